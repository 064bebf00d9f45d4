"""Answers drawn from a model, each from a random stream of its own."""

import hashlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from castalia.inference import LanguageModel
from castalia.inference.batching import Admission, Batcher, raise_first
from castalia.inference.decoding import Continuation
from castalia.inference.sampling import Sampling
from castalia.tokenizers.settings import text_end
from castalia.tokenizers.special_ids import SpecialIds, read_special_ids
from castalia.tokenizers.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """A prompt of a batch."""

    ids: list[int]
    place: int
    """In the served order, as `Batch.index`; it decides the draws."""
    source: int = 0


class Answer(NamedTuple):
    """One answer to a prompt."""

    ids: list[int]
    """Its tokens, the one that ended it included."""
    text: str
    """Without the token that ended it."""
    has_ended: bool
    """Whether a token of the model ended it, as opposed to the limit."""


class Drawing(NamedTuple):
    """How the answers of a step are drawn."""

    sampling: Sampling
    completions: int
    """Answers to each prompt."""
    max_tokens: int
    """Of an answer, the one that ends it included."""
    at_once: int
    """Answers that are written at a time."""
    seed: int
    step: int


def write_answers(
    model: LanguageModel, prompts: Sequence[Prompt], drawing: Drawing
) -> list[list[Answer]]:
    """The answers to each prompt, drawing.completions of them.

    An answer depends on the weights, the seed, the step, the place of its prompt and its own
    number: not on the other answers, nor on how many ranks share the prompts. Up to the last digits
    of the logits, that is, which are those of a batch.
    Raises  ConfigError for a prompt that leaves no room for an answer.
    """
    admissions = []
    for prompt in prompts:
        # Checked and encoded once; the answers to a prompt share its beginning.
        text = model.continuation(prompt.ids, drawing.max_tokens)
        for number in range(drawing.completions):
            key = draw_key(drawing.seed, drawing.step, prompt.place, number)
            # One for each answer: a shared one would tie the draws to the order of the slots.
            generator = torch.Generator(model.engine.device).manual_seed(key)
            admissions.append(Admission(text.fork(), drawing.sampling, generator))
    run(model, admissions, drawing.at_once)
    answers = [answer_of(one) for one in admissions]
    return [
        answers[i : i + drawing.completions] for i in range(0, len(answers), drawing.completions)
    ]


def draw_key(seed: int, step: int, place: int, number: int) -> int:
    """Seed of the draws of one answer, an int64 >= 0: a hash, so that no two are neighbours."""
    text = f"{seed} {step} {place} {number}".encode()
    # 63 bits: torch takes seeds as signed integers of 64.
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def run(model: LanguageModel, admissions: Sequence[Admission], at_once: int) -> None:
    """Continue all texts to their ends, `at_once` at a time."""
    if not admissions:
        return
    length = max(room_of(one.text) for one in admissions)
    batcher = Batcher(model.engine, min(at_once, len(admissions)), length)
    waiting = deque(admissions)
    while waiting or batcher.running:
        # Slots that have become free are filled at once: the next step then has more texts.
        news = [waiting.popleft() for _ in range(min(batcher.free, len(waiting)))]
        if news:
            batcher.admit(news)
        if batcher.running:
            batcher.step()
    raise_first(admissions)


def room_of(text: Continuation) -> int:
    """Tokens of a prompt and its longest answer."""
    return len(text.ids) + text.budget


def answer_of(one: Admission) -> Answer:
    """What came of one text."""
    completion = one.text.completion()
    has_ended = completion.finish_reason == "eod"
    ids = list(completion.tokens)
    if has_ended:
        # The model learns to end its answers, too.
        ids.append(one.token)
    return Answer(ids, completion.text, has_ended)


def ends_of_texts(tokenizer: Tokenizer, vocab_size: int) -> SpecialIds:
    """The ids that end an answer: those that the files beside the tokenizer name."""
    file = Path(tokenizer.where)
    # `bytes` and `char` are names of tokenizers without files.
    if not file.is_file():
        return SpecialIds.of_tokenizer(tokenizer)
    special = read_special_ids(file.parent, tokenizer, vocab_size)
    end = text_end(file.parent)
    if end is None or end.token not in tokenizer.ids:
        return special
    # The end of a turn of a chat, which its template writes; other files need not name it.
    ends = dict.fromkeys([*special.end_ids, tokenizer.ids[end.token]])
    return SpecialIds(tuple(ends), special.start_id)
