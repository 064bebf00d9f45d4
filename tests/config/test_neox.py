"""GPT-NeoX files: each option is honoured, ignored or refused, with GPT-NeoX's meaning."""

import re
from pathlib import Path

import pytest

from castalia.config import flatten, read_yaml
from castalia.config.neox import is_neox, override_hint, read_neox
from castalia.config.neox_keys import (
    ALIASES,
    CHECKED,
    HONOURED,
    NAMES,
    NESTED_HONOURED,
    REFUSED,
    WHY,
)
from castalia.runs.config import RunConfig

HERE = Path(__file__).parent
SMALL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "pos_emb": "rotary",
    "train_iters": 10,
    "train_micro_batch_size_per_gpu": 4,
}


def read(world=1, **options):
    """The reading of one small file with `options` on top."""
    return read_neox({"small.yml": SMALL | options}, world=world)


def values_of(**options):
    """Dotted values of one small file that must have no problems."""
    reading = read(**options)
    assert reading.problems == []
    return flatten(reading.values)


def problems_of(**options):
    """Problems of one small file, as text."""
    return [item.text for item in read(**options).problems]


def test_each_of_the_318_arguments_is_classified_once():
    names = (HERE / "neox_names.txt").read_text().split()
    assert len(set(names)) == 318
    assert set(names) <= set(NAMES)
    classes = [*HONOURED, *ALIASES, *REFUSED, *WHY, *CHECKED]
    assert len(classes) == len(set(classes)) == len(NAMES)
    assert {"decay_lr_to", "warmup_iters", "autotuning_config"}.isdisjoint(names)


def test_names_of_older_versions_are_classified():
    for name in (
        "gas",
        "moe_loss_coeff",
        "moe_type",
        "expert_interval",
        "enable_expert_tensor_parallelism",
    ):
        assert name in NAMES
    assert set(NESTED_HONOURED) <= {
        "optimizer",
        "optimizer.params",
        "fp16",
        "bf16",
        "zero_optimization",
        "autotuning",
        "flops_profiler",
        "curriculum_learning",
        "curriculum_learning.schedule_config",
        "scheduler",
        "scheduler.params",
        "data_types",
        "soft_prompt_tuning",
        "comms_logger",
        "sparsity_config",
        "tensorboard",
        "wandb",
    }


