"""Evaluations that were begun and never ended: the process was killed, and would be again."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from castalia.core.errors import CastaliaError
from castalia.core.files import write_json

MOST = 2
"""Times that an evaluation of one step is begun without an end, before it is left out."""


class Attempts:
    """A file with the steps whose evaluation was begun and has not ended, and how often.

    The kernel ends a process that takes too much memory without a word. The run then resumes at an
    earlier checkpoint, and would end at the same evaluation for ever.

    path      the file, which is there only while it counts something.
    section   the settings of evaluations; with other ones, counting begins anew.
    """

    def __init__(self, path: Path, section: Mapping[str, Any]) -> None:
        self.path = path
        self.section = dict(section)

    def counts(self) -> dict[str, int]:
        """Times by step."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["section"] == self.section:
                return {str(step): int(times) for step, times in content["begun"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Without a file there were none, and a damaged one is worth no run.
            pass
        return {}

    def are_over(self, step: int) -> bool:
        """Whether the evaluation of a step ended the process too often."""
        return self.counts().get(str(step), 0) >= MOST

    def begin(self, step: int) -> None:
        """Count a step before its evaluation."""
        counts = self.counts()
        self.write(counts | {str(step): counts.get(str(step), 0) + 1})

    def end(self, step: int) -> None:
        """The evaluation of a step has ended, in whatever way the process outlived."""
        counts = self.counts()
        counts.pop(str(step), None)
        self.write(counts)

    def write(self, counts: Mapping[str, int]) -> None:
        """Write the file, or delete it without any."""
        # A disk that is full is no reason to end a run: what is not counted is tried again.
        with suppress(CastaliaError, OSError):
            if counts:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.path, {"section": self.section, "begun": counts})
            else:
                self.path.unlink(missing_ok=True)
