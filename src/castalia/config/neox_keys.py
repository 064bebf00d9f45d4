"""Every option of GPT-NeoX: honoured, ignored because it has no effect here, or refused.

The names are those of GPT-NeoX at ea7aefd8 (318 arguments), those of its v1.0, those that its
README of 2024 or published files still use, and those of its fork that mixes data online. `-` and
`_` are one.
Source  gpt-neox megatron/neox_arguments/{neox_args,deepspeed_args}.py; online-data-mixing, the
        same file, 983-1045.
"""

from typing import Any

from castalia.config.neox_monitor_keys import MONITOR_KEYS, MONITOR_OPTIONS
from castalia.config.neox_option import Honoured, Refused
from castalia.config.neox_profile import FLOPS_HONOURED, FLOPS_IGNORED, PROFILE_OPTIONS
from castalia.config.neox_telemetry_keys import (
    TELEMETRY_IGNORED,
    TELEMETRY_KEYS,
    TELEMETRY_OPTIONS,
)

HONOURED: dict[str, Honoured] = {
    "num_layers": Honoured("model.num_layers", "int", plain=True),
    "hidden_size": Honoured("model.hidden_size", "int", plain=True),
    "num_attention_heads": Honoured("model.num_attention_heads", "int", plain=True),
    "max_position_embeddings": Honoured("model.max_position_embeddings", "int", plain=True),
    "num_kv_heads": Honoured("model.num_kv_heads", "int"),
    "pos_emb": Honoured("model.pos_emb", "str", "learned"),
    "opt_pos_emb_offset": Honoured("model.learned_offset", "int", 0),
    "rpe_num_buckets": Honoured("model.rpe_num_buckets", "int", 32),
    "rpe_max_distance": Honoured("model.rpe_max_distance", "int", 128),
    "rotary_pct": Honoured("model.rotary_pct", "number", 1.0, plain=True),
    "rotary_emb_base": Honoured("model.rotary_emb_base", "number", 10000, plain=True),
    "gpt_j_residual": Honoured("model.parallel_residual", "bool", False, plain=True),
    "gpt_j_tied": Honoured("model.shared_norm", "bool", False),
    "use_qk_layernorm": Honoured("model.qk_norm", "bool", False),
    "use_bias_in_attn_linear": Honoured("model.attention_bias", "bool", True, plain=True),
    "use_bias_in_mlp": Honoured("model.mlp_bias", "bool", True, plain=True),
    "norm": Honoured("model.norm", "str", "layernorm"),
    "layernorm_epsilon": Honoured("model.layernorm_epsilon", "number", 1e-5),
    "rms_norm_epsilon": Honoured("model.layernorm_epsilon", "number", 1e-8),
    "scalenorm_epsilon": Honoured("model.layernorm_epsilon", "number", 1e-8),
    "hidden_dropout": Honoured("model.hidden_dropout", "number", 0.0),
    "attention_dropout": Honoured("model.attention_dropout", "number", 0.0),
    "init_method_std": Honoured("model.init_method_std", "number", 0.02, plain=True),
    "init_method": Honoured("model.init_method", "str", "normal"),
    "output_layer_init_method": Honoured("model.output_layer_init_method", "str", "scaled_normal"),
    "no_weight_tying": Honoured("model.tie_word_embeddings", "bool", False),
    "intermediate_size": Honoured("model.intermediate_size", "int"),
    "expansion_factor": Honoured("model.intermediate_size", "number"),
    "mlp_multiple_of": Honoured("model.intermediate_size", "int", 1),
    "activation": Honoured("model.activation", "str", "gelu"),
    "bias_gelu_fusion": Honoured("model.activation", "bool", False),
    "te_layernorm_mlp": Honoured("model.activation", "bool", False),
    "attention_config": Honoured("model.attention_config", "list"),
    "sparsity_config": Honoured("model.sparsity_config", "dict"),
    "sliding_window_width": Honoured("model.sliding_window", "int"),
    # A name that configs/llemma/34B.yml has of a fork; no GPT-NeoX knows it.
    "attention_type": Honoured("model.num_kv_heads", "str"),
    "make_vocab_size_divisible_by": Honoured("model.make_vocab_size_divisible_by", "int", 128),
    "model_parallel_size": Honoured("parallel.tp", "int", 1),
    "pipe_parallel_size": Honoured("parallel.pp", "int", 0),
    "zero_optimization": Honoured("parallel.reshard_after_forward", "dict"),
    "tokenizer_type": Honoured("model.vocab_size", "str", "GPT2BPETokenizer"),
    "vocab_file": Honoured("data.tokenizer", "str"),
    "merge_file": Honoured("data.tokenizer", "str"),
    "seq_length": Honoured("data.seq_length", "int", plain=True),
    "data_path": Honoured("data.train", "str"),
    "split": Honoured("data.split", "str", "969, 30, 1"),
    "train_data_paths": Honoured("data.train", "list"),
    "train_data_weights": Honoured("data.weights", "list"),
    "valid_data_paths": Honoured("data.valid", "list"),
    "valid_data_weights": Honoured("data.valid_weights", "list"),
    "weight_by_num_documents": Honoured("data.document_alpha", "bool", False),
    "weighted_sampler_alpha": Honoured("data.document_alpha", "number", 1.0),
    "data_sampling_method": Honoured("mixing.kind", "str"),
    "data_sampling_warmup_steps": Honoured("mixing.warmup_steps", "int", 0),
    "data_sampling_update_frequency": Honoured("mixing.update_every", "int", 0),
    "data_sampling_smoothing_factor": Honoured("mixing.smoothing", "number", 0.9),
    "mixed_minibatches": Honoured("mixing.kind", "bool", False),
    "mixed_batches": Honoured("mixing.kind", "bool", False),
    "eod_mask_loss": Honoured("data.eod_mask_loss", "bool", False, plain=True),
    "train_label_data_paths": Honoured("data.labels", "list", plain=True),
    "valid_label_data_paths": Honoured("data.valid_labels", "list", plain=True),
    "pack_impl": Honoured("data.packing", "str", "packed", plain=True),
    "allow_chopped": Honoured("data.allow_chopped", "bool", True, plain=True),
    "soft_prompt_tuning": Honoured("adapter.kind", "dict"),
    "train_impl": Honoured("loss.kind", "str", "normal"),
    "dataset_impl": Honoured("loss.kind", "str", "gpt2"),
    "dpo_beta": Honoured("loss.beta", "number", 0.1),
    "dpo_reference_free": Honoured("loss.reference", "bool", False),
    "z_loss": Honoured("loss.z_loss", "number", 0.0),
    "kto_beta": Honoured("loss.beta", "number", 0.1),
    "kto_desirable_weight": Honoured("loss.desirable_weight", "number", 1.0),
    "kto_undesirable_weight": Honoured("loss.undesirable_weight", "number", 1.0),
    "train_reward_data_paths": Honoured("data.rewards", "list"),
    "valid_reward_data_paths": Honoured("data.valid_rewards", "list"),
    "precompute_model_name": Honoured("data.chosen_reference", "str"),
    "pos_train_data_paths": Honoured("data.chosen", "list"),
    "neg_train_data_paths": Honoured("data.rejected", "list"),
    "pos_train_label_data_paths": Honoured("data.chosen_labels", "list"),
    "neg_train_label_data_paths": Honoured("data.rejected_labels", "list"),
    "pos_valid_data_paths": Honoured("data.valid_chosen", "list"),
    "neg_valid_data_paths": Honoured("data.valid_rejected", "list"),
    "pos_valid_label_data_paths": Honoured("data.valid_chosen_labels", "list"),
    "neg_valid_label_data_paths": Honoured("data.valid_rejected_labels", "list"),
    "kl_impl": Honoured("loss.kl_impl", "str", "mse"),
    "kl_div_beta": Honoured("loss.kl_div_beta", "number", 0.1),
    "reinforce_leave_one_out": Honoured("loss.baseline", "bool", False),
    "num_workers": Honoured("data.workers", "int", 2, plain=True),
    "train_iters": Honoured("train.steps", "int", plain=True),
    "train_epochs": Honoured("train.epochs", "int", plain=True),
    "exit_interval": Honoured("train.exit_every", "int", plain=True),
    "train_batch_size": Honoured("train.batch_size", "int"),
    "train_micro_batch_size_per_gpu": Honoured("train.micro_batch_size", "int"),
    "gradient_accumulation_steps": Honoured("train.batch_size", "int", 1),
    "checkpoint_activations": Honoured("train.recompute", "bool", False, plain=True),
    "log_interval": Honoured("train.log_every", "int", 100, plain=True),
    "eval_interval": Honoured("train.eval_every", "int", 1000),
    "eval_iters": Honoured("train.eval_batches", "int", 100),
    "eval_tasks": Honoured("eval.tasks", "list"),
    # A name of files for older versions; the newest has no option for it and evaluates 0-shot.
    "eval_num_fewshot": Honoured("eval.shots", "int", 0),
    "eval_results_prefix": Honoured("eval.results_prefix", "str"),
    "optimizer": Honoured("optim", "dict"),
    "curriculum_learning": Honoured("curriculum", "dict"),
    "use_bnb_optimizer": Honoured("optim", "bool", False),
    "autotuning": Honoured("train.micro_batch_size", "dict"),
    "weight_decay": Honoured("optim.weight_decay", "number"),
    "gradient_clipping": Honoured("optim.clip", "number"),
    "lr_decay_style": Honoured("schedule.name", "str", "linear"),
    "lr_decay_iters": Honoured("schedule.decay_steps", "int"),
    "lr_decay_fraction": Honoured("schedule.decay_steps", "number"),
    "warmup": Honoured("schedule.warmup", "number", 0.01, plain=True),
    "min_lr": Honoured("schedule.min_lr", "number", 0.0, plain=True),
    "scheduler": Honoured("schedule.name", "dict"),
    "use_checkpoint_lr_scheduler": Honoured("schedule.name", "bool", False),
    "moe_num_experts": Honoured("model.moe.experts", "int", 1),
    "moe_top_k": Honoured("model.moe.top_k", "int", 1),
    "moe_expert_interval": Honoured("model.moe.interval", "int", 1),
    "moe_router_type": Honoured("model.moe.router", "str", "sinkhorn"),
    "moe_jitter_eps": Honoured("model.moe.jitter", "number", 0.0),
    # Names of GPT-NeoX before June 2025, with its defaults of then.
    "expert_interval": Honoured("model.moe.interval", "int", 2),
    "moe_type": Honoured("model.moe", "str", "megablocks"),
    "moe_loss_coeff": Honoured("model.moe.balance_loss", "number", 0.1),
    "moe_token_dropping": Honoured("model.moe.capacity_factor", "bool", False),
    "moe_train_capacity_factor": Honoured("model.moe.capacity_factor", "number", 1.0),
    "moe_eval_capacity_factor": Honoured("model.moe.eval_capacity_factor", "number", 1.0),
    "moe_min_capacity": Honoured("model.moe.min_capacity", "int", 4),
    "moe_use_residual": Honoured("model.moe.residual", "bool", True),
    "moe_expert_parallel_size": Honoured("parallel.ep", "int", 1),
    "enable_expert_tensor_parallelism": Honoured("model.moe.split_over_tp", "bool", False),
    "mamba_use_bias_in_conv": Honoured("model.mamba.conv_bias", "bool", True),
    "mamba_use_bias_in_linears": Honoured("model.mamba.bias", "bool", False),
    "dim_att": Honoured("model.rwkv6.attention_size", "int"),
    "gmlp_attn_dim": Honoured("model.gmlp.attention_size", "int", 64),
    "use_mup": Honoured("model.mup.base_width", "bool", False),
    "base_shapes_file": Honoured("model.mup.base_width", "str"),
    "save_base_shapes": Honoured("model.mup.base_width", "bool", False),
    "coord_check": Honoured("model.mup.base_width", "bool", False),
    "mup_init_scale": Honoured("model.mup.init_scale", "number", 1.0),
    "mup_attn_temp": Honoured("model.mup.attention_mult", "number", 1.0),
    "mup_output_temp": Honoured("model.mup.output_mult", "number", 1.0),
    "mup_embedding_mult": Honoured("model.mup.embedding_mult", "number", 1.0),
    "mup_rp_embedding_mult": Honoured("model.mup.rp_embedding_mult", "number", 1.0),
    # Names that configs/llemma/7B.yml has of a fork; no GPT-NeoX knows them.
    "decay_lr_to": Honoured("schedule.min_lr", "number"),
    "warmup_iters": Honoured("schedule.warmup", "int"),
    "precision": Honoured("precision", "str"),
    "te_fp8_mha": Honoured("precision", "bool", False),
    "te_fp8_format": Honoured("fp8.gradients", "str", "hybrid"),
    "te_fp8_wgrad": Honoured("fp8.weight_gradient", "bool", True),
    "data_types": Honoured("train.gradients", "dict"),
    "fp32_allreduce": Honoured("train.gradients", "bool", False),
    "checkpoint_in_cpu": Honoured("train.offload_activations", "bool", False, plain=True),
    "fp16": Honoured("loss_scale", "dict"),
    "bf16": Honoured("precision", "dict"),
    "save": Honoured("output", "str"),
    "load": Honoured("model.start", "str"),
    "iteration": Honoured("model.start", "int"),
    "finetune": Honoured("train.start_step", "bool", False),
    "no_load_optim": Honoured("train.start_optimizer", "bool", False),
    "checkpoint_scale": Honoured("checkpoint.steps", "str", "linear"),
    "checkpoint_factor": Honoured("checkpoint.every", "number"),
    # The name of v1.0 and before, for the linear spacing.
    "save_interval": Honoured("checkpoint.every", "int"),
    "extra_save_iters": Honoured("checkpoint.steps", "list"),
    "keep_last_n_checkpoints": Honoured("checkpoint.keep", "int", plain=True),
    "seed": Honoured("seed", "int", 1234, plain=True),
    "launcher": Honoured("launch.launcher", "str"),
    "deepspeed_slurm": Honoured("launch.launcher", "bool", False),
    "deepspeed_mpi": Honoured("launch.launcher", "bool", False),
    "hostfile": Honoured("launch.hostfile", "str"),
    "include": Honoured("launch.include", "str", plain=True),
    "exclude": Honoured("launch.exclude", "str", plain=True),
    "num_nodes": Honoured("launch.nodes", "int", -1),
    "num_gpus": Honoured("launch.gpus_per_node", "int", plain=True),
    "master_addr": Honoured("launch.master_addr", "str", plain=True),
    "master_port": Honoured("launch.master_port", "int", plain=True),
    "no_ssh_check": Honoured("launch.ssh_check", "bool", False),
    "account": Honoured("launch.slurm.account", "str", plain=True),
    "comment": Honoured("launch.slurm.comment", "str", plain=True),
    "s3_path": Honoured("checkpoint.mirror.url", "str"),
    "s3_chunk_size": Honoured("checkpoint.mirror.chunk", "int", 104857600),
    **PROFILE_OPTIONS,
    **TELEMETRY_OPTIONS,
    **MONITOR_OPTIONS,
}

