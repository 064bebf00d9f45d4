"""Mixing in the loop: the rows that a run reads, what survives a crash, and what stops it."""

import dataclasses
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from castalia.cli.app import app
from castalia.config import dump_yaml
from castalia.core.errors import (
    CastaliaError,
    CheckpointError,
    ConfigError,
    DataError,
    TrainingError,
)
from castalia.data import IndexedDatasetWriter
from castalia.distributed import World
from castalia.losses import LossOut, NextToken
from castalia.mixing import read_mixture
from castalia.recipes import load_config
from castalia.runs.recorded_order import RecordedOrder
from castalia.train.hooks import Hook, Metrics, RecordMixture, Save, Step, StepLine, Validate
from castalia.train.mixture import StaticBlend, movements
from castalia.train.run import closing_line
from castalia.train.startup import source_lines
from castalia.train.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))
SMALL = (
    "debug",
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_attention_heads=2",
    "data.seq_length=8",
    "train.batch_size=12",
    "train.steps=8",
    "checkpoint.every=4",
    "checkpoint.steps=[]",
    "checkpoint.asynchronous=false",
)
SIZES = {"noise": 120, "letters": 60, "trivial": 30}
"""Rows of each source, about."""


def write_source(folder: Path, name: str, rows: int, letters: int) -> str:
    random = np.random.default_rng(len(name))
    with IndexedDatasetWriter(folder / name, "uint16") as writer:
        for _ in range(rows):
            writer.add(random.integers(0, letters, 8))
    return str(folder / name)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[str]:
    """Prefixes of three sources of very different entropy."""
    folder = tmp_path_factory.mktemp("sources")
    return [
        write_source(folder, n, r, k) for (n, r), k in zip(SIZES.items(), (256, 16, 1), strict=True)
    ]


class Ids(Hook):
    """Weights and rows of each step: (source, row) in the order of the batch, over all ranks."""

    def __init__(self) -> None:
        self.ids = []
        self.weights = []

    def start(self, *, mixture) -> None:
        self.mixture = mixture

    def after_step(self, step: Step) -> None:
        rows = self.mixture.plan.rows()
        self.ids.append((rows.source.tolist(), rows.index.tolist()))
        self.weights.append(self.mixture.plan.weights.tolist())


@pytest.fixture
def make(sources, tmp_path):
    """Callable that builds a Trainer over the three sources, with the hooks of a real run."""

    def build(*overrides, hooks=(), loss=None, output="run", train=None) -> Trainer:
        paths = ", ".join(train or sources)
        config = load_config(
            [*SMALL, f"data.train=[{paths}]", f"output={tmp_path / output}", *overrides]
        )
        standard = [Validate(), RecordMixture(), Metrics(), Save()]
        return Trainer(config, ALONE, hooks=[*standard, *hooks], loss=loss)

    return build


@pytest.fixture
def fit(make):
    """Callable that trains and gives the ids, the weights and the trainer."""

    def run(*overrides, **options):
        ids = Ids()
        trainer = make(*overrides, hooks=[ids], **options)
        trainer.fit()
        return ids, trainer

    return run


