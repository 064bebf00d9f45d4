"""Continuing the prompts of tasks: options of the harness as Castalia's, and continuous batches.

Source  lm-eval 0.4.13, models/utils.py: normalize_gen_kwargs.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

from lm_eval.models.utils import normalize_gen_kwargs

from castalia.core.errors import ConfigError, nearest
from castalia.inference import LanguageModel
from castalia.inference.batching import Admission, Batcher, raise_first
from castalia.inference.decoding import Continuation, Ending, begin
from castalia.inference.options import Drawing, split
from castalia.inference.sampling import Sampling

SEED = 1234
"""The harness's seed of torch, which its `hf` model draws with."""
DRAWN = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "typical_p": float,
    "repetition_penalty": float,
    "no_repeat_ngram_size": int,
    "seed": int,
}
"""Options of transformers' `generate` that mean the same here."""
IGNORED = ("use_cache", "pad_token_id", "num_return_sequences", "num_beams")
"""Options without effect on the text, at the only values that this model takes."""


class Prompt(NamedTuple):
    """How a prompt is continued."""

    max_new_tokens: int
    until: tuple[str, ...]
    """Stop strings."""
    drawing: tuple[tuple[str, float], ...]
    """Options of `Drawing`."""
    repeat: int = 0
    """Counts the draws of one prompt; each has another seed."""

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn rather than the likeliest taken."""
        return dict(self.drawing).get("temperature", 0) > 0

    def repeated(self, repeat: int) -> "Prompt":
        """The same with another seed."""
        return self._replace(repeat=repeat)

    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        options: Any = dict(self.drawing)
        options["seed"] = int(options.get("seed", SEED)) + self.repeat
        sampling: Sampling = split(Drawing(**options)).sampling
        return sampling


def options_of(given: Mapping[str, Any], default_tokens: int, task: str | None) -> Prompt:
    """The generation_kwargs of a task.

    Raises  ConfigError naming an option that this model does not have.
    """
    options = dict(normalize_gen_kwargs(dict(given), default_tokens))
    until = tuple(text for text in options.pop("until") if text)
    tokens = int(options.pop("max_gen_toks"))
    do_sample = options.pop("do_sample")
    if not do_sample:
        # Transformers warns of these and takes the likeliest token.
        for name in ("temperature", "top_k", "top_p", "min_p", "typical_p"):
            options.pop(name, None)
    elif "temperature" not in given:
        options["temperature"] = 1.0
    drawing: dict[str, float] = {}
    for name, value in options.items():
        if name in IGNORED and value in (None, True, False, 0, 1):
            continue
        if name not in DRAWN:
            known = [*DRAWN, "until", "max_gen_toks", "do_sample"]
            raise ConfigError(
                f"task {task or '?'}: generation_kwargs has {name}={value!r}, which is not"
                f" implemented; choose among {', '.join(known)}{nearest(name, known)}"
            )
        if value is not None:
            drawing[name] = DRAWN[name](value)
    return Prompt(tokens, until, tuple(sorted(drawing.items())))


def continue_all(
    model: LanguageModel,
    prompts: Sequence[tuple[Sequence[int], Prompt]],
    ends: Set[int],
    *,
    rows: int,
    done: Callable[[int], None],
) -> list[list[int]]:
    """The new ids of each prompt, those of a stop string included, without the end of text.

    At most `rows` prompts are continued together; a text that ends makes room for the next one.
    `done` is called with the number of texts that ended since the last call.
    """
    if not prompts:
        return []
    texts = [continuation_of(model, ids, prompt, ends) for ids, prompt in prompts]
    length = max(len(text.ids) + text.budget for text in texts)
    batcher = Batcher(model.engine, min(rows, len(texts)), length)
    # Long prompts first, so that the batch has equal lengths; equal beginnings follow one another,
    # so that the second is copied from the first.
    waiting = sorted(range(len(texts)), key=lambda i: (-len(texts[i].ids), texts[i].ids))
    while waiting or batcher.running:
        before = len(batcher.running)
        entering = waiting[: batcher.free]
        waiting = waiting[len(entering) :]
        news = []
        for i in entering:
            sampling = prompts[i][1].sampling()
            (generator,) = sampling.generators(1, model.engine.device)
            news.append(Admission(texts[i], sampling, generator))
        if news:
            batcher.admit(news)
            raise_first(news)
        running = list(batcher.running.values())
        batcher.step()
        raise_first(running)
        # Texts that ended with their first token never ran.
        ended = len(news) + before - len(batcher.running)
        if ended:
            done(ended)
    return [text.tokens for text in texts]


def continuation_of(
    model: LanguageModel, ids: Sequence[int], prompt: Prompt, ends: Set[int]
) -> Continuation:
    """A prompt, ready for the decoding loop."""
    model.require_ids(ids)
    others = tuple(sorted(ends - set(model.end_ids)))
    return begin(
        ids,
        max_new_tokens=prompt.max_new_tokens,
        limit=model.config.max_position_embeddings,
        special=model.special,
        decode=model.decode,
        ending=Ending(stop=prompt.until, stop_token_ids=others),
    )
