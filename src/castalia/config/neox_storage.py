"""GPT-NeoX's options about object stores: `s3_path` is the mirror of a run."""

from castalia.config.neox_reading import NeoxOptions, NeoxReading, OptionRule, note

LEAST_CHUNK = 5.0
"""MiB; S3 refuses smaller parts."""


def storage(o: NeoxOptions, out: NeoxReading) -> None:
    """The bucket that checkpoints are copied to, and the size of an upload's parts, in bytes
    there."""
    if not o.has("s3_path"):
        return
    o.put(out, "checkpoint.mirror.url", o["s3_path"], "s3_path")
    chunk = max(o["s3_chunk_size"] / (1 << 20), LEAST_CHUNK)
    o.put(out, "checkpoint.mirror.chunk", chunk, "s3_chunk_size", "s3_path")
    note(
        out,
        "s3_path: checkpoints and logs are copied there in the background, and a run without them"
        " resumes from there; GPT-NeoX waits for each copy and does not load it",
        "checkpoint.mirror",
    )


STORAGE_RULES: list[tuple[tuple[str, ...], OptionRule]] = [(("s3_path", "s3_chunk_size"), storage)]
"""The options that a rule reads, and the rule."""
