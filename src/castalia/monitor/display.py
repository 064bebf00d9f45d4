"""Counts, sizes and durations as text for people."""

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def quantity(value: float) -> str:
    """1234567 -> '1.23M': a count in powers of ten, with three significant digits."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def size_text(count: float) -> str:
    """1234567 -> '1.18 MiB': bytes in binary units, with three significant digits.

    Every size that Castalia prints has these units, so that any two can be compared.
    """
    unit = 0
    while round(count) >= 1024 and unit < len(UNITS) - 1:
        count /= 1024
        unit += 1
    digits = 4 if count >= 999.5 else 3  # the integer part is never rounded, nor written as 1e+03
    return f"{count:.{digits}g} {UNITS[unit]}"


def duration(seconds: float) -> str:
    """Seconds as '42s', '3m07s', '5h02m' or '3d04h'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
