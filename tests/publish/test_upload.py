"""`castalia upload`: a run as a repository with a branch for each checkpoint, on a hub of one's
own."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
import yaml
from tests.fixtures.forked_rank import run_and_exit
from tests.fixtures.hub_server import READER, WRITER, HubServer, Repo

from castalia.checkpoint.find import complete_steps
from castalia.core.errors import CastaliaError, CheckpointError, ConfigError
from castalia.inference import load
from castalia.publish import UploadOptions, upload
from castalia.results import Result, ResultsStore

pytest.importorskip("huggingface_hub")
transformers = pytest.importorskip("transformers")

REPO = "me/small"
STEPS = [0, 1, 2, 4]
NAMES = [f"step{step}" for step in STEPS]
QUICK = UploadOptions(certificate=False)
ANSWER = Result("runs", "small-1m", "lambada_openai", "acc", 0.25, step=4, stderr=0.01, shots=0)


pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.fixture
def run(four_steps: Path, tmp_path: Path) -> Path:
    """A copy of the run, whose results a test may change."""
    folder = tmp_path / "runs" / four_steps.name
    # The optimizer's state is never read for an export.
    shutil.copytree(four_steps, folder, ignore=shutil.ignore_patterns("evals", "exports"))
    return folder


@pytest.fixture
def command(command: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """command(*words): run `castalia upload WORDS`; (exit status, stdout, stderr)."""
    return partial(command, "upload")


def card(hub: HubServer, revision: str, repo: str = REPO) -> str:
    """README.md of a branch."""
    return hub.files(repo, revision)["README.md"].decode()


def test_a_run_becomes_a_repository_as_pythia_has_it(
    own_hub: HubServer,
    run: Path,
    tmp_path: Path,
    command: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ResultsStore(run / "evals").add([ANSWER, ANSWER._replace(step=2, value=0.125)])
    code, out, err = command(run, "--repo", REPO, "--license", "apache-2.0", "--private")
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()] == [
        f"{REPO}@{name}" for name in [*NAMES, "main"]
    ]
    assert own_hub.repos[REPO].private and set(own_hub.repos[REPO].branches) == {*NAMES, "main"}
    # Each branch has a commit of its own on the first one, and main is the newest step.
    assert all(len(commits) == 2 for commits in own_hub.repos[REPO].branches.values())
    weights = [own_hub.files(REPO, name)["model.safetensors"] for name in [*NAMES, "main"]]
    assert len(set(weights)) == len(NAMES) and weights[-1] == weights[-2]
    assert not (run / "exports" / "upload").exists(), "the temporary export is removed"

    text = card(own_hub, "main")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "apache-2.0" and front["library_name"] == "transformers"
    (entry,) = front["model-index"][0]["results"]
    assert entry["dataset"]["name"] == "lambada_openai" and entry["metrics"][0]["value"] == 0.25
    config = json.loads(own_hub.files(REPO)["config.json"])
    assert config["hidden_size"] == 32
    for line in (
        "| parameters, total | 37,344 |",
        "| parameters, non-embedding | 12,768 |",
        "| step | 4 of 4 |",
        "| tokens | 512 |",
        "| batch | 2 rows of 64 tokens = 128 tokens |",
        "| optimizer | adamw |",
        "| precision | fp32 |",
        "| task | metric | shots | dtype | step 2 | step 4 |",
        "| lambada_openai | acc | 0 |  | 0.125 ± 0.01 | 0.25 ± 0.01 |",
        f"[step1]({own_hub.address}/{REPO}/tree/step1)",
    ):
        assert line in text, line
    state = json.loads((run / "checkpoints" / "step-00000004" / "state.json").read_text())
    for source in state["data"]["train"]:
        assert f"| {source['name']} | 0.5 | {source['tokens']:,} |" in text
        assert source["bin_sha256"] in text
    assert '"kind": "neox packed", "seed": 1234' in text
    assert str(tmp_path) not in text and "no logit differs by more than" in text

    early = card(own_hub, "step2")
    assert "| tokens | 256 |" in early and "This is the branch `step2`" in early
    assert "| lambada_openai | acc | 0 |  | 0.125 ± 0.01 |" in early
    assert "model-index" not in early and 'revision="step2"' in early
    assert "Not evaluated." in card(own_hub, "step1")

    # The library keeps the address that it was imported with.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", own_hub.address)
    template = own_hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    cache = {"cache_dir": str(tmp_path / "cache")}
    model = transformers.AutoModelForCausalLM.from_pretrained(REPO, revision="step2", **cache)
    tokenizer = transformers.AutoTokenizer.from_pretrained(REPO, revision="step2", **cache)
    ids = tokenizer("a text", return_tensors="pt")["input_ids"]
    ours = load(f"{run}/step2", engine="torch").logits(ids[0].tolist())
    assert (model(ids).logits[0] - ours).abs().max() < 1e-5


def test_the_second_call_sends_nothing_and_new_numbers_only_cards(
    own_hub: HubServer, run: Path
) -> None:
    list(upload(run, REPO, QUICK))
    received = list(own_hub.received)
    commits = {name: list(made) for name, made in own_hub.repos[REPO].branches.items()}
    again = list(upload(run, REPO, QUICK))
    assert {each.what for each in again} == {"nothing"} and not (run / "exports").exists()
    assert own_hub.received == received and own_hub.repos[REPO].branches == commits
    assert all(each.commit == commits[each.revision][-1][0] for each in again)

    ResultsStore(run / "evals").add([ANSWER._replace(step=2)])
    weights = own_hub.files(REPO)["model.safetensors"]
    changed = {each.revision: each for each in upload(run, REPO, QUICK)}
    assert [name for name, each in changed.items() if each.what == "card"] == ["step2", "main"]
    assert changed["main"].sent == ["README.md", "export.json"] and own_hub.received == received
    assert "lambada_openai" in card(own_hub, "main")
    assert own_hub.files(REPO)["model.safetensors"] == weights
    assert {each.what for each in upload(run, REPO, QUICK)} == {"nothing"}

    # A file that somebody changed on the hub is found without a download, small ones as well.
    branch = own_hub.repos[REPO].branches["step1"]
    branch.append(("3" * 40, branch[-1][1] | {"config.json": b"{}"}))
    mended = [each.revision for each in upload(run, REPO, QUICK) if each.what == "export"]
    assert mended == ["step1"] and b"hidden_size" in own_hub.files(REPO, "step1")["config.json"]


def test_a_run_that_goes_on_moves_main_and_new_branches_begin_empty(
    own_hub: HubServer, run: Path
) -> None:
    newest = run / "checkpoints" / "step-00000004"
    aside = newest.rename(run / "aside")
    list(upload(run, REPO, QUICK))
    assert (
        own_hub.files(REPO, "main")["model.safetensors"]
        == (own_hub.files(REPO, "step2")["model.safetensors"])
    )
    aside.rename(newest)
    # The upload breaks before step 4 has its own commit: its branch has no weights of another step.
    own_hub.answers["/commit/step4"] = 500
    with pytest.raises(CastaliaError, match="HTTP 500"):
        list(upload(run, REPO, QUICK))
    assert own_hub.files(REPO, "step4") == {}
    del own_hub.answers["/commit/step4"]
    done = list(upload(run, REPO, UploadOptions(steps=[1], certificate=False)))
    assert [each.revision for each in done] == ["step1", "main"]
    assert done[1].step == 4 and own_hub.files(REPO, "step4") == {}


def test_killed_in_the_middle_and_started_again(
    own_hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL while the third step's weights wait for an answer."""
    monkeypatch.setattr("castalia.export.push.LARGE", 20_000)
    own_hub.hold_after = 2
    words = ["upload", str(run), "--repo", REPO, "--no-certificate"]
    process = os.fork()
    if process == 0:
        run_and_exit(words)
    waited = own_hub.holding.wait(timeout=120)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    own_hub.release()
    assert waited and own_hub.files(REPO, "main") == {}
    # One export at a time is on the disk, however many steps there are.
    assert [path.name for path in (run / "exports" / "upload").glob("step*")] == ["step2"]
    done = list(upload(run, REPO, QUICK))
    assert [each.what for each in done] == [*["nothing"] * 2, *["export"] * 3]
    # Each step's weights were sent once; those of main are those of the last step.
    assert len(own_hub.received) == len(set(own_hub.received))
    assert not (run / "exports" / "upload").exists()


