"""`castalia export --push-to-hub` against a hub of one's own, over its HTTP API."""

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.fixtures.forked_rank import run_and_exit
from tests.fixtures.hub_server import READER, WRITER, HubServer

from castalia.core.errors import CastaliaError, ConfigError
from castalia.core.hub import hub_folder
from castalia.core.sealed import with_own_hash
from castalia.export import Push, export
from castalia.inference import load

pytest.importorskip("huggingface_hub")

REPO = "me/tiny"
QUICK = {"certificate": False, "max_shard_size": "150KB"}


pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.fixture
def command(command: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """command(*words): run `castalia export WORDS`; (exit status, stdout, stderr)."""
    return partial(command, "export")


def same_files(hub: HubServer, revision: str, folder: Path) -> None:
    """The hub has every byte of an export; the record lacks the paths of this machine."""
    there = hub.files(REPO, revision)
    here = {path.name: path.read_bytes() for path in folder.iterdir()}
    record = json.loads(there.pop("export.json"))
    own = json.loads(here.pop("export.json"))
    names = {"folder": folder.name, "checkpoint": Path(own["checkpoint"]).name}
    assert record == with_own_hash(own | names)
    assert there == here


def test_an_export_arrives_and_loads_from_the_hub(
    own_hub: HubServer, run_folder: Path, tmp_path: Path, command: Callable
) -> None:
    out = tmp_path / "out"
    words = [run_folder, "--to", "hf", "--output", out, "--max-shard-size", "150KB"]
    code, printed, err = command(*words, "--push-to-hub", REPO, "--private")
    assert code == 0, err
    assert f"{REPO}@main: 14 files sent, 0 were there" in printed and "logits differ by" in printed
    same_files(own_hub, "main", out)
    assert own_hub.repos[REPO].private
    card = own_hub.files(REPO)["README.md"].decode()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    folder = hub_folder(REPO, endpoint=own_hub.address, cache_dir=str(tmp_path / "cache"))
    assert torch.equal(load(folder).logits([1, 2, 3]), load(run_folder).logits([1, 2, 3]))


def test_the_same_command_sends_nothing_again(
    own_hub: HubServer, run_folder: Path, tmp_path: Path
) -> None:
    push = Push(REPO, revision="step220")
    options = QUICK | {"output": tmp_path / "out", "push": push}
    (first,) = export(run_folder, **options)
    sent = list(own_hub.received)
    assert len(sent) > 2 and first.pushed["kept"] == []
    commits = len(own_hub.repos[REPO].branches["step220"])
    (again,) = export(run_folder, **options)
    assert own_hub.received == sent and again.pushed["sent"] == []
    assert again.pushed["kept"] == first.pushed["sent"]
    assert again.pushed["commit"] == first.pushed["commit"]
    assert len(own_hub.repos[REPO].branches["step220"]) == commits == 2
    assert own_hub.files(REPO, "main") == {}
    # The folder is the earlier one, so it was not exported a second time either.
    assert again.seconds == first.seconds


def test_a_broken_upload_continues_where_it_broke(
    own_hub: HubServer, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("castalia.export.push.LARGE", 20_000)
    options = QUICK | {"output": tmp_path / "out", "push": Push(REPO)}
    own_hub.cut_after = 2
    with pytest.raises(CastaliaError, match=r"cannot reach http://\S+ \(\w+\); check the network"):
        list(export(run_folder, **options))
    assert len(own_hub.received) == 2
    assert own_hub.files(REPO) == {}, "nothing is visible before all of it is"
    own_hub.cut_after = None
    list(export(run_folder, **options))
    same_files(own_hub, "main", tmp_path / "out")
    # Each large file was sent once, those of the first attempt not again.
    assert len(own_hub.received) == len(set(own_hub.received)) > 3
    assert len(own_hub.repos[REPO].branches["main"]) == 2


def test_killed_and_started_again(
    own_hub: HubServer, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL while the second large file waits for an answer."""
    monkeypatch.setattr("castalia.export.push.LARGE", 20_000)
    words = ["export", str(run_folder), "--to", "hf", "--no-certificate"]
    words += ["--max-shard-size", "150KB", "--output", str(tmp_path / "out")]
    words += ["--push-to-hub", REPO]
    own_hub.hold_after = 1
    # A fork has torch loaded already.
    process = os.fork()
    if process == 0:
        run_and_exit(words)
    waited = own_hub.holding.wait(timeout=120)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    own_hub.release()
    assert waited and len(own_hub.received) == 1 and own_hub.files(REPO) == {}
    process = os.fork()
    if process == 0:
        run_and_exit(words)
    assert os.waitpid(process, 0)[1] == 0
    assert len(own_hub.received) == len(set(own_hub.received)) > 3
    same_files(own_hub, "main", tmp_path / "out")


def test_each_step_has_its_revision(own_hub: HubServer, run_folder: Path, tmp_path: Path) -> None:
    options = QUICK | {"output": tmp_path, "steps": "all", "push": Push(REPO)}
    made = [done.pushed["revision"] for done in export(run_folder, **options)]
    assert made == ["step0", "step220"] and own_hub.files(REPO, "main") == {}
    for revision in made:
        same_files(own_hub, revision, tmp_path / revision)
    with pytest.raises(ConfigError, match="--revision main is one revision for 2 steps"):
        export(run_folder, **options | {"push": Push(REPO, revision="main")})


@pytest.mark.parametrize(("to", "kind"), [("ct2", "model.bin"), ("native", ""), ("gguf", ".gguf")])
def test_other_formats_are_uploaded_too(
    own_hub: HubServer, run_folder: Path, tmp_path: Path, to: str, kind: str
) -> None:
    list(export(run_folder, to=to, output=tmp_path / "out", certificate=False, push=Push(REPO)))
    same_files(own_hub, "main", tmp_path / "out")
    assert any(name.endswith(kind) for name in own_hub.files(REPO))


def test_old_weights_give_way_and_other_files_stay(
    own_hub: HubServer, run_folder: Path, tmp_path: Path
) -> None:
    one = {"certificate": False, "push": Push(REPO)}
    list(export(run_folder, output=tmp_path / "one", **one))
    branch = own_hub.repos[REPO].branches["main"]
    branch.append(("1" * 40, branch[-1][1] | {"LICENSE": b"mine", "old/model.safetensors": b"x"}))
    # A folder without a run, whose name says no step.
    (done,) = export(tmp_path / "one", output=tmp_path / "two", max_shard_size="150KB", **one)
    assert done.pushed["deleted"] == ["model.safetensors"]
    assert {"tokenizer.json", "config.json"} <= set(done.pushed["kept"])
    there = own_hub.files(REPO)
    assert there.pop("LICENSE") == b"mine" and there.pop("old/model.safetensors") == b"x"
    assert set(there) == {path.name for path in (tmp_path / "two").iterdir()}
    # One commit for both: no reader sees the weights of neither or of both.
    assert len(branch) == 4


def test_a_revision_that_holds_something_else_is_left_alone(
    own_hub: HubServer, run_folder: Path, tmp_path: Path, command: Callable
) -> None:
    words = [run_folder, "--no-certificate", "--push-to-hub", REPO]
    assert command(*words, "--to", "hf", "--output", tmp_path / "hf")[0] == 0
    before = own_hub.files(REPO)
    native = [*words, "--to", "native", "--output", tmp_path / "native"]
    code, _, err = command(*native)
    assert code == 1 and f"{REPO}@main holds an export to hf, and the upload to native" in err
    assert own_hub.files(REPO) == before
    assert command(*native, "--revision", "native", "--force")[0] == 0

    foreign = {"README.md": b"mine", "pytorch_model.bin": b"weights"}
    own_hub.repos[REPO].branches["main"].append(("2" * 40, foreign))
    hf = [*words, "--to", "hf", "--output", tmp_path / "hf"]
    code, _, err = command(*hf)
    assert code == 1 and "@main holds files that are no export of Castalia" in err
    assert own_hub.files(REPO) == foreign
    code, printed, err = command(*hf, "--force")
    assert code == 0 and "deleted there: pytorch_model.bin" in printed


@pytest.mark.parametrize(
    ("environment", "push", "message"),
    [
        ({"HF_TOKEN": ""}, {}, "needs a token with write access in the environment: set HF_TOKEN"),
        ({"HF_TOKEN": "hf_wrong_0123"}, {}, r"http://\S+ does not know the token in HF_TOKEN"),
        ({"HF_TOKEN": READER}, {}, f"the token in HF_TOKEN may not write to {REPO} at http"),
        ({}, {"repo": "someone/else"}, "the token in HF_TOKEN may not write to someone/else"),
        ({}, {"repo": "tiny"}, "--push-to-hub 'tiny': expected OWNER/NAME"),
        ({}, {"repo": "me/tiny@main"}, "expected OWNER/NAME; a revision goes to --revision"),
        ({}, {"endpoint": "http://127.0.0.1:9"}, r"cannot reach http://127\.0\.0\.1:9 \(Connect"),
    ],
)
def test_what_stands_in_the_way_is_one_sentence(
    own_hub: HubServer,
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict,
    push: dict,
    message: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CastaliaError, match=message) as error:
        list(
            export(run_folder, output=tmp_path / "out", push=Push(**{"repo": REPO} | push), **QUICK)
        )
    for token in (WRITER, READER, "hf_wrong_0123"):
        assert token not in str(error.value)
    assert "\n" not in str(error.value) and error.value.__cause__ is None
    assert own_hub.received == []


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/commit/", 403, "may not write to me/tiny"),
        (
            "/commit/",
            413,
            "refused the upload .HTTP 413: status 413 is set.; run the command again",
        ),
        ("/lfs/", 500, "HTTP 500"),
        ("/tree/", 429, "HTTP 429"),
    ],
)
def test_a_hub_that_refuses_is_quoted(
    own_hub: HubServer, run_folder: Path, tmp_path: Path, path: str, status: int, message: str
) -> None:
    own_hub.answers[path] = status
    with pytest.raises(CastaliaError, match=message) as error:
        list(export(run_folder, output=tmp_path / "out", push=Push(REPO), **QUICK))
    assert "\n" not in str(error.value) and WRITER not in str(error.value)
    # The export itself is whole: the next attempt has only to send it.
    assert (tmp_path / "out" / "export.json").is_file() and own_hub.files(REPO) == {}


def test_without_a_network_by_choice(
    own_hub: HubServer, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CastaliaError, match="HF_HUB_OFFLINE is set; unset it"):
        export(run_folder, output=tmp_path / "out", push=Push(REPO), **QUICK)
    assert own_hub.requests == []


def test_options_of_the_hub_need_a_repository(run_folder: Path, command: Callable) -> None:
    code, _, err = command(run_folder, "--to", "hf", "--revision", "step1")
    assert code == 2 and "--endpoint belong to --push-to-hub OWNER/NAME" in err


def test_another_export_in_the_way_is_not_uploaded(
    own_hub: HubServer, run_folder: Path, tmp_path: Path
) -> None:
    options = {"output": tmp_path / "out", "certificate": False, "push": Push(REPO)}
    list(export(run_folder, dtype="fp32", **options))
    with pytest.raises(ConfigError, match="exists already; use --force"):
        export(run_folder, dtype="bf16", **options)
    with pytest.raises(ConfigError, match="exists already; use --force"):
        export(run_folder / "step0", **options)
    weights = tmp_path / "out" / "model.safetensors"
    with pytest.raises(ConfigError, match="exists already; use --force"):
        export(run_folder, **options | {"certificate": True})
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match="exists already; use --force"):
        export(run_folder, **options)