def test_the_70m_file_comes_out_as_it_was_trained():
    reading = read_neox({"neox_70m.yml": read_yaml(HERE / "neox_70m.yml")})
    assert reading.problems == []
    flat = flatten(reading.values)
    expected = {
        "model.num_layers": 6,
        "model.hidden_size": 512,
        "model.num_attention_heads": 8,
        "model.vocab_size": 50277,
        "model.make_vocab_size_divisible_by": 128,
        "model.rotary_pct": 0.25,
        "model.parallel_residual": True,
        "model.tie_word_embeddings": False,
        "model.activation": "gelu_tanh",
        "model.init_method": "small_init",
        "model.output_layer_init_method": "wang_init",
        "data.train": ["pile/text_document"],
        "data.tokenizer": "pile/20B_tokenizer.json",
        "train.steps": 143000,
        "train.batch_size": 32,
        "train.micro_batch_size": 32,
        "train.recompute": True,
        "train.eval_every": 100000,
        "optim.lr": 0.001,
        "optim.betas": [0.9, 0.95],
        "optim.clip": 1.0,
        "schedule.name": "cosine_neox_v1",
        "schedule.min_lr": 1e-4,
        "schedule.decay_steps": 143000,
        "precision": "fp16",
        "loss_scale.initial_power": 12,
        "checkpoint.every": 1000,
        "checkpoint.steps": [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
        "parallel.reshard_after_forward": False,
    }
    assert {key: flat[key] for key in expected} == expected
    ignored = [name for names in reading.ignored.values() for name in names]
    assert len(ignored) == len(set(ignored))
    assert "zero_optimization.reduce_bucket_size" in ignored
    assert flat["monitor.times_every"] == 10


def test_statistics_are_measured_when_gpt_neox_writes_them():
    flat = values_of(
        log_interval=50,
        log_grad_norm=True,
        log_param_norm=False,
        log_optimizer_states=True,
        log_grad_pct_zeros=True,
        log_gradient_noise_scale=True,
        gradient_noise_scale_n_batches=4,
        peak_theoretical_tflops=312,
        steps_per_print=20,
        wall_clock_breakdown=True,
        comms_logger={"enabled": True, "verbose": True},
    )
    expected = {
        "monitor.gradient_norms_every": 50,
        "monitor.state_norms_every": 50,
        "monitor.zero_gradients_every": 50,
        "monitor.noise_scale_every": 4,
        "monitor.peak_tflops": 312,
        "monitor.times_every": 20,
        "monitor.collectives_every": 20,
    }
    assert {key: flat[key] for key in flat if key.startswith("monitor.")} == expected
    assert not any(key.startswith("monitor.") for key in values_of(steps_per_print=20))


def test_silence_means_the_defaults_of_gpt_neox():
    flat = values_of()
    assert flat["model.family"] == "neox"
    assert flat["model.activation"] == "gelu"
    assert (flat["model.norm"], flat["model.layernorm_epsilon"]) == ("layernorm", 1e-5)
    assert (flat["model.attention_bias"], flat["model.mlp_bias"]) == (True, True)
    assert flat["model.tie_word_embeddings"] is True
    assert flat["model.parallel_residual"] is False
    assert flat["model.rotary_pct"] == 1.0
    assert (flat["model.init_method"], flat["model.output_layer_init_method"]) == (
        "normal",
        "scaled_normal",
    )
    assert (flat["optim.lr"], flat["optim.betas"]) == (1e-3, [0.9, 0.999])
    assert (flat["schedule.name"], flat["schedule.min_lr"]) == ("linear", 0.0)
    assert (flat["precision"], flat["seed"], flat["train.log_every"]) == ("fp32", 1234, 100)
    assert flat["checkpoint.every"] is None
    assert flat["model.vocab_size"] == 50257


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ({"intermediate_size": 96}, "model.intermediate_size", 96),
        ({"expansion_factor": 2}, "model.intermediate_size", 128),
        ({"bias-gelu-fusion": True}, "model.activation", "gelu_tanh"),
        ({"no_weight_tying": True}, "model.tie_word_embeddings", False),
        ({"use_bias_in_mlp": False}, "model.mlp_bias", False),
        ({"model_parallel_size": 4}, "model.make_vocab_size_divisible_by", 512),
        ({"pipe_parallel_size": 0}, "parallel.pp", 1),
        ({"zero_optimization": {"stage": 3}}, "parallel.reshard_after_forward", True),
        ({"zero_optimization": {"stage": 2}}, "parallel.reshard_after_forward", False),
        ({"gradient_clipping": 0}, "optim.clip", None),
        ({"train_batch_size": 64}, "train.batch_size", 64),
        ({"gas": 8}, "train.batch_size", 32),
        ({"gradient-accumulation-steps": 8}, "train.batch_size", 32),
        ({"lr_decay_fraction": 0.55}, "schedule.decay_steps", 5),
        ({"lr_decay_style": "constant"}, "schedule.name", "constant"),
        ({"precision": "bfloat16"}, "precision", "bf16"),
        ({"bf16": {"enabled": True}}, "precision", "bf16"),
        ({"fp16": {"enabled": False}}, "precision", "fp32"),
        ({"fp16": {"enabled": True, "type": "bfloat16"}}, "precision", "bf16"),
        ({"fp16": {"enabled": True, "type": "fp16"}}, "precision", "fp16"),
        (
            {"precision": "bfloat16", "fp16": {"enabled": True, "type": "bfloat16"}},
            "precision",
            "bf16",
        ),
        (
            {"fp16": {"enabled": False, "type": "bfloat16"}, "bf16": {"enabled": True}},
            "precision",
            "bf16",
        ),
        ({"train_iters": 1e3}, "train.steps", 1000),
        ({"eval_iters": 0, "data_path": "d"}, "train.eval_every", None),
        ({"eval_interval": 0, "data_path": "d"}, "train.eval_every", None),
        ({"eval_tasks": ["piqa"], "eval_interval": 7}, "eval.tasks", ["piqa"]),
        ({"eval_tasks": ["piqa"], "eval_interval": 7}, "eval.every", 7),
        ({"eval_tasks": ["piqa"], "eval_iters": 0}, "eval.at_end", False),
        ({"eval_tasks": ["piqa"]}, "eval.shots", 0),
        ({"eval-tasks": ["piqa"], "eval_num_fewshot": 5}, "eval.shots", 5),
        ({"eval_tasks": ["piqa"], "eval_results_prefix": "a/b"}, "eval.results_prefix", "a/b"),
        ({"eval_tasks": ["piqa"], "eval_results_prefix": ""}, "eval.results_prefix", None),
        ({"optimizer": {"params": {"lr": 0.0}}}, "optim.lr", 0.0),
        ({"optimizer": {"params": {"weight_decay": 0.3}}}, "optim.weight_decay", 0.3),
        ({"optimizer": {"params": {"max_grad_norm": 0.5}}}, "optim.clip", 0.5),
        ({"optimizer": {"params": {"max_grad_norm": 0}}}, "optim.clip", None),
        ({"optimizer": {"params": {"lr": 2e-3, "torch_adam": True}}}, "optim.lr", 2e-3),
        ({"warmup": 1}, "schedule.warmup", 1),
        ({"warmup": 1, "lr_decay_style": "cosine"}, "schedule.name", "cosine"),
        ({"save_interval": 250}, "checkpoint.every", 250),
        ({"save-interval": 250, "checkpoint-factor": 250}, "checkpoint.every", 250),
        ({"max_test_samples_per_dataset": 9}, "train.steps", 10),
        ({"save": "checkpoints", "load": "./checkpoints/"}, "output", "checkpoints"),
        ({"save": "a", "load": str(Path("a").absolute())}, "output", "a"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "loss_scale.static", 128),
        ({"precision": "fp16"}, "loss_scale.initial_power", 16),
        ({"save": "out"}, "output", "out"),
        ({"save": "out", "load": "out"}, "output", "out"),
        ({"checkpoint_factor": 3}, "checkpoint.every", 3),
        ({"checkpoint_factor": 2, "checkpoint_scale": "log"}, "checkpoint.steps", [1, 2, 4, 8]),
        (
            {"checkpoint_factor": 1.5, "checkpoint_scale": "log"},
            "checkpoint.steps",
            [1, 2, 3, 5, 7],
        ),
        ({"keep_last_n_checkpoints": 4}, "checkpoint.keep", 4),
        ({"s3_path": "s3://bucket/a"}, "checkpoint.mirror.url", "s3://bucket/a"),
        ({"s3_path": "s3://bucket/a"}, "checkpoint.mirror.chunk", 100),
        ({"s3_path": "s3://b/a", "s3_chunk_size": 1 << 24}, "checkpoint.mirror.chunk", 16),
        ({"data_path": "d"}, "data.split", "969, 30, 1"),
        ({"data_path": "d", "split": "9,1,0"}, "data.split", "9,1,0"),
        ({"data_path": "d", "eval_interval": 5}, "train.eval_every", 5),
        ({"train_data_paths": ["a", "b"], "train_data_weights": [1, 2]}, "data.weights", [1, 2]),
        ({"eod_mask_loss": True}, "data.eod_mask_loss", True),
        ({"pack_impl": "pack_until_overflow"}, "data.packing", "pack_until_overflow"),
        ({"train_label_data_paths": ["l"]}, "data.labels", ["l"]),
        ({"valid_label_data_paths": ["l"]}, "data.valid_labels", ["l"]),
        ({"allow_chopped": False}, "data.allow_chopped", False),
        ({"attention_config": [[["flash", "global"], "all"]]}, "model.num_layers", 2),
        ({"attention_config": ["flash", "flash"]}, "model.num_layers", 2),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "train.gradients", "fp32"),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}, "precision": "bfloat16"},
            "train.gradients",
            "bf16",
        ),
        (
            {
                "data_types": {"grad_accum_dtype": "bf16"},
                "precision": "bfloat16",
                "fp32_allreduce": True,
            },
            "train.gradients",
            "fp32",
        ),
        ({"te_fp8_mha": True, "precision": "bfloat16"}, "precision", "fp8"),
        ({"te_fp8_mha": True, "te_fp8_format": "e4m3"}, "fp8.gradients", "e4m3"),
        ({"te_fp8_mha": True, "te_fp8_wgrad": False}, "fp8.weight_gradient", False),
        ({"te_fp8_format": "e4m3", "precision": "bfloat16"}, "precision", "bf16"),
        ({"checkpoint_in_cpu": True}, "train.offload_activations", True),
        ({"fp16_lm_cross_entropy": True}, "model.num_layers", 2),
        ({"optimizer": {"type": "cpu_adam", "params": {"lr": 0.5}}}, "optim.lr", 0.5),
        ({"checkpoint_factor": "None"}, "checkpoint.every", None),
        ({"exit_interval": 7}, "train.exit_every", 7),
        ({"train_epochs": 3, "train_iters": None}, "train.epochs", 3),
        (
            {"weight_by_num_documents": True, "train_data_paths": ["a"]},
            "data.document_alpha",
            1.0,
        ),
        (
            {
                "weight_by_num_documents": True,
                "weighted_sampler_alpha": 0.3,
                "train_data_paths": ["a", "b"],
                "train_data_weights": [1, 2],
            },
            "data.document_alpha",
            0.3,
        ),
        ({"warmup_iters": 3}, "schedule.warmup", 0.3),
        (
            {"decay_lr_to": 0.033, "optimizer": {"params": {"lr": 1e-4}}},
            "schedule.min_lr",
            3.3e-6,
        ),
        ({"use_bnb_optimizer": True}, "optim.kind", "adamw8bit"),
        ({"optimizer": {"type": "OneBitAdam"}}, "train.gradients", "fp32"),
        (
            {"optimizer": {"type": "OneBitAdam"}, "precision": "bfloat16"},
            "train.gradients",
            "bf16",
        ),
        ({"use_bnb_optimizer": True, "optimizer": {"type": "SM3"}}, "optim.kind", "sm3"),
        ({"optimizer": {"type": "SM3"}, "weight_decay": 0.1}, "optim.weight_decay", 0.0),
        ({"optimizer": {"type": "sm3", "params": {"momentum": 0.9}}}, "optim.momentum", 0.9),
        ({"optimizer": {"type": "madgrad_wd"}}, "optim.lr", 0.01),
        ({"optimizer": {"type": "Lion", "params": {"lr": 1e-5}}}, "optim.betas", [0.9, 0.99]),
        ({"optimizer": {"type": "sgd", "params": {"nesterov": True}}}, "optim.kind", "sgd"),
        ({"optimizer": {"type": "OneBitAdam"}}, "optim.kind", "adamw"),
        ({"optimizer": {"type": "cpu_torch_adam"}}, "optim.kind", "adamw"),
        (
            {
                "autotuning": {"enabled": True, "arg_mappings": {"a": "--a"}},
                "zero_optimization": {"stage": [0, 1, 2, 3]},
            },
            "parallel.reshard_after_forward",
            False,
        ),
        ({"autotuning_config": {"enabled": True}}, "train.micro_batch_size", 4),
        # From 10 steps done on, two more.
        ({"profile": True}, "profile.steps", [[11, 12]]),
        (
            {"profile": True, "profile_step_start": 4, "profile_step_stop": 9},
            "profile.stacks",
            True,
        ),
        ({"profile_step_start": 4, "profile": True}, "profile.steps", [[5, 12]]),
        ({"memory_profiling": True}, "profile.memory", True),
        (
            {"memory_profiling": True, "memory_profiling_path": "snapshots"},
            "profile.memory_folder",
            "snapshots",
        ),
        ({"flops_profiler": {"enabled": True, "profile_step": 5}}, "profile.steps", [[6, 6]]),
        ({"flops_profiler": {"enabled": True, "top_modules": 3}}, "profile.top", 3),
    ],
)
def test_option(option, key, value):
    assert values_of(**option)[key] == value


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"data_types": {"grad_accum_dtype": "bf61"}},
            "unknown data_types.grad_accum_dtype 'bf61'; choose one of fp32, bf16, fp16",
        ),
        (
            {"te_fp8_mha": True, "te_fp8_format": "e5m2"},
            "unknown te_fp8_format 'e5m2'; choose one of hybrid, e4m3",
        ),
        ({"pos_emb": "alibis"}, "unknown pos_emb 'alibis'; choose one of learned, rotary, sinus"),
        ({"hidden-dropout": "low"}, "hidden-dropout in small.yml: expected a number, got 'low'"),
        ({"norm": "rms"}, "unknown norm 'rms'; choose one of layernorm, te_layernorm, non_param"),
        ({"activation": "swigle"}, "unknown activation 'swigle'; choose one of gelu, relu, soft"),
        (
            {"attention_config": [[["locals", "global"], "all"]]},
            "unknown attention type locals in attention_config; choose one of global, flash, bigb",
        ),
        (
            {"sparsity_config": {"blocks": 16}},
            "sparsity_config.blocks in sparsity_config in small.yml: unknown key; did you mean",
        ),
        (
            {"attention_type": "multiquery"},
            "attention_type 'multiquery' is not an option of GPT-NeoX; write num_kv_heads",
        ),
        (
            {"activation": "swiglu", "expansion_factor": 3.5},
            "swiglu with 224 gives the first matrix twice 75 outputs and the second 74 inputs",
        ),
        (
            {"attention_config": [[["flash"], 3]]},
            "attention_config is for 3 layers, num_layers is 2",
        ),
        ({"attention_config": [3]}, "expected .*type, ...., count. .*got 3"),
        ({"attention_config": [["flash", 12]]}, r"types of an item are a list: write .*'flash'.,"),
        ({"attention_config": [[[], "all"]]}, "expected a list of types, got .. in"),
        ({"attention_config": [[["flash"], -1]]}, "expected a count or all, got -1"),
        (
            {"optimizer": {"type": "madgrad", "params": {"lr": 1}}},
            "unknown optimizer.type 'madgrad'; choose one of adam, .*did you mean 'madgrad_wd'",
        ),
        (
            {"optimizer": {"type": "sm3", "params": {"betas": [0.9, 0.95]}}},
            "optimizer.params.betas: type sm3 has no such parameter",
        ),
        (
            {"optimizer": {"params": {"lr": 1, "wd": 1}}},
            "optimizer.params.wd in optimizer in small.yml: unknown key",
        ),
        (
            {"optimizer": {"params": {"weight_decay": 1}}, "weight_decay": 0.1},
            "weight_decay is 0.1, but optimizer.params.weight_decay is 1; keep one",
        ),
        (
            {"optimizer": {"params": {"max_grad_norm": 2}}, "gradient_clipping": 1.0},
            "gradient_clipping is 1.0, but optimizer.params.max_grad_norm is 2; keep one",
        ),
        (
            {"save_interval": 250, "checkpoint_factor": 500},
            "save_interval 250 is the old name of checkpoint_factor",
        ),
        ({"init_method": "orthogonals"}, "unknown init_method 'orthogonals'; choose one of normal"),
        ({"train_iters": "ten"}, "train_iters in small.yml: expected an integer, got 'ten'"),
        ({"num_workers": True}, "num_workers in small.yml: expected an integer, got True"),
        ({"no_weight_tying": 1}, "expected true or false, got 1"),
        (
            {"hidden_sise": 3},
            "hidden_sise in small.yml: not an option of GPT-NeoX; did you mean 'hidden_size'?",
        ),
        ({"warmup_iters": 3, "warmup": 0.1}, "not an option of GPT-NeoX; write warmup alone"),
        ({"decay_lr_to": 0.1}, "decay_lr_to is not an option of GPT-NeoX; write min_lr alone"),
        ({"train_epochs": 3}, "train_iters and train_epochs are both given; keep one"),
        (
            {
                "train_iters": None,
                "train_epochs": 3,
                "train_data_paths": ["a", "b"],
                "train_data_weights": [1, 2],
            },
            "with train_epochs: every source is passed over alike",
        ),
        (
            {"train_iters": None, "train_epochs": 3, "lr_decay_fraction": 0.5},
            "a share of steps that the data decide; write lr_decay_iters",
        ),
        (
            {"curriculum_learning": {"enabled": True, "schedule_type": "fixed_linar"}},
            "unknown curriculum_learning.schedule_type 'fixed_linar'.*did you mean .*fixed_linear",
        ),
        (
            {"curriculum_learning": {"enabled": True, "schedule_type": "fixed_discrete"}},
            "curriculum_learning.schedule_config lacks difficulty, max_step",
        ),
        ({"lr_decay_style": "wsd"}, "unknown lr_decay_style 'wsd'; choose one of"),
        ({"precision": "fp8"}, "unknown precision 'fp8'; choose one of"),
        ({"precision": "fp16", "bf16": {"enabled": True}}, "asks for bf16 and fp16 at once"),
        (
            {"precision": "fp16", "fp16": {"enabled": True, "type": "bfloat16"}},
            "asks for bf16 and fp16 at once .fp16.type, precision.; keep one",
        ),
        ({"bf16": {"enabled": True, "type": "fp16"}}, "asks for bf16 and fp16 at once .bf16"),
        ({"fp16": {"enabled": True, "type": "float32"}}, "asks for fp16 and fp32 at once"),
        ({"fp16": {"enabled": False, "type": "bfloat16"}}, "but the block is not enabled"),
        ({"fp16": {"enabled": True, "type": "int8"}}, "unknown fp16.type 'int8'; choose one of"),
        ({"fp16": {"enabled": "false"}}, "fp16.enabled: expected true or false, got 'false'"),
        (
            {"save": "runs/a", "load": "runs/a/", "finetune": True},
            "finetune with `load` in the folder of `save` would count from step 0 again"
            ".*start a new run from 'runs/a/'",
        ),
        ({"save": "a", "load": "a", "iteration": 0}, "iteration .* would go back to that step"),
        (
            {"save": "a", "load": "a", "no_load_optim": True},
            "no_load_optim .* delete no_load_optim",
        ),
        ({"load": "a", "finetune": "yes"}, "finetune in small.yml: expected true or false"),
        ({"train_batch_size": 30, "gas": 2}, "train_batch_size 30 is not divisible by"),
        ({"tokenizer_type": "SPMTokenizer"}, "set model.vocab_size=N"),
        ({"data_path": "a", "train_data_paths": ["b"]}, "keep one"),
        ({"intermediate_size": 97}, "is not divisible by 2 [*] mlp_multiple_of"),
        (
            {"deepspeed_extra_args": {"curriculum_learning": {}}},
            "write curriculum_learning at the top level",
        ),
        (
            {"zero_optimization": {"stage": 9}},
            "unknown zero_optimization.stage 9; choose one of 0, 1, 2, 3",
        ),
        ({"zero_optimization": {"stag": 1}}, "unknown key; did you mean 'stage'?"),
    ],
)
def test_refusal(option, message):
    found = problems_of(**option)
    assert len(found) == 1, found
    assert re.search(message, found[0]), found[0]


