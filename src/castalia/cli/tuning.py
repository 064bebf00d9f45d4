"""`castalia lr-find` and `castalia coord-check`: short runs before a long one."""

import json
from typing import Annotated

import typer

from castalia.terminal.flags import AsJson, Config, ConfigFolder


def lr_find(
    config: Config,
    conf_dir: ConfigFolder = None,
    low: Annotated[
        float, typer.Option("--from", metavar="LR", help="Learning rate of the first step.")
    ] = 1e-5,
    high: Annotated[
        float, typer.Option("--to", metavar="LR", help="Learning rate of the last step.")
    ] = 1.0,
    steps: Annotated[int, typer.Option(metavar="N", min=8, help="Steps, at most.")] = 100,
    picture: Annotated[
        str, typer.Option(metavar="FILE", help="SVG file to write.")
    ] = "lr-find.svg",
    as_json: AsJson = False,
) -> None:
    """Find the learning rate of a run: it rises from step to step until the loss breaks away.

    The real loop trains from the run's first step; nothing is written but the picture. Suggested is
    a tenth of the rate with the lowest loss; the rate of the steepest descent is named beside it.

    Examples:

      castalia lr-find debug

      castalia lr-find pythia-70m data.train=data/c --from 1e-6 --to 0.1 --steps 200
    """
    from castalia.analysis.tuning.chart import picture_file
    from castalia.analysis.tuning.lr_find import find_lr, table, write_picture
    from castalia.cli.scaling import print_table
    from castalia.core.ranks import environment
    from castalia.recipes import in_folder, load_config

    picture_file(picture)
    found = find_lr(load_config(in_folder(conf_dir, config)), low=low, high=high, steps=steps)
    if environment()[0]:
        return
    file = write_picture(found, picture)
    if as_json:
        typer.echo(json.dumps(found.as_dict() | {"picture": str(file)}, indent=2))
        return
    print_table(["learning rate", "loss", "smoothed"], table(found))
    typer.echo("")
    if not found.diverged:
        typer.echo(f"the loss did not break away up to {high:g}; search on with --to")
    typer.echo(f"lowest loss at {found.lowest:.1e}, steepest descent at {found.steepest:.1e}")
    typer.echo(f"suggestion: optim.lr={found.suggestion:g}; picture: {file}")


def coord_check(
    config: Config,
    conf_dir: ConfigFolder = None,
    widths: Annotated[
        str,
        typer.Option(metavar="N,N,...", help="Values of hidden_size, with commas between them."),
    ] = "64,128,256",
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Steps at each width.")] = 6,
    picture: Annotated[
        str, typer.Option(metavar="FILE", help="SVG file to write.")
    ] = "coord-check.svg",
    as_json: AsJson = False,
) -> None:
    """Compare the size of activations between widths, under μP and without it.

    Each width trains a few steps in the real loop, at the same learning rate; nothing is written
    but the picture. Printed is the slope of log size against log width: near 0 under μP at every
    step, and above 0 where an activation grows with the width.

    Examples:

      castalia coord-check debug optim.lr=1e-2

      castalia coord-check pythia-70m data.train=data/c --widths 128,256,512
    """
    from castalia.analysis.tuning.chart import picture_file
    from castalia.analysis.tuning.coord_check import (
        MUP,
        STANDARD,
        coordinate_check,
        growing,
        slopes,
        table,
        write_picture,
    )
    from castalia.cli.scaling import print_table
    from castalia.recipes import in_folder, load_config

    picture_file(picture)
    points = coordinate_check(load_config(in_folder(conf_dir, config)), whole(widths), steps)
    file = write_picture(points, picture)
    if as_json:
        values = {
            kind: [each._asdict() for each in slopes(points, kind)] for kind in (MUP, STANDARD)
        }
        sizes = [point._asdict() for point in points]
        typer.echo(json.dumps({"slopes": values, "sizes": sizes, "picture": str(file)}, indent=2))
        return
    header = ["slope of", "μP, step 1", f"step {steps}", "standard, step 1", f"step {steps}"]
    print_table(header, table(points))
    typer.echo("")
    for kind in (MUP, STANDARD):
        parts = growing(points, kind)
        grows = (
            f"{len(parts)} parts grow with the width" if parts else "nothing grows with the width"
        )
        typer.echo(f"{kind}: {grows} at step {steps}")
    typer.echo(f"picture: {file}")


def whole(widths: str) -> list[int]:
    """The numbers in `64,128`.

    Raises  ConfigError if one is no positive integer.
    """
    from castalia.core.errors import ConfigError

    words = [word.strip() for word in widths.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"--widths {widths}: expected integers with commas, such as 64,128,256")
    return [int(word) for word in words]
