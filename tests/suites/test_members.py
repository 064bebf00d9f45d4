"""Suites: their files, members and batches; training goes through `castalia train`."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from castalia.cli.app import app
from castalia.core.errors import ConfigError, DataError
from castalia.core.log_lines import write_log
from castalia.core.starter import STARTER
from castalia.models.flops import active_parameters, parameter_counts
from castalia.monitor import read_metrics
from castalia.suites import open_suite, running
from castalia.suites.batches import compare_batches, require_same_batches
from castalia.suites.page import write_suite_page
from castalia.suites.running import run_suite
from castalia.suites.status import status_of
from castalia.suites.verifying import verify_suite

SMALL = """
base: debug
sizes:
  neox: {model.num_layers: 1, model.hidden_size: 32}
  llama: {preset: debug-llama, model: {num_layers: 1, hidden_size: 32, intermediate_size: 64}}
seeds: [3, {weight_seed: 5}]
checkpoints: [0, 2]
set: {train.steps: 3, train.batch_size: 4, data.seq_length: 32}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(text): the path of a suite's file, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def put(text, name="mine.yaml"):
        Path(name).write_text(text)
        return name

    return put


def test_members_of_the_known_suites():
    names = [member.name for member in open_suite("mini").members]
    assert names == [f"{size}-seed{s}" for size in ("tiny", "small", "medium") for s in (0, 1)]
    pythia = open_suite("pythia")
    assert len(pythia.members) == 20
    member = pythia["160m-deduped"]
    assert member.words[0] == "pythia-160m-deduped"
    assert (member.data_seed, member.weight_seed) == (1234, 1234)
    assert member.folder == Path("runs/pythia/160m-deduped")
    more = open_suite("pythia", only="70m,standard", seeds="1234,1")
    assert [member.name for member in more.members] == ["70m", "70m-seed1"]
    require_same_batches(pythia)
    first = open_suite("pythia-v0")
    assert len(first.members) == 16 and first["410m-deduped"].words[0] == "pythia-410m-deduped-v0"
    assert first["410m-deduped"].config.train.steps == 71_500
    require_same_batches(first)


def test_the_zoo_has_models_of_one_size_on_one_stream(write):
    suite = open_suite("zoo")
    require_same_batches(suite)
    sizes = {}
    for member in suite.members:
        model = member.config.model
        resting = parameter_counts(model).total - active_parameters(model)
        sizes[member.name] = parameter_counts(model).non_embedding - resting
        assert (member.config.optim, member.config.schedule) == (
            suite.members[0].config.optim,
            suite.members[0].config.schedule,
        )
    assert max(sizes.values()) / min(sizes.values()) < 1.05, sizes
    with pytest.raises(DataError, match="no member of zoo has trained a step; castalia suite zoo"):
        write_suite_page(suite, "zoo.html")


def test_a_file_with_two_families_and_a_seed_of_the_weights_alone(write):
    suite = open_suite(write(SMALL))
    assert [member.name for member in suite.members] == [
        "neox-seed3",
        "neox-weight-seed5",
        "llama-seed3",
        "llama-weight-seed5",
    ]
    llama = suite["llama-weight-seed5"]
    assert llama.family == "llama" and llama.config.model.vocab_size == 257
    assert (llama.data_seed, llama.weight_seed) == (1234, 5)
    assert llama.config.checkpoint.steps == [0, 2] and llama.config.checkpoint.every is None
    assert llama.config.data.prepared_in == "runs/mine/data"
    assert len(suite.streams) == 2
    require_same_batches(suite)
    only = open_suite(["mine.yaml", "train.steps=7", "output=x"], only="neox,llama-seed3")
    assert [member.config.train.steps for member in only.members] == [7, 7, 7]
    assert only.members[0].folder == Path("x/neox-seed3")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"only": "neoks"}, "no size or member 'neoks'.*did you mean 'neox'"),
        ({"seeds": "4"}, "no seed '4'; its seeds are seed3, weight-seed5; did you mean 'seed3'"),
    ],
)
def test_an_unknown_member_or_seed(write, options, said):
    with pytest.raises(ConfigError, match=said):
        open_suite(write(SMALL), **options)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sizes: {a: debug}\nseed: [1]", "seed: unknown key"),
        ("sizes: {a-b: debug}", "'a-b': a name consists of letters"),
        ("sizes: {a: {model.num_layers: 1}}", "size a: name a preset, or give the suite a base"),
        ("sizes: {a: debugg}", "size a: .*'debugg'.*did you mean 'debug'"),
        ("sizes: {a: debug}\nseeds: [{}]", "give data_seed, weight_seed or both"),
        ("base: debug\nsizes: {a: {train.stepz: 1}}", "size a: .*train.stepz"),
    ],
)
def test_a_wrong_file(write, text, said):
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        open_suite(write(text))


def test_a_name_that_is_no_suite(write):
    said = r"unknown suite 'minni'.*did you mean 'mini'.*castalia suite mini --run output=minni"
    with pytest.raises(ConfigError, match=said):
        open_suite("minni")
    Path("runs").mkdir()
    with pytest.raises(ConfigError, match=r"runs is no folder of a suite: it has no suite\.yaml"):
        open_suite("runs")
    with pytest.raises(ConfigError, match="after the suite come overrides"):
        open_suite(["mini", "debug"])