@pytest.mark.parametrize(
    ("options", "start", "with_step", "with_optimizer"),
    [
        # megatron/checkpointing.py: the iteration goes on, optimizer and schedule are loaded
        ({}, "old", True, True),
        ({"finetune": False, "no_load_rng": True}, "old", True, True),
        # iteration 0, neither optimizer nor schedule
        ({"finetune": True}, "old", False, False),
        ({"finetune": True, "no_load_optim": True}, "old", False, False),
        # load_module_only, and yet the iteration goes on
        ({"no_load_optim": True}, "old", True, False),
        # the tag of one checkpoint
        ({"iteration": 3000}, "old/step3000", True, True),
        ({"iteration": 0, "finetune": True}, "old/step0", False, False),
    ],
)
def test_a_load_that_is_not_save_is_a_start(options, start, with_step, with_optimizer):
    reading = read(save="new", load="old", **options)
    assert reading.problems == []
    flat = flatten(reading.values)
    assert flat["output"] == "new" and flat["model.start"] == start
    assert flat["train.start_step"] is with_step
    assert flat["train.start_optimizer"] is with_optimizer
    notes = [note.text for note in reading.notes]
    assert sum("GPT-NeoX would load it at every start" in text for text in notes) == 1
    anew = with_step and not with_optimizer
    assert sum("learning rate schedule begin anew" in text for text in notes) == anew