ALIASES = {"gas": "gradient_accumulation_steps", "autotuning_config": "autotuning"}
"""Names of older versions of GPT-NeoX that its newest has dropped."""

OFF: tuple[Any, ...] = (None, False)
SCALING = "loss scaling is set in `fp16`; GPT-NeoX itself reads nothing else"
NO_REWARDS = "delete it; a run has no test data"
OTHER_REWARDS = (
    "delete it; the rewards are those of mixing.kind: odm-repo, exp3, naive-validation, ..."
)

REFUSED: dict[str, Refused] = {
    "validation_based_reward": Refused(OFF, OTHER_REWARDS),
    "batch_normalized_reward": Refused(OFF, OTHER_REWARDS),
    "scale_by_reward_loss_diff": Refused(OFF, OTHER_REWARDS),
    "amp": Refused((*OFF, {}, {"enabled": False}), "write `precision: bfloat16` or fp16"),
    "data_efficiency": Refused((*OFF, {}, {"enabled": False}), "delete it"),
    "compression_training": Refused((None, {}), "delete it"),
    "sparse_attention": Refused((None, {}), "delete it; attention is full and causal"),
    "elasticity": Refused(
        (*OFF, {}, {"enabled": False}), "delete it; any run resumes on another world size"
    ),
    "data_impl": Refused(
        ("mmap", "infer", None), "write `data_impl: mmap`; `cached` files must be tokenized again"
    ),
} | dict.fromkeys(
    ["test_reward_data_paths"],
    Refused((None, []), NO_REWARDS),
)

