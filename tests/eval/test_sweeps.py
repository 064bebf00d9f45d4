"""Sweeps: their order, what is measured again, and the same numbers by every way."""

import hashlib
import os
import resource
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.fixtures.short_run import in_suite

from castalia.core.errors import CastaliaError, DataError
from castalia.eval import HeldOut, bits_per_byte, evaluate, held_out, open_tasks
from castalia.eval.held_out import Windows, document_bytes, sources_of
from castalia.eval.jobs import JobOptions
from castalia.eval.labels import Arithmetic
from castalia.eval.places import checkpoints_of
from castalia.eval.sweep import sweep as sweep_of_demo
from castalia.eval.sweeps import Outcome, sweep
from castalia.eval.work import WorkOptions
from castalia.export import export
from castalia.inference import load
from castalia.results import Result, ResultsStore
from castalia.terminal.signals import StoppedError, stoppable

TEXT = WorkOptions(tasks=("bits_per_byte",), windows=Windows(max_tokens=400))


@pytest.fixture
def run(four_steps: Path, tmp_path: Path) -> Path:
    """The run in a suite of its own."""
    return in_suite(four_steps, tmp_path / "suite")


def swept(
    *paths: Path, steps: str = "all", asked: WorkOptions = TEXT, options: JobOptions = JobOptions()
) -> tuple[list[Outcome], list[str]]:
    """A sweep and the lines that it said."""
    said: list[str] = []
    checkpoints = checkpoints_of([str(path) for path in paths], steps)
    return sweep(checkpoints, asked, options, say=said.append), said


def test_the_cheapest_come_first_and_outcomes_as_they_were_asked_for(
    run: Path, run_folder: Path, tmp_path: Path
):
    words = {source.name: source.prefix for source in sources_of(run, {}, Windows())}
    asked = WorkOptions(
        tasks=("bits_per_byte",), held_out=words, windows=Windows(32, 100), limit=1, batch=4
    )
    checkpoints = checkpoints_of([run_folder, run], "last", store=tmp_path / "numbers")
    said: list[str] = []
    larger, smaller = sweep(checkpoints, asked, JobOptions(), say=said.append)
    assert (larger.checkpoint.model, smaller.checkpoint.model) == ("tiny", "small-1m")
    # 149,248 parameters against 25,888.
    assert [line.split()[0] for line in said] == ["small-1m", "tiny"]
    assert [line.split()[-1] for line in said] == ["1/2", "2/2"]
    assert {row.documents for row in larger.rows} == {1}
    # Of 4 and 6 documents.
    assert [source.documents for source in sources_of(run, {}, Windows(), 0.3)] == [2, 2]


def test_what_is_left_is_counted_in_requests(four_steps: Path, tmp_path: Path, task_folder: Path):
    one, other = (in_suite(four_steps, tmp_path / name) for name in ("one", "other"))
    both = tuple(str(task_folder / f"{name}_local.yaml") for name in ("choices", "lambada"))
    # 10 documents with a request for each choice are left of one, 12 with one request of the other.
    for run, task in ((one, both[1]), (other, both[0])):
        swept(run, steps="last", asked=WorkOptions((task,), bootstrap=0))
    _, said = swept(one, other, steps="last", asked=WorkOptions(both, bootstrap=0))
    assert said[0] == "2 of 4 results are in the table already; 2 to measure"
    assert [("choices_local" in line, "lambada_local" in line) for line in said[1:]] == [
        (False, True),
        (True, False),
    ]


