"""When to save and what to keep, here and in an object store."""

from typing import Annotated

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from castalia.config.base import Config

PYTHIA_EARLY = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
"""The early part of Pythia's 154 checkpoints."""


class MirrorConfig(Config):
    """A copy of the run in an object store. Only checkpoint/ and its hook read these fields."""

    url: str
    """Place of the copy: s3://BUCKET/PREFIX, file:///FOLDER or another URL of fsspec. Credentials
    come from the environment alone."""
    rate: PositiveFloat | None = None
    """Rate at which files are sent at most, in MiB a second; null sends as fast as it goes."""
    chunk: float = Field(64.0, ge=5)
    """Size of a part of a large file, in MiB; one part is in memory at a time."""
    keep: PositiveInt | None = None
    """Newest checkpoints that are kept there, besides those in checkpoint.steps; null keeps all."""
    retries: NonNegativeInt = 4
    """Times that a request is repeated before the mirror counts as gone, and is tried later."""
    hold: NonNegativeInt = 2
    """Checkpoints that stay here until they are mirrored though checkpoint.keep would delete them;
    at most so many."""
    wait: NonNegativeFloat = 600.0
    """Seconds that the end of the run waits for what is not there yet."""

    @field_validator("url")
    @classmethod
    def can_be_opened(cls, url: str) -> str:
        """Refuse a URL with a password, and a protocol without its package, before anything
        runs."""
        # Imported for those who name a mirror: fsspec takes a moment.
        from castalia.storage.urls import problem_of_url

        if problem := problem_of_url(url):
            raise ValueError(problem)
        return url.rstrip("/")


def read_url(value: object) -> object:
    """A URL alone stands for a mirror with its default options."""
    return {"url": value} if isinstance(value, str) else value


class CheckpointConfig(Config):
    """Steps to save: the list, every k, and always the last."""

    steps: list[NonNegativeInt] = []
    """Steps to save, for instance 0, 1, 2, 4, ..., 512."""
    every: PositiveInt | None = 1000
    """Steps from one save to the next; null saves only at `steps` and at the end."""
    keep: PositiveInt | None = None
    """Newest checkpoints that are kept, besides those in `steps`; null keeps all."""
    asynchronous: bool = True
    """Write in the background; training waits only for the copy of the weights."""
    mirror: Annotated[MirrorConfig | None, BeforeValidator(read_url)] = None
    """A URL, or a section of options: finished checkpoints and the logs of the run are copied there
    in the background, and a run without them resumes from there."""
