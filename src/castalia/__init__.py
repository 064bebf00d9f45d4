"""Castalia trains, studies and serves suites of language models, on a laptop or a GPU cluster."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from castalia.inference import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import `load` on first use: `import castalia` and `--help` must not wait for torch."""
    if name == "load":
        from castalia.inference import load

        return load
    raise AttributeError(f"module 'castalia' has no attribute {name!r}")
