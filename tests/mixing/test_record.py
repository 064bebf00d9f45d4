"""The record of a run: enough to replay it bit for bit, whole after a kill, and readable."""

import json

import numpy as np
import pytest

from castalia.core.errors import ConfigError, DataError, TrainingError
from castalia.mixing import MixtureLog, Planner, Stats, make_mixer, read_mixture
from castalia.mixing.record import header_of

NAMES = ["a", "b", "c"]


def planner_of(name="odm", lag=1, **options):
    return Planner(
        make_mixer(name, sources=NAMES, **options), sizes=[31, 17, 50], rows=12, seed=5, lag=lag
    )


def recorded(planner, log, first, last):
    """Run and record; the ids."""
    seen = []
    for step in range(first, last + 1):
        plan = planner.plan(step)
        stats = Stats(step, (2 + np.cos(step * np.arange(3))) * plan.counts, plan.counts)
        seen.append((plan.rows().source.tolist(), plan.rows().index.tolist()))
        planner.observe(stats)
        if log:
            log.write(plan, stats)
    return seen


@pytest.mark.parametrize("options", [{}, {"update_every": 7}, {"warmup_steps": 20}])
@pytest.mark.parametrize("every", [1, 10])
def test_replay_reads_the_same_rows(tmp_path, options, every):
    planner = planner_of(**options)
    log = MixtureLog(tmp_path / "mixture.jsonl", planner, every=every)
    ids = recorded(planner, log, 1, 64)
    log.close()
    for lag in (0, 1, 5):
        assert (
            recorded(planner_of("replay", lag, record=tmp_path / "mixture.jsonl"), None, 1, 64)
            == ids
        )


def test_replay_ends_where_the_record_ends(tmp_path):
    planner = planner_of()
    recorded(planner, MixtureLog(tmp_path / "m.jsonl", planner), 1, 5)
    replay = planner_of("replay", record=str(tmp_path / "m.jsonl"))
    recorded(replay, None, 1, 5)
    with pytest.raises(
        TrainingError, match="replay: the record ends at step 5, but step 6 is needed"
    ):
        replay.plan(6)
    with pytest.raises(
        ConfigError, match="the record has the sources a, b, c; this run has c, b, a"
    ):
        make_mixer("replay", sources=["c", "b", "a"], record=tmp_path / "m.jsonl")


def test_everything_off_is_the_static_mixture():
    """ODM that is frozen from the start reads what `static` reads."""
    static = recorded(planner_of("static", prior=[0.5, 0.3, 0.2]), None, 1, 40)
    assert recorded(planner_of("odm", prior=[0.5, 0.3, 0.2], freeze_after=0), None, 1, 40) == static
    assert (
        recorded(planner_of("odm", prior=[0.5, 0.3, 0.2], warmup_steps=100), None, 1, 40) == static
    )


def test_what_a_line_says(tmp_path):
    planner = planner_of("static", prior=[0.5, 0.5, 0.0])
    log = MixtureLog(tmp_path / "m.jsonl", planner)
    plan = planner.plan(1)
    log.write(plan, Stats(1, [12.0, float("nan"), 0.0], [4, 4, 0]))
    header, line = map(json.loads, (tmp_path / "m.jsonl").read_text().splitlines())
    assert header["sources"] == NAMES and header["sizes"] == [31, 17, 50] and header["seed"] == 5
    assert header["mixer"]["kind"] == "static" and header["exhaustion"] == ["repeat"] * 3
    assert (
        line["loss"] == [3.0, None, None]
        and line["counts"] == [6, 6, 0]
        and line["read"] == [0, 0, 0]
    )
    assert line["entropy"] == pytest.approx(np.log(2), abs=1e-6) and line["distance"] == 0
    assert line["rejected"] == 0 and "uniform_share" not in line
    log.write(planner.plan(2))
    assert "weights" not in json.loads((tmp_path / "m.jsonl").read_text().splitlines()[-1])


def test_a_line_reports_what_the_mixer_does(tmp_path):
    """Step 100 of three sources, the last of which stands at its cap; one loss was refused."""
    mixer = make_mixer(
        "odm", sources=NAMES, max_share=0.4, epoch_cap=2.0, horizon=1e6, sizes=[10, 10, 10]
    )
    planner = Planner(mixer, sizes=[31, 17, 50], rows=12, seed=5)
    log = MixtureLog(tmp_path / "m.jsonl", planner)
    plan = planner.plan(1)
    planner.observe(Stats(1, [1, np.inf, 9], [1, 1, 1]))
    log.write(plan)
    line = json.loads((tmp_path / "m.jsonl").read_text().splitlines()[-1])
    assert (
        line["uniform_share"] == 1.0
        and line["rejected"] == 1
        and line["epoch_cap_overstepped"] == 1
    )
    assert line["at_max_share"] == 0
    for step in range(2, 200):
        plan = planner.plan(step)
        planner.observe(Stats(step, [1, 2, 9], [1, 1, 1]))
    log.write(plan)
    line = json.loads((tmp_path / "m.jsonl").read_text().splitlines()[-1])
    assert line["uniform_share"] == pytest.approx(np.sqrt(3 * np.log(3) / 199), abs=1e-6)
    assert line["at_max_share"] == 1


