"""A side of a benchmark in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class Worker:
    """An engine in its own process, which answers a word with one line of JSON."""

    def __init__(self, script: str, case: dict[str, Any]) -> None:
        """`script` is a file of this folder."""
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, str(HERE / script), json.dumps(case)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def answer(self) -> Any:
        """The next line; if the process died, exit with the end of its log."""
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            self.log.seek(0)
            raise SystemExit(f"an engine stopped: {self.log.read()[-2000:]}")
        return json.loads(line)

    def ask(self, word: str) -> Any:
        """Send one word and wait for the answer."""
        self.tell(word)
        return self.answer()

    def tell(self, word: str) -> None:
        """Send one word."""
        assert self.process.stdin is not None
        print(word, file=self.process.stdin, flush=True)


def serve(build: Callable[[], Any], words: Mapping[str, Callable[[Any], Any]]) -> None:
    """In the process of a side: build its engine, and answer each word until `stop`.

    `words` maps a word to what makes its answer of the engine; `ready` is answered unasked.
    """
    answers = os.fdopen(os.dup(1), "w")
    # Prints of libraries go to stderr, so that stdout holds answers alone.
    os.dup2(2, 1)
    engine = build()
    for word in chain(["ready"], map(str.strip, sys.stdin)):
        if word == "stop":
            # Whoever sends another case waits for this: this process may have read ahead, and would
            # take the next line with it.
            print("null", file=answers, flush=True)
            return
        print(json.dumps(words[word](engine)), file=answers, flush=True)
