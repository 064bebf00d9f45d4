"""A config with a key, a token or a password does not start: its copies would keep it."""

import pytest

from castalia.config import Config
from castalia.config.credentials import require_no_credentials
from castalia.core.errors import ConfigError
from castalia.launch import LaunchConfig


class Logged(Config):
    """A section of a guest."""

    api_key: str | None = None
    """A key."""
    key: str = "text"
    """No key."""
    files: list[str] = []
    """Files."""


class Job(Config):
    """A config with a section that starts processes."""

    launch: LaunchConfig = LaunchConfig()
    """How."""
    logged: Logged = Logged()
    """Where to."""


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        (
            {"launch": {"environment": {"WANDB_API_KEY": "x5", "A": "b"}}},
            "launch.environment.WANDB_API_KEY",
        ),
        ({"launch": {"slurm": {"export": "ALL,HF_TOKEN=x5"}}}, "launch.slurm.export"),
        ({"launch": {"launcher_args": "-x MY_SECRET=x5"}}, "launch.launcher_args"),
        ({"logged": {"api_key": "x5"}}, "logged.api_key"),
        (
            {"logged": {"files": ["a", "https://me:x5@h/a"], "api_key": "x5"}},
            "logged.api_key, logged.files",
        ),
    ],
)
def test_each_key_is_named_without_its_value(values, keys):
    with pytest.raises(ConfigError) as error:
        require_no_credentials(Job.model_validate(values))
    assert str(error.value).startswith(f"{keys}: a config must not hold keys, tokens or passwords")
    assert "x5" not in str(error.value)


def test_other_configs_pass():
    environment = {"NCCL_IB_PKEY": "0x7fff", "TOKENIZERS_PARALLELISM": "false"}
    require_no_credentials(
        Job.model_validate(
            {
                "launch": {"environment": environment, "slurm": {"export": "ALL"}},
                "logged": {"files": ["{{ token=1 }}", "s3://bucket/a", "hf://a/b@main"]},
            }
        )
    )
