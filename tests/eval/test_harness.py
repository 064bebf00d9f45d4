"""Tasks of the harness: their names, one evaluation after another, ranks, errors."""

import contextlib
import json
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lm_eval.api import metrics
from lm_eval.tasks import TaskManager
from tests.fixtures.harness_tasks import JSON, TASKS, write_task

from castalia.core.errors import CastaliaError, ConfigError, DataError
from castalia.eval.harness import model as harness_model
from castalia.eval.harness import quiet, sources
from castalia.eval.harness.encoding import TextEncoder
from castalia.eval.harness.evaluate import Evaluation, evaluate
from castalia.eval.harness.own_tasks import own_tasks
from castalia.eval.harness.tasks import TaskSet, open_tasks
from castalia.eval.labels import labels_of
from castalia.eval.shares import Share
from castalia.inference import LanguageModel, load

ALL = ["local_group", *(name for name in TASKS if name not in ("choices_local", "pairs_local"))]


@pytest.fixture(scope="module")
def tasks(task_folder: Path) -> TaskSet:
    """Every local task."""
    return open_tasks(ALL, include=[str(task_folder)])


@pytest.fixture(scope="module")
def done(tasks: TaskSet, speaker: LanguageModel) -> Evaluation:
    """The newest checkpoint on every task."""
    return evaluate(speaker, tasks, bootstrap=2000, samples=True)


def values(evaluation: Evaluation) -> dict[tuple[str, str], tuple[float, float | None]]:
    """Value and error by task and metric."""
    return {(one.task, one.metric): (one.value, one.stderr) for one in evaluation.numbers}


def test_names_paths_folders_tags_and_wildcards(task_folder, tmp_path):
    def names(*given: str, **options: Any) -> list[str]:
        return open_tasks(list(given), **options).names

    local = {"include": [str(task_folder)]}
    assert names(str(task_folder / "sums_local.yaml")) == ["sums_local"]
    assert names("local_group", **local) == ["choices_local", "pairs_local"]
    assert names("local_likelihoods", **local) == ["lambada_local", "sums_local"]
    assert names("s*_local", "sums_local", **local) == ["stereotypes_local", "sums_local"]
    whole = open_tasks(str(task_folder))
    assert sorted(whole.names) == sorted(TASKS)
    assert [part.name for part in whole.split()[1].parts] == [whole.parts[1].name]
    # Members of a group come with it alone, and `group: [..]` of a task is an older word for tags.
    assert [part.name for part in whole.parts if len(part.tasks) > 1] == ["local_group"]
    config = TASKS["pairs_local"][2] | {"group": ["old_tag"], "metadata": {"version": 7}}
    path = write_task(tmp_path, "old", [TASKS["pairs_local"][0](i) for i in range(3)], config)
    assert names("old_tag", include=[str(path)]) == ["old"]


def test_wrong_names_and_files_are_named(task_folder, tmp_path):
    def refused(*given: str, **options: Any) -> str:
        with pytest.raises(CastaliaError) as error:
            open_tasks(list(given), **options)
        return str(error.value)

    assert "did you mean 'sums_local'?" in refused("sums_locla", include=[str(task_folder)])
    assert "did you mean 'lambada_openai'?" in refused("lambada_opena")
    assert "no task" in refused() and "matches 'nothing*'" in refused("nothing*")
    assert "no such task file" in refused("missing.yaml")
    twice = refused("local_group", "pairs_local", include=[str(task_folder)])
    assert "pairs_local is named twice: by local_group and by pairs_local" in twice
    files = {
        "broken.yaml": ("task: [unclosed", "broken.yaml is not a task file"),
        "text.yaml": ("only text", "expected a mapping"),
        "part.yaml": ("output_type: loglikelihood", "neither `task` nor `group`"),
        "lost.yaml": ("include: missing.yaml\ntask: lost", "missing.yaml"),
    }
    for name, (text, message) in files.items():
        (tmp_path / name).write_text(text)
        assert message.replace("expected a mapping", "not a task file") in refused(
            str(tmp_path / name)
        )
    assert "limit must be above 0" in refused("sums_local", limit=0)


