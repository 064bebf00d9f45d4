"""Text to ids and back as the harness's `hf` model does it, with Castalia's tokenizers.

What differs from `LanguageModel.encode`, which adds no token: the tokenizer's own template may put
a token before the text, as LLaMA's does; a text that already begins with it gets no second one.

Source  lm-eval 0.4.13, models/huggingface.py: tok_encode, prefix_token_id, eot_token_id; and
        api/model.py: _encode_pair, loglikelihood.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from castalia.core.errors import ConfigError
from castalia.inference import LanguageModel
from castalia.tokenizers.forms import OtherTokenizer
from castalia.tokenizers.settings import read_settings, special_tokens
from castalia.tokenizers.tokenizer import Tokenizer

Ids = tuple[int, ...]


class Pair(NamedTuple):
    """The ids of a context and of the continuation that is scored after it."""

    context: Ids
    continuation: Ids


class TextEncoder:
    """The tokenizer of a model, with the rules of the harness.

    `eot_id` ends a text and is None without such a token; `prefix_id` stands before a text without
    a context. Results are kept in `pairs` and `texts`, which may be shared by every checkpoint
    whose `key` is equal.

    Raises  ConfigError if the checkpoint has no tokenizer, or its tokenizer no token to start from.
    """

    def __init__(self, model: LanguageModel) -> None:
        if model.tokenizer is None:
            raise ConfigError(
                "this checkpoint has no tokenizer, and tasks are text; import it again with"
                " --tokenizer FILE, or put a tokenizer.json beside its config"
            )
        self.tokenizer: Tokenizer = model.tokenizer
        where = Path(self.tokenizer.where)
        self.folder = where.parent if where.is_file() else None
        named = special_tokens(self.folder)
        self.bos = self.tokenizer.ids.get(named.get("bos_token", ""))
        self.eot_id = self.tokenizer.ids.get(named.get("eos_token", ""), model.eod_id)
        # A folder that names its end but no beginning starts a text from the end, as in
        # transformers; a folder that names neither from what the model's files say.
        if self.bos is None and "eos_token" not in named:
            self.bos = model.start_id
        if self.bos is None:
            prefix = self.eot_id
        else:
            prefix = self.bos
        if prefix is None:
            raise ConfigError(
                f"{self.tokenizer.where} names no token that begins or ends a text, and a text"
                " without context is scored after one; name eos_token in tokenizer_config.json"
            )
        self.prefix_id: int = prefix
        self.prefix_text = self.tokenizer.decode([prefix])
        self.template = own_template(self.tokenizer, self.folder, named)
        self.pairs: dict[tuple[str, str], Pair] = {}
        self.texts: dict[str, Ids] = {}

    @property
    def key(self) -> str:
        """SHA-256 of everything that the ids of a text depend on."""
        parts = [self.tokenizer.sha256, self.prefix_id, repr(self.template)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def share(self, other: "TextEncoder") -> None:
        """Use the results of an encoder with an equal `key`."""
        self.pairs = other.pairs
        self.texts = other.texts

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, with the tokens that the tokenizer puts around it."""
        new = [text for text in dict.fromkeys(texts) if text not in self.texts]
        self.texts.update(self.ids_of(new))
        return [self.texts[text] for text in texts]

    def ids_of(self, texts: Iterable[str]) -> dict[str, Ids]:
        """As `encode`, by text, without a look at what is known."""
        # All texts at once: the tokenizers library then uses several cores.
        listed = list(dict.fromkeys(texts))
        encoded = dict(zip(listed, self.plain(listed), strict=True))
        if self.template is None:
            return encoded
        before, after = self.template
        for text, ids in encoded.items():
            if not self.begins(text):
                encoded[text] = (*before, *ids, *after)
        return encoded

    def begins(self, text: str) -> bool:
        """Whether a text begins with the token before a text."""
        return text.startswith(self.prefix_text)

    def plain(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text without tokens around it."""
        return [tuple(ids) for ids in self.tokenizer.encode_batch(list(texts))]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Pair]:
        """The ids of each (context, continuation).

        Spaces at the end of a context belong to the continuation, where they are a part of its
        first token. The ids of both together are cut behind those of the context: tokens at the
        border may differ from those of the continuation by itself.
        Raises  ConfigError if a continuation has no token of its own.
        """
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.pairs]
        moved = {pair: with_spaces(*pair) for pair in new if pair[0]}
        # Not kept in `texts`: whole prompts are long, come once, and their ids are in `pairs`.
        wanted = [context for context, _ in moved.values()]
        wanted += [context + continuation for context, continuation in moved.values()]
        ids_of = self.ids_of(wanted)
        bare = [pair for pair in new if not pair[0]]
        for pair, ids in zip(bare, self.plain([text for _, text in bare]), strict=True):
            self.pairs[pair] = after_prefix(ids, self.prefix_id)
        for pair, (context, continuation) in moved.items():
            before = ids_of[context]
            self.pairs[pair] = Pair(before, ids_of[context + continuation][len(before) :])
        for pair in new:
            if not self.pairs[pair].context or not self.pairs[pair].continuation:
                self.refuse(pair)
        return [self.pairs[pair] for pair in pairs]

    def refuse(self, pair: tuple[str, str]) -> None:
        """Raises  ConfigError for a pair of which one half has no token."""
        del self.pairs[pair]
        context, continuation = pair
        raise ConfigError(
            f"a task asks for the likelihood of {continuation[:60]!r} after {context[-60:]!r}, and"
            " one of them has no token of its own: check doc_to_text, doc_to_target and"
            " doc_to_choice of the task for empty texts"
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids by themselves, without the names of special tokens."""
        if isinstance(self.tokenizer, OtherTokenizer):
            return self.tokenizer.decode([i for i in ids if i != self.eot_id])
        text: str = self.tokenizer.inner.decode(list(ids), skip_special_tokens=True)
        return text


def with_spaces(context: str, continuation: str) -> tuple[str, str]:
    """A pair after the spaces at the end of the context moved to the continuation."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def after_prefix(ids: Ids, prefix: int) -> Pair:
    """A text without context, scored after the prefix: after its own, if it begins with it."""
    if ids[:1] == (prefix,):
        return Pair(ids[:1], ids[1:])
    return Pair((prefix,), ids)


def own_template(
    tokenizer: Tokenizer, folder: Path | None, named: dict[str, str]
) -> tuple[Ids, Ids] | None:
    """Ids that the tokenizer puts before and after every text; None if there are none.

    The settings beside a tokenizer.json win over its post-processor, as in transformers.
    Source  transformers 5.23, tokenization_utils_tokenizers.py: update_post_processor.
    """
    if isinstance(tokenizer, OtherTokenizer):
        return None
    settings = read_settings(folder)
    if "add_bos_token" in settings or "add_eos_token" in settings:
        ends = []
        for side in ("bos", "eos"):
            token = tokenizer.ids.get(named.get(f"{side}_token", ""))
            wanted = bool(settings.get(f"add_{side}_token")) and token is not None
            ends.append((token,) if wanted and token is not None else ())
        before, after = ends
        if before or after:
            return (before, after)
        return None
    if not tokenizer.inner.num_special_tokens_to_add(False):
        return None
    bare = tokenizer.inner.encode("a", add_special_tokens=False).ids
    whole = tokenizer.inner.encode("a", add_special_tokens=True).ids
    starts = range(len(whole) - len(bare) + 1)
    start = next(i for i in starts if whole[i : i + len(bare)] == bare)
    return tuple(whole[:start]), tuple(whole[start + len(bare) :])
