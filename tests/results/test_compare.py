"""Two selections side by side: what matches, what is refused, and what names mean."""

import math

import pytest

from castalia.core.errors import ConfigError, DataError
from castalia.results import CONDITIONS, Result, ResultsStore
from castalia.results.compare import allowed_conditions, compare
from castalia.results.selections import select_rows

TASKS = ("arc", "piqa", "ppl")
LATER = {
    "harness": "lm-eval 0.5",
    "task_version": "2",
    "task_hash": "f",
    "dtype": "int8",
    "engine": "native",
    "shots": 5,
    "documents": 7,
}


def rows(suite: str, model: str, step: int | None = 1, plus: float = 0.0, **more) -> list[Result]:
    columns = {
        "harness": "lm-eval 0.4.13",
        "task_version": "1",
        "task_hash": "e",
        "dtype": "fp32",
        "engine": "torch",
        "shots": 0,
        "documents": 100,
        "stderr": 0.03,
    } | more
    return [
        Result(
            *(suite, model, task, "loss" if task == "ppl" else "acc", 0.5 + plus),
            step=step,
            higher_is_better=task != "ppl",
            **columns,
        )
        for task in TASKS
    ]


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> list[ResultsStore]:
    store = ResultsStore(tmp_path_factory.mktemp("store"))
    every = []
    for suite, plus in (("new", 0.1), ("old", 0.0)):
        for model in ("small", "large"):
            for step in (1, 10):
                every += rows(suite, model, step, plus + step / 100)
    every += rows("old", "small", 1, 0.2, shots=5)
    every += rows("old", "large", 10, 0.3, variant="intervened")
    every += rows("bare", "base", None, dtype=None, stderr=None)
    every += rows("bare", "other", None, 0.1, dtype=None)
    every += [row._replace(model=name) for name in CONDITIONS for row in rows("alike", "x")]
    every += [
        row._replace(**{name: LATER[name]}, suite="unlike", model=name)
        for name in CONDITIONS
        for row in rows("", "")
    ]
    for seed in (1, 2):
        every += rows("seeds", "m", 1, seed / 10, seed=seed)
    store.add(every)
    return [store]


def compared(stores: list[ResultsStore], a: str, b: str, across: str | None = None, where=None):
    selections = [select_rows(name, stores, where) for name in (a, b)]
    return compare(*selections, allowed_conditions(across))


def test_two_steps_of_a_model(stores):
    done = compared(stores, "new/small@1", "new/small@10")
    names, (arc, *_, ppl) = done.answer
    assert names == ["task", "metric", "shots", "a", "b", "difference", "stderr", "z"]
    assert arc[:3] == ("arc", "acc", 0) and ppl[:2] == ("ppl", "loss")
    assert arc[3:] == pytest.approx((0.61, 0.7, 0.09, 0.03 * 2**0.5, 0.09 / (0.03 * 2**0.5)))
    assert (done.better, done.certain, done.alone) == ((1, 2), 3, (0, 0))
    assert done.summary(("a", "b")) == (
        "3 numbers: a is better in 1, b in 2; 3 differ by more than 2 standard errors;"
        " 0 only in a, 0 only in b"
    )
    # The last step; the model itself, without its variant; one number of two shots.
    assert compared(stores, "new/small@1", "new/small@last").answer == done.answer
    assert len(compared(stores, "old/large@step10", "new/large@10").answer[1]) == 3
    # One step against several: the same one.
    done = compared(stores, "new/small@1", "old/large")
    assert done.answer[0][2] == "step" and done.alone == (0, 3)


def test_suites_are_joined_by_model_and_step(stores):
    done = compared(stores, "new", "old", where="task = 'piqa'")
    assert done.answer[0][:6] == ["task", "metric", "model", "variant", "step", "shots"]
    places = [row[2:6] for row in done.answer[1]]
    assert places == [(m, "", s, 0) for m in ("large", "small") for s in (1, 10)]
    assert [row[8] for row in done.answer[1]] == pytest.approx([-0.1] * 4)
    # The variant of `old` has no partner.
    assert done.alone == (0, 1)
    variant = compared(stores, "old/large@10", "old/large@10,variant=intervened")
    assert [row[5] for row in variant.answer[1]] == pytest.approx([0.2] * 3)


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_difference_in_each_condition_is_refused_and_allowed(stores, name):
    pair = (f"alike/{name}", f"unlike/{name}")
    first = getattr(rows("", "")[0], name)
    with pytest.raises(DataError) as caught:
        compared(stores, *pair)
    assert str(caught.value).splitlines()[1:] == [
        f"  {name}: {first} against {LATER[name]} (3 numbers)",
        f"--across {name} compares them nevertheless",
    ]
    with pytest.raises(DataError, match=f"--across .*{name} compares"):
        compared(stores, *pair, ",".join(set(CONDITIONS) - {name}))
    names, table = compared(stores, *pair, name).answer
    place = names.index(f"{name}_a")
    assert [row[place : place + 2] for row in table] == [(first, LATER[name])] * 3


