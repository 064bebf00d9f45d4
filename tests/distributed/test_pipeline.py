"""Pipelines beyond the grid: validation, precision, reading, saving, layouts, faults.

Steps without a target are here for every kind of layout: they share the processes.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from castalia.checkpoint import read
from castalia.core.errors import ConfigError
from castalia.data import IndexedDatasetWriter
from castalia.models.stages import split
from castalia.recipes import resolve
from castalia.train.run import run

SEVERAL_RUNS = Path(__file__).with_name("several_runs.py")
BASE = (
    "debug",
    "model.num_layers=4",
    "model.hidden_size=32",
    "data.seq_length=16",
    "train.batch_size=12",
    "train.micro_batch_size=2",
    "train.steps=5",
    "train.eval_every=5",
    "train.eval_batches=2",
    "schedule.decay_steps=5",
    "checkpoint.steps=[0,3]",
    "checkpoint.every=null",
)
MODELS = {
    "plain": (),
    "tied": ("model.tie_word_embeddings=true", "data.eod_mask_loss=true"),
    # Gathers in bf16, which several processes make otherwise, round the embedding and the norms.
    "bf16": ("precision=bf16", "parallel.gather=fp32"),
    "fp16": ("precision=fp16",),
    "apart": ("data.document_mask=documents",),
    "mixed": ("data.train=[{0},{0}2]", "mixing.kind=odm", "mixing.warmup_steps=2"),
    "no targets": (
        "data.train={0}_rows",
        "data.labels={0}_rows_label",
        "data.order=file",
        # As in the grid: with 1e-8 a gradient of 1e-9 takes whole steps out of rounding noise.
        "optim.eps=1e-6",
    ),
}
PP2, PP4 = "parallel.pp=2", "parallel.pp=4"
INTERLEAVED, ZERO_BUBBLE = "parallel.schedule=interleaved_1f1b", "parallel.schedule=zero_bubble"
V = "parallel.schedule=zero_bubble_v"
THREE = "train.micro_batch_size=3"
TWO_PROCESSES = {
    "1f1b": ("plain", (PP2,)),
    "interleaved": ("tied", (PP2, INTERLEAVED)),
    "zero bubble, two stages a process": (
        "plain",
        (PP2, ZERO_BUBBLE, "parallel.stages_per_process=2"),
    ),
    "zero bubble in a V": ("plain", (PP2, V)),
    "tied": ("tied", (PP2,)),
    "bf16": ("bf16", (PP2,)),
    "fp16": ("fp16", (PP2,)),
}
FOUR_PROCESSES = {
    "four stages, tied": ("tied", (PP4,)),
    "shards, zero bubble, tied": ("tied", (PP2, ZERO_BUBBLE, THREE)),
    "four stages, sources mixed by their losses": ("mixed", (PP4,)),
    "four stages, documents by themselves": ("apart", (PP4,)),
}
"""Cases beyond the grid: validation, low precision, several stages a rank, reading, saving."""
NO_TARGETS = {
    "two stages": (PP2,),
    "two stages, zero bubble": (PP2, ZERO_BUBBLE),
    "two copies": ("parallel.dp_replicate=2",),
    "two shards": ("parallel.dp_shard=2",),
    "tensor parallel": ("parallel.tp=2",),
    "context parallel": ("parallel.cp=2",),
}
"""Layouts of the rows of which some steps, and some ranks of others, have no target."""
MOVES = {
    "from 2 stages to 2 shards": (2, "tied", (PP2,), ()),
    "from 2 shards to 2 stages": (2, "tied", (), (PP2,)),
    "from 2 stages to the V": (2, "plain", (PP2,), (PP2, V)),
    "from 2 x 2 to 4 stages": (4, "tied", (PP2,), (PP4,)),
    "from 4 shards to 2 x 2": (4, "plain", (THREE,), (PP2, "parallel.dp_replicate=2")),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[str, ...]:
    """Arguments of every run; its documents end at irregular places."""
    prefix = tmp_path_factory.mktemp("tokens") / "text"
    random = np.random.default_rng(1)
    for name, ids in ((prefix, 123), (f"{prefix}2", 110)):
        with IndexedDatasetWriter(name, "uint16") as writer:
            for size in random.integers(3, 60, 200):
                writer.add([*random.integers(97, ids, size), 256])
    # Nothing counts in the steps 2 and 3 of 12 rows, nor in the first half of step 4.
    rows = random.integers(97, 123, (60, 17))
    labels = rows.copy()
    labels[12:42] = -100
    for name, kind, values in (("rows", "uint16", rows), ("rows_label", "int32", labels)):
        with IndexedDatasetWriter(f"{prefix}_{name}", kind) as writer:
            for row in values:
                writer.add(row)
    return (*BASE, f"data.train={prefix}", f"data.valid={prefix}")


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """Callable: folder of the run of a model on one process."""
    known: dict[str, Path] = {}

    def get(model: str) -> Path:
        if model not in known:
            output = tmp_path_factory.mktemp("alone") / "run"
            run(resolve([*of_model(base, model), f"output={output}"]).config, command=["castalia"])
            known[model] = output
        return known[model]

    return get


def of_model(base: tuple[str, ...], model: str) -> list[str]:
    """Arguments of a run of a model."""
    prefix = base[-1].removeprefix("data.valid=")
    return [*base, *(text.format(prefix) for text in MODELS[model])]


def runs_of(
    processes: int, cases: dict, base: tuple[str, ...], folder: Path, more: list[dict]
) -> dict:
    """A group of several_runs.py: a run of each case, those that move between layouts, and more."""
    runs = [
        {"arguments": [*of_model(base, model), *layout, f"output={folder / name}"]}
        for name, (model, layout) in cases.items()
    ]
    for name, (size, model, before, after) in MOVES.items():
        if size == processes:
            common = [*of_model(base, model), f"output={folder / name}"]
            runs += [{"arguments": [*common, *before, "train.steps=3"]}]
            runs += [{"arguments": [*common, *after]}]
    return {"ranks": processes, "runs": runs + more}


@pytest.fixture(scope="module")
def folders(base, program, tmp_path_factory) -> dict[int, Path]:
    """Folders with all runs on two ranks, and on four; one program forks the ranks of both."""
    two, four = (tmp_path_factory.mktemp(name) for name in ("two", "four"))
    poisoned = [*base, PP2, f"output={two / 'poisoned'}"]
    begun = [*of_model(base, "tied"), PP2, "train.steps=3", f"output={two / 'begun'}"]
    more = [{"arguments": poisoned, "poison": 2}, {"arguments": begun}]
    cases = TWO_PROCESSES | {name: ("no targets", layout) for name, layout in NO_TARGETS.items()}
    groups = [
        runs_of(2, cases, base, two, more),
        runs_of(4, FOUR_PROCESSES, base, four, []),
    ]
    spec = two / "runs.json"
    spec.write_text(json.dumps(groups))
    done = program(SEVERAL_RUNS, spec, limit=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return {2: two, 4: four}


@pytest.fixture(scope="module")
def two(folders) -> Path:
    """Runs on two processes; one of them with a NaN in the first stage."""
    return folders[2]


@pytest.fixture(scope="module")
def four(folders) -> Path:
    """Runs on four processes."""
    return folders[4]


def metrics(folder: Path) -> list[dict]:
    """Lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def largest_difference(ours: Path, theirs: Path) -> float:
    """Of all weights; a key bias has a noise gradient, which Adam turns into a step of size lr."""
    a, b = read(ours), read(theirs)
    assert a.keys() == b.keys()
    differences = {name: (a[name] - b[name]).abs() for name in a}
    return max(
        float((d.view(4, 3, -1)[:, [0, 2]] if name.endswith("qkv.bias") else d).max())
        for name, d in differences.items()
    )


