"""`castalia prepare`."""


def prepare() -> None:
    """(being written)"""
