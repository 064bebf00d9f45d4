"""`castalia view`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from castalia.cli.runs import USUAL
from castalia.cli.serve import HERE, listening
from castalia.terminal.flags import note, panel

if TYPE_CHECKING:
    from castalia.analysis.live.readers import OpenRows

LISTEN = panel("Address")


def view(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH...]",
            help="Runs, folders of runs, results stores; by default this folder if it is a run,"
            " else runs.",
        ),
    ] = None,
    host: Annotated[
        str, LISTEN(help="Address to listen on; 0.0.0.0 is reachable from other machines.")
    ] = "127.0.0.1",
    port: Annotated[
        int, LISTEN(metavar="N", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8765,
    opens: Annotated[bool, LISTEN("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Serve the page of `castalia report` live, while runs train, until Ctrl-C.

    The page follows the files of the runs, and runs that appear join. It also reads on demand: the
    rows of any step, samples checkpoint by checkpoint, and the rows that a checkpoint completes by
    itself. Nothing in the folders is changed.

    Examples:

      castalia view

      castalia view runs/first runs/second --port 8080
    """
    from castalia.analysis.live.server import LiveView, serve_page
    from castalia.core.extras import require

    require("plotly.offline", "report", "castalia view")
    live = LiveView([Path(path) for path in paths or [usual_place()]], open_rows)
    if host not in HERE:
        typer.echo(
            f"castalia: warning: anyone who reaches {host} can read the runs' data; there is no"
            " password",
            err=True,
        )
    with listening(host, port) as listener:
        # The port of the socket, because port 0 takes a free one.
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}/"
        typer.echo(f"castalia: {address} shows {', '.join(paths or [usual_place()])}", err=True)
        if opens:
            import webbrowser

            webbrowser.open(address)
        serve_page(listener, live)


def usual_place() -> str:
    """The folder that is viewed without a path: this one if it is a run, else `runs`.

    Raises  ConfigError if there is neither.
    """
    from castalia.analysis.live.watched import MARKS
    from castalia.config.anchor import CONFIG, run_folder_of
    from castalia.core.errors import ConfigError

    here = Path.cwd() / CONFIG
    if (here.is_file() and run_folder_of(here)) or any(map(os.path.isfile, MARKS)):
        return "."
    if not os.path.isdir(USUAL):
        raise ConfigError(
            f"this folder is no run and has no folder {USUAL}; name what to view: castalia view"
            " PATH"
        )
    return USUAL


def open_rows(folder: Path) -> "OpenRows":
    """The rows of the run in a folder, to be read: a corpus that is gone is not built again.

    Raises  ConfigError or DataError if the config or the token files cannot be read.
    """
    from castalia.analysis.live.readers import OpenRows
    from castalia.core.errors import DataError
    from castalia.corpora.build import find_corpus
    from castalia.data import load_tokenizer
    from castalia.recipes import resolve
    from castalia.runs.rows import rows_as_trained

    config = resolve([str(folder)]).config
    corpus = config.data.corpus
    if not config.data.train_prefixes and corpus is not None:
        place = Path(config.output) / "data"
        if find_corpus(corpus, place) is None:
            raise DataError(f"the corpus {corpus} of this run is not in {place}")
    config, rows = rows_as_trained(config, note)
    tokenizer = None
    if config.data.tokenizer:
        tokenizer = load_tokenizer(config.data.tokenizer)
    return OpenRows(rows, config.train.batches, config.train.steps, tokenizer)
