"""Models that a URL names: fetched into the cache with their hashes compared, then read there."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

import castalia
from castalia.checkpoint import read
from castalia.checkpoint.mirror import Mirror
from castalia.core.errors import CheckpointError, ConfigError
from castalia.eval.places import checkpoints_of
from castalia.export import export
from castalia.formats import remote
from castalia.formats.remote import local_model, split_step
from castalia.formats.saved_model import open_model
from castalia.storage import ObjectStore, StorageError, objects

TEXT = "The "


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of one's own."""
    # The compiled step stays in the cache of all tests.
    monkeypatch.setattr(remote, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def bucket(new_bucket, four_steps, tmp_path_factory) -> str:
    """A bucket with `run`, the mirror of a run, and `hf`, an export of it."""
    url = new_bucket()
    mirror = Mirror(ObjectStore(f"{url}/run"), four_steps)
    for step in (2, 4):
        mirror.send_step(step)
    output = tmp_path_factory.mktemp("export") / "hf"
    list(export(four_steps, to="hf", output=output, certificate=False))
    store = ObjectStore(f"{url}/hf")
    for path in output.iterdir():
        store.write(path.name, path.read_bytes())
    return url


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_a_run_a_step_and_an_export_are_read_as_local_ones(
    bucket, link, four_steps, cache, command
):
    expected = castalia.load(four_steps).generate(TEXT, max_new_tokens=8, temperature=0)
    weights = (four_steps / "checkpoints/step-00000004/model-00000.safetensors").stat().st_size
    before = link.received
    model = castalia.load(f"{bucket}/run")
    assert model.step == 4 and model.generate(TEXT, max_new_tokens=8, temperature=0) == expected
    # The optimizer's state, twice the weights, stays there.
    assert weights < link.received - before < 2 * weights
    assert not any("optim" in name for name in files(cache))
    before = link.received
    assert castalia.load(f"{bucket}/run").step == 4
    assert link.received - before < weights / 4
    for name in ("run/step2", "run@2", "run/checkpoints/step-00000002"):
        assert castalia.load(f"{bucket}/{name}").step == 2
    again = castalia.load(f"{bucket}/hf").generate(TEXT, max_new_tokens=8, temperature=0)
    assert again == expected
    options = ("--prompt", TEXT, "--temperature", 0, "--max-new-tokens", 8)
    code, out, err = command("generate", f"{bucket}/run/step4", *options)
    assert code == 0, err
    assert out == command("generate", four_steps, *options)[1]


def test_what_is_damaged_missing_or_gone(bucket, link, cache, monkeypatch):
    name = "checkpoints/step-00000004/model-00000.safetensors"
    store = ObjectStore(f"{bucket}/run")
    whole = store.read(name)
    store.write(name, whole[:-1] + bytes([whole[-1] ^ 1]))
    said = rf"{bucket}/run/{name} is damaged: its SHA-256 is not the one of its save"
    with pytest.warns(UserWarning, match=f"{said}; using step 2 instead"):
        assert castalia.load(f"{bucket}/run").step == 2
    with pytest.raises(CheckpointError, match=said):
        castalia.load(f"{bucket}/run/step4")
    store.write(name, whole)
    export = ObjectStore(f"{bucket}/hf")
    content = export.read("model.safetensors")
    export.write("model.safetensors", content[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"hf/model.safetensors is damaged: its SHA-256"):
        castalia.load(f"{bucket}/hf")
    export.write("model.safetensors", content)
    with pytest.raises(CheckpointError, match=r"step 3 is not there, .* choose one of 2, 4"):
        castalia.load(f"{bucket}/run/step3")
    with pytest.raises(CheckpointError, match="holds no checkpoint, run or export of Castalia"):
        castalia.load(f"{bucket}/other")
    # Without the server: what was fetched before, or one sentence.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert castalia.load(f"{bucket}/run").step == 4
    monkeypatch.setattr(objects, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(objects, "LONGEST_WAIT", 0.01)
    link.set("gone")
    try:
        with pytest.warns(UserWarning, match=r"does not answer .*which was fetched before"):
            assert castalia.load(f"{bucket}/run").step == 4
        with pytest.raises(StorageError, match="the server does not answer"):
            castalia.load(f"{bucket}/run/step2")
    finally:
        link.set("open")


def test_verbs_of_several_steps_take_one_url(bucket, cache, tmp_path):
    (done,) = export(f"{bucket}/run", to="hf", output=tmp_path / "hf", certificate=False)
    assert done.step == 4
    (checkpoint,) = checkpoints_of([f"{bucket}/run/step2"])
    assert checkpoint.step == 2 and Path(checkpoint.path).is_relative_to(cache)
    # The results lie here and not in the cache, under the names that the URL has.
    assert checkpoint.stores == (Path("evals"),)
    assert (checkpoint.suite, checkpoint.model) == (bucket.rpartition("/")[2], "run")
    (checkpoint,) = checkpoints_of([f"{bucket}/run/checkpoints/step-00000002"], store="mine")
    assert checkpoint.stores == (Path("mine"),) and checkpoint.model == "run"
    with pytest.raises(ConfigError, match="is read as one checkpoint; give URL/step1000"):
        checkpoints_of([f"{bucket}/run"], "all")
    with pytest.raises(ConfigError, match="give --output for its export"):
        export(f"{bucket}/run", to="hf")


def test_a_file_url_is_one_too(four_steps, cache):
    folder = local_model(f"file://{four_steps}/checkpoints")
    assert folder.name == "step-00000004" and folder.is_relative_to(cache)
    ours, theirs = (read(place) for place in (folder, four_steps / "checkpoints" / folder.name))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def write_export(folder: Path, **contents: str) -> str:
    """The URL of a folder with files and their record, of no model."""
    folder.mkdir(exist_ok=True)
    for name, text in contents.items():
        (folder / name).write_text(text)
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in contents.items()}
    record = {"to": "hf", "numbers": "fp32", "model": {}, "files_sha256": hashes}
    (folder / "export.json").write_text(json.dumps(record))
    return f"file://{folder}"


def test_a_fetch_that_was_broken_off_is_no_model(tmp_path, cache, monkeypatch):
    url = write_export(tmp_path / "model", one="1", two="2")
    fetch = ObjectStore.fetch

    def broken_off(store, name, path, size):
        if name == "two":
            raise StorageError("the server does not answer", passing=True)
        fetch(store, name, path, size)

    with monkeypatch.context() as server:
        server.setattr(ObjectStore, "fetch", broken_off)
        for _ in range(2):
            with pytest.raises(StorageError, match="does not answer"):
                local_model(url)
    # Another model has come to the same place: nothing of the first one belongs to it.
    shutil.rmtree(tmp_path / "model")
    write_export(tmp_path / "model", two="second")
    folder = local_model(url)
    assert files(folder) == {"two", "export.json"} and (folder / "two").read_text() == "second"


def test_a_url_stays_in_its_folder_of_the_cache(tmp_path, cache):
    other = local_model(write_export(tmp_path / "other", one="1"))
    url = write_export(tmp_path / "model", one="1")
    for end in ("/x/..", "/."):
        with pytest.raises(ConfigError, match=r"must not hold the parts \. and \.\."):
            local_model(url + end)
    assert files(other) == {"one", "export.json"}


def test_a_step_without_its_manifest_or_under_another_name_is_skipped(four_steps, cache, tmp_path):
    store = ObjectStore(f"file://{tmp_path}/run")
    mirror = Mirror(store, four_steps)
    for step in (2, 4):
        mirror.send_step(step)
    steps = tmp_path / "run/checkpoints"
    shutil.copytree(steps / "step-00000004", steps / "step-00000006")
    with pytest.warns(UserWarning, match=r"it is of step 4, .*step-00000006.*using step 4"):
        assert local_model(store.url).name == "step-00000004"
    shutil.rmtree(steps / "step-00000006")
    # A rank takes the step that the first one has found, whatever has come since.
    assert open_model(store.url, step=2, check=False).step == 2
    (steps / "step-00000004/manifest.json").unlink()
    with pytest.warns(UserWarning, match=r"manifest.json: it does not exist.*using step 2"):
        assert local_model(store.url).name == "step-00000002"


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("s3://bucket/run/step1000", ("s3://bucket/run", 1000)),
        ("s3://bucket/run@1000", ("s3://bucket/run", 1000)),
        ("s3://bucket/run/checkpoints/step-00001000", ("s3://bucket/run", 1000)),
        ("s3://bucket/run", ("s3://bucket/run", None)),
    ],
)
def test_which_step_a_url_names(url, parts):
    assert split_step(url) == parts
