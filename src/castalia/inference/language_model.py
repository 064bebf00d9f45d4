"""`LanguageModel`: an engine with its tokenizer, which generates and scores text."""

import time
import warnings
from collections.abc import Generator, Iterable, Sequence
from functools import cached_property
from typing import Any, Unpack, cast, overload

from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.core.unicode import require_unicode
from castalia.inference.beams import Search
from castalia.inference.continuing import decode_texts, search_texts
from castalia.inference.decoding import Completion, Continuation, Ending, begin
from castalia.inference.engine import Engine
from castalia.inference.grammar import Grammars
from castalia.inference.options import Drawing, Options
from castalia.inference.options import split as split_options
from castalia.inference.rewards import require_score_head, score_rows
from castalia.inference.sampling import Sampling
from castalia.inference.torch_engine import TorchEngine
from castalia.models import Decoder, ModelConfig
from castalia.tokenizers.forms import OtherTokenizer
from castalia.tokenizers.special_ids import SpecialIds
from castalia.tokenizers.token_texts import TokenTexts
from castalia.tokenizers.tokenizer import Tokenizer

BATCH_ROWS = 16
"""Prompts that are continued together; more are split. The KV cache grows with it."""


class LanguageModel:
    """An engine, the tokenizer that its model was trained with, and the step of its checkpoint.

    `engine` computes; a Decoder stands for engine=torch. `config` is the ModelConfig. `tokenizer`
    is None for a checkpoint without one, which reads and writes ids alone. `step` counts optimizer
    steps; None if it is unknown. `special` are the ids that begin and end a text, by default the
    tokenizer's end-of-document token.
    """

    def __init__(
        self,
        engine: Engine | Decoder,
        tokenizer: Tokenizer | None = None,
        step: int | None = None,
        special: SpecialIds | None = None,
    ) -> None:
        self.engine = engine if isinstance(engine, Engine) else TorchEngine(engine)
        self.tokenizer = tokenizer
        self.step = step
        self.special = SpecialIds.of_tokenizer(tokenizer) if special is None else special
        self.quality: dict[str, Any] | None = None
        """For an export, the fields of `Quality`, if it was measured."""
        self.by_default = False
        """Whether `load` chose engine and dtype itself, in place of an option."""

    def __repr__(self) -> str:
        ids = f"{self.tokenizer.vocab_size:,} ids" if self.tokenizer else "no tokenizer"
        return f"LanguageModel({self.engine!r}, step {self.step}, {ids})"

    @property
    def config(self) -> ModelConfig:
        """The decoder's config."""
        return self.engine.config

    @property
    def model(self) -> Decoder:
        """The Decoder itself.

        Raises  ConfigError if the engine is not torch.
        """
        if not isinstance(self.engine, TorchEngine):
            raise ConfigError(
                f"engine={self.engine.name} has no torch model; load with engine='torch'"
            )
        return self.engine.model

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return self.special.end_ids

    @property
    def eod_id(self) -> int | None:
        """The first of the tokens that end a text, or None."""
        return self.end_ids[0] if self.end_ids else None

    @property
    def start_id(self) -> int | None:
        """The token that an empty prompt starts from, or None."""
        return self.special.start_id

    def token_name(self, token: int | None) -> str | None:
        """A token as its tokenizer spells it; None without a tokenizer."""
        if token is None or self.token_texts is None:
            return None
        return self.token_texts.name_of(token)

    @cached_property
    def token_texts(self) -> TokenTexts | None:
        """The bytes of each token; None without a tokenizer."""
        return None if self.tokenizer is None else TokenTexts(self.tokenizer)

    @overload
    def generate(
        self, prompt: str, max_new_tokens: int = ..., **options: Unpack[Drawing]
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: str,
        max_new_tokens: int = ...,
        *,
        num_return_sequences: int,
        **options: Unpack[Drawing],
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        prompt: list[str],
        max_new_tokens: int = ...,
        *,
        num_return_sequences: int = ...,
        **options: Unpack[Drawing],
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str | list[str],
        max_new_tokens: int = 64,
        *,
        num_return_sequences: int | None = None,
        **options: Unpack[Drawing],
    ) -> str | list[str]:
        """The continuation of a prompt, or of each prompt of a list, without the prompt itself.

        `options` are those of `Drawing`. Greedy if temperature is 0. Else a token is drawn: the
        logits are divided by the temperature, cut to the top_k largest, to the nucleus top_p, to
        the tokens that min_p leaves, then to the typical ones (0 turns each off); `seed` makes the
        draws repeatable. num_beams above 1 is a beam search. A continuation ends at a token of
        `end_ids`, before a `stop` string, after max_new_tokens, or at the model's limit. An empty
        prompt starts from `start_id`. With num_return_sequences, every prompt gets as many texts,
        drawn or the best of the beams, and the result is a list in which those of a prompt follow
        one another.
        Warns   if the model's limit ended a text before max_new_tokens did.
        Raises  ConfigError if an option is out of range, a prompt is too long or has ids beyond
                the vocabulary.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        count = 1 if num_return_sequences is None else num_return_sequences
        done = self.complete(prompts, max_new_tokens, num_return_sequences=count, **options)
        if any(completion.finish_reason == "context" for completion in done):
            limit = self.config.max_position_embeddings
            warnings.warn(f"a text ended at the model's limit of {limit} tokens", stacklevel=2)
        texts = [completion.text for completion in done]
        return texts[0] if isinstance(prompt, str) and num_return_sequences is None else texts

    def complete(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int = 64,
        *,
        num_return_sequences: int = 1,
        **options: Unpack[Drawing],
    ) -> list[Completion]:
        """As `generate`, for texts or ids: text, tokens, finish reason, seconds, score of each."""
        sampling, ending, search = self.split_options(options, num_return_sequences)
        # All prompts are checked before the first one is read.
        texts = [self.continuation(prompt, max_new_tokens, ending) for prompt in prompts]
        if search.num_beams > 1:
            return self.searched(texts, sampling, search)
        texts = [text.fork() for text in texts for _ in range(num_return_sequences)]
        for start in range(0, len(texts), BATCH_ROWS):
            batch = texts[start : start + BATCH_ROWS]
            continue_texts(self.engine, batch, sampling.after(start))
        return [text.completion() for text in texts]

    def searched(
        self, texts: Sequence[Continuation], sampling: Sampling, search: Search
    ) -> list[Completion]:
        """The best texts of each prompt by a beam search."""
        done = []
        together = max(1, BATCH_ROWS // search.num_beams)
        for start in range(0, len(texts), together):
            batch = texts[start : start + together]
            done += search_texts(self.engine, batch, sampling.after(start), search)
        return done

    def stream(
        self, prompt: str | Sequence[int], max_new_tokens: int = 64, **options: Unpack[Drawing]
    ) -> Generator[str, None, Completion]:
        """As `generate`, in pieces as they arrive: whole characters, no part of a stop string.

        The generator's value (`completion = yield from model.stream(...)`) is the Completion.
        Raises  ConfigError as `generate`, and for a beam search.
        """
        # Checked here, not when the first piece is asked for.
        sampling, ending, search = self.split_options(options)
        if search.num_beams > 1:
            raise ConfigError(
                f"num_beams={search.num_beams} cannot be streamed: a beam search knows its text"
                " only at the end; use complete"
            )
        return streamed(self.engine, self.continuation(prompt, max_new_tokens, ending), sampling)

    @overload
    def generate_ids(
        self, ids: Sequence[int], max_new_tokens: int = ..., **options: Unpack[Drawing]
    ) -> list[int]: ...

    @overload
    def generate_ids(
        self,
        ids: Sequence[int],
        max_new_tokens: int = ...,
        *,
        num_return_sequences: int,
        **options: Unpack[Drawing],
    ) -> list[list[int]]: ...

    @overload
    def generate_ids(
        self,
        ids: Sequence[Sequence[int]],
        max_new_tokens: int = ...,
        *,
        num_return_sequences: int = ...,
        **options: Unpack[Drawing],
    ) -> list[list[int]]: ...

    def generate_ids(
        self,
        ids: Sequence[int] | Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        *,
        num_return_sequences: int | None = None,
        **options: Unpack[Drawing],
    ) -> list[int] | list[list[int]]:
        """As `generate`, from ids to ids, one list or a list of lists.

        The token that ends a text is not returned.
        """
        one = is_one(ids)
        prompts = cast(Sequence[Sequence[int]], [ids] if one else ids)
        count = 1 if num_return_sequences is None else num_return_sequences
        done = self.complete(prompts, max_new_tokens, num_return_sequences=count, **options)
        made = [completion.tokens for completion in done]
        return made[0] if one and num_return_sequences is None else made

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after each token, over the padded vocabulary: T ids -> (T, V) float32.

        Raises  ConfigError if there are no ids, too many, or ids beyond the vocabulary.
        """
        self.require_text(ids)
        return self.engine.logits(ids)

    def logprobs(self, text: str | Sequence[int]) -> Tensor:
        """Log-probability of each token but the first, given those before it, in nats.

        Shapes  T tokens -> (T - 1,) float32.
        The softmax is over the padded vocabulary, as in training.
        Raises  ConfigError as `logits`.
        """
        ids = self.encode(text)
        self.require_text(ids)
        return self.engine.logprobs(ids)

    def scores(
        self, texts: str | Sequence[str | Sequence[int]], *, end: bool = True
    ) -> list[float]:
        """What a reward model gives each text, read at the text's last token.

        Ids are read as they are. `end` adds the first of `end_ids` to a text that does not end with
        one of them, as texts of training end.
        Raises  ConfigError for a model without a score head, and as `logits`.
        """
        require_score_head(self.config)
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            ids = self.encode(text)
            is_open = not ids or ids[-1] not in self.end_ids
            if end and isinstance(text, str) and self.end_ids and is_open:
                ids = [*ids, self.end_ids[0]]
            self.require_text(ids)
            rows.append(ids)
        return score_rows(self.model, rows)

    def require_text(self, ids: Sequence[int]) -> None:
        """Raises  ConfigError if the model cannot read these ids at once."""
        limit = self.config.max_position_embeddings
        self.require_ids(ids)
        if not 1 <= len(ids) <= limit:
            raise ConfigError(f"the text has {len(ids)} tokens; the model reads from 1 to {limit}")

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a prompt; ids are returned unchanged.

        Raises  ConfigError for text if the checkpoint has no tokenizer, and for text that is not
                valid Unicode.
        """
        if not isinstance(prompt, str):
            return list(prompt)
        require_unicode(prompt, "the prompt")
        if self.tokenizer is None:
            raise ConfigError("this checkpoint has no tokenizer; give ids in place of text")
        return self.tokenizer.encode(prompt)

    def decode(self, ids: list[int]) -> str:
        """Text of ids; empty without a tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(ids)

    def decode_plain(self, ids: list[int]) -> str:
        """Text of ids without the names of special tokens."""
        return self.decode([i for i in ids if i not in self.named_ids])

    @cached_property
    def named_ids(self) -> frozenset[int]:
        """The ids of special tokens, whose text is a name."""
        if self.tokenizer is None or isinstance(self.tokenizer, OtherTokenizer):
            return frozenset(self.end_ids)
        added = self.tokenizer.inner.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    @cached_property
    def grammars(self) -> Grammars:
        """Compiles forms of texts for this model: a JSON schema, a choice, a regular expression.

        Raises  ConfigError if llguidance is not installed, or the tokenizer does not suit it.
        """
        return Grammars(self.tokenizer, self.config.vocab_size, self.end_ids)

    def split_options(self, options: Drawing, num_return_sequences: int = 1) -> Options:
        """How tokens are drawn, what ends a text, and how many texts a prompt gets.

        Raises  ConfigError if an option is out of range or two contradict each other.
        """
        split = split_options(options, num_return_sequences)
        self.require_ids(split.sampling.logit_bias, "logit_bias: id")
        self.require_ids(split.sampling.allowed_token_ids or (), "allowed_token_ids: id")
        self.require_ids(split.ending.stop_token_ids, "stop_token_ids: id")
        return split

    def continuation(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int,
        ending: Ending = Ending(),
        *,
        scoring: bool = False,
    ) -> Continuation:
        """A prompt, checked and encoded, ready for the decoding loop.

        `scoring` reads the prompt alone, which may then fill the model's whole limit.
        """
        if ending.stop and self.tokenizer is None:
            raise ConfigError("stop strings need a tokenizer, and this checkpoint has none")
        for text in ending.stop:
            require_unicode(text, "a stop string")
        ids = self.encode(prompt)
        if not ids:
            if self.start_id is None:
                raise ConfigError(
                    "the prompt is empty, and the tokenizer has no end-of-document token to start"
                    " from; give a prompt"
                )
            ids = [self.start_id]
        self.require_ids(ids)
        return begin(
            ids,
            max_new_tokens=max_new_tokens,
            limit=self.config.max_position_embeddings,
            special=self.special,
            decode=self.decode_plain if ending.skip_special else self.decode,
            ending=ending,
            scoring=scoring,
            prompt=prompt if isinstance(prompt, str) else None,
        )

    def require_ids(self, ids: Iterable[int], what: str = "id") -> None:
        """Raises  ConfigError if an id has no row in the embedding."""
        for i in ids:
            if not 0 <= i < self.config.vocab_size:
                raise ConfigError(
                    f"{what} {i} is outside the vocabulary of {self.config.vocab_size} tokens"
                )


