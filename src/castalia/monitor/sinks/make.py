"""The sinks of a run, from its config."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from castalia.core.errors import ConfigError
from castalia.core.extras import pip_command
from castalia.monitor.sinks.follower import Follower, Tell
from castalia.monitor.sinks.sink import SINKS, About, Sink, SinkConfig


def make_sinks(
    sections: Iterable[SinkConfig], folder: Path, about: About | None = None, tell: Tell = print
) -> list[Sink]:
    """The sinks of a run, the JSONL file first whether or not it is named; the others follow it.

    Takes   about: what the services are told of the run; tell: called with their failures, one
            sentence each, from any thread.
    Raises  ConfigError if a library is missing.
    """
    sections = list(sections)
    require_libraries(sections)
    sinks: list[Sink] = [SINKS["jsonl"](SINKS["jsonl"].Config(), folder)]
    names: list[str] = []
    for section in sections:
        if section.kind == "jsonl":
            continue
        names.append(section.kind)
        # Two of a kind, such as two teams, are told apart by their place.
        count = names.count(section.kind)
        name = section.kind if count == 1 else f"{section.kind}-{count}"
        follower = Follower(SINKS[section.kind](section, folder), name, tell)
        follower.about = about or About(folder.name)
        sinks.append(follower)
    return sinks


def missing_library(kind: str) -> str | None:
    """The sentence that a library is missing, with the command that installs it; None if it is
    there or not needed."""
    library = SINKS[kind].library
    # Not imported: that takes a second or two, and many who read a config start no run.
    if library is None or find_spec(library.module) is not None:
        return None
    return (
        f"monitor {kind} needs {library.module!r}, which is not installed:"
        f" {pip_command(library.extra)}"
    )


def require_libraries(sections: Iterable[SinkConfig]) -> None:
    """Check that what the sinks need is installed.

    Raises  ConfigError with the commands that install it.
    """
    problems = [missing_library(section.kind) for section in sections]
    if found := [problem for problem in problems if problem]:
        raise ConfigError("; ".join(found))