def hashes(folder: Path) -> list[int]:
    return [
        json.loads(line)["rows_hash"]
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


ODM = ("mixing.kind=odm", "mixing.warmup_steps=2")


def test_the_rows_of_a_batch_are_those_of_the_plan(fit):
    batches = []

    class Look(NextToken):
        def __call__(self, scored, batch):
            batches.append(batch)
            return super().__call__(scored, batch)

    ids, trainer = fit(*ODM, "train.micro_batch_size=4", loss=Look(sources=3))
    packs = trainer.rows.train.row_sources
    for step, (source, place) in enumerate(ids.ids):
        micro = batches[3 * step : 3 * step + 3]
        assert torch.cat([b.source for b in micro]).tolist() == source
        assert torch.cat([b.index for b in micro]).tolist() == list(
            range(12 * step, 12 * step + 12)
        )
        rows = [packs[s][i][:-1].tolist() for s, i in zip(source, place, strict=True)]
        assert torch.cat([b.tokens for b in micro]).tolist() == rows
    assert ids.weights[0] == ids.weights[1] == pytest.approx([1 / 3] * 3, abs=1e-9)
    assert ids.weights[-1][0] > 0.34 > ids.weights[-1][2]


def test_static_is_the_blend_of_today_bit_for_bit(make, tmp_path):
    for output, overrides in (("before", []), ("named", ["mixing.kind=static"])):
        trainer = make("data.weights=[3, 2, 1]", *overrides, output=output)
        trainer.fit()
        assert (
            isinstance(trainer.mixture, StaticBlend)
            and not (tmp_path / output / "mixture.jsonl").exists()
        )
    assert hashes(tmp_path / "before") == hashes(tmp_path / "named")


def test_a_mixer_that_never_moves_is_the_planned_static_mixture(fit):
    static, _ = fit("mixing.planned=true", "data.weights=[3, 2, 1]", output="static")
    frozen, _ = fit(
        "mixing.kind=odm", "mixing.warmup_steps=8", "data.weights=[3, 2, 1]", output="frozen"
    )
    assert static.ids == frozen.ids and static.weights == frozen.weights


def test_options_without_a_planner_are_refused(make):
    with pytest.raises(
        ConfigError,
        match=r"mixing.warmup_steps, mixing.floor: without effect on GPT-NeoX's blend; set mix",
    ):
        make("mixing.floor=0.1", "mixing.warmup_steps=3")


def test_a_lag_is_kept_whatever_reads_ahead(fit):
    """Step t follows the losses up to t - 1 - lag: with lag 3 the first four are at the prior."""
    ids, _ = fit("mixing.kind=odm", "mixing.eps=0.01", "mixing.lag=3", output="three")
    moved = [weights != ids.weights[0] for weights in ids.weights]
    assert moved == [False] * 4 + [True] * 4
    now, _ = fit("mixing.kind=odm", "mixing.eps=0.01", "mixing.lag=0", output="none")
    assert now.weights[1] != now.weights[0]


@pytest.mark.parametrize(
    "kind", ["odm", "odm-repo", "odm-paper", "exp3", "ado", "unimax", "natural", "uniform"]
)
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(fit, kind, tmp_path):
    overrides = (f"mixing.kind={kind}", "mixing.warmup_steps=1")
    whole, _ = fit(*overrides, output="whole")
    cut, _ = fit(*overrides, "train.steps=4" if kind != "unimax" else "train.steps=8", output="cut")
    with pytest.MonkeyPatch.context() as patch:  # lose what came after step 4
        patch.chdir(tmp_path)
        for late in Path("cut/checkpoints").glob("step-00000008"):
            late.rename("gone")
    again, _ = fit(*overrides, output="cut")
    assert cut.ids[:4] + again.ids == whole.ids and cut.weights[:4] + again.weights == whole.weights
    records = [(tmp_path / name / "mixture.jsonl").read_text() for name in ("cut", "whole")]
    if kind != "unimax":  # which depends on the length of the run
        assert records[0] == records[1]
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_steps_after_the_checkpoint_leave_the_record(fit, tmp_path):
    fit(*ODM, "train.steps=4")
    path = tmp_path / "run" / "mixture.jsonl"
    kept = path.read_text()
    path.write_text(
        kept
        + '{"step": 5, "weights": [1, 0, 0], "counts": [12, 0, 0], "read": [0, 0, 0]}\n'
        + '{"step": 6, "cou'
    )
    fit(*ODM, "train.steps=5")
    record = read_mixture(path)
    assert path.read_text().startswith(kept) and record.steps == [1, 2, 3, 4, 5]
    assert record.lines[5]["weights"].tolist() != [1, 0, 0]


def test_a_replay_reads_the_same_rows(fit, tmp_path, capsys):
    recorded, _ = fit(*ODM, "mixing.log_every=4", output="recorded")
    path = tmp_path / "recorded" / "mixture.jsonl"
    again, trainer = fit("mixing.kind=replay", f"mixing.record={path}", output="again")
    assert again.ids == recorded.ids and again.weights == recorded.weights
    assert (
        hashes(tmp_path / "again") == hashes(tmp_path / "recorded") and trainer.mixture.notes == []
    )
    other, trainer = fit("mixing.kind=replay", f"mixing.record={path}", "seed=5", output="other")
    assert other.weights == recorded.weights and other.ids != recorded.ids
    assert "other seed here" in trainer.mixture.notes[0]


def test_a_replay_that_is_too_long_is_refused_before_the_first_step(fit, make, tmp_path):
    fit(*ODM, output="recorded")
    path = tmp_path / "recorded" / "mixture.jsonl"
    with pytest.raises(ConfigError, match=r"ends at step 8 of 9; set train.steps=8"):
        make("mixing.kind=replay", f"mixing.record={path}", "train.steps=9", output="again")


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_sources_that_end_end_the_run_well(fit, make, tmp_path, lag):
    overrides = (
        "mixing.kind=odm",
        "mixing.exhaustion=drop",
        f"mixing.lag={lag}",
        "train.steps=100",
    )
    ids, trainer = fit(*overrides)
    sizes = trainer.rows.train.sizes
    steps = int(sizes.sum()) // 12
    assert trainer.progress.step == steps == len(ids.ids)
    read = [pair for source, place in ids.ids for pair in zip(source, place, strict=True)]
    assert len(set(read)) == len(read)
    assert trainer.store.latest() == steps
    assert closing_line(trainer).startswith(
        f"done: step {steps} of 100"
    ) and "sources are exhausted" in closing_line(trainer)
    again, trainer = fit(*overrides)
    assert again.ids == [] and trainer.progress.step == steps
    assert read_mixture(tmp_path / "run" / "mixture.jsonl").steps == list(range(1, steps + 1))


def test_one_source_that_stops_ends_the_run(fit):
    ids, trainer = fit(
        "mixing.kind=uniform", 'mixing.exhaustion={"trivial": "stop"}', "train.steps=50"
    )
    assert len(ids.ids) == int(trainer.rows.train.sizes[2]) // 4
    assert "source 'trivial' is exhausted and its policy is to stop" in trainer.mixture.ended


class Broken(NextToken):
    """A loss by source that is wrong in step 2."""

    wrong = float("nan")
    step = 0

    def __call__(self, scored, batch) -> LossOut:
        out = super().__call__(scored, batch)
        self.step += 1
        if self.step == 2:
            out.per_source[1, 0] = self.wrong
        return out


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e30])
def test_a_loss_that_is_none_is_counted_and_not_used(fit, wrong, tmp_path):
    loss = Broken(sources=3)
    loss.wrong = wrong
    ids, trainer = fit(*ODM, loss=loss)
    assert trainer.mixture.planner.mixer.rejected_losses().tolist() == [0, 1, 0]
    assert np.isfinite(ids.weights).all()
    assert read_mixture(tmp_path / "run" / "mixture.jsonl").lines[8]["rejected"] == 1


