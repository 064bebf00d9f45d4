"""`castalia eval`: sweeps over checkpoints, what is skipped, what fails, and what is printed."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tests.fixtures.forked_rank import join_ranks, run_and_exit
from tests.fixtures.harness_tasks import FUNCTIONS, TASKS, write_task
from tests.fixtures.ports import held_port
from tests.fixtures.short_run import in_suite

from castalia.checkpoint import Store
from castalia.cli.eval import OutputFlags, show
from castalia.config import dump_yaml
from castalia.data import IndexedDatasetWriter
from castalia.distributed import initialize
from castalia.eval.places import Checkpoint
from castalia.eval.sweeps import Outcome, Part
from castalia.export import export
from castalia.models import Decoder, NeoxConfig
from castalia.models.init import start_weights
from castalia.results import COLUMNS, Result, ResultsStore
from castalia.runs.config import RunConfig

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(four_steps: Path, tmp_path: Path) -> Path:
    """A run of four steps in a suite of its own, without results."""
    return in_suite(four_steps, tmp_path / "suite")


TEXT = ("--tasks", "bits_per_byte", "--held-out-tokens", 400)
"""Held-out text needs no harness, and is quick."""


def numbers(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], float]:
    """Values by what tells rows apart."""
    keys = ("model", "step", "task", "metric", "shots", "engine", "dtype", "documents")
    return {tuple(row[key] for key in keys): row["value"] for row in rows}


def test_a_run_is_measured_once_and_printed_alike_ever_after(
    run: Path, task_folder: Path, command: Command, tmp_path: Path
):
    tasks = ("--tasks", f"{task_folder}/lambada_local.yaml,local_group", "--include", task_folder)
    words = ("eval", run, *tasks, "--shots", "0,2", "--limit", 5, "--bootstrap", 10)
    code, table, said = command(*words, "--samples")
    assert code == 0, said
    assert said.count("small-1m step 4  ") == 7 and "already" not in said
    code, again, said = command(*words, "--samples", "--output", tmp_path / "o.json")
    assert (code, again) == (0, table)
    assert "7 of 7 results are in the table already; 0 to measure" in said
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["task", "metric", "shots", "small-1m", "step", "4"]
    kinds = [tuple(line[:3]) for line in lines[1:]]
    assert ("local_group", "acc", "0") in kinds and ("local_group", "acc", "2") in kinds
    # A task that fixes its examples is measured once, and belongs to both groups.
    assert kinds.count(("pairs_local", "acc", "0")) == 1
    code, out, _ = command(*words, "--json")
    rows = json.loads(out)
    for row in rows:
        assert (row["suite"], row["model"], row["size"]) == ("suite", "small-1m", "1m")
        assert (row["engine"], row["dtype"], row["harness"]) == ("torch", "fp32", "lm-eval 0.4.13")
        assert (row["step"], row["last_step"], row["tokens"], row["seed"]) == (4, 4, 512, 1234)
    by_task = {(row["task"], row["shots"]): row["documents"] for row in rows}
    assert by_task["lambada_local", 0] == 5 and by_task["local_group", 2] == 10
    samples = run / "evals" / "samples"
    (file,) = samples.glob("small-1m-step4-choices_local-2shot-torch-fp32-*.jsonl")
    documents = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(documents) == 5 and {"doc", "resps", "acc"} <= documents[0].keys()
    # Of what was found the harness's form has the numbers, of what is measured now all of it.
    values = {(row["task"], row["metric"], row["shots"]): row["value"] for row in rows}
    found = json.loads((tmp_path / "o-0shot.json").read_text())
    perplexity = found["results"]["lambada_local"]["perplexity,none"]
    assert perplexity == values["lambada_local", "perplexity", 0]
    assert "configs" not in found
    code, _, said = command(*words, "--again", "--output", tmp_path / "new.json")
    assert code == 0 and "already" not in said
    new = json.loads((tmp_path / "new-2shot.json").read_text())
    assert new["configs"]["choices_local"]["num_fewshot"] == 2
    assert new["results"]["local_group"]["acc,none"] == values["local_group", "acc", 2]


def test_other_arithmetic_says_what_it_changes(run: Path, command: Command):
    words = ("eval", run, *TEXT, "engine=native", "dtype=int8")
    code, out, said = command(*words, "--no-reference")
    assert code == 0 and "against" not in out and "(reference)" not in said
    code, out, said = command(*words)
    assert code == 0 and "1 of 1 results are in the table already; 1 to measure" in said
    assert "small-1m step 4 (reference)  bits_per_byte/stdlib" in said
    _, _, effects = out.partition("native int8 against torch fp32:")
    differences = {
        tuple(line.split()[:2]): [float(word) for word in line.split()[3:]]
        for line in effects.splitlines()
        if line.startswith("bits_per_byte/")
    }
    assert len(differences) == 4
    for exact, here, difference in differences.values():
        assert 0 < abs(difference) < 0.1 and here - exact == pytest.approx(difference, abs=2e-3)
    rows = json.loads(command(*words, "--json")[1])
    assert {(row["engine"], row["dtype"]) for row in rows} == {
        ("torch", "fp32"),
        ("native", "int8"),
    }
    # The options in their other form; the reference now has the table of a single run.
    flags = ("--engine", "native", "--dtype", "int8")
    code, out, said = command("eval", run, *TEXT, *flags)
    assert code == 0 and "0 to measure" in said and "native int8 against torch fp32:" in out


def test_a_suite_goes_on_past_a_damaged_checkpoint_in_parallel(
    run: Path, command: Command, tmp_path: Path
):
    other = run.with_name("other")
    shutil.copytree(run, other)
    weights = other / "checkpoints" / "step-00000001" / "model-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    words = ("eval", run.parent, *TEXT, "--steps", "0:1")
    code, out, said = command(*words, "--jobs", 2)
    assert code == 1
    assert "castalia: error: 1 of 4 checkpoints failed; the others are in the table:" in said
    assert f"{other}/step1: " in said and "model-00000.safetensors is corrupt" in said
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["bits_per_byte/stdlib"] * 2 + [
        "bits_per_byte/reference"
    ] * 2
    code, out, said = command(*words, "--json")
    assert code == 1 and "3 of 4 results are in the table already; 1 to measure" in said
    found = numbers(json.loads(out))
    # The same numbers as one run alone, in one process.
    alone = numbers(
        json.loads(command("eval", run, *TEXT, "--steps", "0,1", "--again", "--json")[1])
    )
    assert len(alone) == 8 and alone.items() <= found.items()


def killed(words: list[str], adds: int) -> None:
    """Run `castalia WORDS` in a fork that is killed as it is about to write for the last time."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        add = ResultsStore.add
        left = iter(range(adds))

        def last_add(self: ResultsStore, rows: Any) -> int:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return add(self, rows)

        ResultsStore.add = last_add  # type: ignore[method-assign]
        run_and_exit(words)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_kill_9_loses_one_task_of_one_checkpoint(run: Path, command: Command):
    words = ["eval", str(run), *map(str, TEXT), "--steps", "all"]
    killed(words, adds=2)
    code, out, said = command(*words)
    assert code == 0 and "2 of 4 results are in the table already; 2 to measure" in said
    assert said.count("bits_per_byte/stdlib bits_per_byte") == 2
    assert out.splitlines()[0].count("small-1m step") == 4