def test_tasks_that_cannot_be_built_say_why(task_folder, tmp_path, monkeypatch):
    def refused(config: dict[str, Any], kind: type[CastaliaError], **options: Any) -> str:
        path = tmp_path / "wrong.yaml"
        text = yaml.safe_dump({"task": "wrong", **JSON, **TASKS["sums_local"][2], **config})
        path.write_text(text.replace("FUNCTION ", "!function "))
        with pytest.raises(kind) as error:
            open_tasks(str(path), **options)
        return str(error.value)

    data = {"dataset_kwargs": {"data_files": {"test": "missing.jsonl"}}}
    lost = refused(data, DataError)
    assert "task wrong: its data json cannot be read" in lost and "missing.jsonl" in lost
    # Without a network: no request, and the way to give local data.
    monkeypatch.setattr(sources, "hub_answers", lambda endpoint: False)
    remote = refused({"dataset_path": "owner/data", "dataset_name": "part"}, DataError)
    assert "task wrong: its data owner/data (part) cannot be read" in remote
    assert f"include: {tmp_path}/wrong.yaml" in remote and "dataset_path: json" in remote
    assert "runs code that the model writes" in refused({"unsafe_code": True}, ConfigError)
    (tmp_path / "needs.py").write_text("import a_package_that_nobody_has\n")
    needs = refused({"process_results": "FUNCTION needs.process"}, ConfigError)
    assert "task wrong needs the package 'a_package_that_nobody_has'" in needs
    here = {"dataset_kwargs": {"data_files": {"test": str(task_folder / "sums_local.jsonl")}}}
    # What the harness refuses keeps its reason.
    odd = refused(here | {"output_type": "guess"}, ConfigError)
    assert "task wrong cannot be built" in odd and "'guess'" in odd


def test_numbers_have_their_tasks_shots_errors_and_documents(tasks, done, speaker, run_folder):
    lines = {(one.task, one.metric): one for one in done.numbers}
    assert len(lines) == 13 and len({one.task_hash for one in done.numbers}) == 8
    acc = lines["lambada_local", "acc"]
    assert (acc.filter, acc.shots, acc.documents, acc.task_version) == ("none", 0, 12, "1.0")
    assert acc.higher_is_better is True
    assert lines["lambada_local", "perplexity"].higher_is_better is False
    group = lines["local_group", "acc"]
    assert group.documents == 18 and group.task_version == "2.0"
    members = [lines[name, "acc"].value for name in ("choices_local", "pairs_local")]
    assert group.value == pytest.approx((10 * members[0] + 8 * members[1]) / 18)
    assert group.seconds == pytest.approx(
        sum(lines[name, "acc"].seconds for name in ("choices_local", "pairs_local"))
    )
    assert {len(docs) for docs in done.samples.values()} == {4, 8, 9, 10, 12}
    written = json.loads(json.dumps(done.json))
    assert written["config"]["model"] == "castalia:torch"
    assert written["results"]["lambada_local"]["acc,none"] == acc.value
    assert "def process_results" in written["configs"]["stereotypes_local"]["process_results"]
    rows = done.results(labels_of(run_folder, speaker))
    assert len(rows) == 13 and {row.harness for row in rows} == {"lm-eval 0.4.13"}
    assert (rows[0].step, rows[0].batch, rows[0].engine) == (220, 16, "torch")


def test_a_task_set_is_built_once_for_all_checkpoints(
    tasks, done, speaker, run_folder, task_folder, monkeypatch
):
    calls: list[int] = []
    plain = TextEncoder.plain
    monkeypatch.setattr(
        TextEncoder, "plain", lambda self, texts: calls.append(len(texts)) or plain(self, texts)
    )
    monkeypatch.setattr("datasets.load_dataset", None)
    answered: dict[str, int] = {}

    def say(name: str, count: int) -> None:
        answered[name] = answered.get(name, 0) + count

    again = evaluate(speaker, tasks, bootstrap=2000, batch=5, say=say)
    # Not one text is encoded again, nor a request built.
    assert sum(calls) == 0
    assert answered == tasks.requests
    for key, (value, stderr) in values(done).items():
        assert again[key].value == pytest.approx(value, rel=1e-6), key
        assert again[key].stderr == (stderr and pytest.approx(stderr, rel=1e-6)), key
    assert again.samples == {} and again.json["results"].keys() == done.json["results"].keys()
    start = load(run_folder / "step0", engine="torch")
    later = evaluate(start, tasks, bootstrap=0)
    monkeypatch.undo()
    fresh = evaluate(start, open_tasks(ALL, include=[str(task_folder)]), bootstrap=0)
    assert values(later) == values(fresh)
    assert (
        later["pages_local", "bits_per_byte"].value != again["pages_local", "bits_per_byte"].value
    )
    assert later["lambada_local", "acc"].stderr is None


