"""Damaged records, hash lists, document indexes and `datasets` folders: sentences, no crash."""

import json
import random

import pytest

from castalia.core.errors import CastaliaError
from castalia.corpus import prepare
from castalia.corpus.inputs import list_files
from castalia.corpus.provenance import read_provenance
from castalia.curate.joining import merge, split
from castalia.curate.resharding import shard
from castalia.curate.verify import hash_list, read_hashes, verify

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'castalia[parquet]'")
VALUES = [
    None,
    True,
    -1,
    3.5,
    10**30,
    "",
    "x",
    "../../x",
    [],
    {},
    [1],
    {"a": 1},
    "\ud800",
    float("nan"),
    "0" * 64,
]


@pytest.fixture
def folder(tmp_path):
    """A token file `p` and share 0 of 2 of the same, `q`."""
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(30))
    )
    prepare([tmp_path / "a.jsonl"], tmp_path / "p", "bytes")
    prepare([tmp_path / "a.jsonl"], tmp_path / "q", "bytes", shard=(0, 2))
    return tmp_path


def changed(draw, value):
    """JSON with one or two values of another kind, or gone."""
    damaged_value = json.loads(json.dumps(value))
    for _ in range(draw.choice([1, 1, 2])):
        key = draw.choice([*damaged_value, "new"])
        if isinstance(damaged_value.get(key), dict) and draw.random() < 0.6:
            damaged_value[key][draw.choice([*damaged_value[key], "new"])] = any_value(draw)
        elif (
            isinstance(damaged_value.get(key), list) and damaged_value[key] and draw.random() < 0.6
        ):
            damaged_value[key][draw.randrange(len(damaged_value[key]))] = any_value(draw)
        else:
            damaged_value[key] = any_value(draw)
    return json.dumps(damaged_value)


def any_value(draw):
    """A new one each time."""
    return json.loads(json.dumps(draw.choice(VALUES)))


def damaged(draw, data):
    """Bytes of which a few are others, now and then cut off."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 2, 5])):
        data[draw.randrange(len(data))] = draw.choice([draw.randrange(256), 10, 32, 46, 47])
    return bytes(data[: draw.randrange(len(data))] if draw.random() < 0.2 else data)


def in_words(job, refusals=None):
    """Result of a job; None if it was refused, which is added to `refusals`."""
    try:
        return job()
    except CastaliaError as error:
        assert str(error)
        if refusals is not None:
            refusals.append(str(error))
        return None


@pytest.mark.filterwarnings("ignore")
def test_records(folder):
    draw = random.Random(1)
    good = {name: json.loads((folder / f"{name}.json").read_text()) for name in "pq"}
    refusals: list[str] = []
    failed = 0
    for _ in range(50):
        for name, record in good.items():
            (folder / f"{name}.json").write_text(changed(draw, record))
        checks = in_words(lambda: list(verify([folder / "p"])), refusals)
        failed += checks is None or any(not check.ok for check in checks)
        in_words(lambda: merge([folder / "p", folder / "p"], folder / "m"), refusals)
        in_words(lambda: split(folder / "p", folder / "s", parts=2), refusals)
        in_words(lambda: shard(folder / "p", folder / "cut", size=50), refusals)
        in_words(
            lambda: prepare([folder / "a.jsonl"], folder / "q", "bytes", shard=(1, 2)), refusals
        )
    # Some changes are harmless. Here about one in three fails a check, and every other share in
    # q.json changes the sentence with which `prepare` refuses the folder.
    assert failed > 0
    assert len(set(refusals)) > 1


@pytest.mark.filterwarnings("ignore")
def test_indexes_of_documents(folder):
    draw = random.Random(2)
    path = folder / "p.documents.parquet"
    good = path.read_bytes()
    refusals: list[str] = []
    failed = 0
    for _ in range(50):
        path.write_bytes(damaged(draw, good))
        failed += any(not check.ok for check in verify([folder / "p"]))
        in_words(lambda: read_provenance(str(folder / "p"), draw.randrange(30)), refusals)
        in_words(lambda: merge([folder / "p", folder / "p"], folder / "m"), refusals)
        in_words(lambda: split(folder / "p", folder / "s", parts=2), refusals)
    # About three of four damaged indexes fail the check, and most jobs refuse them.
    assert failed > 0
    assert refusals


def test_lists_of_hashes(folder):
    draw = random.Random(3)
    good = "".join(
        f"{name} {digest}\n" for name, digest in hash_list(folder / "p").items()
    ).encode()
    noticed = 0
    for _ in range(300):
        data = damaged(draw, good)
        (folder / "hashes").write_bytes(data)
        checks = in_words(lambda: list(verify([folder / "p"], read_hashes(folder / "hashes"))))
        noticed += checks is None or any(not check.ok for check in checks)
        same = data.lower().split() == good.lower().split()
        assert checks is None or same == all(check.ok for check in checks)
    assert noticed > 0


def test_folders_of_datasets(folder):
    draw = random.Random(4)
    for name in ("one", "many"):
        (folder / name).mkdir()
    (folder / "one" / "dataset_info.json").write_text("{}")
    (folder / "one" / "x.arrow").touch()
    for _ in range(300):
        state = {"_data_files": [{"filename": "x.arrow"}], "_indices_data_files": None}
        (folder / "one" / "state.json").write_text(changed(draw, state))
        files = in_words(lambda: list_files([folder / "one"])) or []
        assert all(file.path == str(folder / "one" / "x.arrow") for file in files)
        (folder / "many" / "dataset_dict.json").write_text(changed(draw, {"splits": ["../one"]}))
        assert in_words(lambda: list_files([folder / "many"])) is None
