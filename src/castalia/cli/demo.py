"""`castalia demo`."""


def demo() -> None:
    """(being written)"""
