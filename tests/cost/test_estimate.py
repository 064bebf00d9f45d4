"""Estimates: the closed forms agree with the code that they describe."""

import pytest
import torch

from castalia.cost import estimate as cost_estimate
from castalia.cost.estimate import estimate
from castalia.distributed import initialize
from castalia.models import FAMILIES, Decoder
from castalia.models.init import start_weights
from castalia.models.parts import attention
from castalia.models.parts.dropout import row_draws
from castalia.models.tiles import logits_rows
from castalia.recipes import load_config


def small(*overrides):
    """A small config with overrides; one without a value is a preset in place of `debug`."""
    presets = [word for word in overrides if "=" not in word] or ["debug"]
    return load_config([*presets, *(word for word in overrides if "=" in word)])


def test_weights_and_optimizer_are_those_of_the_real_model():
    config = small()
    with torch.device("meta"):
        bytes_of_weights = sum(
            p.numel() * p.element_size() for p in Decoder(config.model).parameters()
        )
    memory = estimate(config.workload, 1, "cpu").memory
    assert memory.weights == bytes_of_weights
    assert memory.optimizer == 2 * bytes_of_weights


LONG = ["data.seq_length=256", "model.max_position_embeddings=256", "train.batch_size=3"]
"""Rows so long that a table of biases is large beside them."""
LONGER = ["data.seq_length=600", "model.max_position_embeddings=600", "train.batch_size=2"]
"""Rows that keep their probabilities, where any are kept, only because they are few."""
BY_HEAD = "model.sparsity_config={different_layout_per_head: true}"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["precision=bf16"],
        ["data.seq_length=128", "train.batch_size=6"],
        ["model.family=llama", "model.num_kv_heads=2"],
        ["model.family=falcon", "precision=bf16"],
        ["model.family=olmo2", "model.num_kv_heads=1"],
        ["model.family=gpt2"],
        ["model.pos_emb=alibi"],
        ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"],
        [*LONGER],
        [*LONGER, "precision=bf16"],
        ["debug-rwkv"],
        ["debug-rwkv", "precision=bf16"],
        ["debug-rwkv6", "model.rwkv6.attention_size=64"],
        ["debug-rwkv6", "precision=bf16"],
        [*LONG, "model.pos_emb=alibi"],
        [*LONG, "model.pos_emb=rpe", "precision=bf16"],
        [*LONG, "model.attention_config=[sparse_fixed]", BY_HEAD],
        ["model.moe.experts=4", "model.moe.top_k=2", "model.moe.expert_size=64"],
        [
            "model.family=llama",
            "model.moe.experts=8",
            "model.moe.top_k=2",
            "precision=bf16",
            "model.moe.expert_size=64",
        ],
        ["debug-mamba", *LONG],
        ["debug-mamba", "precision=bf16"],
        ["debug-mamba2", *LONG, "model.mamba2.groups=2"],
        ["debug-mamba2", "precision=bf16"],
    ],
)
def test_activations_are_near_what_autograd_saves(overrides):
    require_near_what_autograd_saves(overrides)


@pytest.mark.parametrize(
    "overrides", [[], ["precision=bf16", "model.family=llama", "model.num_kv_heads=2"]]
)
def test_probabilities_are_counted_where_they_are_kept(overrides, monkeypatch):
    """By the attention of torch's operators, where there is no compiled one."""
    for module in (attention, cost_estimate):
        monkeypatch.setattr(module, "fuses", lambda dtype, head_dim: False)
    require_near_what_autograd_saves([*LONGER, *overrides])


def require_near_what_autograd_saves(overrides):
    """Within 15%."""
    config = small(*overrides)
    model = Decoder(config.model)
    initialize(model, start_weights(model.config, 0))
    rows = config.train.batch_size
    tokens = torch.zeros(rows, config.data.seq_length, dtype=torch.int64)
    known = {p.data_ptr() for p in model.parameters()}
    saved: dict[bytes | int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            # Uncompiled autocast casts an input once for each product, compiled code once for all.
            copies = tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
            content = tensor.detach().view(torch.int16).numpy().tobytes() if copies else b""
            saved[content or storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision == "bf16"),
    ):
        draws = row_draws(0, 0, torch.arange(rows)) if config.model.drops else None
        hidden = model(tokens, draws=draws)
    cost = estimate(config.workload, 1, "cpu")
    stored = cost.memory.activations
    low_precision_weights = (
        0 if config.precision == "fp32" else cost.memory.weights - 4 * cost.parameters.total
    )
    assert hidden.requires_grad
    assert sum(saved.values()) == pytest.approx(stored + low_precision_weights, rel=0.15)


def test_recompute_and_smaller_micro_batches_need_less(monkeypatch):
    whole = estimate(small().workload, 1, "cpu").memory.activations
    kinds = ("true", "selective", "2")
    all_of_it, selective, half = (
        estimate(small(f"train.recompute={how}").workload, 1, "cpu").memory.activations
        for how in kinds
    )
    assert all_of_it < selective < whole and all_of_it < half < whole
    dropped = (*LONG, "model.attention_dropout=0.1")
    whole_dropped, selective_dropped = (
        estimate(small(*dropped, f"train.recompute={how}").workload, 1, "cpu").memory.activations
        for how in ("false", "selective")
    )
    assert selective_dropped < whole_dropped
    # What is kept for speed alone is not kept by layers that are recomputed.
    config = small(*LONGER)
    rows, T, layers, heads = 2, 600, config.model.num_layers, config.model.num_attention_heads
    with monkeypatch.context() as patch:
        patch.setattr(cost_estimate, "fuses", lambda dtype, head_dim: False)
        plain, spared = (
            estimate(small(*LONGER, f"train.recompute={how}").workload, 1, "cpu").memory.activations
            for how in ("false", "selective")
        )
    assert plain - spared > layers * 4 * rows * heads * T * (T + 128) // 2
    assert (
        estimate(small("train.micro_batch_size=3").workload, 1, "cpu").memory.activations
        == whole // 4
    )