IGNORED: dict[str, str] = {
    "CUDA kernels and fusions": """
        scaled_upper_triang_masked_softmax_fusion scaled_masked_softmax_fusion bias_dropout_fusion
        layernorm_fusion rmsnorm_fusion rope_fusion fused_kernels_build_path use_flashattn_swiglu
        mamba_selective_scan_fusion mamba_causal_conv_fusion mamba_inner_func_fusion
        te_columnparallel te_rowparallel te_mha onnx_safe use_tutel
        output_layer_parallelism rotary_save_freqs_buffer""",
    "arithmetic that is the same or better here": """
        apply_query_key_layer_scaling attention_softmax_in_fp32 prescale_gradients
        gradient_predivide_factor sparse_gradients communication_data_type
        use_cpu_initialization fp16_lm_cross_entropy fp32_reinforce dpo_fp32
        moe_lbl_in_fp32 mamba_selective_fp32_params""",
    "the run writes its answers itself; neither weights nor data are served": """
        serve_model_weights weight_server_port online_dataserver_ips online_dataserver_ports""",
    "placement in memory and on devices": """
        pipe_partition_method sequence_parallel activation_checkpointing
        deepspeed_activation_checkpointing contiguous_checkpointing
        synchronize_each_layer profile_backward distributed_backend lazy_mpu_init mmap_warmup
        use_shared_fs""",
    "fp8 scales each tensor by its own values, without a history": """
        te_fp8_amax_history_len te_fp8_amax_compute_algo te_fp8_margin""",
    "blocks are recomputed one by one; train.recompute=2 takes every second": """
        checkpoint_num_layers""",
    "activations are always split over the ranks of parallel.tp": "partition_activations",
    "launching; `castalia launch` does without": """
        force_multi autotuning_run deepspeed deepscale deepscale_config user_script local_rank rank
        adlr_autoresume adlr_autoresume_interval detect_nvlink_pairs""",
    "metrics.jsonl has every number; `castalia.read_metrics` reads it as a table": "csv_monitor",
    "what ranks print is the launcher's to keep; numbers are in metrics.jsonl": "log_dir",
    "GPT-NeoX derives it itself": "git_hash comet_experiment",
    "logging; metrics.jsonl is always written": """
        dump_state char_level_ppl""",
    "the noise scale keeps no copy of the gradients": "gradient_noise_scale_cpu_offload",
    "checkpoint files; ours hold weights, optimizer and position, each with its SHA-256": """
        config_files checkpoint_validation_with_forward_pass no_save_optim
        no_save_rng checkpoint save_iters zero_allow_untested_optimizer""",
    "GPT-NeoX derives it and overwrites the value in the file": """
        world_size is_pipe_parallel optimizer_type zero_stage zero_reduce_scatter
        zero_contiguous_gradients zero_reduce_bucket_size zero_allgather_bucket_size lr
        padded_vocab_size batch_size clip_grad dynamic_loss_scale do_train do_valid do_test
        global_num_gpus curriculum_seqlen head_size ffn_dim""",
    "rows and weights follow from seed and step; a checkpoint has no random state": "no_load_rng",
    SCALING: "loss_scale loss_scale_window hysteresis min_scale",
    "GPT-NeoX itself never reads it": """
        use_bias_in_norms num_unique_layers param_sharing_style short_seq_prob""",
    "GPT-NeoX itself never reads it; a gated activation gates experts too": "moe_glu",
    "experts are in the one gradient norm with all other weights": "create_moe_param_group",
    "belongs to an option that is not in use": "kto_fp32",
    "the base width of μP is a number here, model.mup.base_width": "mup_width_scale",
    "a run resumes with its own schedule; one that begins with `load` has that of the file": """
        override_lr_scheduler""",
    "sources always have names here": "use_named_train_datasets use_named_eval_datasets",
    "train.eval_batches bounds the validation": "max_validation_samples_per_dataset",
    "no test part during training": """
        test_data_paths test_data_weights test_label_data_paths max_test_samples_per_dataset
        pos_test_data_paths neg_test_data_paths pos_test_label_data_paths
        neg_test_label_data_paths""",
    "generation, which is a command of its own": """
        text_gen_type temperature top_p top_k return_logits maximum_tokens
        prompt_end sample_input_file sample_output_file num_samples recompute""",
}
"""Why an option has no effect on the results here -> the options."""