def test_without_load_nothing_is_loaded():
    reading = read(save="new", finetune=True, iteration=5, no_load_optim=True, no_load_rng=True)
    assert reading.problems == [] and "start" not in reading.values["model"]
    assert reading.ignored["nothing is loaded without `load`"] == [
        "finetune",
        "iteration",
        "no_load_optim",
    ]
    assert "finetune" not in str(read(finetune=False).ignored)
    assert read(save="a", load="a").ignored["a run resumes from its own folder"] == ["load"]


MIXED = {"data_sampling_method": "smoothed_mean", "data_sampling_update_frequency": 1}


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ({}, "mixing.kind", "odm-repo"),
        ({}, "mixing.smoothing", 0.9),
        ({}, "mixing.update_every", 1),
        ({"data_sampling_smoothing_factor": 0.5}, "mixing.smoothing", 0.5),
        ({"data-sampling-warmup-steps": 2000}, "mixing.warmup_steps", 2000),
        ({"data_sampling_method": "exp3"}, "mixing.kind", "exp3"),
        (
            {"data_sampling_method": "naive_validation", "data_sampling_update_frequency": 10},
            "mixing.update_every",
            10,
        ),
    ],
)
def test_the_keys_of_online_data_mixing(option, key, value):
    assert values_of(**MIXED | option)[key] == value


