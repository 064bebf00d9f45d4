"""Rows read: equal on all ranks, each row once an epoch, and the policies at a source's end."""

import tracemalloc

import numpy as np
import pytest

from castalia.core.errors import ConfigError, TrainingError
from castalia.mixing import ExhaustionError, Planner, Stats, make_mixer

NAMES = ["a", "b", "c"]


def planner_of(weights, **settings):
    """A planner over a static mixture."""
    names = NAMES[: len(weights)]
    mixer = make_mixer("static", sources=names, prior=weights)
    return Planner(mixer, **({"sizes": [1000] * len(names), "rows": 8, "seed": 1} | settings))


def ids(planner, first, last):
    """(step, source, row) of everything that is read in these steps."""
    return [
        (step, *pair)
        for step in range(first, last + 1)
        for pair in pairs(planner.plan(step).rows())
    ]


def pairs(rows):
    return list(zip(rows.source.tolist(), rows.index.tolist(), strict=True))


def test_each_epoch_reads_every_row_once_in_an_order_of_its_own():
    """Sources of 50, 7 and 13 rows, read for 40 steps of 8."""
    sizes = [50, 7, 13]
    planner = planner_of([0.5, 0.3, 0.2], sizes=sizes)
    read = {source: {} for source in range(3)}
    for step in range(1, 41):
        rows = planner.plan(step).rows()
        for source, index, epoch in zip(rows.source, rows.index, rows.epoch, strict=True):
            read[int(source)].setdefault(int(epoch), []).append(int(index))
    for source, size in enumerate(sizes):
        *whole, last = read[source].values()
        assert len(whole) == planner.cursors[source] // size >= 3
        assert all(sorted(epoch) == list(range(size)) for epoch in whole)
        assert len(set(last)) == len(last) <= size
        assert whole[0] != whole[1] != whole[2]


def test_the_batch_is_split_and_not_changed_by_its_readers():
    """One, two and four processes read the same rows."""
    whole = planner_of([0.5, 0.3, 0.2]).plan(1).rows()
    for world in (2, 4):
        plans = [planner_of([0.5, 0.3, 0.2]).plan(1) for _ in range(world)]
        share = 8 // world
        parts = [plan.rows(rank * share, (rank + 1) * share) for rank, plan in enumerate(plans)]
        assert [pair for part in parts for pair in pairs(part)] == pairs(whole)


def test_parts_of_a_batch_hold_a_mixture():
    planner = planner_of([0.5, 0.5], rows=64)
    halves = [len(set(planner.plan(step).rows(0, 32).source.tolist())) for step in range(1, 20)]
    assert halves == [2] * 19


def test_a_part_past_the_end_is_empty():
    plan = planner_of([1.0]).plan(1)
    assert pairs(plan.rows(8, 16)) == []
    assert len(plan.rows(6, 99).index) == 2


def test_rows_follow_seed_and_name_alone():
    first, same, other = (ids(planner_of([0.5, 0.5], seed=seed), 1, 10) for seed in (1, 1, 2))
    assert first == same != other
    alone = {i for _, _, i in ids(planner_of([1.0]), 1, 5)}
    beside = [i for _, s, i in ids(planner_of([0.5, 0.5]), 1, 20) if s == 0][:40]
    assert alone == set(beside), "another source beside it does not change the order of a source"


def test_golden_rows():
    """These rows never change: a run made by one version is repeated by the next."""
    assert pairs(planner_of([0.5, 0.3, 0.2], sizes=[50, 7, 13]).plan(1).rows()) == GOLDEN_ROWS


GOLDEN_ROWS = [(1, 2), (0, 40), (1, 1), (0, 48), (0, 44), (1, 0), (2, 5), (0, 28)]


def learned(lag):
    mixer = make_mixer("odm", sources=NAMES, smoothing=0.5)
    return Planner(mixer, sizes=[50, 60, 70], rows=16, seed=4, lag=lag)


def stats_at(step, plan):
    return Stats(step, (1 + np.sin(step + np.arange(3))) * plan.counts, plan.counts)


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_how_far_ahead_one_plans_changes_nothing(lag):
    """Planned at the last moment, or as early as the lag allows."""
    late, early = learned(lag), learned(lag)
    expected = []
    for step in range(1, 30):
        plan = late.plan(step)
        expected.append(plan.rows().index.tolist())
        late.observe(stats_at(step, plan))
    queue = [early.plan(step) for step in range(1, lag + 2)]
    found = []
    for step in range(1, 30):
        plan = queue.pop(0)
        found.append(plan.rows().index.tolist())
        early.observe(stats_at(step, plan))
        queue.append(early.plan(step + lag + 1))
    assert found == expected


def test_lag_is_the_distance_to_the_losses():
    """A lone loss, at step 5, reaches step 6 + lag and none before."""
    for lag in (0, 2):
        planner = learned(lag)
        for step in range(1, 12):
            plan = planner.plan(step)
            assert (plan.weights[0] > 0.34) == (step >= 6 + lag), (lag, step)
            loud = step == 5
            planner.observe(
                Stats(
                    step,
                    [4.0 if loud else 0.0, 1.0 if loud else 0.0, 1.0 if loud else 0.0],
                    [loud] * 3,
                )
            )