def test_ranks_share_a_checkpoint_and_count_every_document_once(
    run: Path, task_folder: Path, command: Command
):
    tasks = f"bits_per_byte,{task_folder}/lambada_local.yaml"
    words = ["eval", str(run), "--tasks", tasks, "--held-out-tokens", "400", "--bootstrap", "0"]
    children = []
    with held_port() as port:
        for rank in range(2):
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)
                join_ranks(rank, 2, port)
                run_and_exit(words)
            children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    shared = numbers(json.loads(command(*words, "--json")[1]))
    code, out, _ = command(*words, "--json", "--again")
    assert code == 0 and shared == pytest.approx(numbers(json.loads(out)), rel=1e-6)
    assert len(shared) == 6


def test_tasks_of_the_runs_config_and_gpt_neox_file(run: Path, command: Command, tmp_path: Path):
    path = run / "config.yaml"
    # Its config has functions, which JSON has as their names, and one of them prints.
    document, _, config = TASKS["stereotypes_local"]
    task = write_task(tmp_path, "stereotypes_local", [document(i) for i in range(3)], config)
    printing = FUNCTIONS.replace("more, less =", "print('printed')\n    more, less =")
    (tmp_path / "local_functions.py").write_text(printing)
    tasks = [str(task)]
    section = {"tasks": tasks, "results_prefix": f"{tmp_path}/neox"}
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "eval": section}))
    code, out, said = command("eval", run, "--steps", "1,last", "--json")
    assert code == 0, said
    assert {row["task"] for row in json.loads(out)} == {"stereotypes_local"}
    assert said.count("printed") == 6
    files = sorted(tmp_path.glob("neox_eval_results_*.json"))
    assert len(files) == 2
    for file in files:
        content = json.loads(file.read_text())
        assert set(content["results"]) == {"stereotypes_local"}
        assert "process_results" in content["configs"]["stereotypes_local"]["process_results"]
    # Tasks that are named win over those of the config.
    code, out, said = command("eval", run, *TEXT)
    assert code == 0 and "stereotypes_local" not in out and "neox" not in said


def test_a_table_of_many_checkpoints_has_one_a_line(run: Path, command: Command):
    other = run.with_name("other")
    os.symlink(run, other)
    words = ("eval", run, f"{other}/step0", f"{other}/step1", *TEXT, "--steps", "all")
    code, out, _ = command("eval", run, other, *TEXT, "--steps", "0,2,4")
    assert code == 0, words
    lines = out.splitlines()
    assert lines[0].split() == [] or "bits_per_byte/stdlib" in lines[0]
    titles = [line[:15].split("  ")[0] for line in lines[2:]]
    assert titles == [f"{name} step {step}" for name in ("small-1m", "other") for step in (0, 2, 4)]


