"""Samples of a run's checkpoints, and its exports compared: text, speed, size and quality."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from castalia.data import IndexedDataset
from castalia.inference import load

Ids = list[int]
ROUNDS = 3
"""Each voice is timed this often, in turn with the others; its best time counts."""


class Voice(NamedTuple):
    """One way to run the trained model."""

    name: str
    generate: Callable[[Sequence[Ids], int], list[Ids]]
    """Greedy continuations of prompts, without the prompts."""
    logprobs: Callable[[Ids], Sequence[float]]
    """Log-probability of each id but the first, in nats."""
    bytes: int
    """Size of its weights on disk."""


def samples(
    run: Path, steps: Iterable[int], prompts: Sequence[str], *, max_new_tokens: int, seed: int
) -> list[dict[str, Any]]:
    """Continuations of each prompt by each checkpoint: a list of {"step", "prompt", "text"}.

    All checkpoints draw with the same seed, so only the weights differ.
    """
    rows = []
    for step in steps:
        model = load(run / str(step))
        texts = model.generate(list(prompts), max_new_tokens, temperature=0.7, top_k=50, seed=seed)
        for prompt, text in zip(prompts, texts, strict=True):
            rows.append({"step": step, "prompt": prompt, "text": text})
    return rows


def own_voice(run: Path, weights: Path) -> Voice:
    """The newest checkpoint of a run in fp32, in Castalia; the file `weights` gives its size."""
    model = load(run)
    return Voice(
        "castalia fp32",
        lambda prompts, count: model.generate_ids(list(prompts), count),
        lambda ids: model.logprobs(ids).tolist(),
        weights.stat().st_size,
    )


def ct2_voice(folder: Path, name: str) -> Voice:
    """A CTranslate2 export."""
    speaker = load(folder, engine="ct2")
    return Voice(
        name,
        lambda prompts, count: speaker.generate_ids(list(prompts), count),
        lambda ids: speaker.logprobs(ids).tolist(),
        (folder / "model.bin").stat().st_size,
    )


def compare(
    voices: Sequence[Voice], prompts: Sequence[Ids], texts: Sequence[Ids], *, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Greedy continuations, speed, size and loss on `texts` of each voice.

    Returns  a dict a voice: name, megabytes (10**6 bytes), tokens_per_second (one prompt at a
             time), bits_per_token, made (ids), same (share of its tokens that equal the first
             voice's, up to the first difference in each prompt).
    """
    # Before the timing, so that every voice is warm.
    continued: list[list[Ids]] = [voice.generate(prompts, max_new_tokens) for voice in voices]
    best = [math.inf] * len(voices)
    for _ in range(ROUNDS):
        for i, voice in enumerate(voices):
            best[i] = min(best[i], seconds_of(voice, prompts, max_new_tokens))
    rows = []
    for voice, ids, seconds in zip(voices, continued, best, strict=True):
        rows.append(
            {
                "name": voice.name,
                "megabytes": voice.bytes / 1e6,
                "tokens_per_second": sum(map(len, ids)) / seconds,
                "bits_per_token": bits_per_token(voice, texts),
                "made": ids,
                "same": same_share(continued[0], ids),
            }
        )
    return rows


def seconds_of(voice: Voice, prompts: Sequence[Ids], max_new_tokens: int) -> float:
    """Time to continue all prompts, one after the other."""
    start = time.perf_counter()
    for prompt in prompts:
        voice.generate([prompt], max_new_tokens)
    return time.perf_counter() - start


def bits_per_token(voice: Voice, texts: Sequence[Ids]) -> float:
    """Mean of -log2 p over every token of the texts but their first."""
    bits = [-sum(voice.logprobs(ids)) / math.log(2) for ids in texts]
    return sum(bits) / sum(len(ids) - 1 for ids in texts)


def same_share(first: Sequence[Ids], other: Sequence[Ids]) -> float:
    """Share of tokens before the first difference of each pair of continuations."""
    same = 0
    total = 0
    for a, b in zip(first, other, strict=True):
        for x, y in zip(a, b, strict=False):
            if x != y:
                break
            same += 1
        total += max(len(a), len(b))
    return same / max(1, total)


def held_out_texts(prefixes: Sequence[str], length: int, count: int) -> list[Ids]:
    """The first `length` tokens of the first `count` long enough documents of each token file."""
    texts = []
    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        long = [i for i in range(len(dataset)) if dataset.sizes[i] > length]
        texts += [dataset.get(i, 0, length).tolist() for i in long[:count]]
    return texts