WHY = {name: reason for reason, names in IGNORED.items() for name in names.split()}
"""Ignored option -> the reason."""

CHECKED = ("deepspeed_extra_args",)
"""Options that a rule checks and that set nothing."""

NESTED_HONOURED = {
    **TELEMETRY_KEYS,
    **MONITOR_KEYS,
    "optimizer": "type params",
    "optimizer.params": "lr betas eps momentum beta nesterov weight_decay max_grad_norm",
    "scheduler": "type params",
    "scheduler.params": """
        warmup_min_lr warmup_max_lr warmup_num_steps warmup_type total_num_steps warmup_min_ratio
        cos_min_ratio cycle_min_lr cycle_max_lr cycle_first_step_size cycle_second_step_size
        decay_step_size decay_lr_rate cycle_momentum""",
    "fp16": """
        enabled type loss_scale loss_scale_window initial_scale_power hysteresis min_loss_scale""",
    "bf16": "enabled type",
    "data_types": "grad_accum_dtype",
    "zero_optimization": "stage",
    "autotuning": "enabled",
    "flops_profiler": FLOPS_HONOURED,
    "curriculum_learning": """
        enabled curriculum_type min_difficulty max_difficulty schedule_type schedule_config""",
    "curriculum_learning.schedule_config": """
        total_curriculum_step difficulty_step root_degree difficulty max_step""",
    "soft_prompt_tuning": "enabled n_tokens num_tokens init_string init_range",
    "sparsity_config": """
        block different_layout_per_head num_local_blocks num_global_blocks
        num_different_global_patterns num_random_blocks num_sliding_window_blocks
        local_window_blocks global_block_indices global_block_end_indices""",
}
"""Honoured keys inside DeepSpeed's dictionaries."""

