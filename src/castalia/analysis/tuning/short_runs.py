"""Runs of a few steps in the one loop, without a folder of their own."""

from castalia.models import ModelConfig, TransformerConfig, build_model_config
from castalia.optim.schedule import ScheduleConfig
from castalia.runs.config import RunConfig


def short_run(config: RunConfig, steps: int, folder: str) -> RunConfig:
    """The config of `steps` steps at one rate that begin where the run would begin.

    The loop without hooks writes nothing; `folder` is a temporary one, in which data.corpus and
    other text is prepared. So neither the run's folder nor its checkpoints are read.
    """
    train = config.train.model_copy(
        update={
            "steps": steps,
            "epochs": None,
            "exit_every": None,
            "start_step": False,
            "start_optimizer": False,
        }
    )
    return config.model_copy(
        update={
            "output": folder,
            "train": train,
            "schedule": ScheduleConfig(name="constant", warmup=0.0),
        }
    )


def at_width(model: ModelConfig, width: int) -> ModelConfig:
    """The model with another hidden_size and as many heads; all widths grow in one proportion.

    Raises  ConfigError if a size does not divide.
    """
    values = model.model_dump(mode="json") | {"hidden_size": width}
    if isinstance(model, TransformerConfig):
        for name in ("intermediate_size", "attention_head_dim"):
            size = getattr(model, name)
            if size is not None:
                values[name] = max(1, round(size * width / model.hidden_size))
    return build_model_config(values, f"hidden_size {width}")