LEARNED = {
    "odm": [7.389056, 20.085537, None],
    "odm-repo": [0.738906, 2.008554, 0.0],
    "exp3": [0.6, 0.9, 0.0],
    "doremi": [1.0, 2.0, 0.0],
}


@pytest.mark.parametrize("name", [*LEARNED, "static", "ado"])
def test_a_line_has_what_was_learned(tmp_path, name):
    """After a step with losses of 2 and 3 nats and an undrawn source, also within more sources."""
    options = {"reference": [1.0] * 4} if name == "doremi" else {}
    mixer = make_mixer(
        name, [*NAMES, "none"], sizes=[31, 17, 50, 0], allow_empty=True, max_share=1.0, **options
    )
    planner = Planner(mixer, sizes=[31, 17, 50, 0], rows=12, seed=5, allow_empty=True)
    log, plan = MixtureLog(tmp_path / "m.jsonl", planner), planner.plan(1)
    planner.observe(Stats(1, [2.0, 3.0, 0, 0], [1, 1, 0, 0]))
    log.write(plan, Stats(1, [2.0, 1e308, 0, 0], [1, 1, 0, 0]))
    line = json.loads((tmp_path / "m.jsonl").read_text().splitlines()[-1])
    assert line["loss"] == [2.0, None, None, None], "a loss that six decimals cannot hold is none"
    assert line.get("estimate") == ([*LEARNED[name], None] if name in LEARNED else None)


def test_a_line_of_a_thousand_sources(tmp_path):
    """Weights have the digits that make them exact and no more: 35 bytes a source in all."""
    random, names = np.random.default_rng(0), [f"source-{i}" for i in range(1000)]
    planner = Planner(make_mixer("progress", names), sizes=[10_000] * 1000, rows=512, seed=1)
    log, plans = MixtureLog(tmp_path / "m.jsonl", planner), []
    for step in range(1, 31):
        plans.append(planner.plan(step))
        stats = Stats(step, random.uniform(2, 4, 1000) * plans[-1].counts, plans[-1].counts)
        planner.observe(stats)
        log.write(plans[-1], stats)
    read = read_mixture(tmp_path / "m.jsonl")
    assert all(np.array_equal(read.lines[plan.step]["weights"], plan.weights) for plan in plans)
    assert max(map(len, (tmp_path / "m.jsonl").read_text().splitlines()[1:])) < 35_000


def test_mean_weights_are_a_static_mixture(tmp_path):
    planner = planner_of(update_every=10)
    log = MixtureLog(tmp_path / "m.jsonl", planner, every=1000)
    used = []
    for step in range(1, 41):
        plan = planner.plan(step)
        used.append(plan.weights)
        planner.observe(Stats(step, np.array([1, 2, 3]) * plan.counts, plan.counts))
        log.write(plan)
    log.close()
    mixture = read_mixture(tmp_path / "m.jsonl")
    assert mixture.steps == [1, 12, 22, 32, 40]
    np.testing.assert_allclose(mixture.mean_weights(), np.mean(used, axis=0), rtol=1e-12)
    np.testing.assert_allclose(
        mixture.mean_weights(begin=22), np.mean(used[21:], axis=0), rtol=1e-12
    )
    make_mixer("static", sources=NAMES, prior=mixture.mean_weights())
    with pytest.raises(DataError, match="the record has no step from 50 on; its last step is 40"):
        mixture.mean_weights(begin=50)


def test_a_killed_and_resumed_run_has_one_record(tmp_path):
    """Killed at step 30 in the middle of a line, resumed from step 20."""
    path = tmp_path / "m.jsonl"
    whole = recorded(planner_of(), None, 1, 50)
    planner = planner_of()
    log = MixtureLog(path, planner)
    recorded(planner, log, 1, 20)
    state = planner.state_dict()
    recorded(planner, log, 21, 30)
    path.write_bytes(path.read_bytes()[:-25])
    assert read_mixture(path).steps == list(range(1, 30))
    planner = planner_of()
    planner.load_state_dict(state)
    assert recorded(planner, MixtureLog(path, planner), 21, 50) == whole[20:]
    assert read_mixture(path).steps == list(range(1, 51))
    assert recorded(planner_of("replay", record=path), None, 1, 50) == whole


def test_files_that_are_no_record(tmp_path):
    path = tmp_path / "m.jsonl"
    with pytest.raises(DataError, match=r"cannot read the mixture record .*: No such file"):
        read_mixture(path)
    path.write_text('{"step": 1}\n')
    with pytest.raises(DataError, match="not a mixture record of format 1"):
        read_mixture(path)
    path.unlink()
    path.write_text(json.dumps(header_of(planner_of())) + '\n{"step": 1, "weights": [1.0]}\n')
    with pytest.raises(DataError, match=r"m.jsonl line 2: not a line of a mixture record"):
        read_mixture(path)
    other = Planner(make_mixer("uniform", sources=["x"]), sizes=[5], rows=1, seed=1)
    with pytest.raises(ConfigError, match="is the record of other sources; choose another file"):
        MixtureLog(path, other)
    with pytest.raises(ConfigError, match="replay: the record does not begin with step 1"):
        path.unlink()
        MixtureLog(path, planner_of())
        make_mixer("replay", sources=NAMES, record=path)