def test_a_server_that_is_gone_in_the_middle(
    own_hub: HubServer, run: Path, command: Callable
) -> None:
    own_hub.cut_after = 1
    code, out, err = command(run, "--repo", REPO, "--no-certificate")
    assert code == 1 and err.splitlines()[-1].startswith("castalia: error: cannot reach http://")
    assert "run the command again" in err and len(own_hub.received) == 1
    own_hub.cut_after = None
    code, out, err = command(run, "--repo", REPO, "--no-certificate", "--json")
    assert code == 0, err
    done = [json.loads(line) for line in out.splitlines()]
    assert [each["revision"] for each in done] == [*NAMES, "main"]
    assert len(own_hub.received) == len(set(own_hub.received))


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("", REPO, "needs a token with write access in the environment: set HF_TOKEN"),
        ("hf_wrong_0123", REPO, "does not know the token in HF_TOKEN"),
        (READER, REPO, f"the token in HF_TOKEN may not write to {REPO}"),
        (WRITER, "someone/else", "the token in HF_TOKEN may not write to someone/else"),
        (WRITER, "small", "--repo 'small': expected OWNER/NAME"),
    ],
)
def test_what_stands_in_the_way_is_one_sentence(
    own_hub: HubServer,
    four_steps: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    repo: str,
    message: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    options = UploadOptions(steps=[0], certificate=False)
    with pytest.raises(CastaliaError, match=message) as error:
        list(upload(four_steps, repo, options))
    assert "\n" not in str(error.value) and "hf_" not in str(error.value)
    assert own_hub.received == []


def test_wrong_words_are_refused_before_anything_is_sent(
    own_hub: HubServer, four_steps: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no complete checkpoint step-00000003; it has 4 from 0"):
        upload(four_steps, REPO, UploadOptions(steps=[1, 3]))
    with pytest.raises(ConfigError, match="unknown dtype 'int8' for hf"):
        upload(four_steps, REPO, UploadOptions(dtype="int8"))
    with pytest.raises(ConfigError, match="is not a folder; give the folder of a run"):
        upload(four_steps / "step1", REPO, QUICK)
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        upload(tmp_path, REPO, QUICK)
    with pytest.raises(ConfigError, match="--only chooses members of a suite"):
        upload(four_steps, REPO, QUICK, only="70m")
    assert own_hub.requests == []


def test_a_repository_with_other_files_is_left_alone(own_hub: HubServer, four_steps: Path) -> None:
    options = UploadOptions(steps=[4], certificate=False)
    list(upload(four_steps, REPO, options))
    own_hub.repos[REPO].branches["main"].append(("4" * 40, {"model.safetensors": b"mine"}))
    with pytest.raises(CastaliaError, match="@main holds files that are no export of Castalia"):
        list(upload(four_steps, REPO, options))
    assert own_hub.files(REPO) == {"model.safetensors": b"mine"}


def test_a_repository_begun_on_the_website_is_a_fresh_one(
    own_hub: HubServer, four_steps: Path
) -> None:
    begun = {".gitattributes": b"", "README.md": b"---\nlicense: mit\n---\n"}
    own_hub.repos[REPO] = Repo(private=False)
    own_hub.repos[REPO].branches["main"] = [("1" * 40, begun)]
    options = UploadOptions(steps=[2], certificate=False)
    list(upload(four_steps, REPO, options))
    for revision in ("main", "step2"):
        assert "model.safetensors" in own_hub.files(REPO, revision)
        assert "# " in card(own_hub, revision)
    # A file of somebody else is none of a fresh repository.
    own_hub.repos["me/other"] = Repo(private=False)
    own_hub.repos["me/other"].branches["main"] = [("1" * 40, {**begun, "notes.txt": b"mine"})]
    with pytest.raises(CastaliaError, match=r"@step2 holds files that .* \(notes.txt\)"):
        list(upload(four_steps, "me/other", options))
    assert own_hub.files("me/other")["README.md"] == begun["README.md"]


def test_a_branch_of_other_weights_is_left_alone(own_hub: HubServer, four_steps: Path) -> None:
    options = UploadOptions(steps=[2, 4], certificate=False)
    list(upload(four_steps, REPO, options))
    branches = own_hub.repos[REPO].branches
    branches["step4"] = list(branches["step2"])
    other = own_hub.files(REPO, "step4")
    for dry in (True, False):
        with pytest.raises(CastaliaError, match="@step4 holds the export of other weights"):
            list(upload(four_steps, REPO, replace(options, dry_run=dry)))
    assert own_hub.files(REPO, "step4") == other
    list(upload(four_steps, REPO, replace(options, force=True)))
    assert own_hub.files(REPO, "step4")["model.safetensors"] != other["model.safetensors"]


def test_a_dry_run_sends_nothing(
    own_hub: HubServer, run: Path, command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [run, "--repo", REPO, "--steps", "0", "--dry-run", "--dtype", "bf16"]
    monkeypatch.delenv("HF_TOKEN")
    code, out, err = command(*words)
    assert code == 0 and own_hub.requests == []
    assert f"{REPO}@step0  step 0  would be sent, weights 72.9 KiB" in out
    assert "HF_TOKEN is not set" in err and "the card has no license" in err
    monkeypatch.setenv("HF_TOKEN", WRITER)
    code, out, _ = command(*words)
    assert code == 0 and own_hub.repos == {} and out.count("would be sent") == 2
    list(upload(run, REPO, UploadOptions(steps=[0], dtype="bf16", certificate=False)))
    code, out, _ = command(*words, "--no-certificate")
    assert out.count("is there") == 2


def test_a_suite_has_a_repository_for_each_member(
    own_hub: HubServer, four_steps: Path, tmp_path: Path, command: Callable
) -> None:
    suite = tmp_path / "mini"
    for name in ("tiny-seed0", "small-seed1"):
        shutil.copytree(
            four_steps, suite / name, ignore=shutil.ignore_patterns("evals", "exports", "optim-*")
        )
    (suite / "suite.yaml").write_text(
        "name: mini\nbase: mini\nsizes: {tiny: {}, small: {}}\nseeds: [0, 1]\ncheckpoints: [0]\n"
    )
    words = [suite, "--repo", "me/mini", "--steps", "4", "--no-certificate"]
    code, out, err = command(*words)
    assert code == 0, err
    assert set(own_hub.repos) == {"me/mini-tiny-seed0", "me/mini-small-seed1"}
    text = card(own_hub, "main", "me/mini-tiny-seed0")
    assert f"- [small-seed1]({own_hub.address}/me/mini-small-seed1)" in text
    code, out, _ = command(*words, "--only", "tiny")
    assert out.count("was there") == 2 and "small-seed1" not in out


def test_results_without_their_extra_are_a_note(
    own_hub: HubServer, run: Path, command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    ResultsStore(run / "evals").add([ANSWER._replace(evaluated_at=datetime(2026, 1, 1))])
    monkeypatch.setattr("castalia.publish.evaluations.is_installed", lambda: False)
    code, _, err = command(run, "--repo", REPO, "--steps", "4", "--dry-run")
    assert code == 0 and "are not on the card, since reading them needs duckdb and pyarrow" in err


def test_the_run_of_these_tests_has_the_steps_that_they_name(four_steps: Path) -> None:
    assert complete_steps(four_steps / "checkpoints") == STEPS
