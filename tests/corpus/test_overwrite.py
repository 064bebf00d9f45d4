"""Token files of another job are not replaced without a word; the same job is done already."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from castalia.core.errors import ConfigError
from castalia.corpus import ChatOptions, prepare
from castalia.curate.dedup import Near, dedup
from castalia.curate.joining import merge, split
from castalia.curate.resharding import shard
from castalia.data import IndexedDataset
from castalia.data.labels import mask_before


@pytest.fixture
def corpus(tmp_path):
    """Two inputs, the first one prepared as `out`."""
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name} one"}}\n{{"text": "two"}}\n')
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", "bytes")
    return tmp_path


def contents(folder, name="out"):
    """The bytes of every file of a prefix."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"{name}*"))}


OTHER_JOBS = [
    ({"inputs": ["b.jsonl"]}, r"out\.bin exists, prepared from .*a\.jsonl, not from .*b\.jsonl"),
    ({"inputs": ["a.jsonl", "b.jsonl"]}, r"prepared from 1 files, now 2"),
    ({"append_eod": True}, r"out\.bin exists, made by another job: end of document none, now 256"),
    ({"eod": "7"}, r"end of document none, now 7"),
    ({"tokenizer": "char"}, r'made by another job: tokenizer "[0-9a-f]{64}", now "'),
    ({"max_documents": 1}, r"made by another job: num_docs none, now 1"),
    ({"ftfy": True}, r"made by another job: ftfy false, now true"),
    ({"keep": ("id",)}, r'made by another job: keep \[\], now \["id"\]'),
]


@pytest.mark.parametrize(("more", "message"), OTHER_JOBS)
def test_another_job_is_refused(corpus, more, message):
    before = contents(corpus)
    inputs = [corpus / name for name in more.pop("inputs", ["a.jsonl"])]
    tokenizer = more.pop("tokenizer", "bytes")
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(inputs, corpus / "out", tokenizer, **more)
    assert "choose another --output, or replace it with --overwrite" in str(caught.value)
    assert contents(corpus) == before
    prepare(inputs, corpus / "out", tokenizer, overwrite=True, **more)
    assert contents(corpus) != before


