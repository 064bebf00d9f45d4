"""Counts over the training stream, in tokens a second, against decoding and searching row by row.

    python benchmarks/analysis_count.py [--tokens 2000000] [--rounds 3] [--json FILE]

Three counts of the same rows by one process: 1,000 terms as whole words, a pattern, and 2-grams of
tokens. The other side is the way of Pythia's run_freq_count.py: the tokenizer decodes each piece of
a row, `re` searches it, a Counter adds up. Both sides read the rows through the same blocks, take
turns, and must find the same numbers. The text is that of Python's own library; the tokenizer is
trained on it.
"""

import argparse
import functools
import json
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

HERE = Path(__file__).resolve().parent
SEQ_LENGTH = 2048
VOCAB = 16384
TERMS = 1000
PATTERN = r"\b\w+_\w+\b"
"""Names with an underscore."""
CHARACTERS = 6_000_000
"""Of the library's text; longer streams repeat it."""
TOP = 20


def main() -> None:
    """Make the stream, count it on both sides in turn, print a table, write JSON."""
    options = read_options()
    record = measure(options.tokens, options.rounds)
    show(record)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n")


def measure(tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of both sides for each kind of count, with the ratios."""
    folder = Path(tempfile.mkdtemp(prefix="castalia-count-"))
    # Counts of a config without a run are kept in the cache.
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        stream, text = make_stream(folder, tokens)
        cases = {name: case(stream, text, name, rounds) for name in ("terms", "regex", "2-grams")}
    finally:
        shutil.rmtree(folder)
    return {"machine": machine.describe(), "tokens": tokens, "cases": cases}


def make_stream(folder: Path, tokens: int) -> tuple[Any, str]:
    """A stream of at least so many tokens, and the text that it repeats."""
    from castalia.corpus import prepare
    from castalia.data import train_tokenizer
    from castalia.stream.opening import open_stream

    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if sum(map(len, texts)) > CHARACTERS:
            break
        texts.append(path.read_text(encoding="utf-8", errors="ignore"))
    tokenizer = train_tokenizer(texts, VOCAB, folder / "tokenizer.json")
    with (folder / "texts.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    prepare(str(folder / "texts.jsonl"), str(folder / "texts"), str(folder / "tokenizer.json"))
    steps = -(-tokens // (SEQ_LENGTH * 32))
    words = [
        "debug",
        f"data.train={folder / 'texts'}",
        f"data.tokenizer={folder / 'tokenizer.json'}",
        "data.corpus=null",
        f"data.seq_length={SEQ_LENGTH}",
        f"model.max_position_embeddings={SEQ_LENGTH}",
        f"model.vocab_size={tokenizer.vocab_size}",
        "train.batch_size=32",
        f"train.steps={steps}",
        f"output={folder / 'run'}",
    ]
    return open_stream(words, lambda line: None), "".join(texts)


def case(stream: Any, text: str, name: str, rounds: int) -> dict[str, Any]:
    """Both sides of one kind of count."""
    words = [word for word, _ in Counter(re.findall(r"\w{3,}", text)).most_common(TERMS)]
    plain: dict[str, Callable[[], Counter[Any]]] = {
        "terms": functools.partial(plain_terms, stream, words),
        "regex": functools.partial(plain_matches, stream),
        "2-grams": functools.partial(plain_pairs, stream),
    }
    ours: dict[str, Callable[[], Counter[Any]]] = {
        "terms": functools.partial(our_terms, stream, words),
        "regex": functools.partial(our_matches, stream),
        "2-grams": functools.partial(our_pairs, stream),
    }
    require_equal(name, ours[name](), plain[name]())
    tokens = len(stream.places(0, stream.steps)) * (SEQ_LENGTH + 1)
    works = {
        "castalia": functools.partial(rate, ours[name], tokens),
        "plain": functools.partial(rate, plain[name], tokens),
    }
    rates = machine.in_turn(works, rounds)
    return {
        "castalia": machine.summary(rates["castalia"]),
        "plain": machine.summary(rates["plain"]),
        "ratio": machine.ratio(rates["castalia"], rates["plain"]),
    }


def require_equal(name: str, ours: Counter[Any], plain: Counter[Any]) -> None:
    """Stop if the sides disagree; of 2-grams the most frequent counts are compared."""
    if name == "2-grams":
        same = sorted(ours.values()) == sorted(count for _, count in plain.most_common(TOP))
    else:
        same = +ours == +plain
    if not same:
        raise SystemExit(f"{name}: the sides count differently")


def rate(work: Callable[[], object], tokens: int) -> float:
    """Tokens a second; what was counted before is forgotten."""
    shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]), ignore_errors=True)
    start = time.perf_counter()
    work()
    return tokens / (time.perf_counter() - start)


def our_terms(stream: Any, words: list[str]) -> Counter[str]:
    """Whole words by `castalia count --terms`."""
    from castalia.stream.counting.asked import Terms
    from castalia.stream.counting.counting import count

    counts = count(stream, Terms(tuple(words)))
    return Counter(dict(zip(counts.labels, counts.totals.tolist(), strict=True)))


def our_matches(stream: Any) -> Counter[str]:
    """Matches by `castalia count --regex`."""
    from castalia.stream.counting.asked import Matches
    from castalia.stream.counting.counting import count

    counts = count(stream, Matches(PATTERN))
    return Counter(dict(zip(counts.labels, counts.totals.tolist(), strict=True)))


def our_pairs(stream: Any) -> Counter[tuple[int, ...]]:
    """The most frequent 2-grams by `castalia count --ngrams 2`."""
    from castalia.stream.counting.counting import count_ngrams
    from castalia.stream.counting.ngrams import Ngrams

    counts = count_ngrams(stream, Ngrams(2), top=TOP)
    assert counts.ids is not None
    return Counter(dict(zip(map(tuple, counts.ids), counts.totals.tolist(), strict=True)))


def pieces(stream: Any) -> Iterator[Any]:
    """The ids of each document's piece in every row."""
    import numpy as np

    for block in stream.blocks(stream.places(0, stream.steps)):
        for row, spans in zip(block.tokens, block.spans, strict=True):
            yield from np.split(row, np.cumsum([span.length for span in spans])[:-1])


def plain_terms(stream: Any, words: list[str]) -> Counter[str]:
    """Whole words by decoding each piece; a set is the fastest plain look-up of single words."""
    tokenizer = stream.tokenizer
    wanted = set(words)
    found: Counter[str] = Counter()
    for ids in pieces(stream):
        text = tokenizer.decode(ids[ids != tokenizer.eod_id])
        found.update(word for word in re.findall(r"\w+", text) if word in wanted)
    return found


def plain_matches(stream: Any) -> Counter[str]:
    """Matches of the pattern by decoding each piece."""
    tokenizer = stream.tokenizer
    pattern = re.compile(PATTERN)
    found: Counter[str] = Counter()
    for ids in pieces(stream):
        found.update(pattern.findall(tokenizer.decode(ids[ids != tokenizer.eod_id])))
    return found


def plain_pairs(stream: Any) -> Counter[tuple[int, int]]:
    """2-grams by one Counter, which holds all of them."""
    found: Counter[tuple[int, int]] = Counter()
    for ids in pieces(stream):
        values = ids.tolist()
        found.update(pairwise(values))
    return found


def show(record: dict[str, Any]) -> None:
    """The table."""
    print(f"{'count':<10}{'castalia tok/s':>18}{'plain tok/s':>16}{'ratio':>8}")
    for name, line in record["cases"].items():
        ours = line["castalia"]["median"]
        plain = line["plain"]["median"]
        print(f"{name:<10}{ours:>18,.0f}{plain:>16,.0f}{line['ratio']['median']:>8.1f}")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Counts over the stream, in tokens a second.")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "analysis_count.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
