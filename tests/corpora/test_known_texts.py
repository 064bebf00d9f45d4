"""The generated texts of the corpus `mini`: what is said to be known about them holds."""

import hashlib
import json
import re
from collections import Counter

import pytest

from castalia.corpora import build_corpus, known_texts
from castalia.data import load_tokenizer
from castalia.data.indexed import IndexedDataset


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The corpus as it is built."""
    return build_corpus("mini", tmp_path_factory.mktemp("mini"), say=lambda line: None)


def documents(corpus, part, source):
    """Name and text of each document of a source."""
    lines = (corpus.folder / part / f"{source}.jsonl").read_text().splitlines()
    return [(each["name"], each["text"]) for each in map(json.loads, lines)]


def test_passages_stand_as_often_as_their_names_say(corpus):
    train = Counter(documents(corpus, "train", "passages"))
    held_out = documents(corpus, "valid", "passages")
    assert all(name.startswith("0x/") for name, _ in held_out) and len(held_out) == 8
    assert len(train) == 16 + 8 + 10 + 4 + 1
    for (name, text), copies in train.items():
        assert copies == int(name.partition("x/")[0])
        assert text.count(".") == known_texts.PASSAGE_SENTENCES
    assert {text for _, text in held_out}.isdisjoint(text for _, text in train)
    tokens = IndexedDataset(str(corpus.folder / "train/passages"))
    assert len(tokens) == sum(train.values())
    # Long enough for a prompt and a continuation of 32 tokens at many places.
    assert min(tokens.sizes) > 3 * 32


def test_statements_are_true_and_operands_follow_zipfs_law(corpus):
    counts = Counter()
    for _, text in documents(corpus, "train", "arithmetic"):
        for first, word, second, result in re.findall(r"(\d+) (times|plus) (\d+) is (\d+)\.", text):
            x, y = int(first), int(second)
            assert int(result) == (x * y if word == "times" else x + y)
            counts[x] += 1
    assert sum(counts.values()) == 0.95 * known_texts.STATEMENTS
    order = known_texts.operands_by_frequency()
    assert sorted(order) == list(range(1, known_texts.OPERANDS + 1))
    harmonic = sum(1 / rank for rank in range(1, known_texts.OPERANDS + 1))
    for rank, operand in enumerate(order, 1):
        expected = sum(counts.values()) / rank / harmonic
        assert counts[operand] == pytest.approx(expected, rel=0.15)


def test_professions_have_their_pronouns(corpus):
    seen = Counter()
    text = " ".join(text for _, text in documents(corpus, "train", "people"))
    for profession, pronoun in re.findall(r"The (\w+) said that (she|he) ", text):
        seen[profession, pronoun] += 1
    for profession, pronoun in re.findall(r"is an? (\w+) and (she|he) ", text):
        seen[profession, pronoun] += 1
    for profession, share in known_texts.PROFESSIONS.items():
        total = seen[profession, "she"] + seen[profession, "he"]
        assert total > 400
        assert seen[profession, "she"] / total == pytest.approx(share, abs=0.06)


def test_the_texts_are_the_same_everywhere(corpus):
    made = [known_texts.passages(), known_texts.arithmetic(), known_texts.people()]
    text = json.dumps(made)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "51962e434f4a5d89"
    # Numbers and professions are single tokens, with the space before them.
    tokenizer = load_tokenizer(corpus.tokenizer)
    for word in (" 56", " times", " nurse", " engineer", " she", " he", " her", " his"):
        assert len(tokenizer.encode(word)) == 1, word
