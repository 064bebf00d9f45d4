"""What is held out says nothing that training documents say."""

import random

import numpy as np

from castalia.corpora.heldout import (
    FEWEST,
    SHINGLE,
    choose_held_out,
    fingerprint,
    first_sayings,
    plain,
    shared_fractions,
    shingles,
    split_sources,
    window_hashes,
)
from castalia.corpora.texts import TextDocument

LICENCE = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software "
    * 12
)


def prose(seed: int, words: int = 150) -> str:
    """Text of random words that no other seed repeats."""
    rng = random.Random(seed)
    return " ".join(
        "".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(words)
    )


def test_window_hashes_are_equal_exactly_where_windows_are():
    data = b"the same fifty bytes stand here twice, one after other|" * 2
    for width in (1, 2, 3, 7, SHINGLE):
        hashes = window_hashes(data, width)
        windows = [data[i : i + width] for i in range(len(data) - width + 1)]
        assert len(hashes) == len(windows)
        assert len(set(hashes.tolist())) == len(set(windows))
        assert all(
            (hashes[i] == hashes[j]) == (windows[i] == windows[j])
            for i in (0, 5)
            for j in range(len(windows))
        )


def test_shingles_do_not_see_case_or_white_space_and_short_texts_have_one():
    text = prose(1)
    assert np.array_equal(shingles(text), shingles(text.upper().replace(" ", "\n\t")))
    assert len(shingles(text)) > 20
    assert len(shingles("short")) == 1 and shingles("short") != shingles("other")
    assert fingerprint("A  b\n") == fingerprint("a b") != fingerprint("a c")


def test_a_copy_with_another_name_on_it_is_dropped_and_news_is_kept():
    marks = [
        shingles(text)
        for text in (LICENCE + prose(1), "Copyright X " + LICENCE + prose(1), prose(2))
    ]
    assert first_sayings(marks) == [True, False, True]


def test_shared_fraction_counts_what_others_say():
    whole, half = prose(3, 400), prose(3, 400)[:1200] + prose(4, 200)
    low, mid, none = shared_fractions([shingles(whole), shingles(half), shingles(prose(5))])
    assert 0.3 < low < 0.7 and 0.3 < mid < 0.7 and none == 0
    assert shared_fractions([]) == []


def test_held_out_are_few_unshared_and_chosen_by_content_alone():
    documents = [TextDocument(f"d{i:03}", prose(i)) for i in range(100)]
    shared = [0.5 if i < 50 else 0.0 for i in range(100)]
    chosen = choose_held_out(documents, shared)
    assert FEWEST <= len(chosen) <= 7 and min(chosen) >= "d050"
    renamed = [TextDocument("x" + d.name, d.text) for d in documents]
    assert choose_held_out(renamed[::-1], shared[::-1]) == {"x" + name for name in chosen}
    assert len(choose_held_out(documents[:10], [0.0] * 10)) == 2  # never more than a fifth


def test_no_held_out_document_occurs_in_training_under_any_source_or_disguise():
    texts = [prose(i) for i in range(60)]
    sources = {
        "a": [TextDocument(f"a{i}", text) for i, text in enumerate(texts[:40])],
        "b": [
            TextDocument(f"b{i}", text) for i, text in enumerate(texts[20:])
        ],  # half of them stand in a too
        "c": [TextDocument(f"c{i}", LICENCE + text.upper()) for i, text in enumerate(texts)],
    }
    splits = split_sources(sources)
    train = [plain(d.text) for split in splits.values() for d in split.train]
    held = [plain(d.text) for split in splits.values() for d in split.valid]
    assert len(held) >= 2 * FEWEST - 2
    for text in held:
        windows = [text[i : i + SHINGLE] for i in range(0, len(text) - SHINGLE, 7)]
        assert sum(any(w in other for other in train) for w in windows) <= 0.1 * len(windows)
    names = [d.name for split in splits.values() for part in split for d in part]
    assert len(names) == len(set(names)) and names == sorted(names, key=names.index)
