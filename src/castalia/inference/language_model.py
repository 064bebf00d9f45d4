"""`LanguageModel`: a decoder with its tokenizer, that continues texts and scores them."""

import warnings
from collections.abc import Generator, Sequence
from typing import TypedDict, Unpack, cast, overload

import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.data.tokenizer import Tokenizer
from castalia.inference.decoding import Completion, Row, decode_rows, make_row
from castalia.inference.sampling import Sampling
from castalia.models import Decoder, ModelConfig

BATCH_ROWS = 16
"""Prompts that are continued together; more are split."""

HEAD_ROWS = 256
"""Positions whose logits exist at a time when a text is scored: 256 x 50,304 x 4 bytes is 51 MB."""


class Drawing(TypedDict, total=False):
    """Options of `generate` and its kin besides max_new_tokens; the numbers are those of Sampling."""

    temperature: float
    top_k: int
    top_p: float
    stop: str | list[str] | None
    seed: int | None


class LanguageModel:
    """A decoder in eval mode, the tokenizer it was trained with, and the step of its checkpoint.

    `model` is a Decoder, `config` its ModelConfig, `tokenizer` None for a checkpoint without one (ids still work),
    `step` the number of optimizer steps, None when unknown.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer | None = None, step: int | None = None) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.step = step

    @property
    def config(self) -> ModelConfig:
        """The decoder's config."""
        return self.model.config

    @property
    def eod_id(self) -> int | None:
        """The token that ends a document, or None."""
        return None if self.tokenizer is None else self.tokenizer.eod_id

    @overload
    def generate(self, prompt: str, max_new_tokens: int = ..., **options: Unpack[Drawing]) -> str: ...

    @overload
    def generate(self, prompt: list[str], max_new_tokens: int = ..., **options: Unpack[Drawing]) -> list[str]: ...

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
        self, prompts: Sequence[str | Sequence[int]], max_new_tokens: int = 64, **options: Unpack[Drawing]
    ) -> list[Completion]:
        """As `generate`, for texts or ids, with text, tokens, finish reason and seconds of each."""
        sampling, stop = split_options(options)
        rows = [self.row(prompt, max_new_tokens, stop) for prompt in prompts]
        for start in range(0, len(rows), BATCH_ROWS):
            for _ in decode_rows(self.model, rows[start : start + BATCH_ROWS], sampling.after(start)):
                pass
        return [row.completion() for row in rows]

    def stream(
        self, prompt: str | Sequence[int], max_new_tokens: int = 64, **options: Unpack[Drawing]
    ) -> Generator[str, None, Completion]:
        """As `generate`, in pieces as they arrive: whole characters, nothing of a stop string.

        The generator's value (`completion = yield from model.stream(...)`) is the Completion.
        """
        sampling, stop = split_options(options)
        return streamed(self.model, self.row(prompt, max_new_tokens, stop), sampling)

    @overload
    def generate_ids(self, ids: Sequence[int], max_new_tokens: int = ..., **options: Unpack[Drawing]) -> list[int]: ...

    @overload
    def generate_ids(
        self, ids: Sequence[Sequence[int]], max_new_tokens: int = ..., **options: Unpack[Drawing]
    ) -> list[list[int]]: ...

    def generate_ids(
        self, ids: Sequence[int] | Sequence[Sequence[int]], max_new_tokens: int = 64, **options: Unpack[Drawing]
    ) -> list[int] | list[list[int]]:
        """As `generate`, from ids to ids: one list, or a list of lists. The end-of-document token is left out."""
        prompts = [ids] if is_one(ids) else ids
        tokens = [
            done.tokens for done in self.complete(cast(Sequence[Sequence[int]], prompts), max_new_tokens, **options)
        ]
        return tokens[0] if is_one(ids) else tokens

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after each token, over the padded vocabulary: T ids -> (T, V) float32.

        Raises  ConfigError if there are no ids, too many, or ids beyond the vocabulary.
        """
        out: Tensor = self.model.head(self.hidden(ids)).float()
        return out

    @torch.inference_mode()
    def logprobs(self, text: str | Sequence[int]) -> Tensor:
        """Log-probability of each token but the first, given those before it: T tokens -> (T - 1,) float32, in nats.

        The softmax is over the padded vocabulary, as in training. The logits exist for 256 positions at a time.
        Raises  ConfigError as `logits`.
        """
        ids = self.encode(text)
        hidden = self.hidden(ids)[:-1]
        targets = torch.tensor(ids[1:], device=hidden.device)
        parts = []
        for rows, labels in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
            logits = self.model.head(rows).float()
            parts.append(logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(1))
        return torch.cat(parts)

    def hidden(self, ids: Sequence[int]) -> Tensor:
        """Hidden states (T, C) of T ids."""
        limit = self.config.max_position_embeddings
        self.require_ids(ids)
        if not 1 <= len(ids) <= limit:
            raise ConfigError(f"the text has {len(ids)} tokens; the model reads from 1 to {limit}")
        tokens = torch.tensor([list(ids)], device=self.model.head_weight.device)
        hidden: Tensor = self.model(tokens)[0]
        return hidden

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
                raise ConfigError("the prompt is empty and the tokenizer has no end-of-document token to start from")
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
            raise ConfigError(f"id {wrong[0]} is outside the vocabulary of {self.config.vocab_size} tokens")


def streamed(model: Decoder, row: Row, sampling: Sampling) -> Generator[str, None, Completion]:
    """Run one row, yielding what is not empty."""
    for (piece,) in decode_rows(model, [row], sampling):
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
