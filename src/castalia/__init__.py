"""Castalia trains, studies and serves suites of language models, on a laptop CPU and on a GPU cluster alike."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from castalia.inference import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """`castalia.load` on first use, so that `import castalia` and `--help` do not wait for torch."""
    if name == "load":
        from castalia.inference import load

        return load
    raise AttributeError(f"module 'castalia' has no attribute {name!r}")