def require_equal(ours: Path, theirs: Path, limit: float = 1e-5) -> None:
    """Losses, validation, gradient norms, counts, rows and weights."""
    a, b = metrics(ours), metrics(theirs)
    assert len(a) == len(b) == 5
    for key in ("step", "tokens", "rows_hash"):
        assert [line[key] for line in a] == [line[key] for line in b]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in a] == pytest.approx([line[key] for line in b], abs=limit), key
    assert a[-1]["valid_loss"] == pytest.approx(b[-1]["valid_loss"], abs=limit)
    steps = [path / "checkpoints" / "step-00000000" for path in (ours, theirs)]
    assert largest_difference(*steps) == 0, "start weights depend on the layout"
    steps = [path / "checkpoints" / "step-00000005" for path in (ours, theirs)]
    assert largest_difference(*steps) <= limit


@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_two_stages_equal_one_process(two, alone, name):
    model, _ = TWO_PROCESSES[name]
    require_equal(two / name, alone(model), limit=2e-4 if model in ("bf16", "fp16") else 1e-5)


@pytest.mark.parametrize("name", NO_TARGETS)
def test_steps_without_targets_are_skipped_on_every_layout(two, alone, name):
    require_equal(two / name, alone("no targets"))
    lines = metrics(two / name)
    assert [line.get("skipped") for line in lines] == [None, "no targets", "no targets", None, None]
    assert lines[2]["tokens"] == lines[0]["tokens"] > 0