def test_a_group_that_was_stopped_goes_on_after_its_last_task(
    run: Path, task_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    asked = WorkOptions(("local_group",), (str(task_folder),), limit=5, samples=True)
    evaluated: list[str] = []

    def stops_at_the_second(model, tasks, **options):
        evaluated.extend(tasks.names)
        if tasks.names == ["pairs_local"] and len(evaluated) == 2:
            raise KeyboardInterrupt
        return evaluate(model, tasks, **options)

    def fails_at_pairs(model, tasks, **options):
        if tasks.names == ["pairs_local"]:
            raise DataError("no memory")
        return evaluate(model, tasks, **options)

    monkeypatch.setattr("castalia.eval.harness.evaluate.evaluate", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        swept(run, steps="last", asked=asked)
    (outcome,), said = swept(run, steps="last", asked=asked)
    assert said[0] == "1 of 3 results are in the table already; 2 to measure"
    assert evaluated == ["choices_local", "pairs_local", "pairs_local"]
    # The group's numbers are the harness's own, of all its tasks at once.
    tasks = open_tasks("local_group", include=[str(task_folder)], limit=5)
    whole = evaluate(load(run, engine="torch"), tasks)
    columns = ("value", "stderr", "documents", "shots", "higher_is_better", "task_hash")
    expected = {
        (number.task, number.metric): [getattr(number, name) for name in columns]
        for number in whole.numbers
    }
    assert {
        (row.task, row.metric): [getattr(row, name) for name in columns] for row in outcome.rows
    } == expected
    assert ("local_group", "acc") in expected and len(expected) == 4
    _, said = swept(run, steps="last", asked=asked)
    assert said == ["3 of 3 results are in the table already; 0 to measure"]
    # Fewer documents are another number of the group, too, and have samples of their own.
    (fewer,), _ = swept(run, steps="last", asked=replace(asked, limit=3, samples=False))
    (again,), _ = swept(run, steps="last", asked=replace(asked, limit=3))
    assert again.measured == 2 and again.found == 1
    files = (run / "evals" / "samples").iterdir()
    assert sorted(len(file.read_text().splitlines()) for file in files) == [3, 3, 5, 5]
    assert fewer.measured == 3
    assert {row.documents for row in fewer.rows if row.task == "local_group"} == {6}
    # Without one of its tasks there is no mean of them.
    monkeypatch.setattr("castalia.eval.harness.evaluate.evaluate", fails_at_pairs)
    (broken,), _ = swept(run, steps="last", asked=replace(asked, limit=2))
    assert [failure.reason for failure in broken.failures] == [
        "no memory",
        "its means need the numbers of all its tasks, and there are none of pairs_local",
    ]


def test_held_out_text_is_the_library_s_own_measure(run: Path):
    (outcome,), _ = swept(run, steps="4", asked=WorkOptions(tasks=("bits_per_byte",)))
    model = load(run, engine="torch")
    sources = {
        source.name: HeldOut(source.prefix, document_bytes(source.prefix, model.tokenizer))
        for source in sources_of(run, {}, Windows())
    }
    expected = bits_per_byte(model.model, sources, seq_length=64, eod_id=model.eod_id)
    found = {(row.task, row.metric): row.value for row in outcome.rows}
    for name, bits in expected.items():
        assert found[f"bits_per_byte/{name}", "bits_per_byte"] == bits.bits_per_byte
        assert found[f"bits_per_byte/{name}", "loss"] == bits.loss
    # The bytes of the corpus, as its documents have them.
    assert sum(document_bytes(sources["stdlib"].prefix, model.tokenizer)) == 24319
    assert sources["stdlib"].document_bytes == document_bytes(
        sources["stdlib"].prefix, model.tokenizer
    )


def test_only_other_weights_data_or_settings_are_measured_again(run: Path):
    first, said = swept(run)
    assert [outcome.measured for outcome in first] == [1] * 4 and len(said) == 4
    again, said = swept(run)
    assert [outcome.found for outcome in again] == [1] * 4
    assert said == ["4 of 4 results are in the table already; 0 to measure"]
    assert [outcome.rows for outcome in again] == [outcome.rows for outcome in first]
    # In its suite a run has the numbers that it has alone.
    _, said = swept(run.parent)
    assert said == ["4 of 4 results are in the table already; 0 to measure"]
    # Saved again, with other weights as far as the manifest says.
    steps = run / "checkpoints"
    four = steps / "step-00000004"
    store = ResultsStore(run / "evals")
    hashes = dict(store.query("SELECT DISTINCT step, checkpoint_hash FROM results")[1])
    assert len(set(hashes.values())) == 4
    manifest = (four / "manifest.json").read_bytes() + b" "
    (four / "manifest.json").write_bytes(manifest)
    (four / "COMPLETE").write_text(hashlib.sha256(manifest).hexdigest() + "\n")
    _, said = swept(run)
    assert said[0] == "3 of 4 results are in the table already; 1 to measure"
    assert "step 4" in said[1] and len(said) == 2
    assert store.query("SELECT count(*) FROM results")[1] == [(16,)]
    # Other windows are another measure, beside the first.
    shorter = WorkOptions(tasks=("bits_per_byte",), windows=Windows(32, 400))
    (outcome,), said = swept(run, steps="4", asked=shorter)
    assert outcome.measured == 1 and store.query("SELECT count(*) FROM results")[1] == [(20,)]


def test_the_demo_s_numbers_are_in_the_same_table(run: Path):
    tokenizer = load(run).tokenizer
    sources = {
        source.name: HeldOut(source.prefix, document_bytes(source.prefix, tokenizer))
        for source in sources_of(run, {}, Windows())
    }
    entries = sweep_of_demo(run, sources, seq_length=64, max_tokens=400, say=lambda text: None)
    outcomes, said = swept(run)
    assert said == ["4 of 4 results are in the table already; 0 to measure"]
    for entry, outcome in zip(entries, outcomes, strict=True):
        found = {row.task: row.value for row in outcome.rows if row.metric == "bits_per_byte"}
        for name, numbers in entry["sources"].items():
            assert found[f"bits_per_byte/{name}"] == numbers["bits_per_byte"]


def test_exports_of_a_run_stand_beside_its_checkpoints(run: Path):
    list(export(run, to="hf", certificate=False))
    list(export(run, to="hf", dtype="bf16", output=run / "exports" / "half", certificate=False))
    list(export(run, to="native", quantization="int8", certificate=False))
    (exact,), _ = swept(run, steps="last")
    folders = (run / "exports" / name for name in ("hf/step4", "half", "native-int8/step4"))
    (whole, half, packed), said = swept(*folders)
    # An export in fp32 is the checkpoint itself; its reference is measured already, too.
    assert said[0].startswith("1 of 3 results are in the table already; 2 to measure")
    assert whole.rows == exact.rows
    assert {row.variant for row in half.rows} == {"bf16 weights"}
    assert {(row.engine, row.dtype) for row in packed.rows} == {("native", "int8")}
    assert packed.reference == exact.rows
    for row, reference in zip(packed.rows, exact.rows, strict=True):
        assert 0 < abs(row.value - reference.value) < 0.1


def test_nothing_is_measured_for_a_table_that_cannot_take_it(run: Path, tmp_path: Path):
    said: list[str] = []

    def sweep_into(store: Path) -> None:
        sweep(checkpoints_of([run], "all", store), TEXT, JobOptions(), say=said.append)

    (tmp_path / "file").write_text("")
    for place, reason in (("file", "File exists"), ("file/store", "Not a directory")):
        with pytest.raises(CastaliaError, match=f"cannot write .*/{place}: {reason}; choose"):
            sweep_into(tmp_path / place)
    # A flipped byte in numbers that no question about this run reads.
    store = ResultsStore(tmp_path / "store")
    store.add([Result("s", "m", f"t{i}", "acc", i / 7, seconds=i / 9) for i in range(5000)])
    content = bytearray(store.path.read_bytes())
    content[len(content) // 2] ^= 1
    store.path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read as Parquet.*; move it away"):
        sweep_into(store.folder)
    assert said == []


@pytest.mark.slow
def test_ctrl_c_ends_worker_processes_at_once_and_keeps_what_is_done(run: Path):
    store = run / "evals" / "results.parquet"

    def interrupt() -> None:
        while not store.exists() and not over.wait(0.01):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    over = threading.Event()
    long = WorkOptions(tasks=("bits_per_byte",), windows=Windows(16, 9000))
    waiting = threading.Thread(target=interrupt)
    waiting.start()
    said: list[str] = []
    checkpoints = checkpoints_of([run], "all")
    stopped = pytest.raises(StoppedError, match="stopped by SIGINT; the same command goes on")
    with stopped, stoppable("the same command goes on"):
        sweep(checkpoints, long, JobOptions(), processes=2, say=said.append)
    over.set()
    waiting.join()
    rest = sweep(checkpoints, long, JobOptions(), say=said.append)
    assert 1 <= sum(outcome.found for outcome in rest) < 4
    assert sum(outcome.found + outcome.measured for outcome in rest) == 4


def test_a_disk_that_fills_ends_the_sweep(run: Path, tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = checkpoints_of([run], "all", store=tmp_path / "numbers")
    said: list[str] = []
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CastaliaError, match=r"cannot write .*results\.parquet.*; free space"):
            sweep(checkpoints, TEXT, JobOptions(), say=said.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not said  # of four steps none is said to be done, and the last three are not measured
    outcomes = sweep(checkpoints, TEXT, JobOptions(), say=said.append)
    assert len(said) == len(outcomes) and all(outcome.measured for outcome in outcomes)


def test_an_error_that_no_check_foresaw_is_noted_and_the_rest_goes_on(
    run: Path, monkeypatch: pytest.MonkeyPatch
):
    measure = held_out.measure

    def fails_at_one(model, source, labels, **options):
        if labels.step == 1:
            raise torch.OutOfMemoryError("out of memory\nsecond line")
        return measure(model, source, labels, **options)

    monkeypatch.setattr(held_out, "measure", fails_at_one)
    options = JobOptions(Arithmetic("native", "fp32"))
    outcomes, _ = swept(run, options=options)
    failures = [failure for outcome in outcomes for failure in outcome.failures]
    assert [outcome.checkpoint.step for outcome in outcomes if outcome.failures] == [1]
    assert failures == [("bits_per_byte", "OutOfMemoryError: out of memory", 1)]
    assert [len(outcome.rows) for outcome in outcomes] == [4, 0, 4, 4]