class Heard(Hook):
    """The target tokens of each step as the mixer heard of them."""

    def __init__(self) -> None:
        self.tokens = []

    def start(self, *, mixture) -> None:
        self.mixture = mixture

    def after_step(self, step: Step) -> None:
        self.tokens.append(int(self.mixture.stats.tokens.sum()))


def test_a_step_without_an_update_tells_the_mixer_nothing(make):
    heard = Heard()
    make(*ODM, "guard.skip_steps=[3]", hooks=[heard]).fit()
    assert heard.tokens == [96, 96, 0, 96, 96, 96, 96, 96]


def test_a_run_that_goes_back_plans_the_same_rows_again(fit, make, tmp_path):
    class Bad(NextToken):
        """A loss that is no number, once, at step 7."""

        steps = 0

        def __call__(self, scored, batch) -> LossOut:
            self.steps += 1
            out = super().__call__(scored, batch)
            if self.steps != 7:
                return out
            return dataclasses.replace(out, total=out.total * float("nan"))

    ids, _ = fit(*ODM, "guard.nan=rollback", loss=Bad(sources=3), output="back")
    whole, _ = fit(*ODM, "guard.skip_steps=[7]", output="whole")
    assert (
        ids.ids[:6] + ids.ids[8:] == whole.ids
        and ids.weights[:6] + ids.weights[8:] == whole.weights
    )
    records = [(tmp_path / name / "mixture.jsonl").read_text() for name in ("back", "whole")]
    assert records[0] == records[1]