def test_the_same_job_is_done_already(corpus):
    before = contents(corpus)
    record = json.loads(before["out.json"])
    times = {path.name: path.stat().st_mtime_ns for path in corpus.glob("out*")}
    os.utime(corpus / "a.jsonl")  # another age, the same content
    for workers in (1, 2):
        done = prepare([corpus / "a.jsonl"], corpus / "out", "bytes", workers=workers)
        assert done.done_before and done.seconds == record["seconds"]
        assert (done.documents, done.tokens, done.prefixes) == (2, 8, (str(corpus / "out"),))
    assert times == {path.name: path.stat().st_mtime_ns for path in corpus.glob("out*")}
    # There was no faulty document to reject.
    assert prepare([corpus / "a.jsonl"], corpus / "out", "bytes", reject=True).done_before
    # An older record, without the options that are recorded now.
    for name in ("options", "input_stamps", "files", "record_sha256"):
        del record[name]
    (corpus / "out.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match=r"older version, which did not record --num-docs, --keep"):
        assert prepare([corpus / "a.jsonl"], corpus / "out", "bytes").done_before
    # A file of the output that is gone is made again.
    (corpus / "out.idx").unlink()
    assert not prepare([corpus / "a.jsonl"], corpus / "out", "bytes").done_before
    assert IndexedDataset(corpus / "out").sizes.tolist() == [5, 3]
    with open(corpus / "a.jsonl", "a") as file:
        file.write('{"text": "three"}\n')
    with pytest.raises(ConfigError, match=r"prepared from .*a\.jsonl as it was before it changed"):
        prepare([corpus / "a.jsonl"], corpus / "out", "bytes")


def test_a_job_that_rejected_documents_is_another_one_without(corpus):
    (corpus / "c.jsonl").write_text('{"text": "one"}\n{broken\n')
    assert prepare([corpus / "c.jsonl"], corpus / "c", "bytes", reject=True).rejected == 1
    assert prepare([corpus / "c.jsonl"], corpus / "c", "bytes", reject=True).done_before
    (corpus / "c.rejects.jsonl").unlink()
    assert not prepare([corpus / "c.jsonl"], corpus / "c", "bytes", reject=True).done_before
    assert (corpus / "c.rejects.jsonl").exists()
    with pytest.raises(ConfigError, match='made by another job: on_error "reject", now "stop"'):
        prepare([corpus / "c.jsonl"], corpus / "c", "bytes")


def test_each_output_of_a_job_counts(corpus):
    """Conversations have several outputs; all of them are the same job's, or none is written."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (corpus / "c.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (corpus / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    options = {"keys": ("messages",)}
    template = str(corpus / "t.jinja")
    chats = [ChatOptions(template), ChatOptions(template, roles=("user",))]
    prepare([corpus / "c.jsonl"], corpus / "c", "bytes", chat=chats[0], **options)
    before = contents(corpus, "c_")
    assert prepare(
        [corpus / "c.jsonl"], corpus / "c", "bytes", chat=chats[0], **options
    ).done_before
    with pytest.raises(ConfigError, match=r'chat\.roles \["assistant"\], now \["user"\]'):
        prepare([corpus / "c.jsonl"], corpus / "c", "bytes", chat=chats[1], **options)
    (corpus / "t.jinja").write_text("{% for m in messages %}{{ m.content }}.{% endfor %}")
    with pytest.raises(ConfigError, match=r"chat\.template_sha256"):
        prepare([corpus / "c.jsonl"], corpus / "c", "bytes", chat=chats[0], **options)
    assert contents(corpus, "c_") == before


def test_files_without_a_record_are_not_replaced(corpus):
    """Such as GPT-NeoX's own, shards, or a .json of something else."""
    (corpus / "out.json").unlink()
    (corpus / "shards-00000-of-00000.bin").write_bytes(b"tokens")
    (corpus / "settings.json").write_text('{"mine": 1}')
    for name, file in (
        ("out", "out.bin"),
        ("shards", "shards-00000-of-00000.bin"),
        ("settings", "settings.json"),
    ):
        with pytest.raises(ConfigError, match=f"{file} exists, and no record says that this job"):
            prepare([corpus / "a.jsonl"], corpus / name, "bytes")


def test_the_other_verbs_that_write_token_files(corpus):
    prepare([corpus / "b.jsonl"], corpus / "other", "bytes")
    out = str(corpus / "out")
    other = str(corpus / "other")
    jobs = [
        lambda source, name, **more: merge([source, source], name, **more),
        lambda source, name, **more: dedup([source], name, **more),
        lambda source, name, **more: mask_before(source, name, [32], **more),
    ]
    for number, job in enumerate(jobs):
        name = str(corpus / f"written{number}")
        job(out, name)
        job(out, name)
        before = contents(corpus, Path(name).name)
        with pytest.raises(ConfigError, match=rf"written{number}\.bin exists, made by another job"):
            job(other, name)
        with pytest.raises(ConfigError, match=r"no record says that this job made it"):
            jobs[number - 1](out, name)
        assert contents(corpus, Path(name).name) == before
        job(other, name, overwrite=True)
    with pytest.raises(ConfigError, match=r"written1\.bin exists, made by another job: dedup"):
        dedup([other], corpus / "written1", near=Near(0.5))
    split(out, corpus / "cut", parts=2)
    with pytest.raises(ConfigError, match=r"cut-part0\.bin exists, made by another job: split"):
        split(other, corpus / "cut", parts=2)
    assert np.array_equal(IndexedDataset(corpus / "cut-part0")[0], IndexedDataset(out)[0])


def test_an_index_is_not_put_beside_the_tokens_of_another_file(corpus):
    (corpus / "there").mkdir()
    prepare([corpus / "b.jsonl"], corpus / "there" / "out", "bytes", append_eod=True)
    before = contents(corpus / "there")
    with pytest.raises(ConfigError, match=r"there/out\.idx exists and is not that of .*out"):
        shard(corpus / "out", corpus / "there", size=4)
    assert contents(corpus / "there") == before
