"""Names of other trainers for what a config here has under another name.

Sources: the arguments of transformers' Trainer and of litgpt, torchtitan, nanoGPT, DeepSpeed and
PyTorch Lightning. GPT-NeoX's own names have their table in `neox_keys`.
"""

KEYS = {
    "optim.lr": ("learning_rate", "max_lr", "peak_lr", "base_lr"),
    "optim.clip": (
        *("grad_clip", "gradient_clipping", "max_grad_norm", "clip_grad", "clip_grad_norm"),
        *("gradient_clip_val", "max_norm"),
    ),
    "optim.betas": ("beta1", "beta2", "adam_beta1", "adam_beta2"),
    "optim.eps": ("epsilon", "adam_epsilon", "adam_eps"),
    "optim.weight_decay": ("wd", "decay"),
    "optim.kind": ("optimizer", "optimizer_type", "optim_type"),
    "schedule.name": ("lr_scheduler", "lr_scheduler_type", "scheduler", "lr_schedule"),
    "schedule.warmup": (
        *("warmup_steps", "warmup_iters", "warmup_ratio", "num_warmup_steps", "lr_warmup_steps"),
        *("lr_warmup_fraction", "warmup_fraction", "warmup_num_steps"),
    ),
    "schedule.min_lr": ("min_learning_rate", "lr_min", "final_lr"),
    "schedule.decay_steps": ("lr_decay_iters", "lr_decay_steps"),
    "train.epochs": ("num_epochs", "num_train_epochs", "max_epochs", "epoch"),
    "train.steps": (
        *("max_steps", "max_iters", "iterations", "iters", "num_steps", "total_steps"),
    ),
    "train.batch_size": ("global_batch_size", "total_batch_size", "batch"),
    "train.micro_batch_size": (
        *("micro_batch", "device_batch_size", "local_batch_size", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "gradient_accumulation_iters", "grad_accum"),
        *("grad_accum_steps", "accumulate_grad_batches", "accumulation_steps", "mbs"),
    ),
    "train.recompute": (
        *("gradient_checkpointing", "activation_checkpointing", "activation_checkpoint"),
        *("grad_checkpointing", "checkpoint_activations"),
    ),
    "train.log_every": ("log_interval", "logging_steps", "log_freq", "log_steps"),
    "train.eval_every": (
        *("eval_interval", "eval_steps", "eval_freq", "val_every", "val_interval"),
        *("val_check_interval", "validate_every"),
    ),
    "train.eval_batches": ("eval_iters", "val_batches", "limit_val_batches"),
    "checkpoint.every": (
        *("save_every", "save_interval", "save_steps", "save_freq", "ckpt_interval"),
        *("checkpoint_every", "checkpoint_interval", "checkpoint_steps"),
    ),
    "checkpoint.keep": ("save_total_limit", "keep_last", "keep_last_n", "save_top_k"),
    "precision": (
        *("dtype", "fp16", "bf16", "amp", "mixed_precision", "torch_dtype", "fp32"),
        *("mixed_precision_param", "half"),
    ),
    "output": ("out_dir", "output_dir", "save_dir", "run_name", "exp_name", "log_dir"),
    "device": ("accelerator",),
    "model.num_layers": ("n_layer", "n_layers", "num_hidden_layers", "layers", "depth"),
    "model.hidden_size": ("n_embd", "d_model", "dim", "hidden_dim", "embed_dim", "width"),
    "model.num_attention_heads": ("n_head", "n_heads", "num_heads", "heads"),
    "model.intermediate_size": ("d_ff", "ffn_dim", "n_inner", "ffn_hidden_size", "mlp_dim"),
    "model.tie_word_embeddings": ("tie_embeddings", "tie_weights", "weight_tying"),
    "model.start": (
        *("init_from", "pretrained", "from_pretrained", "pretrained_model", "load_from"),
        *("checkpoint_dir", "resume_from", "resume_from_checkpoint", "finetune_from"),
        *("model_name_or_path", "init_checkpoint", "ckpt_path"),
    ),
    "data.seq_length": (
        *("block_size", "context_length", "seq_len", "sequence_length", "max_seq_len"),
        *("max_seq_length", "n_ctx", "context_size", "ctx_len", "max_length", "cutoff_len"),
    ),
    "data.train": ("dataset", "datasets", "data_path", "data_dir", "train_data", "path", "paths"),
    "data.valid": ("val_data", "valid_data", "eval_data", "validation", "val", "eval_dataset"),
    "data.tokenizer": ("tokenizer_path", "tokenizer_name", "tokenizer_file", "vocab_file"),
    "data.workers": ("num_workers", "dataloader_num_workers", "n_workers"),
    "model.hidden_dropout": ("dropout", "resid_dropout", "embd_dropout", "resid_pdrop"),
    "model.attention_dropout": ("attn_dropout", "attn_pdrop"),
    "parallel.dp_shard": ("fsdp", "zero", "zero_stage", "data_parallel_shard_degree"),
    "parallel.dp_replicate": ("ddp", "data_parallel_replicate_degree"),
    "parallel.tp": ("tensor_parallel", "tensor_parallel_degree", "tensor_parallel_size", "tp_size"),
    "parallel.pp": ("pipeline_parallel", "pipeline_parallel_degree", "pp_size"),
    "parallel.cp": ("context_parallel", "context_parallel_degree", "cp_size"),
    "monitor.sinks": ("logger", "loggers", "report_to", "callbacks"),
}
"""Our key -> the last part of names that other trainers have for it."""

OURS = {name: key for key, names in KEYS.items() for name in names}
"""Another trainer's name -> our key."""

SINKS = "metrics.jsonl is always written; monitor.sinks=[wandb] sends it on"

ABSENT = {
    "lora_dropout": "there are no adapters",
    "wandb": SINKS,
    "wandb_project": SINKS,
    "wandb_log": SINKS,
    "use_wandb": SINKS,
    "tensorboard": "metrics.jsonl is always written; monitor.sinks=[tensorboard] draws it",
    "resume": "the same command again resumes a run",
}
"""Another trainer's name -> why no key stands for it."""
