"""A suffix array over a token file: where a text stands in it, how often, and what follows it."""

from castalia.core.lazy import lazy

__getattr__ = lazy(__name__, {"Index": "search", "FileScan": "search", "build_index": "building"})