def test_a_method_that_never_updates_or_is_not_there():
    assert "never updates; write 1" in problems_of(data_sampling_method="exp3")[0]
    assert (
        "choose one of smoothed_mean, exp3, naive_validation"
        in problems_of(**MIXED | {"data_sampling_method": "ema"})[0]
    )
    assert not [key for key in values_of(data_sampling_warmup_steps=5) if key.startswith("mixing")]
    notes = read(**MIXED, mixed_minibatches=True, use_named_train_datasets=True).notes
    assert any("drawn one by one" in note.text for note in notes)
    assert "mixing.smoothing" not in values_of(**MIXED | {"data_sampling_method": "exp3"})


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_each_refused_option_has_a_harmless_value_and_a_hint(name):
    option = REFUSED[name]
    assert option.harmless and option.hint
    assert problems_of(**{name: option.harmless[0]}) == []
    harmful = {"surely": "not this"}
    found = problems_of(**{name: harmful})
    assert any(option.hint in text for text in found), found


@pytest.mark.parametrize("name", sorted(WHY))
def test_each_ignored_option_is_listed_once(name):
    reading = read(**{name: 1})
    assert reading.problems == []
    assert reading.ignored == {WHY[name]: [name]}


def test_options_with_one_remedy_are_one_problem():
    found = problems_of(
        validation_based_reward=True, batch_normalized_reward=True, scale_by_reward_loss_diff=True
    )
    assert len(found) == 1
    assert "like 2 more options of its kind" in found[0]


