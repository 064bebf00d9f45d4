"""Preferences as a user has them become token files of both sides."""

import json

import pytest

from castalia.core.errors import ConfigError, DataError
from castalia.corpora.conversations import options_of, prepared_text
from castalia.data import IndexedDataset, load_tokenizer
from castalia.data.labels import IGNORED
from castalia.recipes import load_config
from castalia.runs.named_corpus import ensure_corpus

BYTES = load_tokenizer("bytes")
END = "<|endoftext|>"
ASKED = {"role": "user", "content": "hi"}
GOOD = {"role": "assistant", "content": "hello"}
BAD = {"role": "assistant", "content": "what"}
TALK = "user:\nhi\nassistant:\n"


@pytest.fixture
def prepared(tmp_path):
    """prepared(*records) -> texts and targets of both sides, by document."""

    def make(*records):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        options = options_of("plain", ["assistant"], False)
        (text,) = prepared_text(
            "pairs", [str(path)], BYTES, options, tmp_path / "made", lambda _: None
        )
        out = []
        for document in range(len(records)):
            for side in ("chosen", "rejected"):
                tokens, labels = (
                    IndexedDataset(text.files[side + kind])[document] for kind in ("", "_labels")
                )
                out.append((BYTES.decode(tokens), BYTES.decode(labels[labels != IGNORED])))
        return out

    return make


def test_every_form_of_a_pair(prepared):
    talk = (
        (TALK + "hello" + END, f"hello{END}"),
        (TALK + "what" + END, f"what{END}"),
    )
    found = prepared(
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        # The prompt as a string, and in both conversations again.
        {"prompt": "hi", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "one plus one is", "chosen": " two", "rejected": " three"},
        {"chosen": "the sky is blue", "rejected": "the sky is black"},
        {"chosen": "the sky is", "rejected": "no"},
    )
    assert found[:8] == list(talk) * 4
    assert found[8:] == [
        (f"one plus one is two{END}", f" two{END}"),
        (f"one plus one is three{END}", f" three{END}"),
        (f"the sky is blue{END}", f" blue{END}"),
        (f"the sky is black{END}", f" black{END}"),
        (f"the sky is{END}", f"the sky is{END}"),
        (f"no{END}", f"no{END}"),
    ]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, "lacks the key 'rejected'; keys: chosen, prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [GOOD]}, "are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "'rejected' is empty"),
        ({"chosen": "", "rejected": "a b c"}, "'chosen' is empty"),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED]}, "'rejected' is empty, or all of it"),
        (
            {"prompt": [ASKED], "chosen": [GOOD], "rejected": [{**BAD, "content": ""}]},
            "message 1 of 'rejected': the answer is empty",
        ),
        ({"prompt": "a", "chosen": [GOOD], "rejected": "c"}, "give both in one form"),
        ({"prompt": "a", "chosen": 1, "rejected": "b"}, "'chosen' must be a list of messages"),
    ],
)
def test_a_faulty_pair_is_named_by_file_and_line(prepared, tmp_path, record, words):
    with pytest.raises(DataError, match=words) as caught:
        prepared({"prompt": "a", "chosen": "b", "rejected": "c"}, record)
    assert f"{tmp_path}/pairs.jsonl:2: " in str(caught.value)


def test_a_run_names_both_sides(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    words = ["debug", f"output={tmp_path}/run", f"data.pairs={path}", "loss.kind=simpo"]
    words += [f"data.valid_pairs={path}", "data.packing=unpacked"]
    config = ensure_corpus(load_config(words), say=lambda line: None)
    data = config.data
    for name in ("chosen", "rejected", "chosen_labels", "rejected_labels"):
        assert len(getattr(data, name)) == 1 and getattr(data, f"valid_{name}") == getattr(
            data, name
        )
    assert not data.train and not data.labels
    path.unlink()
    assert ensure_corpus(config, say=print) == config
    with pytest.raises(ConfigError, match=r"data.chosen and data.pairs both name"):
        ensure_corpus(load_config([*words, "data.chosen=[x]", "data.rejected=[y]"]))
    with pytest.raises(ConfigError, match="packing=unpacked"):
        load_config([*words[:-1], "data.packing=packed"])
