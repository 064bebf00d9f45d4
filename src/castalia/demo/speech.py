"""What a run's checkpoints say, and how its exports speak beside it: text, speed, size and loss of quality."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from castalia.data import IndexedDataset
from castalia.inference import load

Ids = list[int]
ROUNDS = 3
"""Each voice is timed this often, in turn with the others, and its best time counts."""


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
    """What each checkpoint writes after each prompt, drawn with the same seed: [{"step", "prompt", "text"}]."""
    made = []
    for step in steps:
        speaker = load(run / str(step))
        texts = speaker.generate(
            list(prompts), max_new_tokens, temperature=0.7, top_k=50, seed=seed
        )
        made += [
            {"step": step, "prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)
        ]
    return made


def own_voice(run: Path, weights: Path) -> Voice:
    """The newest checkpoint of a run in fp32, run by Castalia; `weights` is the file whose size counts."""
    speaker = load(run)
    return Voice(
        "castalia fp32",
        lambda prompts, count: speaker.generate_ids(list(prompts), count),
        lambda ids: speaker.logprobs(ids).tolist(),
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
    """Each voice's greedy continuations, speed, size and loss on `texts`, beside the first voice's.

    Returns  a dict a voice: name, megabytes, tokens_per_second (one prompt at a time), bits_per_token, made (ids),
             same (share of its tokens that are the first voice's, up to the first difference in each prompt).
    """
    best = [math.inf] * len(voices)
    made: list[list[Ids]] = [
        voice.generate(prompts, max_new_tokens) for voice in voices
    ]  # also warms them up
    for _ in range(ROUNDS):
        for i, voice in enumerate(voices):
            best[i] = min(best[i], seconds_of(voice, prompts, max_new_tokens))
    return [
        {
            "name": voice.name,
            "megabytes": voice.bytes / 1e6,
            "tokens_per_second": sum(map(len, made[i])) / best[i],
            "bits_per_token": bits_per_token(voice, texts),
            "made": made[i],
            "same": same_share(made[0], made[i]),
        }
        for i, voice in enumerate(voices)
    ]


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
    """Share of tokens that stand before the first difference of each pair."""
    same = total = 0
    for a, b in zip(first, other, strict=True):
        pairs = zip(a, b, strict=False)
        same += next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
        total += max(len(a), len(b))
    return same / max(1, total)


def held_out_texts(prefixes: Sequence[str], length: int, count: int) -> list[Ids]:
    """The first `length` tokens of the first `count` documents of each token file that are long enough."""
    texts = []
    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        long = [i for i in range(len(dataset)) if dataset.sizes[i] > length]
        texts += [dataset.get(i, 0, length).tolist() for i in long[:count]]
    return texts
