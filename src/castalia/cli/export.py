"""`castalia export`."""


def export() -> None:
    """(being written)"""