def test_plans_that_differ_stop_the_run_before_the_update(make):
    trainer = make(*ODM)
    trainer.world = dataclasses.replace(ALONE)
    object.__setattr__(
        trainer.world, "largest", lambda *numbers: [*numbers[:3], numbers[3] + 1]
    )  # another has more
    with pytest.raises(TrainingError, match="step 1: the planners disagree across ranks"):
        trainer.fit()
    assert trainer.progress.step == trainer.progress.updates == 0


def test_one_source_and_a_source_smaller_than_a_batch(fit, sources, tmp_path):
    ids, trainer = fit(*ODM, output="one", train=sources[:1])
    assert ids.weights == [[1.0]] * 8
    tiny = write_source(tmp_path, "tiny", 5, 9)
    ids, trainer = fit("mixing.kind=uniform", output="tiny", train=[sources[0], tiny])
    assert trainer.rows.train.sizes[1] == 4
    read = [i for source, place in ids.ids for s, i in zip(source, place, strict=True) if s == 1]
    assert [read.count(i) for i in range(4)] == [12] * 4  # six rows a step, four an epoch


def test_an_empty_source_is_an_error_or_has_weight_0(fit, make, sources, tmp_path):
    empty = write_source(tmp_path, "empty", 1, 9)
    with pytest.raises(
        DataError,
        match=r"empty: a row needs 9 tokens, but this source holds 8.*mixing.allow_empty=true",
    ):
        make(*ODM, train=[*sources, empty])
    ids, _ = fit(*ODM, "mixing.allow_empty=true", train=[*sources, empty])
    assert all(weights[3] == 0 for weights in ids.weights) and ids.weights[-1][0] > 0.34


@pytest.mark.parametrize(
    "kind", ["static", "uniform", "natural", "odm", "exp3", "static mixing.floor=0.3"]
)
def test_a_source_of_weight_0_is_left_out_by_every_mixer(fit, sources, tmp_path, kind):
    """Also one that is too short for a row."""
    mixing = f"mixing.kind={kind} mixing.planned=true data.weights=[0,1,1]".split()
    tiny = write_source(tmp_path, "tiny", 1, 9)
    ids, trainer = fit(*mixing, train=[tiny, *sources[:2]])
    assert {source for rows, _ in ids.ids for source in rows} == {1, 2}
    assert all(weights[0] == 0 for weights in ids.weights)
    assert source_lines(trainer.config, trainer.rows)[0] == "tiny left out (weight 0)"
    record = f"mixing.record={tmp_path / 'run' / 'mixture.jsonl'}"
    replayed = ("mixing.kind=replay", record, mixing[-1])
    again, _ = fit(*replayed, train=trainer.config.data.train, output="again")
    assert again.ids == ids.ids


def test_a_source_leaves_a_running_mixture_by_weight_0(fit):
    """Its rows, and the weights planned ahead for it, are gone with it."""
    fit(*ODM, "train.steps=4")
    ids, _ = fit(*ODM, "data.weights=[0,1,1]", "data.allow_changed=true")
    assert len(ids.ids) == 4 and {source for rows, _ in ids.ids for source in rows} == {1, 2}


