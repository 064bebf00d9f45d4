"""GPT-NeoX's names of options about monitors."""

from castalia.config.neox_option import Honoured

HOST = "https://api.wandb.ai"
"""GPT-NeoX's default, which needs no option here."""

MONITOR_OPTIONS = {
    "tensorboard_dir": Honoured("monitor.sinks.folder", "str"),
    "use_wandb": Honoured("monitor.sinks", "bool"),
    "wandb_group": Honoured("monitor.sinks.group", "str"),
    "wandb_run_name": Honoured("monitor.sinks.name", "str"),
    "wandb_team": Honoured("monitor.sinks.entity", "str"),
    "wandb_project": Honoured("monitor.sinks.project", "str", "neox"),
    "wandb_host": Honoured("monitor.sinks.host", "str", HOST),
    "wandb_init_all_ranks": Honoured("monitor.sinks", "bool", False),
    "use_comet": Honoured("monitor.sinks", "bool"),
    "comet_workspace": Honoured("monitor.sinks.workspace", "str"),
    "comet_project": Honoured("monitor.sinks.project", "str"),
    "comet_experiment_name": Honoured("monitor.sinks.name", "str"),
    "comet_tags": Honoured("monitor.sinks.tags", "list"),
    "comet_others": Honoured("monitor.sinks.others", "dict"),
    # DeepSpeed's own monitors.
    "tensorboard": Honoured("monitor.sinks", "dict"),
    "wandb": Honoured("monitor.sinks", "dict"),
}
"""The options that set a sink."""

MONITOR_KEYS = {
    "tensorboard": "enabled output_path job_name",
    "wandb": "enabled group team project",
}
"""Keys of DeepSpeed's dictionaries."""

MONITOR_PATHS = {
    "tensorboard.output_path": "monitor.sinks.folder",
    "tensorboard.job_name": "monitor.sinks.folder",
    "wandb.group": "monitor.sinks.group",
    "wandb.team": "monitor.sinks.entity",
    "wandb.project": "monitor.sinks.project",
}
"""Our keys for those of the dictionaries."""