def test_json_has_only_what_json_has(capsys: pytest.CaptureFixture[str]):
    """The perplexity of a model that is not trained may be infinite."""
    rows = [Result("s", "m", "t", name, value) for name, value in (("a", inf), ("b", nan))]
    outcome = Outcome(Checkpoint("m", "s", "m", 1, None, ()), [Part(None, rows, {})])
    show([outcome], OutputFlags(as_json=True), None)
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [row["value"] for row in found] == ["Infinity", "NaN"]
    assert tuple(found[0]) == tuple(COLUMNS)


def saved(folder: Path, **options: Any) -> Path:
    """A run of another model, without a tokenizer."""
    config = NeoxConfig(num_layers=1, hidden_size=32, num_attention_heads=4, **options)
    model = Decoder(config)
    initialize(model, start_weights(config, 0))
    files = {"config.yaml": dump_yaml(RunConfig(model=config, data={"seq_length": 32}))}
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    Store(folder / "checkpoints").save(1, tensors, {"step": 1}, files, asynchronous=False)
    return folder


@pytest.fixture(scope="module")
def places(
    four_steps: Path, task_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What the words of the errors name."""
    folder = tmp_path_factory.mktemp("places")
    sizes: dict[str, Any] = {"vocab_size": 60, "max_position_embeddings": 64}
    saved(folder / "bare", **sizes)
    longer = {"kind": "dynamic", "factor": 2.0}
    saved(folder / "ntk", **sizes, rotary_pct=1.0, rope_scaling=longer)
    list(export(four_steps, to="hf", output=folder / "hf", certificate=False))
    with IndexedDatasetWriter(folder / "text", np.uint16) as writer:
        writer.add([5, 70, 3])
    (folder / "text.json").write_text(json.dumps({"text_bytes": 9}))
    (folder / "broken").mkdir()
    (folder / "broken" / "results.parquet").write_bytes(b"PAR1 no table PAR1")
    (folder / "empty").mkdir()
    task = yaml.safe_load((task_folder / "sums_local.yaml").read_text())
    task |= {"task": "nodata", "dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}
    (folder / "empty" / "nodata.yaml").write_text(yaml.safe_dump(task))
    names = ("bare", "ntk", "hf", "text", "broken", "empty")
    found = {name: str(folder / name) for name in names}
    return found | {"run": str(four_steps), "tasks": str(task_folder)}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (
            "{run}",
            2,
            "no tasks: eval.tasks is empty in the config of {run}; give --tasks NAME",
        ),
        ("{run}", 2, "with tasks of lm-evaluation-harness, such as lambada_openai, piqa, arc_easy"),
        ("{hf} --tasks bits_per_byte", 2, "names no held-out text; give --held-out NAME=PREFIX"),
        ("{hf}", 2, "no tasks: a model without a run has no config that names them"),
        ("{run} --tasks lambda_local --include {tasks}", 2, "did you mean 'lambada_local'?"),
        ("{run} --tasks {empty}/nodata.yaml", 1, "task nodata: its data json cannot be read"),
        ("{bare} --tasks {tasks}/sums_local.yaml", 2, "this checkpoint has no tokenizer"),
        ("{run} --tasks a --steps 3", 1, "no checkpoint of step 3; the nearest is 2 or 4"),
        ("{run} --tasks a --steps x", 2, "'x' is not a step; expected all, last"),
        ("{empty} --tasks a", 1, "is no run and no model, and no folder in it is one"),
        ("{empty}/none --tasks a", 1, "no checkpoint at {empty}/none"),
        ("{run} --tasks a --shots few", 2, "--shots 'few': expected numbers between commas"),
        ("{run} --tasks a --limit 0", 2, "--limit 0: expected a whole number of documents, or a"),
        ("{run} --tasks a --limit 1.5", 2, "--limit 1.5: expected a whole number of documents"),
        ("{run} --tasks a --limit inf", 2, "--limit inf: expected a whole number of documents"),
        ("{run} --tasks bits_per_byte dtyp=int8", 2, "did you mean 'dtype'?"),
        ("{run} --tasks bits_per_byte engine=turbo", 2, "unknown engine 'turbo'; choose one of"),
        (
            "{run} --tasks bits_per_byte dtype=int9",
            2,
            "fp32, bf16, fp16, auto, int8, int4; did you",
        ),
        ("{bare} --tasks bits_per_byte --held-out x={text}", 2, "has token id 70, but the model's"),
        (
            "{ntk} --tasks bits_per_byte --held-out x={text} engine=native",
            2,
            "engine=native does not implement rope_scaling.kind='dynamic'",
        ),
        ("{run} --held-out x --tasks bits_per_byte", 2, "--held-out x: expected NAME=PREFIX"),
        ("{run} --tasks bits_per_byte --store {broken}", 1, "cannot be read as Parquet"),
        ("engine=native --tasks a", 2, "castalia eval needs a run, a checkpoint or a suite"),
    ],
)
def test_errors_are_one_sentence(
    words: str, code: int, says: str, places: dict[str, str], command: Command
):
    status, out, err = command("eval", *words.format(**places).split())
    assert out == "" and err.startswith("castalia: error: "), err
    assert says.format(**places) in err and status == code
