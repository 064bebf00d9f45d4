"""Weights & Biases: https://wandb.ai, another server of it, or files that are sent later."""

import netrc
import os
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from castalia.core.errors import ConfigError
from castalia.core.extras import require
from castalia.monitor.sinks.sink import SINKS, Library, Sink, SinkConfig
from castalia.monitor.sinks.wandb_files import last_step_in

KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
HOST = "https://api.wandb.ai"


@SINKS.register("wandb")
class WandbSink(Sink):
    """One run of the service for the run, however often it is resumed."""

    library = Library("wandb", "wandb")

    class Config(SinkConfig):
        """Where the run is shown. The key comes from WANDB_API_KEY or from `wandb login`."""

        kind: Literal["wandb"] = "wandb"
        project: str = "castalia"
        """Project of the run."""
        entity: str | None = None
        """Team or user; null: the default of the account."""
        group: str | None = None
        """Group of runs that belong together, such as a suite."""
        name: str | None = None
        """Name of the run; null: that of its folder."""
        tags: list[str] = []
        """Words to find the run by."""
        notes: str | None = None
        """What is special about it."""
        host: str | None = None
        """URL of another server; null: WANDB_BASE_URL, or wandb.ai."""
        mode: Literal["online", "offline"] | None = None
        """`offline` writes wandb/ in the run folder, for `wandb sync`; null: WANDB_MODE, or
        online."""

    config: Config
    remote: Any = None

    @property
    def is_offline(self) -> bool:
        """Whether nothing is sent."""
        mode = self.config.mode or os.environ.get("WANDB_MODE", "online")
        return mode in ("offline", "dryrun")

    def start(self, step: int) -> None:
        """Begin the remote run, or continue it."""
        if self.remote is not None:
            return
        config = self.config
        wandb = require("wandb", "wandb", "monitor wandb")
        if not self.is_offline:
            self.require_key()
        self.kept.setdefault("id", uuid.uuid4().hex[:16])
        settings = {
            "silent": True,
            # The step lines are in metrics.jsonl as numbers; the run's output is not W&B's.
            "console": "off",
            "disable_code": True,
            "disable_job_creation": True,
        }
        if config.host is not None:
            settings["base_url"] = config.host
        self.remote = wandb.init(
            id=self.kept["id"],
            resume="allow",
            project=config.project,
            entity=config.entity,
            group=config.group,
            name=config.name or self.about.name,
            tags=config.tags or None,
            notes=config.notes,
            mode="offline" if self.is_offline else "online",
            dir=str(self.folder),
            config={**self.about.config, "environment": dict(self.about.environment)},
            # Beside a run that the user's own code may have.
            reinit="create_new",
            settings=wandb.Settings(**settings),
        )

    def require_key(self) -> None:
        """Look for a key, since the library would ask for one on the terminal.

        Raises  ConfigError if there is none.
        """
        host = urlsplit(self.config.host or os.environ.get("WANDB_BASE_URL") or HOST).hostname or ""
        if any(os.environ.get(name) for name in KEYS):
            return
        try:
            if netrc.netrc(os.environ.get("NETRC")).authenticators(host):
                return
        except (OSError, netrc.NetrcParseError):
            pass
        raise ConfigError(
            f"no key of W&B for {host}: set {KEYS[0]}, run `wandb login`, or set mode: offline"
        )

    def last_step(self) -> int | None:
        """The last step of the files, or that from which the server continues."""
        if self.is_offline:
            return last_step_in(self.folder / "wandb", self.kept["id"])
        return int(self.remote.starting_step) - 1 if self.remote.resumed else None

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One row of the history."""
        self.remote.log(dict(metrics), step=step)

    def amend(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The newest numbers of the run: a row that was sent cannot be added to."""
        self.remote.summary.update(dict(metrics))

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table in the row of `step`."""
        wandb = require("wandb", "wandb", "monitor wandb")
        columns = list(rows[0])
        data = [[row[column] for column in columns] for row in rows]
        self.remote.log({name: wandb.Table(columns=columns, data=data)}, step=step)

    def file(self, path: Path) -> None:
        """A file of the remote run."""
        # A copy: `save` makes a link, which is broken where the folder is moved, and says so.
        copy = Path(self.remote.dir) / path.name
        shutil.copyfile(path, copy)
        self.remote.save(str(copy), base_path=self.remote.dir, policy="now")

    def close(self) -> None:
        """Wait until all is sent."""
        if self.remote is not None:
            self.remote.finish()
            self.remote = None

    def flush(self) -> bool:
        """Offline the library writes every 15 seconds; a start asks the files how far it came."""
        return not self.is_offline

    def abandon(self) -> None:
        """Leave out what the library does when the process ends, which waits for the network."""
        if self.remote is not None:
            self.remote._atexit_cleanup_called = True
        wandb = sys.modules["wandb"]
        # Not part of its interface: where another version has other names, its end is waited for.
        with suppress(AttributeError, TypeError):
            wandb.setup()._connection._cleanup()