def continue_texts(engine: Engine, texts: Sequence[Continuation], sampling: Sampling) -> None:
    """Continue texts to their ends, by the engine's own greedy search where that is enough.

    Such a search knows neither penalties nor stop strings: after a stop string it could only be
    cut, at the cost of the tokens after it.
    """
    continued = None
    if sampling.temperature == 0 and not sampling.steers and all(map(is_plain, texts)):
        prompts = [text.ids for text in texts]
        budgets = [text.budget for text in texts]
        continued = engine.greedy(prompts, budgets, list(texts[0].ends))
    if continued is None:
        for _ in decode_texts(engine, texts, sampling):
            pass
        return
    for text, tokens in zip(texts, continued, strict=True):
        for token in tokens:
            text.push(token)
        # The search does not return the token that ended a text below its budget.
        if text.finish_reason is None:
            text.finish("eod")
        text.seconds = time.perf_counter() - text.started


def streamed(
    engine: Engine, text: Continuation, sampling: Sampling
) -> Generator[str, None, Completion]:
    """Continue one text, yielding the pieces that are not empty."""
    for (piece,) in decode_texts(engine, [text], sampling):
        if piece:
            yield piece
    return text.completion()


def is_one(ids: Sequence[int] | Sequence[Sequence[int]]) -> bool:
    """Whether these are the ids of one prompt, as opposed to several prompts."""
    return len(ids) == 0 or isinstance(ids[0], int)


def is_plain(text: Continuation) -> bool:
    """Whether end-of-document tokens alone can end a text below its budget."""
    by_document = bool(text.ends) and set(text.ends.values()) == {"eod"}
    return by_document and not text.stream.stop and not text.min_tokens
