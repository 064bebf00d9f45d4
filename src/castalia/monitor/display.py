"""Numbers as people read them."""


def quantity(value: float, unit: str = "") -> str:
    """1234567 -> '1.23M'. Powers of ten; three digits that count."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}{unit}"
    return f"{value:.3g}{unit}"


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
