"""`castalia version`: the versions that a report of a fault needs."""

import json
import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

import typer

from castalia import __version__
from castalia.terminal.flags import AsJson


def version(as_json: AsJson = False) -> None:
    """Print the versions of Castalia, torch and Python.

    `castalia doctor` also shows the machine and the extras.

    Examples:

      castalia version

      castalia version --json
    """
    found = {"castalia": __version__, "torch": torch_version(), "python": platform.python_version()}
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, number in found.items():
        typer.echo(f"{name} {number}")


def torch_version() -> str:
    """That of the installed package: importing it would take seconds."""
    try:
        return version_of("torch")
    except PackageNotFoundError:
        return "not installed"
