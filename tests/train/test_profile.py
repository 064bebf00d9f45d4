"""Recorded steps: what the files say, that the weights are the same, and what cuts a window."""

import gzip
import json
import os
import pickle
import resource
from collections import Counter

import pytest
import torch
from tests.gpu.pretended import PretendedGpu

from castalia.core.errors import TrainingError
from castalia.monitor import parts
from castalia.recipes import load_config
from castalia.train.hooks import Hook, Profile, Save
from castalia.train.trainer import Trainer

SMALL = (
    "debug",
    "model.num_layers=2",
    "model.hidden_size=32",
    "data.seq_length=16",
    "train.batch_size=4",
    "train.micro_batch_size=2",
    "train.steps=5",
    "checkpoint.every=null",
    "checkpoint.steps=[]",
)


@pytest.fixture
def trainer(tokens, tmp_path):
    """Callable: a trainer in the folder of the test that profiles."""

    def make(*words, hooks=()):
        config = load_config([*SMALL, f"data.train={tokens}", f"output={tmp_path}", *words])
        return Trainer(config, hooks=[*hooks, Profile()])

    return make


def weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def same(ours, theirs):
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def names_of(path):
    """How often each range of ours is in a trace."""
    with gzip.open(path, "rt") as file:
        trace = json.load(file)
    return Counter(
        event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"
    )


def test_a_window_is_recorded_and_changes_nothing(trainer, tmp_path, capsys):
    plain = trainer()
    plain.fit()
    assert not (tmp_path / "profile").exists()
    profiled = trainer("profile.steps=2:3", "profile.memory=true", "profile.flops=true")
    profiled.fit()
    assert same(weights(plain), weights(profiled))
    assert not parts.listeners
    names = names_of(tmp_path / "profile/steps-2-3-rank0.pt.trace.json.gz")
    assert names["ProfilerStep#2"] == names["ProfilerStep#3"] == 1
    assert "ProfilerStep#1" not in names and "ProfilerStep#4" not in names
    # Two steps of two micro-batches.
    for name in ("forward", "backward", "loss", "embed", "layers.0.attn", "layers.1", "norm"):
        assert names[name] == 4, name
    for name in ("data", "update", "gradient norm", "hook Profile"):
        assert names[name] == 2, name
    assert names["head"] >= 4
    text = (tmp_path / "profile/steps-2-3-rank0.txt").read_text()
    log = capsys.readouterr().out
    table = text.split("\n\n")[0]
    assert len(table.splitlines()) == 11 and table in log
    # Which operations are the dearest depends on the machine, and on what else it does.
    assert "aten::" in table and "FLOP/s" in table and "ProfilerStep" not in table
    calls = {line.split()[0]: line.split()[-1] for line in text.split("\n\n")[1].splitlines()}
    assert calls["forward"] == "4" and calls["update"] == "2"


def test_stacks_are_in_the_trace_and_not_in_the_table(trainer, tmp_path):
    trainer("profile.steps=2", "profile.stacks=true", "profile.top=40").fit()
    with gzip.open(tmp_path / "profile/steps-2-2-rank0.pt.trace.json.gz", "rt") as file:
        kinds = {event.get("cat") for event in json.load(file)["traceEvents"]}
    assert "python_function" in kinds
    text = (tmp_path / "profile/steps-2-2-rank0.txt").read_text()
    assert "aten::mm" in text and ".py(" not in text and "nn.Module" not in text


def test_memory_by_part(trainer, tmp_path):
    trainer("profile.steps=3", "profile.memory=true").fit()
    found = json.loads((tmp_path / "profile/steps-3-3-rank0.memory.json").read_text())
    named = {part["name"]: part for part in found["parts"]}
    assert named["layers.0.mlp"]["calls"] == 2
    # What an MLP keeps for its backward pass: 32 tokens, 4 bytes, input and two widths of 128.
    assert named["layers.0.mlp"]["allocated"] >= 2 * 32 * 4 * 2 * 128
    assert named["forward"]["peak"] >= named["layers.0.mlp"]["peak"] > 0
    assert max(bytes_ for _, bytes_ in found["timeline"]) == max(
        part["peak"] for part in found["parts"]
    )


class Ends(Hook):
    """Stops, or fails, after a step."""

    def __init__(self, step, error=None):
        self.at = step
        self.error = error

    def start(self, *, ask_stop):
        self.ask_stop = ask_stop

    def after_step(self, step):
        if step.number == self.at and self.error is not None:
            raise self.error
        if step.number == self.at - 1:
            self.ask_stop()


def test_a_cut_window_is_written_and_the_rest_recorded_after_a_resume(trainer, tmp_path, capsys):
    words = ("profile.steps=2:4", "checkpoint.every=1")
    trainer(*words, hooks=[Ends(3), Save()]).fit()
    log = capsys.readouterr().out
    first = "steps-2-3-rank0.pt.trace.json.gz; the end of the run cut the window 2:4"
    assert first in log
    trainer(*words, hooks=[Save()]).fit()
    log = capsys.readouterr().out
    assert "profile: steps 2 to 4 are recorded from step 4 on" in log
    assert names_of(tmp_path / "profile/steps-4-4-rank0.pt.trace.json.gz")["ProfilerStep#4"] == 1


