"""Files of fine-tuning become token files once, and again when anything that decides them
changes."""

import json
import os
import sys
from pathlib import Path

import pytest

from castalia.core.errors import CastaliaError, ConfigError, DataError
from castalia.corpora.conversations import FACTS, options_of, prepared_text
from castalia.corpora.records import TEXT_KINDS
from castalia.data import IndexedDataset, load_tokenizer
from castalia.data.labels import IGNORED
from castalia.recipes import load_config
from castalia.runs.named_corpus import ensure_corpus

BYTES = load_tokenizer("bytes")
ASKED = {"role": "user", "content": "hi"}
ANSWERED = {"role": "assistant", "content": "hello"}


def write(path: Path, *records: object) -> str:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def prepare_chat(tmp_path):
    """prepare_chat(*records, ...) -> the one prepared text and the lines that were said."""

    def make(*records, name="talk.jsonl", template="plain", roles=("assistant",), last=False):
        said = []
        path = write(tmp_path / name, *records)
        options = options_of(template, roles, last)
        (text,) = prepared_text("chat", [path], BYTES, options, tmp_path / "made", said.append)
        return text, said

    return make


def shown(text, document: int) -> list[tuple[str, str, list[float]]]:
    """(text, targets, weights that are not 0) of a document."""
    tokens, labels, weights = (
        IndexedDataset(text.files[name])[document] for name in ("train", "labels", "label_weights")
    )
    targets = labels[labels != IGNORED]
    assert ((labels == IGNORED) == (weights == 0)).all()
    return [BYTES.decode(tokens), BYTES.decode(targets), sorted(set(weights[weights > 0]))]


END = "<|endoftext|>"


def test_every_form_of_a_chat(prepare_chat):
    text, said = prepare_chat(
        {"messages": [ASKED, ANSWERED, ASKED, {**ANSWERED, "content": "again", "weight": 0}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"prompt": "two plus two is", "completion": " four"},
        {"prompt": [ASKED], "completion": [{**ANSWERED, "weight": 0.5}]},
        {"prompt": "hi", "completion": [ANSWERED]},
        {"text": "learned whole"},
    )
    talk = "user:\nhi\nassistant:\nhello" + END
    assert shown(text, 0) == [f"{talk}\nuser:\nhi\nassistant:\nagain{END}", f"hello{END}", [1]]
    assert shown(text, 1) == [talk, f"hello{END}", [1]]
    assert shown(text, 2) == [f"two plus two is four{END}", f" four{END}", [1]]
    assert shown(text, 3) == [talk, f"hello{END}", [0.5]]
    assert shown(text, 4) == [talk, f"hello{END}", [1]]
    assert shown(text, 5) == [f"learned whole{END}"] * 2 + [[1]]
    assert text.weighted
    assert said == [f"chat: {text.facts['source']}, 6 records, 166 tokens, 44 of them targets"]


def test_a_second_start_prepares_nothing_and_a_change_prepares_anew(prepare_chat, tmp_path):
    record = {"messages": [ASKED, ANSWERED]}
    text, said = prepare_chat(record)
    assert len(said) == 1 and not text.weighted
    # The same content under another name is the same text.
    assert prepare_chat(record, name="moved.jsonl") == (text, [])
    others = [
        prepare_chat(record, record),
        prepare_chat(record, template="chatml"),
        prepare_chat(record, template="{% for m in messages %}{{ m.content }}{% endfor %}"),
        prepare_chat(record, roles=("user", "assistant")),
        prepare_chat(record, last=True),
    ]
    assert len({other.folder for other, _ in others} | {text.folder}) == 6
    assert all(len(said) == 1 for _, said in others)
    # Killed in the middle: without its facts, or with a shorter file, it is made again.
    for damage in (FACTS, "talk_messages_document.bin"):
        os.truncate(text.folder / damage, 0)
        again, said = prepare_chat(record)
        assert again == text and len(said) == 1
        assert shown(again, 0)[1] == f"hello{END}"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{not json", "invalid JSON at column 2"),
        ("[1]", "a line must be a JSON object with the key 'messages'"),
        ({"msgs": []}, "'prompt' and 'completion', or 'text'; keys: msgs"),
        ({"messages": [ASKED]}, "no message of the role assistant"),
        (
            {"messages": [ASKED, {**ANSWERED, "content": " "}]},
            "message 2 of 'messages': the answer is empty",
        ),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"messages": [{**ANSWERED, "weight": -1}]}, "'weight' must be a finite number >= 0"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "unknown role 'bot'"),
    ],
)
def test_a_faulty_record_is_named_by_file_and_line(prepare_chat, tmp_path, record, words):
    with pytest.raises(DataError) as caught:
        prepare_chat({"messages": [ASKED, ANSWERED]}, record)
    assert f"{tmp_path}/talk.jsonl:2: " in str(caught.value)
    assert words in str(caught.value)
    assert not list((tmp_path / "made").rglob(FACTS))


def test_templates(prepare_chat):
    record = {"messages": [ASKED, ANSWERED]}
    with pytest.raises(CastaliaError, match=r"bytes has no chat template .* plain, chatml"):
        prepare_chat(record, template=None)
    text, _ = prepare_chat({"prompt": "needs", "completion": " none"}, template=None)
    assert shown(text, 0)[1] == f" none{END}"
    with pytest.raises(CastaliaError, match=r"talk.jsonl:1: the chat template rejects this"):
        prepare_chat(record, template="{{ raise_exception('no') }}")


def test_a_template_needs_jinja2_and_plain_strings_do_not(prepare_chat, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    text, _ = prepare_chat({"prompt": "needs", "completion": " none"}, template=None)
    assert shown(text, 0)[1] == f" none{END}"
    with pytest.raises(ConfigError, match=r"needs 'jinja2', which is not installed: pip install"):
        prepare_chat({"messages": [ASKED, ANSWERED]}, template="{{ 'never compiled before' }}")


def test_a_run_names_its_prepared_files(tmp_path):
    path = write(tmp_path / "talk.jsonl", {"messages": [ASKED, {**ANSWERED, "weight": 2}]})
    words = ["debug", f"output={tmp_path}/run", f"data.chat={path}", "data.chat_template=plain"]
    config = ensure_corpus(load_config([*words, f"data.valid_chat={path}"]), say=lambda line: None)
    data = config.data
    assert data.train == data.valid and data.labels == data.valid_labels
    assert data.label_weights == data.valid_label_weights != []
    assert Path(data.train[0]).is_relative_to(tmp_path / "run" / "data")
    # A resume from the run's own config, with the text and after it is gone.
    assert ensure_corpus(config, say=print) == config
    Path(path).unlink()
    assert ensure_corpus(config, say=print) == config
    with pytest.raises(ConfigError, match=r"data.train and data.chat both name"):
        ensure_corpus(load_config([*words, "data.train=other"]))
    with pytest.raises(ConfigError, match=r"needs data.tokenizer"):
        ensure_corpus(load_config([*words, "data.tokenizer=null"]))
    with pytest.raises(ConfigError, match="chat and pairs are rows of different kinds"):
        load_config([*words, "data.pairs=b.jsonl"])
    with pytest.raises(ConfigError, match="valid_pairs validates a run on pairs"):
        load_config([*words, "data.valid_pairs=b.jsonl"])
    assert set(TEXT_KINDS) >= {"chat"}