def test_the_mixer_may_be_fed_directly():
    mixer = make_mixer("odm", sources=NAMES)
    direct, through = Planner(mixer, sizes=[50] * 3, rows=8, seed=1), learned(0)
    for step in range(1, 10):
        mixer.observe(stats_at(step, direct.plan(step)))
    assert direct.plan(10).step == 10
    through.plan(1)
    with pytest.raises(
        TrainingError,
        match=r"plan\(2\) with lag 0 follows the losses up to step 1, but the mixer has",
    ):
        through.plan(2)


def test_steps_are_planned_in_order():
    with pytest.raises(
        TrainingError, match=r"plan\(5\): the next step to plan is 1; to resume, load"
    ):
        planner_of([1.0]).plan(5)


def test_repeat_tells_when_a_source_begins_its_fifth_epoch():
    planner = planner_of([0.5, 0.5], sizes=[10, 1000])
    events = [(step, text) for step in range(1, 30) for text in planner.plan(step).events]
    assert events == [(11, "source 'a' starts epoch 5; further repeats bring diminishing returns")]


def test_stop():
    planner = planner_of([0.5, 0.5], sizes=[10, 1000], exhaustion={"a": "stop"})
    assert len(ids(planner, 1, 2)) == 16
    with pytest.raises(
        ExhaustionError,
        match=r"source 'a' is exhausted.* 2 of its 10 rows are left and 4 are due",
    ):
        planner.plan(3)
    assert planner.cursors.tolist() == [8, 8], "nothing is lost"


def test_drop_gives_the_rest_to_the_others():
    planner = planner_of([0.5, 0.25, 0.25], sizes=[10, 1000, 1000], exhaustion="drop")
    counts = [planner.plan(step).counts.tolist() for step in range(1, 6)]
    assert counts[:2] == [[4, 2, 2]] * 2
    assert counts[2:] == [[2, 3, 3], [0, 4, 4], [0, 4, 4]]


def test_drop_says_so_once_and_ends_when_all_are_read():
    planner = planner_of([0.5, 0.5], sizes=[10, 20], exhaustion="drop")
    events = [text for step in range(1, 4) for text in planner.plan(step).events]
    assert events == ["source 'a' is exhausted after one epoch and contributes no more rows"]
    with pytest.raises(
        ExhaustionError, match="all sources are exhausted: 2 of the 8 rows of a batch are missing"
    ):
        planner.plan(4)


def test_cap():
    planner = planner_of([0.5, 0.5], sizes=[6, 1000], exhaustion={"a": "cap:2"})
    plans = [planner.plan(step) for step in range(1, 7)]
    assert sum(plan.counts[0] for plan in plans) == 12
    assert [text for plan in plans for text in plan.events] == [
        "source 'a' is exhausted after 2 epochs and contributes no more rows"
    ]


def test_a_source_smaller_than_its_part_of_a_batch():
    """Three rows, of which a batch takes 32: every row ten or eleven times."""
    rows = planner_of([0.5, 0.5], sizes=[3, 1000], rows=64).plan(1).rows()
    drawn = np.bincount(rows.index[rows.source == 0], minlength=3)
    assert drawn.sum() == 32 and drawn.min() >= 10 and drawn.max() <= 11


def test_empty_sources():
    with pytest.raises(
        ConfigError, match="source 'b' has no rows; remove it, or pass allow_empty=True"
    ):
        planner_of([0.5, 0.5], sizes=[10, 0])
    plan = planner_of([0.5, 0.5], sizes=[10, 0], allow_empty=True).plan(1)
    assert plan.counts.tolist() == [8, 0] and plan.events == ()


WRONG = {
    "exhaustion: unknown source 'z'; choose one of a, b": {"exhaustion": {"z": "stop"}},
    "exhaustion of source 'a': expected repeat, stop, drop or cap:N epochs, got 'cap:0'": {
        "exhaustion": "cap:0"
    },
    "expected 0 < rows <= 536870912 and lag >= 0, got rows 0": {"rows": 0},
    "sizes: source 'b' has -1": {"sizes": [1, -1]},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings(message):
    with pytest.raises(ConfigError, match=message):
        planner_of([0.5, 0.5], **WRONG[message])


def test_five_thousand_sources():
    """Six hundred steps of 32 rows, learned, in a few megabytes."""
    names = [f"s{i}" for i in range(5000)]
    mixer = make_mixer("odm", sources=names, eps=1e-5, warmup_steps=200)
    tracemalloc.start()
    planner = Planner(mixer, sizes=np.arange(1, 5001), rows=32, seed=3, lag=1)
    losses = np.linspace(1, 3, 5000)
    for step in range(1, 601):
        plan = planner.plan(step)
        assert len(plan.rows().index) == 32
        planner.observe(Stats(step, losses * plan.counts, plan.counts))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert planner.cursors.sum() == 32 * 600
    assert peak < 50e6
    assert planner.cursors[4000:].sum() > 1.2 * planner.cursors[:1000].sum(), (
        "higher losses are read more"
    )
