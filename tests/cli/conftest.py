"""What the tests of this room share."""

import sys

import pytest

from castalia.cli import main


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*words): run `castalia WORDS` here; returns (exit status, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["castalia", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call