def test_processes_share_weights_and_rows():
    one, three = (estimate(small().workload, processes, "cpu") for processes in (1, 3))
    assert (one.micro_rows, three.micro_rows) == (12, 4)
    assert three.memory.optimizer == one.memory.optimizer // 3
    assert three.disk == one.disk


def test_tensor_parallelism_gathers_the_inputs_of_matrices():
    """Twice what each of two processes keeps is what one keeps, and what both have of the norms'
    outputs.
    """
    words = ["pythia-70m", "precision=bf16", "train.micro_batch_size=4", "train.recompute=false"]
    config = load_config([*words, "parallel.tp=2"])
    alone = config.model_copy(update={"parallel": config.parallel.model_copy(update={"tp": 1})})
    one, two = (
        estimate(each.workload, processes, "cuda").memory.activations
        for each, processes in ((alone, 1), (config, 2))
    )
    numbers = 4 * config.data.seq_length * config.model.hidden_size
    assert 2 * two - one == numbers * (2 * 2 * config.model.num_layers + 2 + 4)


def test_ranks_beyond_the_key_heads_hold_copies():
    words = ["model.family=llama", "model.num_kv_heads=2"]
    model = small(*words).model
    parts = {part.role: part for part in FAMILIES["llama"].parts(model).linears}
    keys = 2 * parts["k"].outputs * parts["k"].inputs * model.num_layers
    one, two, four = (
        estimate(small(*words, f"parallel.tp={tp}").workload, tp, "cpu").memory.weights
        for tp in (1, 2, 4)
    )
    norms = 4 * (2 * model.num_layers + 1) * model.hidden_size
    assert two - norms == (one - norms) / 2
    assert four - norms == (one - norms - 4 * keys) / 4 + 4 * keys


def test_tables_of_positions_are_whole_on_every_rank():
    words = ["model.pos_emb=learned"]
    one, two = (
        estimate(small(*words, f"parallel.tp={tp}").workload, tp, "cpu").memory.weights
        for tp in (1, 2)
    )
    plain_one, plain_two = (
        estimate(small(f"parallel.tp={tp}").workload, tp, "cpu").memory.weights for tp in (1, 2)
    )
    assert one - plain_one == two - plain_two > 0


def test_a_window_bounds_the_flops_of_attention():
    def of(*words):
        return estimate(small(*words).workload, 1, "cpu").flops_per_token

    short = of("data.seq_length=16")
    assert of("data.seq_length=64", "model.sliding_window=16") == short
    local = "model.sparsity_config={block: 4, num_local_blocks: 6}"
    assert of("data.seq_length=64", "model.attention_config=[local]", local) == short
    both = of(
        "data.seq_length=64", "model.sliding_window=16", "model.attention_config=[global, sliding]"
    )
    assert 2 * both == short + of("data.seq_length=64")


def test_logits_are_one_chunk():
    config = load_config(["pythia-70m"])
    memory = estimate(config.workload, 1, "cpu").memory
    assert memory.logits == logits_rows(50304, 512, 2, "cpu") * 50304 * 2 == 512 * 50304 * 2
    assert 25e6 < estimate(load_config(["pythia-14m"]).workload, 1, "cpu").memory.logits <= 25 << 20
    assert memory.logits < 32 * 2048 * config.model.padded_vocab_size * 2 / 100
    tiny = small()
    assert estimate(tiny.workload, 1, "cpu").memory.logits == 12 * 64 * 384 * 4


def test_disk_counts_what_is_kept():
    disk = estimate(small("checkpoint.keep=1").workload, 1, "cpu").disk
    assert (disk.written, disk.kept) == (10, 8)
    assert disk.bytes_total == 8 * disk.bytes_each


def test_weights_gradients_and_masters_take_what_their_dtypes_do():
    """Of one rank, and of two that share a model."""
    words = ["debug", "precision=bf16", "train.batch_size=8", "train.micro_batch_size=4"]

    def parts(ranks, *overrides):
        return estimate(load_config([*words, *overrides]).workload, ranks, "cpu")

    plain = parts(1)
    count = plain.parameters.total
    assert plain.memory.optimizer == 8 * count
    masters = parts(1, "train.parameters=bf16")
    assert masters.memory.weights == 2 * count
    assert masters.memory.optimizer == 12 * count
    assert masters.disk.bytes_each == plain.disk.bytes_each == 12 * count
    rounded = parts(1, "train.parameters=bf16_stochastic", "train.gradients=bf16")
    assert rounded.memory.weights == 2 * count
    assert rounded.memory.optimizer == 8 * count
    assert rounded.disk.bytes_each == 10 * count
    assert plain.memory.gradients - rounded.memory.gradients == 2 * count
    two, wide, kept = (
        parts(2, *options)
        for options in ((), ("parallel.gather=fp32",), ("train.parameters=bf16",))
    )
    # The shards are the masters; what is gathered is in bf16, without a copy by autocast.
    assert two.memory == kept.memory
    assert two.memory.weights == 4 * count // 2
    assert two.memory.gathered == wide.memory.gathered // 2
    assert wide.memory.weights > two.memory.weights
