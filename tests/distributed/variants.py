"""What a row of the grid varies besides its layout: schedules, recompute, and the model."""

START = "model.start=BASE"
"""Begins with the weights of a run with the same model and without an adapter."""

CHAT = "data.chat=CHAT"
"""Fine-tunes on conversations, which one rank prepares."""


def share_of_vowels(completions, **columns):
    """A reward of answers: which part of a text are vowels."""
    return [sum(map(text.count, "aeiou")) / max(len(text), 1) for text in completions]


PROMPTS = (
    "data.packing=unpacked",
    "data.seq_length=72",
    "loss.kind=grpo",
    "loss.completions=3",
    "loss.max_tokens=8",
    "loss.rewards=[variants:share_of_vowels]",
    "train.batch_size=4",
)
FULL = ("loss.kind=reinforce", "loss.kl_impl=full", "loss.kl_div_beta=0.3")
PLAIN = {
    "": (),
    "accumulated": ("train.micro_batch_size=3",),
    "unequal counts": ("train.micro_batch_size=3", "data.eod_mask_loss=true"),
    "tied": ("model.tie_word_embeddings=true",),
    "no biases, serial": (
        "model.attention_bias=false",
        "model.mlp_bias=false",
        "model.parallel_residual=false",
    ),
    "recompute": ("train.recompute=true",),
    "selective": ("train.recompute=selective", "train.micro_batch_size=3"),
    "tied, selective": (
        "model.tie_word_embeddings=true",
        "train.recompute=selective",
        "train.micro_batch_size=3",
    ),
    "every second": ("train.recompute=2",),
    "compiled": ("train.compile=true",),
    "compiled, selective": ("train.compile=true", "train.recompute=selective"),
    "one row at a time": ("train.micro_batch_size=1",),
    "uneven": ("train.batch_size=11", "parallel.uneven=true"),
    "ZeRO 2": ("parallel.reshard_after_forward=false", "train.micro_batch_size=3"),
    "1f1b": ("train.micro_batch_size=2", "data.eod_mask_loss=true"),
    "1f1b, tied": ("train.micro_batch_size=2", "model.tie_word_embeddings=true"),
    "1f1b, compiled": ("train.micro_batch_size=2", "train.compile=true"),
    "gpipe": ("train.micro_batch_size=4", "parallel.schedule=gpipe"),
    "interleaved, tied": (
        "train.micro_batch_size=2",
        "model.num_layers=4",
        "model.tie_word_embeddings=true",
        "parallel.schedule=interleaved_1f1b",
    ),
    "zero bubble": (
        "train.micro_batch_size=2",
        "data.eod_mask_loss=true",
        "parallel.schedule=zero_bubble",
    ),
    "zero bubble, tied": (
        "train.micro_batch_size=2",
        "model.tie_word_embeddings=true",
        "parallel.schedule=zero_bubble",
    ),
    "zero bubble in a V": (
        "train.micro_batch_size=2",
        "model.num_layers=4",
        "parallel.schedule=zero_bubble_v",
    ),
    "zero bubble, recompute": (
        "train.micro_batch_size=2",
        "train.recompute=true",
        "parallel.schedule=zero_bubble",
    ),
    "curriculum and ramp": (
        "train.micro_batch_size=2",
        "train.batch_ramp=[4,4,8]",
        "curriculum.kind=linear",
        "curriculum.shortest=4",
        "curriculum.length_step=4",
    ),
    "conversations": (
        CHAT,
        "data.train=[]",
        "data.chat_template=plain",
        "data.seq_length=64",
        "data.packing=best_fit",
        "data.document_mask=documents",
        "loss.prompt_weight=0.25",
        "train.micro_batch_size=3",
    ),
    "answers": (*PROMPTS, *FULL),
    "answers, two updates": (
        *PROMPTS,
        "loss.updates=2",
        "loss.beta=0.3",
        "loss.answers_at_once=1",
    ),
    "answers, 1f1b": (*PROMPTS, *FULL, "train.micro_batch_size=1"),
    "answers, 1f1b, tied": (
        *PROMPTS,
        *FULL,
        "train.micro_batch_size=1",
        "model.tie_word_embeddings=true",
    ),
    "answers, interleaved": (
        *PROMPTS,
        "loss.beta=0.3",
        "train.micro_batch_size=1",
        "model.num_layers=4",
        "parallel.schedule=interleaved_1f1b",
    ),
    "four layers": ("train.micro_batch_size=2", "model.num_layers=4"),
}
"""Variations besides the layout; all have 257 ids, padded to 384, and gradients clipped at 0.5."""
ACCUMULATED = ("train.micro_batch_size=3",)
MICRO = ("train.micro_batch_size=2",)
SERIAL = ("model.parallel_residual=false",)
EXPERTS = ("model.moe.experts=4", "model.moe.top_k=2", "model.moe.z_loss=0.01")
MODELS = {
    "llama": (
        "model.family=llama",
        "model.num_kv_heads=2",
        "model.intermediate_size=48",
        "data.document_mask=eod",
    ),
    "mistral": ("model.family=mistral", "model.num_kv_heads=2", "model.sliding_window=5"),
    "falcon": ("model.family=falcon",),
    "falcon with alibi": ("model.family=falcon", "model.pos_emb=alibi", "model.num_kv_heads=4"),
    "olmo2": ("model.family=olmo2", "model.num_kv_heads=2", "model.intermediate_size=48"),
    "qwen": (
        "model.family=qwen2",
        "model.num_kv_heads=2",
        "model.intermediate_size=48",
        "model.qk_norm=head",
    ),
    "gpt2": ("model.family=gpt2",),
    "neox norm": ("model.qk_norm=neox",),
    "rpe": ("model.pos_emb=rpe", *SERIAL),
    "sinusoidal": ("model.pos_emb=sinusoidal", "model.norm=scalenorm"),
    "partial": ("model.norm=rmsnorm", "model.rmsnorm_partial=0.5"),
    "dropout": ("model.hidden_dropout=0.1", "model.attention_dropout=0.2"),
    "llama with dropout": (
        "model.family=llama",
        "model.num_kv_heads=2",
        "model.intermediate_size=48",
        "model.hidden_dropout=0.1",
        "model.attention_dropout=0.2",
        "data.document_mask=eod",
    ),
    "sparse": (
        "model.attention_config=[sparse_fixed,bigbird]",
        "model.sparsity_config.block=2",
        "model.sparsity_config.different_layout_per_head=true",
        "model.sparsity_config.num_local_blocks=2",
        "model.sparsity_config.num_different_global_patterns=2",
    ),
    "lora": (START, "adapter.kind=lora", "adapter.rank=3", "adapter.dropout=0.1", "optim.lr=0.002"),
    "dora": (START, "adapter.kind=dora", "adapter.rank=4", "adapter.dropout=0.1", "optim.lr=0.002"),
    "soft prompt": (START, "adapter.kind=soft_prompt", "adapter.tokens=5", "optim.lr=0.01"),
    "bitfit": (START, "adapter.kind=bitfit", "train.frozen=['*qkv.bias']"),
    "llama with lora": (
        "model.family=llama",
        "model.num_kv_heads=2",
        "model.intermediate_size=48",
        START,
        "adapter.kind=lora",
        "adapter.rank=4",
        "adapter.dropout=0.1",
        "optim.lr=0.002",
    ),
    "llama with dora": (
        "model.family=llama",
        "model.num_kv_heads=2",
        "model.intermediate_size=48",
        START,
        "adapter.kind=dora",
        "adapter.rank=4",
        "optim.lr=0.002",
    ),
    "experts": EXPERTS,
    "split experts": (*EXPERTS, "model.moe.bias=true", "model.moe.split_over_tp=true"),
    "experts of odd number": ("model.moe.experts=3", "model.moe.expert_size=48"),
    "experts with a bias": (*EXPERTS, "model.moe.bias_rate=0.01", "model.moe.scores=sigmoid"),
    "experts with room": (*EXPERTS, "model.moe.capacity_factor=1", "model.moe.jitter=0.1"),
    "split experts with room": (
        *EXPERTS,
        "model.moe.split_over_tp=true",
        "model.moe.capacity_factor=1",
        "model.moe.jitter=0.1",
        "model.hidden_dropout=0.1",
    ),
    "mamba": ("debug-mamba", "model.mamba.state_size=4", "data.document_mask=eod"),
    "mamba2": (
        "debug-mamba2",
        "model.mamba2={head_size: 16, state_size: 8, groups: 2, chunk_size: 5, bias: true}",
        "data.document_mask=eod",
    ),
    "rwkv6": ("debug-rwkv6", "model.rwkv6.head_size=8", "data.document_mask=eod"),
    "rwkv7": ("debug-rwkv", "model.rwkv7.head_size=8", "data.document_mask=eod"),
    "gmlp": (
        "debug-gmlp",
        "model.gmlp.inner_size=48",
        "model.max_position_embeddings=24",
        "data.document_mask=eod",
    ),
    "amlp": (
        "debug-amlp",
        "model.gmlp={inner_size: 48, attention_size: 8}",
        "model.norm=rmsnorm",
        "model.max_position_embeddings=24",
    ),
    "hybrid": (
        "debug-hybrid",
        "model.num_layers=4",
        "model.intermediate_size=48",
        "model.pattern=[mamba, attention, amlp, mamba2]",
        "model.gmlp={inner_size: 48, attention_size: 8}",
        "model.mamba2={head_size: 16, state_size: 8, groups: 2}",
        "model.max_position_embeddings=24",
        "model.hidden_dropout=0.1",
        "data.document_mask=eod",
    ),
    "attention before rwkv7": (
        "model.pattern=[attention,attention,rwkv7,rwkv7]",
        "model.rwkv7.head_size=8",
        "data.document_mask=eod",
    ),
    "experts by Sinkhorn": (*EXPERTS, "model.moe.router=sinkhorn", "model.moe.interval=2"),
    "experts beside an MLP": (
        *EXPERTS,
        "model.moe.shared_size=16",
        "model.moe.shared_gate=true",
        "model.moe.residual=true",
        "model.activation=swiglu",
    ),
    "uneven experts": (*EXPERTS, "train.batch_size=11", "parallel.uneven=true"),
    "no norm weights": ("model.norm=non_parametric_layernorm", "model.qk_norm=head"),
}
"""Families and options whose parameters or statistics are laid out in their own way."""
RUNS = {
    "": (),
    "accumulated": ACCUMULATED,
    "unequal counts": (*ACCUMULATED, "data.eod_mask_loss=true"),
    "1f1b": MICRO,
    "1f1b, recompute": (*MICRO, "train.recompute=true"),
    "zero bubble": (*MICRO, "parallel.schedule=zero_bubble"),
    "interleaved": (*MICRO, "model.num_layers=4", "parallel.schedule=interleaved_1f1b"),
    "recompute": ("train.recompute=true",),
    "selective": ("train.recompute=selective",),
    "compiled": ("train.compile=true",),
    "compiled, selective": ("train.compile=true", "train.recompute=selective"),
    "zero bubble, recompute": (
        *MICRO,
        "parallel.schedule=zero_bubble",
        "train.recompute=true",
    ),
    "zero bubble in a V": (*MICRO, "model.num_layers=4", "parallel.schedule=zero_bubble_v"),
}
"""How a model of `MODELS` is run."""
VARIANTS = PLAIN | {
    f"{model}, {run}" if run else model: (*options, *RUNS[run])
    for model, options in MODELS.items()
    for run in RUNS
}
"""Variations by name."""