NESTED_IGNORED = {
    "flops_profiler": FLOPS_IGNORED,
    **TELEMETRY_IGNORED,
    **dict.fromkeys(MONITOR_KEYS, ""),
    "data_types": "",
    "soft_prompt_tuning": "",
    "curriculum_learning": "",
    "curriculum_learning.schedule_config": "",
    "sparsity_config": "",
    "autotuning": """
        arg_mappings mp_size results_dir exps_dir overwrite metric metric_path start_profile_step
        end_profile_step fast max_train_batch_size num_tuning_micro_batch_sizes
        min_train_micro_batch_size_per_gpu max_train_micro_batch_size_per_gpu tuner_type
        tuner_early_stopping tuner_num_trials model_info model_info_path""",
    "scheduler": "",
    "scheduler.params": """
        last_batch_iteration cycle_first_stair_count cycle_second_stair_count cycle_min_mom
        cycle_max_mom decay_mom_rate""",
    "optimizer": "legacy_fusion",
    "optimizer.params": """
        torch_adam fused foreach capturable differentiable set_grad_none use_triton
        fp32_optimizer_states""",
    "fp16": "fp16 auto_cast",
    "bf16": """
        bf16 auto_cast loss_scale loss_scale_window initial_scale_power hysteresis
        min_loss_scale immediate_grad_update check_grad_overflow""",
    "zero_optimization": """
        allgather_partitions allgather_bucket_size overlap_comm reduce_scatter reduce_bucket_size
        contiguous_gradients cpu_offload cpu_offload_params cpu_offload_use_pin_memory
        offload_param offload_optimizer load_from_fp32_weights elastic_checkpoint
        round_robin_gradients sub_group_size stage3_max_live_parameters stage3_max_reuse_distance
        stage3_prefetch_bucket_size stage3_param_persistence_threshold
        stage3_model_persistence_threshold stage3_gather_16bit_weights_on_model_save
        stage3_gather_fp16_weights_on_model_save zero_hpz_partition_size ignore_unused_parameters
        use_multi_rank_bucket_allreduce memory_efficient_linear log_trace_cache_warnings""",
}
"""Keys inside those dictionaries that do not change the results."""

NESTED_REFUSED = {
    "optimizer.params.adam_w_mode": Refused((True, None), "delete it; weight decay is decoupled"),
    "optimizer.params.bias_correction": Refused(
        (True, None), "delete it; the moments are corrected"
    ),
    "optimizer.params.amsgrad": Refused(OFF, "delete it; it is not supported"),
    "optimizer.params.maximize": Refused(OFF, "delete it; the loss is minimized"),
    "fp16.consecutive_hysteresis": Refused(OFF, "delete it; it is not supported"),
    "fp16.fp16_master_weights_and_grads": Refused(OFF, "delete it; weights and gradients are fp32"),
    "bf16.bf16_master_weights_and_grads": Refused(OFF, "delete it; weights and gradients are fp32"),
    "zero_optimization.zero_quantized_weights": Refused(OFF, "delete it; nothing is quantized"),
    "zero_optimization.zero_quantized_gradients": Refused(OFF, "delete it; nothing is quantized"),
}
"""Keys inside those dictionaries that change results and do not exist here."""

NAMES = sorted({*HONOURED, *ALIASES, *REFUSED, *WHY, *CHECKED})
"""Every name that a GPT-NeoX file may use."""
