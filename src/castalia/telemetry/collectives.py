"""Collectives of the passes of a step, by kind: calls, numbers and time, from torch's profiler.

The profiler records the whole of a measured step, which that step pays for; no other step does.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from castalia.distributed import World
from castalia.monitor.parts import part
from castalia.telemetry.statistic import Statistic
from castalia.telemetry.times import STATISTICS

CALL = re.compile(r"(?:gloo|nccl):(\w+)$")
"""Name of a call on the host: `gloo:all_reduce`. Of gloo its time is that of the collective, of
nccl only that of its launch."""
KERNEL = re.compile(r"ncclDevKernel_([A-Za-z]+?)(?:[_(]|$)")
"""Name of a kernel on the GPU: `ncclDevKernel_AllReduce_Sum_f32_RING_LL`."""
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send", "recv")
"""Kinds that are told apart, in the order of the vectors; the others are `other`."""
SAME = {"_all_gather_base": "all_gather", "_reduce_scatter_base": "reduce_scatter"}
"""nccl's names of calls that work on one large tensor."""
MICROSECOND = 1e-6


class Span(NamedTuple):
    """One collective, or the kernel of one, in microseconds."""

    kind: str
    began: float
    ended: float
    numbers: int
    """Of its first tensor on this rank; 0 for a kernel."""
    is_call: bool
    is_timed: bool


def spans_of(events: Iterable[Any]) -> Iterator[Span]:
    """The collectives among the events of a profile."""
    for event in events:
        span = event.time_range
        call = CALL.match(event.name)
        if call and event.device_type != DeviceType.CPU:
            # The name of a call is also a range on the GPU, around its kernels.
            continue
        if call:
            shape: list[int] = next((sizes for sizes in event.input_shapes if sizes), [])
            numbers = 1 if shape else 0
            for size in shape:
                numbers *= int(size)
            timed = event.name.startswith("gloo")
            yield Span(kind_of(call[1]), span.start, span.end, numbers, True, timed)
        elif kernel := KERNEL.match(event.name):
            yield Span(kind_of(snake(kernel[1])), span.start, span.end, 0, False, True)


def snake(name: str) -> str:
    """AllReduce -> all_reduce; SendRecv -> send, which is what a pipeline's kernels do."""
    parts = re.findall("[A-Z][a-z]*", name)
    if parts[:1] == ["Send"]:
        return "send"
    return "_".join(parts).lower()


def kind_of(name: str) -> str:
    """One of KINDS, or other."""
    name = SAME.get(name, name)
    return next((kind for kind in KINDS if name.startswith(kind)), "other")


class Collectives(Statistic):
    """See the module."""

    def __init__(self, every: int, world: World) -> None:
        super().__init__(every)
        self.world = world
        self.kinds = (*KINDS, "other")

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record the passes, unless another profiler records them."""
        if torch._C._autograd._profiler_enabled():
            self.sums = self.counted([], 0)
            yield
            return
        activities = [ProfilerActivity.CPU]
        if self.world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        recorder = profile(activities=activities, record_shapes=True)
        with part(STATISTICS):
            recorder.start()
        try:
            yield
        finally:
            with part(STATISTICS):
                recorder.stop()
                self.sums = self.counted(spans_of(recorder.events()), 1)

    def counted(self, spans: Iterable[Span], ranks: int) -> torch.Tensor:
        """Calls, numbers and seconds of each kind, and the ranks that recorded them, float64."""
        sums = torch.zeros(len(self.kinds), 3, dtype=torch.float64)
        for span in spans:
            place = self.kinds.index(span.kind)
            sums[place, 0] += span.is_call
            sums[place, 1] += span.numbers
            sums[place, 2] += (span.ended - span.began) * MICROSECOND * span.is_timed
        counts = torch.tensor([ranks], dtype=torch.float64)
        return torch.cat([sums.flatten(), counts]).to(self.world.device)

    def metrics(self, sums: list[float], maxima: list[float]) -> Mapping[str, Any]:
        """`collectives/KIND/{calls,numbers,seconds}`, means of a rank."""
        out: dict[str, Any] = {}
        # Ranks on which another profiler was running have recorded nothing.
        ranks = max(1.0, sums[-1])
        for place, kind in enumerate(self.kinds):
            calls, numbers, seconds = (value / ranks for value in sums[3 * place : 3 * place + 3])
            if calls:
                out[kind] = {"calls": calls, "numbers": numbers, "seconds": round(seconds, 6)}
        return {"collectives": out}
