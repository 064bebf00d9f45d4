"""`LanguageModel`: an engine with its tokenizer, that continues texts and scores them."""

import time
import warnings
from collections.abc import Generator, Sequence
from typing import Any, TypedDict, Unpack, cast, overload

from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.data.tokenizer import Tokenizer
from castalia.inference.batching import decode_rows
from castalia.inference.decoding import Completion, Row, make_row
from castalia.inference.engine import Engine
from castalia.inference.sampling import Sampling
from castalia.inference.torch_engine import TorchEngine
from castalia.models import Decoder, ModelConfig

BATCH_ROWS = 16
"""Prompts that are continued together; more are split."""


class Drawing(TypedDict, total=False):
    """Options of `generate` and its kin besides max_new_tokens; the numbers are those of Sampling."""

    temperature: float
    top_k: int
    top_p: float
    stop: str | list[str] | None
    seed: int | None


class LanguageModel:
    """An engine, the tokenizer that its model was trained with, and the step of its checkpoint.

    `engine` computes (a Decoder is taken as engine=torch), `config` is the ModelConfig, `tokenizer` None for a
    checkpoint without one (ids still work), `step` the number of optimizer steps, None when unknown.
    """

    def __init__(
        self, engine: Engine | Decoder, tokenizer: Tokenizer | None = None, step: int | None = None
    ) -> None:
        self.engine = engine if isinstance(engine, Engine) else TorchEngine(engine)
        self.tokenizer = tokenizer
        self.step = step
        self.quality: dict[str, Any] | None = None
        """Of an export, what `Quality` says of it, if it was measured."""

    @property
    def config(self) -> ModelConfig:
        """The decoder's config."""
        return self.engine.config

    @property
    def model(self) -> Decoder:
        """The Decoder itself.

        Raises  ConfigError if another engine than torch computes.
        """
        if not isinstance(self.engine, TorchEngine):
            raise ConfigError(
                f"engine {self.engine.name} has no torch model; load with engine='torch'"
            )
        return self.engine.model

    @property
    def eod_id(self) -> int | None:
        """The token that ends a document, or None."""
        return None if self.tokenizer is None else self.tokenizer.eod_id

    @overload
    def generate(
        self, prompt: str, max_new_tokens: int = ..., **options: Unpack[Drawing]
    ) -> str: ...

    @overload
    def generate(
        self, prompt: list[str], max_new_tokens: int = ..., **options: Unpack[Drawing]
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str | list[str],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 0.0,
        stop: str | list[str] | None = None,
        seed: int | None = None,
    ) -> str | list[str]:
        """The continuation of a prompt, or of each prompt of a list; the prompt itself is not repeated.

        Greedy when temperature is 0, else drawn: logits / temperature, then the top_k largest, then the nucleus top_p
        (0 turns either off); `seed` makes the draw repeatable. Ends at the end-of-document token, before a `stop`
        string, after max_new_tokens, or at the model's limit. An empty prompt starts from the end-of-document token.
        Warns   when the model's limit ended a text before max_new_tokens did.
        Raises  ConfigError if an option is out of range, a prompt is too long or holds ids beyond the vocabulary.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        drawing = Drawing(temperature=temperature, top_k=top_k, top_p=top_p, stop=stop, seed=seed)
        done = self.complete(prompts, max_new_tokens, **drawing)
        if any(completion.finish_reason == "context" for completion in done):
            limit = self.config.max_position_embeddings
            warnings.warn(f"a text ended at the model's limit of {limit} tokens", stacklevel=2)
        return done[0].text if isinstance(prompt, str) else [completion.text for completion in done]

    def complete(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int = 64,
        **options: Unpack[Drawing],
    ) -> list[Completion]:
        """As `generate`, for texts or ids, with text, tokens, finish reason and seconds of each."""
        sampling, stop = split_options(options)
        rows = [self.row(prompt, max_new_tokens, stop) for prompt in prompts]
        for start in range(0, len(rows), BATCH_ROWS):
            continue_rows(self.engine, rows[start : start + BATCH_ROWS], sampling.after(start))
        return [row.completion() for row in rows]

    def stream(
        self, prompt: str | Sequence[int], max_new_tokens: int = 64, **options: Unpack[Drawing]
    ) -> Generator[str, None, Completion]:
        """As `generate`, in pieces as they arrive: whole characters, nothing of a stop string.

        The generator's value (`completion = yield from model.stream(...)`) is the Completion.
        """
        sampling, stop = split_options(options)
        return streamed(self.engine, self.row(prompt, max_new_tokens, stop), sampling)

    @overload
    def generate_ids(
        self, ids: Sequence[int], max_new_tokens: int = ..., **options: Unpack[Drawing]
    ) -> list[int]: ...

    @overload
    def generate_ids(
        self, ids: Sequence[Sequence[int]], max_new_tokens: int = ..., **options: Unpack[Drawing]
    ) -> list[list[int]]: ...

    def generate_ids(
        self,
        ids: Sequence[int] | Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        **options: Unpack[Drawing],
    ) -> list[int] | list[list[int]]:
        """As `generate`, from ids to ids: one list, or a list of lists. The end-of-document token is left out."""
        prompts = [ids] if is_one(ids) else ids
        tokens = [
            done.tokens
            for done in self.complete(
                cast(Sequence[Sequence[int]], prompts), max_new_tokens, **options
            )
        ]
        return tokens[0] if is_one(ids) else tokens

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after each token, over the padded vocabulary: T ids -> (T, V) float32.

        Raises  ConfigError if there are no ids, too many, or ids beyond the vocabulary.
        """
        self.require_text(ids)
        return self.engine.logits(ids)

    def logprobs(self, text: str | Sequence[int]) -> Tensor:
        """Log-probability of each token but the first, given those before it: T tokens -> (T - 1,) float32, in nats.

        The softmax is over the padded vocabulary, as in training.
        Raises  ConfigError as `logits`.
        """
        ids = self.encode(text)
        self.require_text(ids)
        return self.engine.logprobs(ids)

    def require_text(self, ids: Sequence[int]) -> None:
        """Raises  ConfigError if the model cannot read these ids at once."""
        limit = self.config.max_position_embeddings
        self.require_ids(ids)
        if not 1 <= len(ids) <= limit:
            raise ConfigError(f"the text has {len(ids)} tokens; the model reads from 1 to {limit}")

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a prompt; ids are returned as they are.

        Raises  ConfigError if text is given and the checkpoint has no tokenizer.
        """
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ConfigError("this checkpoint has no tokenizer; give ids in place of text")
        return self.tokenizer.encode(prompt)

    def decode(self, ids: list[int]) -> str:
        """Text of ids; empty without a tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(ids)

    def row(self, prompt: str | Sequence[int], max_new_tokens: int, stop: list[str]) -> Row:
        """A prompt made ready for the decoding loop."""
        if stop and self.tokenizer is None:
            raise ConfigError("stop strings need a tokenizer, and this checkpoint has none")
        ids = self.encode(prompt)
        if not ids:
            if self.eod_id is None:
                raise ConfigError(
                    "the prompt is empty and the tokenizer has no end-of-document token to start from"
                )
            ids = [self.eod_id]
        self.require_ids(ids)
        return make_row(
            ids,
            max_new_tokens=max_new_tokens,
            limit=self.config.max_position_embeddings,
            eod_id=self.eod_id,
            decode=self.decode,
            stop=stop,
            prompt=prompt if isinstance(prompt, str) else None,
        )

    def require_ids(self, ids: Sequence[int]) -> None:
        """Raises  ConfigError if an id has no row in the embedding."""
        wrong = [i for i in ids if not 0 <= i < self.config.vocab_size]
        if wrong:
            raise ConfigError(
                f"id {wrong[0]} is outside the vocabulary of {self.config.vocab_size} tokens"
            )