def test_members_of_one_stream_read_equal_batches(write):
    write("base: debug\nsizes: {a: {train.batch_size: 6}, b: {}}")
    with pytest.raises(ConfigError, match=r"a-seed0 and b-seed0 .*train.batch_size 6 and 12"):
        require_same_batches(open_suite("mine.yaml"))
    write("base: debug\nsizes: {a: {}}\nset: {mixing.kind: progress}")
    with pytest.raises(ConfigError, match=r"mixing.kind=progress chooses rows by the losses"):
        require_same_batches(open_suite("mine.yaml"))
    write("base: debug\nsizes: {a: {}}\nset: {mixing.kind: progress}\nsame_batches: false")
    require_same_batches(open_suite("mine.yaml"))


@pytest.fixture
def good_in_this_process(monkeypatch):
    """Only the member that fails takes the seconds that a process needs to start; those of the
    suite that docs/suite.md trains have processes of their own too."""
    started = running.train

    def train(member):
        if member.name == "none-seed3":
            return started(member)
        return CliRunner().invoke(app, ["train", *member.words]).exit_code

    monkeypatch.setattr(running, "train", train)


def test_two_families_train_on_one_stream_and_the_third_member_fails(write, good_in_this_process):
    text = SMALL.replace("seeds: [3, {weight_seed: 5}]", "seeds: [3]")
    text = text.replace("sizes:\n", "sizes:\n  none: {model.start: missing/model}\n")
    said = []
    outcomes = run_suite(open_suite(write(text)), said.append)
    assert [outcome.failed for outcome in outcomes] == [True, False, False]
    assert "missing/model" in said[1] and "runs/mine/none-seed3/train.log" in said[1]
    suite = open_suite("runs/mine", only="neox,llama")
    states = [(state.name, state.step, state.state) for state in status_of(suite)]
    assert states == [("neox-seed3", 3, "done"), ("llama-seed3", 3, "done")]
    assert [state.checkpoints for state in status_of(suite)] == [[0, 2, 3]] * 2
    # Every step of both families had the same rows, and nothing is trained again.
    (stream,) = compare_batches(suite)
    assert stream.steps == 3 and stream.problems == []
    assert not any(outcome.failed for outcome in run_suite(suite, said.append))
    assert said[-1] == f"[2/2] llama-seed3: done, {said[-1].partition('done, ')[2]}"
    words = ["suite", "runs/mine", "--run", "--only", "neox,llama", "--json"]
    printed = json.loads(CliRunner().invoke(app, words).stdout)
    assert [member["state"] for member in printed["members"]] == ["done", "done"]
    assert verify_suite(suite).findings == []
    words = ["suite", "runs/mine", "--page", "page.html"]
    assert CliRunner().invoke(app, words).stdout == "wrote page.html\n"
    page = Path("page.html").read_text()
    assert "equal in 3 steps of 2 members" in page and page.count("<polyline") == 2 * 3
    for member in suite.members:
        counts = parameter_counts(member.config.model)
        assert f"<td>{counts.total:,}</td>" in page and f"<td>{counts.non_embedding:,}</td>" in page
    whole = verify_suite(open_suite("runs/mine"))
    assert [(finding.kind, finding.what) for finding in whole.findings] == [
        ("unfinished", "none-seed3 has not begun")
    ]
    # Data for validation are not those of training: members may differ in them.
    state = Path("runs/mine/llama-seed3/checkpoints/step-00000003/state.json")
    saved = state.read_text()
    values = json.loads(saved)
    values["data"]["valid"] = [{"name": "another"}]
    state.write_text(json.dumps(values))
    assert compare_batches(suite)[0].problems == []
    values["data"]["train"][0]["bin_sha256"] = "0"
    state.write_text(json.dumps(values))
    problem = "llama-seed3 has another fingerprint of its data than neox-seed3"
    assert compare_batches(suite)[0].problems == [problem]
    state.write_text(saved)
    changed = Path("runs/mine/llama-seed3/metrics.jsonl")
    lines = read_metrics(changed)
    lines[1]["rows_hash"] += 1
    write_log(changed, [json.dumps(line).encode() for line in lines])
    (stream,) = compare_batches(suite)
    assert stream.problems == [
        "llama-seed3 read other rows than neox-seed3 in 1 steps, the first is step 1, counted from"
        " 0"
    ]
    config = Path("runs/mine/neox-seed3/config.yaml")
    config.write_text(config.read_text().replace("seed: 3", "seed: 4", 1))
    report = verify_suite(open_suite("runs/mine", only="neox"))
    assert {finding.kind for finding in report.findings} == {"member"}
    assert "the seed of the weights of neox-seed3 is 3 in the suite and 4" in str(report.findings)


def test_a_request_to_stop_reaches_the_member(tmp_path):
    log = tmp_path / "train.log"
    member = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *a: sys.exit('saved'))"
    command = [sys.executable, "-c", f"{member}\nprint('ready', flush=True)\ntime.sleep(60)"]

    def stop():
        while "ready" not in log.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    with open(log, "wb") as file:
        stopping = threading.Thread(target=stop)
        stopping.start()
        assert running.run_command(command, file) in running.STOPPED
        stopping.join()
    assert log.read_text().split() == ["ready", "saved"]


def test_a_member_is_told_with_which_process_it_ends(tmp_path):
    with open(tmp_path / "train.log", "wb") as file:
        assert running.run_command(["printenv", STARTER], file) == 0
    assert (tmp_path / "train.log").read_text() == f"{os.getpid()}\n"