@pytest.mark.parametrize("kind", ["static", "odm"])
def test_a_source_without_targets_is_refused_before_the_start(make, sources, tmp_path, kind):
    with IndexedDatasetWriter(tmp_path / "blank", "uint16") as writer:
        for _ in range(60):
            writer.add(np.array([7]))
    options = (f"mixing.kind={kind}", "data.packing=unpacked")
    with pytest.raises(DataError, match=r"rows of source 'blank' .* has a target, so nothing can"):
        make(*options, train=[*sources, str(tmp_path / "blank")])


def test_a_source_that_comes_or_goes_needs_a_policy(fit, make, sources, tmp_path):
    fit(*ODM, "train.steps=4")
    news = write_source(tmp_path, "news", 40, 30)
    more = [*sources, news]
    with pytest.raises(DataError, match=r"3 sources before, 4 now.*data.allow_changed"):
        fit(*ODM, train=more)
    with pytest.raises(
        CheckpointError, match=r"source 'news', which the state lacks.*on_new=\"prior"
    ):
        fit(*ODM, "data.allow_changed=true", train=more)
    ids, trainer = fit(*ODM, "data.allow_changed=true", "mixing.on_new=prior", train=more)
    assert len(ids.ids) == 4 and len(ids.weights[0]) == 4 and trainer.mixture.planner.cursors[3] > 0
    assert read_mixture(tmp_path / "run" / "mixture-to-step-00000004.jsonl").steps == [1, 2, 3, 4]
    assert read_mixture(tmp_path / "run" / "mixture.jsonl").steps == [5, 6, 7, 8]
    fewer = [sources[0], sources[1], news]
    longer = ("train.steps=10", "data.allow_changed=true")
    with pytest.raises(
        CheckpointError,
        match=r"the state has source 'trivial', which this run lacks.*\"drop\" drops it",
    ):
        fit(*ODM, *longer, train=fewer)
    ids, _ = fit(*ODM, *longer, "mixing.on_removed=drop", train=fewer)
    assert len(ids.ids) == 2 and len(ids.weights[0]) == 3


def test_an_unknown_source_in_an_option_gets_the_menu(make):
    with pytest.raises(
        ConfigError, match=r"exhaustion: unknown source 'nois'.*did you mean 'noise'"
    ):
        make("mixing.kind=uniform", 'mixing.exhaustion={"nois": "stop"}')


def test_a_checkpoint_without_a_planner_is_told(make, tmp_path):
    make().fit()
    with pytest.raises((CheckpointError, DataError), match=r"no state 'mixture'|the data differ"):
        make("mixing.kind=uniform", "data.allow_changed=true").fit()


def test_the_line_on_the_screen_names_what_moved(make, capsys):
    trainer = make(*ODM, "train.log_every=8")
    trainer.hooks.append(StepLine())
    trainer.fit()
    last = capsys.readouterr().out.splitlines()[-1]
    assert "  mix " in last and "trivial" in last and "(-" in last


def test_shares_that_stand_are_not_named():
    before = np.array([0.5, 0.3, 0.2])
    now = np.array([0.5004, 0.25, 0.2496])
    assert movements(before, now, ["a", "b", "c"]) == "b 25.0% (-5.0) c 25.0% (+5.0)"
    assert movements(before, before, ["a", "b", "c"]) == "steady"


def test_what_a_mixer_needs_is_asked_for_before_the_first_step(make):
    with pytest.raises(CastaliaError, match=r"doremi needs mixing.reference"):
        make("mixing.kind=doremi")
    with pytest.raises(
        CastaliaError, match=r"naive-validation learns from held-out losses: set train.eval_every"
    ):
        make("mixing.kind=naive-validation")
    with pytest.raises(CastaliaError, match=r"data.valid needs 3 prefixes"):
        make("mixing.kind=naive-validation", "train.eval_every=2")


