"""What goes along with the numbers of a run: texts as tables, and files at its end."""

import json
from pathlib import Path

from castalia.core.files import sha256_of
from castalia.monitor.sinks.record import Record
from castalia.monitor.sinks.sink import Sink

SAMPLES = Path("samples") / "samples.json"
"""The texts that evaluations write: a list of {"step", "prompt", "text"}."""
FILES = ("config.yaml", "env.json", "mixture.jsonl", "events.jsonl", "report.html")
"""Files of the run folder that go along at its end."""


class Along:
    """Hands tables and files to a sink, each content once, as its record says."""

    def __init__(self, sink: Sink, record: Record) -> None:
        self.sink = sink
        self.record = record
        self.seen_samples = 0
        """Time of change of the file of samples when all of it was handed over, in ns."""

    def send_samples(self, step: int) -> None:
        """Hand the tables of the steps up to `step` to the sink."""
        path = self.sink.folder / SAMPLES
        if type(self.sink).table is Sink.table or not path.is_file():
            return
        changed = path.stat().st_mtime_ns
        if changed == self.seen_samples:
            return
        samples = json.loads(path.read_text(encoding="utf-8"))
        numbers = sorted({sample["step"] for sample in samples})
        for number in numbers:
            if self.record.tables < number <= step:
                rows = [sample for sample in samples if sample["step"] == number]
                self.sink.table("samples", number, rows)
                self.record.tables = number
        # Those of a step are written before its line: they may be ahead of what was read.
        if not numbers or numbers[-1] <= step:
            self.seen_samples = changed

    def send_files(self) -> None:
        """Hand over the files of the run that the sink has not, or in another state."""
        for name in FILES:
            path = self.sink.folder / name
            if not path.is_file():
                continue
            digest = sha256_of(path)
            if self.record.files.get(name) != digest:
                self.sink.file(path)
                self.record.files[name] = digest
