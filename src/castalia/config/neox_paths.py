"""Our key for each of GPT-NeoX's names, and GPT-NeoX's names for each of our keys."""

from functools import cache

from castalia.config.neox_keys import ALIASES, HONOURED, NESTED_HONOURED
from castalia.config.neox_monitor_keys import MONITOR_PATHS

NESTED_PATHS = {
    "optimizer.type": "optim.kind",
    "optimizer.params.lr": "optim.lr",
    "optimizer.params.betas": "optim.betas",
    "optimizer.params.eps": "optim.eps",
    "optimizer.params.momentum": "optim.momentum",
    "optimizer.params.beta": "optim.beta",
    "optimizer.params.nesterov": "optim.nesterov",
    "optimizer.params.weight_decay": "optim.weight_decay",
    "optimizer.params.max_grad_norm": "optim.clip",
    "scheduler.type": "schedule.name",
    "scheduler.params.warmup_min_lr": "schedule.warmup_start",
    "scheduler.params.warmup_max_lr": "optim.lr",
    "scheduler.params.warmup_num_steps": "schedule.warmup_steps",
    "scheduler.params.warmup_type": "schedule.warmup_shape",
    "scheduler.params.total_num_steps": "schedule.decay_steps",
    "scheduler.params.warmup_min_ratio": "schedule.warmup_start",
    "scheduler.params.cos_min_ratio": "schedule.min_lr",
    "scheduler.params.cycle_min_lr": "schedule.min_lr",
    "scheduler.params.cycle_max_lr": "optim.lr",
    "scheduler.params.cycle_first_step_size": "schedule.warmup_steps",
    "scheduler.params.cycle_second_step_size": "schedule.decay_steps",
    "fp16.enabled": "precision",
    "fp16.type": "precision",
    "fp16.loss_scale": "loss_scale.static",
    "fp16.loss_scale_window": "loss_scale.window",
    "fp16.initial_scale_power": "loss_scale.initial_power",
    "fp16.hysteresis": "loss_scale.hysteresis",
    "fp16.min_loss_scale": "loss_scale.minimum",
    "curriculum_learning.enabled": "curriculum.kind",
    "curriculum_learning.min_difficulty": "curriculum.shortest",
    "curriculum_learning.max_difficulty": "curriculum.longest",
    "curriculum_learning.schedule_type": "curriculum.kind",
    "curriculum_learning.schedule_config.total_curriculum_step": "curriculum.steps",
    "curriculum_learning.schedule_config.difficulty_step": "curriculum.length_step",
    "curriculum_learning.schedule_config.root_degree": "curriculum.root_degree",
    "curriculum_learning.schedule_config.difficulty": "curriculum.lengths",
    "curriculum_learning.schedule_config.max_step": "curriculum.until",
    "flops_profiler.profile_step": "profile.steps",
    "flops_profiler.top_modules": "profile.top",
    "soft_prompt_tuning.n_tokens": "adapter.tokens",
    "soft_prompt_tuning.num_tokens": "adapter.tokens",
    "soft_prompt_tuning.init_string": "adapter.init_string",
    "soft_prompt_tuning.init_range": "adapter.init_range",
    **MONITOR_PATHS,
}
"""Honoured key of a dictionary -> the key here, where it is not that of the whole dictionary."""
SAME_NAMES = ("sparsity_config",)
"""Dictionaries whose keys have their own names here, too."""


def nested_path(name: str) -> str:
    """Our key for the honoured key `name` of a dictionary, such as `fp16.hysteresis`."""
    if name in NESTED_PATHS:
        return NESTED_PATHS[name]
    option, _, inner = name.partition(".")
    path = HONOURED[option].path
    return f"{path}.{inner}" if option in SAME_NAMES else path


def nested_names() -> list[str]:
    """Every honoured key of a dictionary that holds a value, not another dictionary."""
    names = [f"{outer}.{key}" for outer, keys in NESTED_HONOURED.items() for key in keys.split()]
    return [name for name in names if name not in NESTED_HONOURED]


@cache
def neox_names() -> dict[str, list[str]]:
    """GPT-NeoX's names for each of our keys and sections, the newest names first."""
    names: dict[str, list[str]] = {}
    for name, option in HONOURED.items():
        names.setdefault(option.path, []).append(name)
    for old, name in ALIASES.items():
        names.setdefault(HONOURED[name].path, []).append(old)
    for name in nested_names():
        path = nested_path(name)
        # A key that the whole dictionary already stands for is named once.
        if name.partition(".")[0] not in names.get(path, []):
            names.setdefault(path, []).append(name)
    return names