def test_unknown_compares_with_unknown_only(stores):
    names, table = compared(stores, "bare/base", "bare/other").answer
    assert [row[names.index("difference")] for row in table] == pytest.approx([0.1] * 3)
    # Without a standard error on one side there is none.
    assert {row[-2:] for row in table} == {(None, None)}
    with pytest.raises(DataError, match=r"dtype: unknown against fp32 \(3 numbers\)"):
        compared(stores, "bare/base", "new/small@1")


def test_matching_conditions_are_preferred_to_allowed_ones(stores):
    # Both have numbers without examples; old/small has others with five.
    for across in (None, "shots", "all"):
        _, table = compared(stores, "new/small@1", "old/small@1", across).answer
        assert [row[2] for row in table] == [0, 0, 0]
    names, table = compared(stores, "new/small@1", "old/small@1,shots=5", "shots").answer
    assert names[2:4] == ["shots_a", "shots_b"] and table[0][2:4] == (0, 5)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ("nwe", "old", "no suite, model or store 'nwe'; did you mean 'new'"),
        ("new/smal", "old", "did you mean 'new/small'"),
        ("???", "old", r"no suite, model or store '\?\?\?'; have: alike, alike/.*, bare"),
        ("small", "old", "small is a model of several suites; name one: new/small, old/small"),
        ("new/small@2", "old", "new/small@2: no such rows; there are the steps 1, 10"),
        ("bare/base@2", "old", "bare/base@2: no such rows; they have no step"),
        ("new/small,dtyp=x", "old", "no column 'dtyp'; did you mean 'dtype'"),
        ("new/small,dtype=x", "old", "new/small,dtype=x: no such rows$"),
        ("base", "old/large", "base has no step and old/large the steps 1, 10; .*: NAME@STEP"),
        ("bare/base", "old", "base has the model base and old the models large, small; .*MODEL"),
        ("seeds", "new/small@1", "seeds has the seeds 1, 2 and .* no seed; .*: NAME,seed=VALUE"),
        ("bare", "new", "bare has the models base, other and new the models large, small"),
    ],
)
def test_what_cannot_be_compared(stores, a, b, message):
    where = "step = 1 or step is null" if a in ("seeds", "bare/base") else None
    with pytest.raises(DataError, match=message):
        compared(stores, a, b, where=where)


def test_a_condition_that_does_not_exist():
    with pytest.raises(ConfigError, match="--across dtyp: unknown condition; did you mean 'dtype'"):
        allowed_conditions("harness,dtyp")
    assert allowed_conditions(" dtype , all") == CONDITIONS and allowed_conditions(None) == ()


def test_paths_of_runs_and_stores(stores, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run, plus in (("a", 0.0), ("b", 0.05)):
        ResultsStore(f"runs/{run}/evals").add(rows("runs", run, 10, plus))
    # A sweep over the suite wrote its runs into one table.
    ResultsStore("runs/evals").add(rows("runs", "a", 20) + rows("runs", "b", 20, 0.1))
    _, table = compared([], "runs/a@10", "runs/b").answer
    assert [row[5] for row in table] == pytest.approx([0.05] * 3)
    _, table = compared([], "runs/evals/results.parquet", "runs").answer
    assert [row[7] for row in table] == [0.0] * 6
    with pytest.raises(DataError, match="no suite, model or store 'runs/c'; --store DIR names"):
        compared([], "runs/c", "runs/a")
    with pytest.raises(DataError, match="have no task and metric in common"):
        compared([], "runs/a,task=arc", "runs/a,task=ppl")


def test_numbers_that_are_none(tmp_path):
    store = ResultsStore(tmp_path)
    store.add([row._replace(value=math.nan, stderr=0.0) for row in rows("s", "a")])
    store.add([row._replace(value=math.inf, stderr=0.0) for row in rows("s", "b")])
    done = compared([store], "s/a", "s/b")
    assert all(math.isnan(row[5]) and row[7] is None for row in done.answer[1])
    # A NaN is neither better nor worse, and no difference that is certain.
    assert (done.better, done.certain) == ((0, 0), 0)
