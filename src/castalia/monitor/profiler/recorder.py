"""`Recorder`: one window of steps on one rank, in torch's profiler or for nsys."""

import gzip
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from castalia.core.files import atomic_write
from castalia.monitor.parts import listen, unlisten
from castalia.monitor.profiler.config import ProfileConfig
from castalia.monitor.profiler.memory import Change, Span, by_part, timeline
from castalia.monitor.profiler.modules import MarkedModules
from castalia.monitor.profiler.table import Cost, operation_lines, part_lines

MEMORY = "[memory]"
"""torch's name of an allocation among the events."""
STEP = "ProfilerStep"
"""The name by which TensorBoard's profiler plugin knows a step."""
HISTORY = 200_000
"""Allocations of a GPU that a snapshot has at most; each has a stack, some KB in all."""


class Recorder:
    """Records from `begin` to `end`; `write` leaves the files.

    Parts of the steps are marked while it records, and cost nothing before and after.
    """

    def __init__(
        self, config: ProfileConfig, folder: Path, rank: int, device: torch.device
    ) -> None:
        self.config = config
        self.folder = folder
        self.rank = rank
        self.device = device
        self.first = 0
        self.names: dict[str, None] = {}
        """Parts in the order of their first calls."""
        self.step_range: AbstractContextManager[Any] | None = None
        self.modules: MarkedModules | None = None
        self.profiler: profile | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether the rank computes on a GPU."""
        return self.device.type == "cuda"

    @property
    def for_nsys(self) -> bool:
        """Whether nsys records, and torch does not; nsys knows the ranges of a GPU's program."""
        return self.config.nsys and self.on_gpu

    def begin(self, step: int, roots: list[nn.Module]) -> None:
        """Record from step `step` on.

        Raises  RuntimeError if torch's profiler is in use.
        """
        if torch.autograd._profiler_enabled():
            # torch has one at a time, and would end that one without a word.
            raise RuntimeError("torch's profiler is in use by another part of this program")
        self.first = step
        if self.config.memory and self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY)
        if self.for_nsys:
            torch.cuda.cudart().cudaProfilerStart()
        else:
            self.profiler = self.make_profiler()
            self.profiler.start()
        listen(self.mark)
        self.modules = MarkedModules(roots)
        self.begin_step(step)

    def make_profiler(self) -> profile:
        """torch's profiler with the options of the config."""
        config = self.config
        wanted = {ProfilerActivity.CPU}
        if self.on_gpu:
            wanted.add(ProfilerActivity.CUDA)
        return profile(
            # A build without CUDA has no recorder for it.
            activities=wanted & supported_activities(),
            record_shapes=config.shapes or config.flops,
            # A snapshot says more of a GPU's memory.
            profile_memory=config.memory and not self.on_gpu,
            with_stack=config.stacks,
            with_flops=config.flops,
        )

    def mark(self, name: str) -> AbstractContextManager[Any]:
        """The context of a part."""
        self.names.setdefault(name)
        return self.range_of(name)

    def range_of(self, name: str) -> AbstractContextManager[Any]:
        """A named range in the trace, or for nsys."""
        if self.for_nsys:
            return nvtx_range(name)
        return record_function(name)

    def begin_step(self, step: int) -> None:
        """The range of a step, from the end of the step before it."""
        self.end_step()
        self.step_range = self.range_of(f"{STEP}#{step}")
        self.step_range.__enter__()

    def end_step(self) -> None:
        """Leave the range of the step."""
        if self.step_range is not None:
            self.step_range.__exit__(None, None, None)
            self.step_range = None

    def end(self) -> None:
        """Stop recording."""
        self.end_step()
        unlisten(self.mark)
        if self.modules is not None:
            self.modules.remove()
        if self.on_gpu:
            # What was queued belongs to the window.
            torch.cuda.synchronize(self.device)
        if self.profiler is not None:
            self.profiler.stop()
        else:
            torch.cuda.cudart().cudaProfilerStop()

    def forget(self) -> None:
        """Leave out the files, of a window that no step ended in."""
        if self.config.memory and self.on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)

    def write(self, last: int) -> list[str]:
        """Write the files of the steps up to `last`; lines for the log, the table among them.

        Raises  OSError or CastaliaError if the disk does not take a file; no part of it is left.
        """
        name = f"steps-{self.first}-{last}-rank{self.rank}"
        lines = [f"profile: steps {self.first} to {last} of rank {self.rank}"]
        try:
            if self.profiler is not None:
                # As TensorBoard's plugin wants it; Perfetto and chrome://tracing read it too.
                trace = self.folder / f"{name}.pt.trace.json.gz"
                self.folder.mkdir(parents=True, exist_ok=True)
                # Last, since it empties the profiler.
                lines += self.write_table(name)
                lines += self.write_memory(name)
                save_trace(self.profiler, trace)
                lines[0] += f": {trace}"
            else:
                lines[0] += " were marked for nsys"
                lines += self.write_memory(name)
        finally:
            self.forget()
        return lines

    def write_table(self, name: str) -> list[str]:
        """The dearest operations, which are returned, and all parts, to a text file."""
        assert self.profiler is not None
        operations = []
        busy = 0.0
        parts: dict[str, Cost] = {}
        total = 0.0
        hidden = {MEMORY, *self.python_functions()}
        timed = DeviceType.CPU
        if self.on_gpu and ProfilerActivity.CUDA in supported_activities():
            timed = DeviceType.CUDA
        for event in self.profiler.key_averages():
            on_host = event.device_type == DeviceType.CPU
            # A GPU has a range of the same name, around the kernels: parts are timed on the host.
            if event.is_user_annotation and on_host:
                cost = Cost(event.key, event.cpu_time_total / 1e6, event.count)
                total += cost.seconds if event.key.startswith(STEP) else 0.0
                parts[event.key] = cost
            elif not event.is_user_annotation and event.key not in hidden:
                micros = event.self_cpu_time_total
                if timed == DeviceType.CUDA:
                    micros = event.self_device_time_total
                # The time of a kernel is also that of the operation that launched it.
                if event.device_type == timed:
                    busy += micros / 1e6
                operations.append(Cost(event.key, micros / 1e6, event.count, event.flops))
        table = operation_lines(operations, self.config.top, busy)
        ours = [parts[each] for each in self.names if each in parts]
        with atomic_write(self.folder / f"{name}.txt", synced=False) as file:
            file.write("\n".join([*table, "", *part_lines(ours, total), ""]))
        return table

    def python_functions(self) -> set[str]:
        """Names of Python's functions among the events, which stacks add: no operations."""
        if not self.config.stacks:
            return set()
        return {event.name() for event in self.events() if event.is_python_function()}

    def events(self) -> Any:
        """What torch recorded, in the order of time."""
        assert self.profiler is not None and self.profiler.profiler is not None
        result: Any = self.profiler.profiler.kineto_results
        return result.events()

    def write_memory(self, name: str) -> list[str]:
        """The file about memory, and the line that names it; nothing where none is recorded."""
        if not self.config.memory:
            return []
        folder = Path(self.config.memory_folder or self.folder)
        if self.on_gpu:
            path = folder / f"{name}.memory.pickle"
            with atomic_write(path, "wb", synced=False) as file:
                pickle.dump(torch.cuda.memory._snapshot(), file)
            return [f"memory: {path}, for pytorch.org/memory_viz"]
        if self.profiler is None:
            return []
        spans, changes = self.recorded()
        parts = by_part(spans, changes)
        found = {
            "steps": name,
            "parts": [each._asdict() for each in parts],
            "timeline": timeline(changes),
        }
        path = folder / f"{name}.memory.json"
        with atomic_write(path, synced=False) as file:
            json.dump(found, file)
        return [f"memory by part: {path}"]

    def recorded(self) -> tuple[list[Span], list[Change]]:
        """Calls of our parts, and allocations, in the order of time."""
        spans = []
        changes = []
        for event in self.events():
            name = event.name()
            if name == MEMORY:
                changes.append(Change(event.start_ns(), event.nbytes()))
            elif name in self.names and event.is_user_annotation():
                spans.append(Span(event.start_ns(), event.end_ns(), name))
        return spans, sorted(changes)


@contextmanager
def nvtx_range(name: str) -> Iterator[None]:
    """A range that nsys shows."""
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


def save_trace(profiler: profile, path: Path) -> None:
    """The trace as compressed JSON.

    Raises  OSError or CastaliaError if the disk does not take all of it.
    """
    # A folder, since torch writes beside the name that it is given, too.
    with TemporaryDirectory(prefix=".trace-", dir=path.parent) as folder:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        # torch writes in C++ and tells nobody of a full disk.
        require_end(plain)
        with (
            open(plain, "rb") as source,
            atomic_write(path, "wb", synced=False) as file,
            # The lowest level: traces are large and repetitive.
            gzip.GzipFile(path.stem, "wb", 1, file) as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)


def require_end(path: Path) -> None:
    """Raises  OSError if a JSON object was cut off, or never written."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 64))
        # So many bytes at most: a device, which takes nothing, may have no end.
        if not file.read(64).rstrip().endswith(b"}"):
            raise OSError(f"{path} is incomplete after {size} bytes; is the disk full?")
