"""The dearest operations of a window, as text for a terminal and for a file."""

from collections.abc import Sequence
from typing import NamedTuple

from castalia.monitor.display import quantity

NAME = 44
"""Characters of a name; longer ones, such as those of CUDA's kernels, are cut."""


class Cost(NamedTuple):
    """What all calls of one operation, or of one part, cost."""

    name: str
    seconds: float
    """Of an operation without those that it calls, of a part with them."""
    calls: int
    flops: int = 0


def operation_lines(costs: Sequence[Cost], top: int, total: float) -> list[str]:
    """A header, and one line for each of the `top` dearest operations; shares of `total` seconds.

    On a GPU kernels and the operations that launch them have lines, so that seconds add up to more.
    """
    chosen = sorted(costs, key=lambda cost: -cost.seconds)[:top]
    lines = [f"{'operation':<{NAME}} {'self time':>10} {'share':>6} {'calls':>8}"]
    counted = any(cost.flops for cost in chosen)
    if counted:
        lines[0] += f" {'FLOP/s':>8}"
    for cost in chosen:
        line = line_of(cost, total)
        if counted and cost.flops and cost.seconds:
            line += f" {quantity(cost.flops / cost.seconds):>8}"
        lines.append(line)
    return lines


def part_lines(costs: Sequence[Cost], total: float) -> list[str]:
    """A header and one line a part, in the order of its first call; parts lie in one another."""
    lines = [f"{'part':<{NAME}} {'time':>10} {'share':>6} {'calls':>8}"]
    return lines + [line_of(cost, total) for cost in costs]


def line_of(cost: Cost, total: float) -> str:
    """Name, time, share of `total` seconds and calls."""
    name = cost.name
    if len(name) > NAME:
        name = f"{name[: NAME - 3]}..."
    share = cost.seconds / total if total else 0.0
    return f"{name:<{NAME}} {seconds_text(cost.seconds):>10} {share:>6.1%} {cost.calls:>8,}"


def seconds_text(seconds: float) -> str:
    """`1.23 s`, `45.6 ms` or `789 us`."""
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} us"