def test_held_out_losses_come_by_source_and_reach_the_mixer(make, sources, tmp_path):
    overrides = (f"data.valid=[{', '.join(sources)}]", "train.eval_every=2", "train.eval_batches=1")
    ids = Ids()
    lines = []
    trainer = make("mixing.kind=naive-validation", "mixing.eps=0.01", *overrides, hooks=[ids])
    look = Hook()
    look.after_step = lambda step: lines.append(dict(step.metrics))
    trainer.hooks.append(look)
    trainer.fit()
    assert ["valid" in line for line in lines] == [False, True] * 4
    valid = lines[-1]["valid"]
    parts = lines[-1]["valid_sources"]
    assert list(parts) == list(SIZES) and valid["worst"] == max(
        part["loss"] for part in parts.values()
    )
    assert valid["token_weighted"] == pytest.approx(lines[-1]["valid_loss"])
    assert valid["mean"] == pytest.approx(sum(part["loss"] for part in parts.values()) / 3)
    flat = ids.weights[
        0
    ]  # the validation of step 2 is told with step 3, which step 5 follows: lag 1
    assert [weights != flat for weights in ids.weights] == [False] * 4 + [True] * 4
    cut = Ids()
    again = make(
        "mixing.kind=naive-validation",
        "mixing.eps=0.01",
        *overrides,
        "train.steps=4",
        output="cut",
        hooks=[cut],
    )
    again.fit()
    rest = Ids()
    make(
        "mixing.kind=naive-validation", "mixing.eps=0.01", *overrides, output="cut", hooks=[rest]
    ).fit()
    assert cut.weights + rest.weights == ids.weights and cut.ids + rest.ids == ids.ids


def test_the_record_tells_which_row_stood_where(fit, tmp_path):
    ids, trainer = fit(*ODM)
    order = RecordedOrder(trainer.config, trainer.rows, tmp_path / "run" / "mixture.jsonl")
    flat = [pair for source, place in ids.ids for pair in zip(source, place, strict=True)]
    assert [order(place) for place in range(96)] == flat
    assert order(3) == flat[3]
    for places in (range(96), range(20, 70), [90, 3]):
        found = order.locate_all(places)
        pairs = zip(found.source.tolist(), found.place.tolist(), strict=True)
        assert list(pairs) == [flat[place] for place in places]
    with pytest.raises(CastaliaError, match="the record ends at step 8, but step 9 is needed"):
        order(96)
    with pytest.raises(DataError, match=r"whose mixture.jsonl records them"):
        trainer.rows.train.locate(0)


def test_five_thousand_sources_in_one_loader(sources, make, tmp_path):
    """More files than a process usually may hold open; one planner and one thread read them all."""
    paths = []
    for i in range(5000):
        paths.append(str(tmp_path / f"s{i}"))
        for end in (".bin", ".idx"):
            os.link(sources[i % 3] + end, paths[-1] + end)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < 10_200:
        pytest.skip(f"this machine lets a process open {limits[1]} files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, limits[1]))
    try:
        heard = Heard()
        trainer = make(
            "mixing.kind=odm", "train.steps=3", "mixing.log_every=3", train=paths, hooks=[heard]
        )
        trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert heard.tokens == [96] * 3 and len(trainer.mixture.plan.weights) == 5000
    assert sum(trainer.mixture.planner.cursors) == 36
    assert "5000 sources, exploration mixes 100% of the data" in trainer.mixture.notes[0]
    assert source_lines(trainer.config, trainer.rows)[-2:] == ["and 4,960 more", "mixed by odm"]


def test_the_viewer_shows_the_rows_that_a_mixed_run_read(fit, tmp_path):
    _, trainer = fit(*ODM)
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(trainer.config))
    ids = tmp_path / "ids.npy"
    done = CliRunner().invoke(
        app,
        [
            "data",
            "view",
            str(tmp_path / "run" / "config.yaml"),
            "--steps",
            "2:8",
            "--ids",
            str(ids),
        ],
    )
    assert done.exit_code == 0, done.output
    shown = [int(line.split("rows_hash ")[1]) for line in done.output.splitlines()]
    assert shown == hashes(tmp_path / "run")[2:]
    assert np.load(ids).shape == (72, 9)