def test_a_run_that_fails_in_a_window_leaves_the_profiler_as_it_was(trainer, tmp_path):
    failing = trainer("profile.steps=2:4", hooks=[Ends(3, TrainingError("stop here"))])
    with pytest.raises(TrainingError, match="stop here"):
        failing.fit()
    assert names_of(tmp_path / "profile/steps-2-2-rank0.pt.trace.json.gz")["ProfilerStep#3"] == 1
    assert not parts.listeners and not torch._C._autograd._profiler_enabled()
    assert not any(module._forward_hooks for module in failing.model.modules())


class SmallDisk(Hook):
    """After the first window no file can grow beyond some KB, as on a disk that is full."""

    def after_step(self, step):
        size = 16_000 if step.number == 2 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_does_not_end_the_run(trainer, tmp_path, capfd):
    run = trainer("profile.steps=[2:2, 4:4]", hooks=[SmallDisk()])
    run.fit()
    assert run.progress.step == 5
    error = capfd.readouterr().err
    assert error.count("warning") == 1
    assert "the profile of steps 2 to 2 of rank 0 is not written, and the run goes on" in error
    left = set(os.listdir(tmp_path / "profile"))
    assert left == {
        "steps-2-2-rank0.txt",
        "steps-4-4-rank0.txt",
        "steps-4-4-rank0.pt.trace.json.gz",
    }


def test_a_window_behind_the_end_or_on_no_rank(trainer, tmp_path, capsys):
    trainer("profile.steps=[2:2, 8:9]", "profile.ranks=[1]").fit()
    assert "profile.steps 8:9 is never reached: the run ends at train.steps 5" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "profile").exists()


def test_another_profiler_of_the_program(trainer, capsys):
    run = trainer("profile.steps=2")
    with torch.profiler.profile():
        run.fit()
    assert run.progress.step == 5
    assert "profile.steps 2:2 is not recorded" in capsys.readouterr().err


class Driver:
    """The calls of a pretended GPU's driver."""

    def __init__(self, patch):
        self.calls = []
        patch.setattr(torch.cuda, "cudart", lambda: self)
        for name in ("range_push", "range_pop"):
            patch.setattr(torch.cuda.nvtx, name, self.told(name))
        patch.setattr(torch.cuda.memory, "_record_memory_history", self.told("history"))
        patch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": [1]})

    def told(self, name):
        return lambda *args, **options: self.calls.append((name, *args, *options.values()))

    def cudaProfilerStart(self):  # noqa: N802  CUDA's name
        self.calls.append(("start",))

    def cudaProfilerStop(self):  # noqa: N802  likewise
        self.calls.append(("stop",))


def test_nsys_and_a_snapshot_on_a_gpu(trainer, tmp_path, monkeypatch):
    with PretendedGpu():
        driver = Driver(monkeypatch)
        words = ("profile.steps=2:2", "profile.memory=true", "profile.nsys=true", "device=cuda")
        trainer(*words, f"profile.memory_folder={tmp_path}/snapshots").fit()
    calls = driver.calls
    kinds = [call[0] for call in calls]
    begin, end = kinds.index("start"), kinds.index("stop")
    assert kinds.count("start") == kinds.count("stop") == 1
    ranges = [call[1] for call in calls if call[0] == "range_push"]
    assert begin < kinds.index("range_push") and ranges[0] == "ProfilerStep#2"
    assert {"forward", "layers.1.mlp", "backward", "update", "data"} <= set(ranges)
    assert kinds.count("range_pop") == len(ranges)
    # The history begins before the window and ends behind its snapshot.
    assert calls[0][0] == "history" and calls[0][1] > 1000
    assert kinds.count("history") == 2 and ("history", None) in calls[end:]
    snapshot = tmp_path / "snapshots/steps-2-2-rank0.memory.pickle"
    assert pickle.loads(snapshot.read_bytes()) == {"segments": [1]}


def test_ranks_of_a_pipeline(train, tmp_path):
    words = ("parallel.pp=2", "train.micro_batch_size=6", "train.steps=3", "profile.steps=2:3")
    done = train(tmp_path, *words, processes=2)
    assert done.stdout.count("profile: steps 2 to 3 of rank") == 2
    for rank in range(2):
        names = names_of(tmp_path / f"profile/steps-2-3-rank{rank}.pt.trace.json.gz")
        assert names[f"forward stage {rank}"] == names[f"backward stage {rank}"] == 4
        assert names[f"layers.{rank}"] == 4 and f"layers.{1 - rank}" not in names
        assert names["collectives"] >= 4