def test_a_file_without_a_length_is_told_so():
    (remark,) = [note for note in read(train_iters=None).notes if note.key == "train.steps"]
    assert remark.text.startswith("neither train_iters nor train_epochs is given")
    assert not any(note.key == "train.steps" for note in read().notes)


def test_an_option_stands_in_one_file_only_in_either_spelling():
    reading = read_neox({"a.yml": SMALL, "b.yml": {"train-iters": 5}})
    assert [item.text for item in reading.problems] == [
        "train_iters is 10 in a.yml and 5 in b.yml; give an option in one file only"
    ]
    both = read_neox({"a.yml": SMALL | {"gas": 2}, "b.yml": {"gradient_accumulation_steps": 3}})
    assert len(both.problems) == 1
    equal = {"a.yml": SMALL | {"save": "out"}, "b.yml": {"train-iters": 10, "save": "./out/"}}
    assert read_neox(equal).problems == []
    assert read_neox({"a.yml": SMALL | {"gas": 1}, "b.yml": {"gas": True}}).problems
    (twice,) = read_neox({"a.yml": SMALL | {"train-iters": 5}}).problems
    assert twice.text == (
        "train_iters is 10 in a.yml and 5 in a.yml; `-` and `_` are one: keep one of the two"
    )


def test_several_files_make_one_config():
    shape = {key: SMALL[key] for key in ("num_layers", "hidden_size", "num_attention_heads")}
    rest = {key: value for key, value in SMALL.items() if key not in shape}
    reading = read_neox({"shape.yml": shape, "rest.yml": rest})
    assert reading.problems == []
    assert reading.values == read().values


def test_files_without_a_model_say_so_once():
    (problem,) = read_neox({"dir/setup.yml": {"data_path": "x", "log_interval": 1}}).problems
    assert problem.text.startswith(
        "no model in setup.yml: name a preset or the file with num_layers"
    )


def test_over_a_preset_only_what_the_file_says_counts():
    reading = read_neox(
        {"s.yml": {"data_path": "x", "save": "out", "log-interval": 7}}, complete=False
    )
    assert reading.problems == []
    flat = flatten(reading.values)
    assert flat.pop("train.eval_batches", 100) == 100
    assert flat == {
        "data.train": ["x"],
        "data.split": "969, 30, 1",
        "output": "out",
        "train.log_every": 7,
        "train.eval_every": 1000,
    }


def test_attention_types_are_checked_where_the_number_of_layers_is_a_presets():
    options = {"attention_config": [[["hyena", "global"], "all"]]}
    (problem,) = read_neox({"s.yml": options}, complete=False).problems
    assert "unknown attention type hyena in attention_config" in problem.text


def test_batch_follows_the_number_of_processes():
    reading = read(world=8, gas=2, model_parallel_size=2)
    assert reading.values["train"]["batch_size"] == 4 * 2 * 4
    (batch,) = [item for item in reading.notes if item.key == "train.batch_size"]
    assert (
        "train.batch_size is 32 rows: 4 a rank * 2 accumulated * 4 data-parallel ranks"
        in batch.text
    )
    assert any(
        "is not divisible" in item.text for item in read(world=3, model_parallel_size=2).problems
    )


