"""The page of `castalia doctor`, for a terminal of any width."""

import os
from collections.abc import Iterable
from typing import Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from castalia.core.extras import pip_command
from castalia.machine.table import QUIET
from castalia.monitor.display import size_text

ALIKE = 1.05
"""Factor below which two choices are alike, for all that can be measured."""
PIPE_WIDTH = 100
"""Columns where the output is not a terminal."""


def print_page(found: dict[str, Any]) -> None:
    """Print what `examined` found."""
    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    with console.capture() as page:
        put_page(console, found)
    # rich fills the cells of a table with spaces to their width.
    typer.echo("\n".join(line.rstrip() for line in page.get().splitlines()))


def put_page(console: Console, found: dict[str, Any]) -> None:
    """The sections, one after the other."""
    versions = found["versions"]
    console.print(
        f"castalia {versions['castalia']}, Python {versions['python']}, torch {versions['torch']}"
    )
    section(console, "This machine", pairs(machine_lines(found)))
    section(console, "Kernels", pairs(found["kernels"].items()))
    section(console, "Matrix products: GFLOP/s and library, by rows", products(found))
    for note in notes(found):
        console.print(Padding(note, (0, 0, 0, 2)))
    section(console, "Chosen by speed", pairs(choice_lines(found["choices"])))
    section(console, "Extras", extras(found["extras"]))
    if versions["gigatoken"] is None:
        console.print("\nWithout gigatoken text becomes tokens several times slower; it comes with")
        console.print("  pip install gigatoken orjson", soft_wrap=True)
    missing = [extra["name"] for extra in found["extras"] if not extra["installed"]]
    if missing:
        console.print("\nWhat is missing, or a part of it, comes with")
        # One line, however narrow the terminal: it is to be copied.
        console.print(f"  {pip_command(','.join(missing))}", soft_wrap=True)


def section(console: Console, title: str, table: Table) -> None:
    """A title, and what stands under it."""
    console.print(f"\n{title}", style="bold")
    console.print(Padding(table, (0, 0, 0, 2), expand=False))


def notes(found: dict[str, Any]) -> list[str]:
    """What is remarkable about the rates."""
    texts = []
    last = {dtype: cells[-1] for dtype, cells in found["products"].items()}
    for dtype, cell in last.items():
        slower = last["fp32"]["rate"] / cell["rate"]
        # What is said of fp32 itself would be of its gradients, which are no choice.
        if slower > ALIKE and not dtype.startswith("fp32"):
            texts.append(
                f"{dtype} is slow here: {digits(slower)} times as long as fp32 at {cell['rows']}"
                " rows."
            )
    if found["busy"] >= QUIET:
        texts.append(
            f"Other programs took {found['busy']:.0%} of the processors meanwhile, so the rates may"
            " be too low: castalia doctor --measure in a quiet moment."
        )
    return texts


def pairs(lines: Iterable[tuple[str, str]]) -> Table:
    """Names and what is said of them."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in lines:
        table.add_row(name, text)
    return table


def machine_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The processor and all around it."""
    machine = found["machine"]
    cache = found["cache"]
    step = found["compiled_step"]
    rate = size_text(machine["memory_rate"])
    instructions = " ".join(machine["instructions"]) or "none that make products faster"
    cores = counted(machine["cores"], "core")
    threads = counted(machine["threads"], "thread")
    lines = [
        ("processor", f"{machine['processor']}, {cores}, {threads}"),
        ("instructions", f"{machine['level']}: {instructions}"),
        ("memory", f"{size_text(machine['memory_bytes'])}, read at {rate} a second"),
        ("GPU", ", ".join(map(gpu_text, found["gpus"])) or "none"),
        ("compiled step", step_text(step)),
        ("cache", cache["folder"] + ("" if cache["writable"] else ", which cannot be written")),
    ]
    if machine["caps"]:
        caps = " ".join(f"{name}={value}" for name, value in machine["caps"].items())
        lines.insert(2, ("capped by", caps))
    return lines


def counted(count: int, noun: str) -> str:
    """1 core, 2 cores."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def gpu_text(card: dict[str, Any]) -> str:
    """One GPU."""
    return f"{card['name']}, {size_text(card['memory_bytes'])}"


def step_text(step: dict[str, Any]) -> str:
    """The code that decodes, and the compiler."""
    compiler = step["compiler"] or "none found"
    if step["level"] is None:
        return f"does not run: decoding takes torch's slower operators (compiler: {compiler})"
    return f"runs with the instructions of {step['level']} (compiler: {compiler})"


def products(found: dict[str, Any]) -> Table:
    """The measured rates."""
    table = Table(box=None, pad_edge=False, header_style="italic")
    table.add_column("rows", no_wrap=True)
    columns = [cell["rows"] for cell in next(iter(found["products"].values()))]
    for rows in columns:
        table.add_column(str(rows), justify="right", no_wrap=True)
    for dtype, cells in found["products"].items():
        # Products of the backward pass are measured at fewer numbers of rows.
        texts = {cell["rows"]: f"{digits(cell['rate'] / 1e9)} {cell['library']}" for cell in cells}
        table.add_row(dtype, *(texts.get(rows, "") for rows in columns))
    return table


def digits(value: float) -> str:
    """0.71, 7.1, 71, 712, 7,120."""
    if value >= 9.95:
        return f"{value:,.0f}"
    return f"{value:.2g}"


def choice_lines(choices: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What `auto` means, and why."""
    lines = []
    for choice in choices:
        factor = choice["factor"]
        gain = f", {digits(factor)} times as fast as"
        if factor < 1:
            gain = f", and takes {digits(1 / factor)} times as long as"
        if 1 / ALIKE < factor < ALIKE:
            gain = ", about as fast as"
        text = (
            f"{choice['option']} is {choice['chosen']}{gain} {choice['than']}"
            f" ({choice['measured_on']})"
        )
        lines.append((choice["for"], text))
    return lines


def extras(found: list[dict[str, Any]]) -> Table:
    """The optional parts."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for extra in found:
        state = "installed" if extra["installed"] else "missing"
        table.add_row(extra["name"], state, extra["gives"])
    return table
