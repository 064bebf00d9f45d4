"""`castalia train`."""


def train() -> None:
    """(being written)"""