@pytest.mark.parametrize("name", FOUR_PROCESSES)
def test_compositions_equal_one_process(four, alone, name):
    require_equal(four / name, alone(FOUR_PROCESSES[name][0]))


@pytest.mark.parametrize("name", MOVES)
def test_a_checkpoint_moves_between_layouts(folders, alone, name):
    processes, model, _, _ = MOVES[name]
    require_equal(folders[processes] / name, alone(model))


def test_one_process_goes_on_from_two_stages(two, alone, base):
    run(resolve([*of_model(base, "tied"), f"output={two / 'begun'}"]).config, command=["castalia"])
    require_equal(two / "begun", alone("tied"))


def test_stages_hold_their_layers_and_only_the_ends_read(four):
    held = [
        json.loads((four / "four stages, tied" / f"rank-{rank}.json").read_text())
        for rank in range(4)
    ]
    assert [each["reads"] for each in held] == [True, False, False, True]
    layers = [
        {name.split(".")[1] for name in each["names"] if name.startswith("layers.")}
        for each in held
    ]
    assert layers == [{"0"}, {"1"}, {"2"}, {"3"}]
    ends = [{name for name in each["names"] if not name.startswith("layers.")} for each in held]
    assert ends == [{"embed.weight"}, set(), set(), {"embed.weight", "norm.weight", "norm.bias"}]


def test_a_tied_embedding_is_saved_once(two):
    manifest = json.loads(
        (two / "tied" / "checkpoints" / "step-00000005" / "manifest.json").read_text()
    )
    chunks = manifest["tensors"]["model.embed.weight"]["chunks"]
    assert [chunk["file"] for chunk in chunks] == ["model-00000.safetensors"]


def test_nan_in_one_stage_stops_all(two):
    errors = [
        json.loads((two / "poisoned" / f"rank-{rank}.json").read_text())["error"]
        for rank in range(2)
    ]
    assert all(
        error.startswith("gradient norm nan at step 2 (rows 12 to 23") for error in errors
    ), errors
    assert [line["step"] for line in metrics(two / "poisoned")] == [1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.num_layers=3", PP4), "makes 4 stages of 3 layers"),
        ((PP2, V, "model.tie_word_embeddings=true"), "use zero_bubble"),
        (
            (PP2, ZERO_BUBBLE, "train.compile=true"),
            "splits the backward pass, which torch.compile makes one piece",
        ),
        ((PP2, "parallel.stages_per_process=2"), "schedule 1f1b needs stages_per_process 1, got 2"),
        (
            (PP2, V, "parallel.stages_per_process=3"),
            "zero_bubble_v needs stages_per_process 2, got 3",
        ),
        ((PP2, "parallel.schedule=dual"), "zero_bubble"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        resolve([*BASE, *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("train.micro_batch_size=12",),
            "12 rows in micro-batches of 12 make 1; train.micro_batch_size=6 fits",
        ),
        (("train.micro_batch_size=null",), "make 1; train.micro_batch_size=6 fits"),
        (
            (INTERLEAVED, "train.batch_size=10"),
            "10 rows in micro-batches of 2 make 5; train.micro_batch_size=5 fits",
        ),
    ],
)
def test_too_few_micro_batches_are_refused_before_any_process_group(
    monkeypatch, tmp_path, overrides, message
):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    resolved = resolve([*BASE, PP2, *overrides, f"output={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=message):
        run(resolved.config, command=["castalia"])
    assert not torch.distributed.is_initialized() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("layers", "count", "sizes"), [(12, 4, [3, 3, 3, 3]), (6, 4, [2, 2, 1, 1]), (5, 1, [5])]
)
def test_layers_are_split_evenly_and_in_order(layers, count, sizes):
    parts = split(layers, count)
    assert [len(part.layers) for part in parts] == sizes
    assert [layer for part in parts for layer in part.layers] == list(range(layers))
    assert [part.first for part in parts] == [True] + [False] * (count - 1)
    assert [part.last for part in parts] == [False] * (count - 1) + [True]