class Ranks:
    """Ranks in threads, which exchange objects at a barrier."""

    def __init__(self, size: int) -> None:
        self.parts: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def share(self, rank: int) -> Share:
        """One rank's share."""

        def gather(part: Any) -> list[Any]:
            self.parts[rank] = part
            self.barrier.wait()
            parts = list(self.parts)
            self.barrier.wait()
            return parts

        return Share(rank, len(self.parts), gather)

    def run(self, function: Any) -> list[Any]:
        """`function` of each rank's share; an error in place of a result."""
        results: list[Any] = [None] * len(self.parts)

        def one(rank: int) -> None:
            try:
                results[rank] = function(self.share(rank))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(self.parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.fixture(scope="module")
def tasks_of_ranks(task_folder: Path) -> list[TaskSet]:
    """Three times the same tasks: every rank has its own."""
    names = ["choices_local", "pages_local", "pronouns_local"]
    return [open_tasks(names, include=[str(task_folder)]) for _ in range(3)]


@pytest.mark.parametrize("size", [2, 3])
def test_each_line_counts_once_on_any_number_of_ranks(
    size, tasks_of_ranks, done, speaker, monkeypatch
):
    scored: list[Any] = []
    score_lines = harness_model.score_lines

    def counted(engine: Any, lines: Sequence[Any], **options: Any) -> list[Any]:
        scored.extend(lines)
        return score_lines(engine, lines, **options)

    monkeypatch.setattr(harness_model, "score_lines", counted)
    # The ranks of one process would wait for each other.
    monkeypatch.setattr(quiet, "LOCK", contextlib.nullcontext())
    results = Ranks(size).run(
        lambda share: evaluate(speaker, tasks_of_ranks[share.rank], bootstrap=0, share=share)
    )
    for evaluation in results:
        assert not isinstance(evaluation, Exception), evaluation
        assert len(evaluation.numbers) == 6
        for key, (value, _) in values(evaluation).items():
            assert value == pytest.approx(values(done)[key][0], rel=1e-6), key
    assert len(scored) == len(set(scored)) > 40


def test_a_rank_that_fails_ends_the_others():
    def compute(share: Share) -> list[int]:
        def function(items: list[int]) -> list[int]:
            if 5 in items:
                raise ValueError("five")
            return [item * item for item in items]

        return share.compute([1, 2, 3, 5], function, together=lambda i: i, cost=lambda i: i)

    results = Ranks(2).run(compute)
    kinds = sorted(type(result).__name__ for result in results)
    assert kinds == ["CastaliaError", "ValueError"]
    assert any("failed: ValueError('five')" in str(result) for result in results)
    # Ranks whose tasks list their documents in another order do not take each other's answers.
    ordered = [[1, 2, 3], [1, 3, 2]]
    other = Ranks(2).run(
        lambda share: share.compute(
            ordered[share.rank], lambda own: own, together=lambda i: i, cost=lambda i: 1
        )
    )
    assert all("ask for different things" in str(result) for result in other)
    dealt = Share(0, 3).deal(range(20), together=lambda i: i // 2, cost=lambda i: i)
    assert sorted(place for places in dealt for place in places) == list(range(20))
    assert all(places.index(i + 1) == places.index(i) + 1 for places in dealt for i in places[::2])
    loads = [sum(places) for places in dealt]
    assert max(loads) - min(loads) <= 37


def test_the_bootstrap_draws_what_the_harness_draws(monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    numbers = [-0.3 * i for i in range(7)]
    for function in (metrics.perplexity, metrics.nanmean, metrics.median):
        theirs = metrics.bootstrap_stderr(function, numbers, 2000)
        ours = quiet.bootstrap_stderr(function, numbers, 2000)
        assert ours == pytest.approx(theirs, rel=1e-12), function


def test_nothing_leaks_out_of_the_harness(tasks, speaker, capfd, monkeypatch):
    # No pool of processes for the bootstrap.
    monkeypatch.setattr("multiprocessing.Pool", None)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    want = (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    evaluate(speaker, TaskSet(tasks.parts[1:2], built=tasks.built), bootstrap=100)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == want
    assert capfd.readouterr() == ("", "")


def written(model: LanguageModel, folder: Path, options: dict[str, Any], **more: Any) -> list[Any]:
    """The texts of a generating task with some generation_kwargs, by document."""
    config = TASKS["pronouns_local"][2] | {"generation_kwargs": options} | more
    docs = [{"text": "The naïve café", "answer": ""}, {"text": "A second guest", "answer": ""}]
    tasks = open_tasks(str(write_task(folder, "written", docs, config)))
    done = evaluate(model, tasks, bootstrap=0, samples=True)
    # A filter may be one of several that see the same answers.
    samples = {doc["doc_id"]: doc["resps"][0] for doc in done.samples["written"]}
    return [samples[i] for i in range(2)]


def test_texts_end_at_stop_strings_and_draws_are_repeatable(speaker, tmp_path):
    whole = written(speaker, tmp_path, {"max_gen_toks": 40, "until": []})
    assert whole[0][0].startswith(" owner said: “¡Olé!” and poured ")
    cut = written(speaker, tmp_path, {"max_gen_toks": 40, "until": ["said", " and"]})
    assert cut == [[" owner "], [whole[1][0].split("said")[0].split(" and")[0]]]
    # One request comes twice with a draw of its own each; another run draws the same.
    options = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 12, "until": ["\n"]}
    draws = written(speaker, tmp_path, options, repeats=2)
    assert draws == written(speaker, tmp_path, options, repeats=2)
    assert draws[0][0] != draws[0][1] and draws[0] != whole[0]
    other = written(speaker, tmp_path, {**options, "seed": 7}, repeats=2)
    assert other != draws


def test_what_a_model_cannot_do_is_named(speaker, tasks, tmp_path):
    cases = {
        "generation_kwargs has num_beams=4": {"num_beams": 4},
        "did you mean 'top_p'": {"top_q": 0.5, "do_sample": True},
        "asks for 300 new tokens, but the model reads at most 256": {"max_gen_toks": 300},
        "min_p must be from 0 to 1": {"min_p": 2, "do_sample": True, "max_gen_toks": 8},
    }
    for message, options in cases.items():
        with pytest.raises(ConfigError) as error:
            written(speaker, tmp_path, options)
        assert message in str(error.value)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        evaluate(LanguageModel(speaker.engine), tasks)
    with pytest.raises(ConfigError, match="has no chat template"):
        evaluate(speaker, tasks, chat=True)
    config = TASKS["sums_local"][2]
    for docs, message in (
        ([{"context": "a", "completion": "b" * 300}], "a continuation of 300 tokens"),
        ([{"context": "a", "completion": ""}], "has no token of its own"),
    ):
        wrong = open_tasks(str(write_task(tmp_path, "wrong", docs, config)))
        with pytest.raises(ConfigError, match=message):
            evaluate(speaker, wrong)
    for name in ("batch", "bootstrap"):
        with pytest.raises(ConfigError, match=f"{name} must be >="):
            evaluate(speaker, tasks, **{name: -1})


def test_another_engine_gives_the_same_numbers(tasks, done, run_folder):
    native = load(run_folder, engine="native", dtype="fp32")
    other = evaluate(native, tasks, bootstrap=0)
    assert other.json["config"]["model"] == "castalia:native"
    for key, (value, _) in values(done).items():
        assert values(other)[key][0] == pytest.approx(value, rel=1e-4), key


def hash_of(tasks: TaskSet, chat_template: str | None = None) -> str:
    """The hash of the only task."""
    (part,) = tasks.parts
    (digest,) = part.hashes(tasks.prompting(chat_template)).values()
    return digest


def test_a_hash_is_that_of_the_task_and_not_of_the_machine(tmp_path):
    folders = [tmp_path / name for name in ("here", "there", "changed")]
    hashes = []
    for folder in folders:
        folder.mkdir()
        make, _, config = TASKS["sums_local"]
        if folder.name == "changed":
            config = config | {"target_delimiter": "\n"}
        path = write_task(folder, "sums_local", [make(1), make(2), make(3)], config)
        for shots in (0, 1):
            hashes.append(hash_of(open_tasks(str(path), shots=shots)))
    assert len(hashes[0]) == 16
    assert len(set(hashes[:4])) == 1 and len(set(hashes[4:])) == 1 and hashes[0] != hashes[4]
    # Which examples there are is a part of the question, and without examples it is none.
    asked = [open_tasks(str(path), shots=shots, seed=7) for shots in (0, 1)]
    assert hash_of(asked[0]) == hashes[4] != hash_of(asked[1])
    assert hash_of(asked[0], "{{ messages }}") not in hashes


@pytest.mark.slow
def test_the_names_of_the_harness_are_those_of_its_own_index():
    mine = own_tasks()
    theirs = TaskManager().task_index
    assert len(theirs) > 10_000 and mine.keys() == theirs.keys()
    for name, entry in theirs.items():
        got = mine[name]
        assert (got.kind, got.yaml_path, got.tags) == (entry.kind, entry.yaml_path, entry.tags)
