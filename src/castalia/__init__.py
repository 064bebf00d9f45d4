"""Castalia trains, studies and serves suites of language models, on a laptop or a GPU cluster.

    castalia.train("debug", steps=20)          train a run, or resume it; returns a Trainer
    castalia.read_metrics("runs/debug")        its metrics as a table
    castalia.load("runs/debug")                a checkpoint or an export, to generate and to score
    castalia.prepare("text.jsonl", ...)        text to token files
    castalia.load_config(["debug", ...])       a config, for castalia.Trainer(config) or to look at

`help` of each has examples. The rooms of the package (`castalia.data`, `castalia.mixing`, ...) are
imported when they are first used. `castalia --help` lists the commands.

Examples
    >>> import castalia
    >>> run = castalia.train("debug", steps=4, output="runs/first")
    >>> castalia.read_metrics(run)["loss"].shape
    (4,)
    >>> text = castalia.load(run).generate("The ", max_new_tokens=8)
"""

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from castalia.corpus import prepare
    from castalia.inference import load
    from castalia.monitor.table import read_metrics
    from castalia.recipes import load_config
    from castalia.recipes.training import train
    from castalia.train.trainer import Trainer

__version__ = "0.1.0"
__all__ = ["Trainer", "__version__", "load", "load_config", "prepare", "read_metrics", "train"]

PLACES = {
    "Trainer": "castalia.train.trainer",
    "load": "castalia.inference",
    "load_config": "castalia.recipes",
    "prepare": "castalia.corpus",
    "read_metrics": "castalia.monitor.table",
}
"""Public name -> its module, imported on first use: `import castalia` must not wait for torch."""


class TrainRoom(ModuleType):
    """`castalia.train`, which is a room and a verb: `castalia.train("debug", steps=20)`."""

    def __call__(self, *words: Any, **settings: Any) -> Any:
        """See `castalia.recipes.training.train`."""
        from castalia.recipes.training import train

        return train(*words, **settings)


class CastaliaModule(ModuleType):
    """The package, which makes a verb of its room `train` as soon as that is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Python binds a submodule to its package here, whichever module imported it first.
        if name == "train":
            value.__class__ = TrainRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = CastaliaModule


def rooms() -> set[str]:
    """Names of the packages inside."""
    return {entry.name for entry in os.scandir(__path__[0]) if entry.is_dir()} - {"__pycache__"}


def __getattr__(name: str) -> Any:
    """Import a public name or a room on first use."""
    if name in PLACES:
        return getattr(importlib.import_module(PLACES[name]), name)
    if not name.startswith("_") and name in rooms():
        return importlib.import_module(f"{__name__}.{name}")
    # With `name` and `obj` Python itself adds the nearest right name.
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__]
    )


def __dir__() -> list[str]:
    """The public names and the rooms, whether or not they are imported yet."""
    special = {name for name in globals() if name.startswith("__")}
    return sorted({*special, *__all__, *rooms()})
