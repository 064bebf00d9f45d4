"""Prompts to ids within bounds: a text that the model cannot read is refused before it is encoded.

The tokenizers library encodes half a megabyte a second, and needs a hundred bytes of memory for
each token.
"""

from collections.abc import Sequence

from castalia.core.errors import ConfigError
from castalia.core.unicode import require_unicode
from castalia.inference.language_model import LanguageModel
from castalia.serve.requests import SamplingBody
from castalia.tokenizers.forms import OtherTokenizer

PIECE = 1 << 14
"""Characters that are encoded at once without a look at the length."""
SEAM = 64
"""Tokens that a piece may have more than its part of the whole text: those at its two ends."""
MOST_COUNTED = 1 << 16
"""Tokens that /tokenize lists where the model reads fewer; other texts are split by the client."""
FEW = 8
"""Characters of a token, below which no tokenizer's longest token is taken to be."""


def prompt_ids(
    model: LanguageModel, prompt: str | list[int], body: SamplingBody, echo: bool
) -> tuple[list[int], str]:
    """The ids of a prompt, cut to `truncate_prompt_tokens`, and its text for `echo`, else "".

    Raises  ConfigError if the tokenizer would have to add special tokens, or the model cannot read
            as many.
    """
    require_no_added(model, body.add_special_tokens)
    limit = model.config.max_position_embeddings
    most = body.truncate_prompt_tokens
    from_end = body.truncation_side != "right"
    if most is None or most > limit:
        ids = all_ids(model, prompt, limit)
        is_cut = False
    else:
        ids, is_cut = some_ids(model, prompt, most, from_end=from_end)
    if not echo:
        return ids, ""
    # A whole prompt is echoed as it was sent: a tokenizer may rewrite a text.
    if isinstance(prompt, str) and not is_cut:
        return ids, prompt
    return ids, decoded(model, ids)


def all_ids(model: LanguageModel, prompt: str | list[int], limit: int) -> list[int]:
    """All ids of a prompt.

    Raises  ConfigError if there are more than `limit`, at the latest when they are.
    """
    if isinstance(prompt, str):
        return bounded_ids(model, prompt, limit, "the prompt", too_many_for_model(limit))
    if len(prompt) > limit:
        raise ConfigError(f"the prompt has {len(prompt)} tokens{too_many_for_model(limit)}")
    return model.encode(prompt)


def too_many_for_model(limit: int) -> str:
    """The end of the sentence about a prompt."""
    return f" but the model reads at most {limit}, new ones included; shorten it"


def some_ids(
    model: LanguageModel, prompt: str | list[int], most: int, *, from_end: bool
) -> tuple[list[int], bool]:
    """The first or last `most` ids of a prompt, and whether it has more.

    A long text is read from that end, as far as it takes.
    """
    ids: Sequence[int] = prompt if not isinstance(prompt, str) else ()
    is_part = False
    if isinstance(prompt, str):
        width = max(PIECE, FEW * most)
        while True:
            part = prompt[-width:] if from_end else prompt[:width]
            is_part = len(part) < len(prompt)
            ids = encoded(model, part)
            # What lies behind the cut may change the tokens beside it.
            if not is_part or len(ids) >= most + SEAM:
                break
            width *= 4
    is_cut = is_part or len(ids) > most
    kept = ids[-most:] if from_end else ids[:most]
    return list(kept), is_cut


def bounded_ids(model: LanguageModel, text: str, most: int, what: str, why: str) -> list[int]:
    """The ids of a text of about `most` tokens or fewer; a short text may have more.

    Raises  ConfigError beginning with `what` and ending with `why` if it must have more.
    """
    if len(text) > PIECE and model.tokenizer is not None:
        widest = max(FEW, model.tokenizer.longest)
        if len(text) > max(PIECE, most * widest):
            raise ConfigError(f"{what} has {len(text):,} characters, over {most:,} tokens{why}")
        least = 0
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            least += max(0, len(encoded(model, piece)) - SEAM)
            if least > most:
                raise ConfigError(f"{what} has more than {most:,} tokens{why}")
    return encoded(model, text)


def encoded(model: LanguageModel, text: str) -> list[int]:
    """The ids of a text, while other threads run if it is long."""
    if len(text) < PIECE // 8 or model.tokenizer is None:
        return model.encode(text)
    require_unicode(text, "the prompt")
    # Of the library's two ways this one lets other threads run.
    return model.tokenizer.encode_batch([text])[0]


def decoded(model: LanguageModel, ids: list[int]) -> str:
    """The text of ids, while other threads run if there are many."""
    tokenizer = model.tokenizer
    if len(ids) < PIECE // 8 or tokenizer is None or isinstance(tokenizer, OtherTokenizer):
        return model.decode(ids)
    text: str = tokenizer.inner.decode_batch([ids], skip_special_tokens=False)[0]
    return text


def require_no_added(model: LanguageModel, add_special_tokens: bool | None) -> None:
    """Raises  ConfigError if `add_special_tokens` asks for tokens that no tokenizer here adds."""
    tokenizer = model.tokenizer
    if not add_special_tokens or tokenizer is None or isinstance(tokenizer, OtherTokenizer):
        return
    if tokenizer.inner.num_special_tokens_to_add(False):
        raise ConfigError(
            "add_special_tokens: not supported by this server; write the special tokens into the"
            " prompt"
        )


def listed_ids(model: LanguageModel, text: str) -> bytes:
    """The answer of /tokenize, in JSON.

    Raises  ConfigError if the text has more tokens than are listed.
    """
    limit = model.config.max_position_embeddings
    most = max(limit, MOST_COUNTED)
    ids = bounded_ids(model, text, most, "the text", "; split it")
    listed = ",".join(map(str, ids))
    answer = f'{{"tokens":[{listed}],"count":{len(ids)},"max_model_len":{limit}}}'
    return answer.encode()
