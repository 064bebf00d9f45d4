"""The training stream: the rows that steps read, where a text stood in them, counts over them."""

from castalia.core.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "Index": "index.search",
        "Trace": "tracing",
        "Tracer": "tracing",
        "build_index": "index.building",
        "continuations": "following",
        "open_stream": "opening",
        "trace": "tracing",
    },
)
