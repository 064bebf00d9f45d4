"""`castalia generate`."""


def generate() -> None:
    """(being written)"""