def continue_rows(engine: Engine, rows: Sequence[Row], sampling: Sampling) -> None:
    """Continue rows to their ends, by the engine's own greedy search where it has one and nothing else is asked."""
    made = None
    if sampling.temperature == 0 and not any(row.stream.stop for row in rows):
        made = engine.greedy(
            [row.ids for row in rows], [row.budget for row in rows], rows[0].eod_id
        )
    if made is None:
        for _ in decode_rows(engine, rows, sampling):
            pass
        return
    for row, tokens in zip(rows, made, strict=True):
        for token in tokens:
            row.push(token)
        if row.finish_reason is None:
            row.finish("eod")
        row.seconds = time.perf_counter() - row.started


def streamed(engine: Engine, row: Row, sampling: Sampling) -> Generator[str, None, Completion]:
    """Run one row, yielding what is not empty."""
    for (piece,) in decode_rows(engine, [row], sampling):
        if piece:
            yield piece
    return row.completion()


def is_one(ids: Sequence[int] | Sequence[Sequence[int]]) -> bool:
    """Whether these are the ids of one prompt, and not several prompts."""
    return len(ids) == 0 or isinstance(ids[0], int)


def split_options(options: Drawing) -> tuple[Sampling, list[str]]:
    """How tokens are drawn, and the stop strings as a list."""
    stop = options.get("stop")
    numbers = {name: value for name, value in options.items() if name != "stop"}
    return Sampling(**numbers), [stop] if isinstance(stop, str) else list(stop or ())  # type: ignore[arg-type]
