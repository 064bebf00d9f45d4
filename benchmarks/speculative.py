"""Speculative decoding against plain greedy decoding: equality, accepted guesses, speed.

    python benchmarks/speculative.py runs/demo --draft lookup --draft runs/small
                                     --prompts held-out.txt

Prompts are pieces of a text file. All methods take their turn in each round, and their texts are
compared with those of plain decoding.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from machine import describe, in_turn, ratio, seconds, summary

import castalia
from castalia.inference import LanguageModel
from castalia.inference.speculative import speculative_complete

RESULTS = Path(__file__).parent / "results" / "speculative.json"


def pieces_of(text: str, count: int, size: int) -> list[str]:
    """`count` pieces of a text, evenly spread."""
    gap = max(1, (len(text) - size) // count)
    return [text[i * gap : i * gap + size] for i in range(count)]


def plain(model: LanguageModel, prompts: list[str], new: int) -> list[list[int]]:
    """Greedy tokens, one prompt at a time as with a draft."""
    return [model.complete([prompt], new)[0].tokens for prompt in prompts]


def guessed(
    model: LanguageModel, draft: LanguageModel | str, prompts: list[str], new: int
) -> tuple[list[list[int]], float]:
    """Greedy tokens with a draft, and the fraction of accepted guesses."""
    completions = speculative_complete(model, prompts, new, draft=draft)
    kept = sum(counts.kept for _, counts in completions)
    tried = sum(counts.guessed for _, counts in completions)
    return [done.tokens for done, _ in completions], kept / max(1, tried)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument(
        "--draft", action="append", default=[], help="`lookup`, or a smaller model of the suite"
    )
    parser.add_argument("--prompts", type=Path, required=True, help="a text file")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--size", type=int, default=80, help="characters of a prompt")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", default="native")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--json", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Compare, measure, print, write JSON."""
    options = parse()
    machine = describe()
    model = castalia.load(options.model, engine=options.engine, dtype=options.dtype)
    prompts = pieces_of(options.prompts.read_text("utf-8", "ignore"), options.count, options.size)
    want = plain(model, prompts, options.new)
    record: dict[str, Any] = {
        "machine": machine,
        "engine": options.engine,
        "dtype": options.dtype,
        "drafts": {},
    }
    works = {"plain": partial(seconds, partial(plain, model, prompts, options.new))}
    for name in options.draft or ["lookup"]:
        draft: LanguageModel | str = name
        if name != "lookup":
            draft = castalia.load(name, engine=options.engine, dtype=options.dtype)
        tokens, kept = guessed(model, draft, prompts, options.new)
        same = sum(a == b for a, b in zip(tokens, want, strict=True))
        record["drafts"][Path(name).name] = {"kept": kept, "same_texts": same, "texts": len(want)}
        works[Path(name).name] = partial(
            seconds, partial(guessed, model, draft, prompts, options.new)
        )
    times = in_turn(works, options.rounds)
    record["plain_seconds"] = summary(times["plain"])
    for name, entry in record["drafts"].items():
        entry["speed"] = ratio(times["plain"], times[name])
        speed = entry["speed"]
        print(
            f"{name}: {entry['same_texts']} of {entry['texts']} texts equal,"
            f" {entry['kept']:.0%} of the guesses accepted,"
            f" {speed['median']:.2f} ({speed['low']:.2f}-{speed['high']:.2f}) times the speed"
        )
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
