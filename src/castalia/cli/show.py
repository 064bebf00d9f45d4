"""`castalia show`."""


def show() -> None:
    """(being written)"""