def test_vocabulary_is_counted_when_the_file_is_here(tmp_path):
    file = tmp_path / "t.json"
    file.write_text(
        '{"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 4, "content": "<x>"}]}'
    )
    flat = values_of(tokenizer_type="HFTokenizer", vocab_file=str(file))
    assert (flat["model.vocab_size"], flat["data.tokenizer"]) == (5, str(file))


@pytest.mark.parametrize(
    ("options", "tokenizer", "ids"),
    [
        (
            {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "v.json", "merge_file": "m.txt"},
            "v.json,m.txt",
            50257,
        ),
        ({"tokenizer_type": "CharLevelTokenizer"}, "char", 512),
        (
            {"tokenizer_type": "TiktokenTokenizer", "vocab_file": "d/cl100k_base.tiktoken"},
            "d/cl100k_base.tiktoken",
            100277,
        ),
        ({"tokenizer_type": "TiktokenTokenizer", "vocab_file": "cl100k_base"}, None, 100277),
    ],
)
def test_tokenizer_types(options, tokenizer, ids):
    reading = read(**options)
    flat = flatten(reading.values)
    assert (reading.problems, flat.get("data.tokenizer"), flat["model.vocab_size"]) == (
        [],
        tokenizer,
        ids,
    )


def test_the_vocabulary_of_gpt2_is_counted(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 6}')
    reading = read(
        tokenizer_type="GPT2BPETokenizer",
        vocab_file=str(tmp_path / "vocab.json"),
        merge_file="m.txt",
    )
    assert flatten(reading.values)["model.vocab_size"] == 7


def test_the_pieces_of_sentencepiece_are_counted(tmp_path):
    file = tmp_path / "t.model"
    piece = b"\x0a\x03\x0a\x01a"  # field 1, a message of 3 bytes: the text "a"
    trainer = b"\x12\x82\x01" + bytes(130)  # field 2 with a length of two bytes
    file.write_bytes(piece * 7 + trainer)
    spm = {"tokenizer_type": "SPMTokenizer", "vocab_file": str(file)}
    flat = values_of(**spm)
    assert (flat["model.vocab_size"], flat["data.tokenizer"]) == (7, str(file))
    for damaged in (piece[:-1], trainer, b"\x80", b"\x08\x01", b""):
        file.write_bytes(damaged)
        assert "set model.vocab_size=N" in problems_of(**spm)[0]


def test_the_20b_tokenizer_has_50277_ids():
    file = HERE.parents[1].parent / "shared" / "data" / "20B_tokenizer.json"
    if not file.is_file():
        pytest.skip("the GPT-NeoX-20B tokenizer is not on this machine")
    assert (
        values_of(tokenizer_type="HFTokenizer", vocab_file=str(file))["model.vocab_size"] == 50277
    )


def test_which_files_are_gpt_neox_files():
    assert is_neox({"num-layers": 2})
    assert is_neox({"data_path": "x", "seed": 1})
    assert not is_neox({"model": {"num_layers": 2}})
    assert not is_neox({"recipe": "debug", "seed": 1})
    assert not is_neox({"nonsense": 1})


def test_hints_for_names_of_gpt_neox():
    assert (
        override_hint("train-iters")
        == "train-iters: this is GPT-NeoX's name; here it is train.steps"
    )
    assert override_hint("gas") == "gas: this is GPT-NeoX's name; here it is train.batch_size"
    assert "has no effect here (CUDA kernels and fusions)" in override_hint("rope_fusion")
    assert "here it is model.mup.base_width" in override_hint("use_mup")
    assert override_hint("nonsense") is None


def test_curriculum_learning_sets_the_section():
    section = {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": 64,
        "max_difficulty": 2048,
        "schedule_type": "fixed_root",
        "schedule_config": {
            "total_curriculum_step": 1000,
            "difficulty_step": 8,
            "root_degree": 3,
        },
    }
    assert read(curriculum_learning=section).values["curriculum"] == {
        "kind": "root",
        "shortest": 64,
        "longest": 2048,
        "steps": 1000,
        "length_step": 8,
        "root_degree": 3,
    }
    stages = {"difficulty": [8, 64], "max_step": [10]}
    section = {"enabled": True, "schedule_type": "fixed_discrete", "schedule_config": stages}
    reading = read(curriculum_learning=section).values["curriculum"]
    assert reading == {"kind": "discrete", "lengths": [8, 64], "until": [10]}


def test_train_impl_reinforce_asks_for_prompts():
    """As GPT-NeoX's own example, which names token files that it never opens."""
    reading = read(
        train_impl="reinforce",
        dataset_impl="online",
        reinforce_leave_one_out=True,
        fp32_reinforce=True,
        kl_impl="abs",
        kl_div_beta=0.05,
        online_dataserver_ports=[10000, 10001],
        serve_model_weights=True,
        train_data_paths=["a_document"],
        train_label_data_paths=["a_label_document"],
    )
    assert reading.values["loss"] == {
        "kind": "reinforce",
        "baseline": "leave_one_out",
        "kl_impl": "abs",
        "kl_div_beta": 0.05,
        "average": "neox",
    }
    data = reading.values["data"]
    assert data["packing"] == "unpacked" and not {"train", "labels"} & set(data)
    (problem,) = reading.problems
    assert problem.key == "data.prompts" and "set data.prompts=FILE.jsonl" in problem.text
    assert any("divide it by loss.completions" in remark.text for remark in reading.notes)
    (reason,) = [why for why, names in reading.ignored.items() if "serve_model_weights" in names]
    assert "writes its answers itself" in reason
    assert read(train_impl="reinforce").values["loss"]["baseline"] == "running_mean"


PAIRWISE = {
    "train_impl": "dpo",
    "dataset_impl": "pairwise",
    "pack_impl": "unpacked",
    "allow_chopped": False,
    "dpo_fp32": True,
    "dpo_beta": 0.01,
} | {
    f"{side}_{part}{kind}_data_paths": [f"{side}/{part}{kind}"]
    for side in ("pos", "neg")
    for part in ("train", "valid", "test")
    for kind in ("", "_label")
}
"""As GPT-NeoX's post-training/configs/llama3-8b-dpo.yml."""


def test_train_impl_dpo_reads_pairs():
    values = values_of(**PAIRWISE)
    assert [values["loss.kind"], values["loss.beta"]] == ["dpo", 0.01]
    assert values["loss.reference"] == "cached" and values["data.packing"] == "unpacked"
    assert values["train.eval_every"] == 1000
    data = {key.removeprefix("data."): value for key, value in values.items()}
    assert data["chosen"] == ["pos/train"] and data["rejected"] == ["neg/train"]
    assert data["chosen_labels"] == ["pos/train_label"]
    assert data["valid_rejected_labels"] == ["neg/valid_label"]
    assert not {"train", "labels", "chosen_reference"} & set(data)
    assert RunConfig.model_validate(read(**PAIRWISE).values).data.paired
    # A second file of log-probabilities for each token file, as generate.py names them.
    values = values_of(**PAIRWISE | {"precompute_model_name": "sft"})
    assert values["data.chosen_reference"] == ["pos/train_sft"]
    assert values["data.valid_rejected_reference"] == ["neg/valid_sft"]
    assert values_of(**PAIRWISE | {"dpo_reference_free": True})["loss.reference"] == "free"
    packed = PAIRWISE | {"pack_impl": "pack_until_overflow", "data_path": "unread"}
    assert values_of(**packed)["loss.reference"] == "live"
    assert "data.train" not in values_of(**packed)


def test_train_impl_dpo_without_its_data():
    (problem,) = problems_of(**PAIRWISE | {"dataset_impl": "gpt2"})
    assert "write `dataset_impl: pairwise`" in problem
    (problem,) = problems_of(train_impl="dpo", dataset_impl="pairwise", pack_impl="unpacked")
    assert "without pos_train_data_paths" in problem
    reading = read(pos_train_data_paths=["a"], dpo_beta=0.2)
    assert reading.ignored["belongs to train_impl dpo or rm"] == ["pos_train_data_paths"]
    assert reading.ignored["belongs to train_impl dpo"] == ["dpo_beta"]


def test_an_unknown_train_impl_gets_the_menu():
    (problem,) = problems_of(train_impl="reinfroce")
    assert "choose one of normal, dpo, kto, rm, reinforce; did you mean 'reinforce'" in problem


def test_a_soft_prompt_is_an_adapter():
    section = {"enabled": True, "n_tokens": 4, "init_string": "Translate:", "init_range": 0.3}
    values = values_of(soft_prompt_tuning=section)
    ours = {key: value for key, value in values.items() if key.startswith("adapter.")}
    assert ours == {
        "adapter.kind": "soft_prompt",
        "adapter.tokens": 4,
        "adapter.init_string": "Translate:",
        "adapter.init_range": 0.3,
    }
    assert "adapter.kind" not in values_of(soft_prompt_tuning={"enabled": False})
    (problem,) = problems_of(soft_prompt_tuning={"enabled": True, "tokens": 4})
    assert "soft_prompt_tuning.tokens" in problem and "'n_tokens'" in problem


def test_train_impl_rm_is_a_reward_model():
    values = values_of(**PAIRWISE | {"train_impl": "rm", "z_loss": 0.1})
    names = ("loss.kind", "loss.at", "loss.z_loss", "model.head")
    assert [values[name] for name in names] == ["reward", "targets", 0.1, "score"]


def test_train_impl_kto_reads_rewards():
    files = {
        "train_data_paths": ["a"],
        "train_label_data_paths": ["a_label"],
        "train_reward_data_paths": ["a_reward"],
    }
    options = {"train_impl": "kto", "pack_impl": "unpacked", "kto_beta": 0.2}
    values = values_of(**files, **options, kto_undesirable_weight=2.0)
    names = ("loss.kind", "loss.kl", "loss.beta", "loss.undesirable_weight", "data.rewards")
    assert [values[name] for name in names] == ["kto", "halves", 0.2, 2.0, ["a_reward"]]
    assert any("without train_reward_data_paths" in one for one in problems_of(**options))
