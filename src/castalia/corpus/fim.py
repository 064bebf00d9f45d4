"""Fill-in-the-middle: documents cut in three with the middle moved to the end.

Models learn to fill gaps from them.
Source  Bavarian et al. 2022, arXiv:2207.14255: documents cut at two characters, before tokenization
        (section 3), in the orders PSM and SPM; the latter is their variant 2 (appendix D), as in
        Megatron's FIM data set.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from castalia.corpus.encoding import Encoded, Encoder, split_ids
from castalia.corpus.forms import TextForm
from castalia.data.fim import DRAW_LIMIT, Sentinels, draws_of, parts_of, sentinels_of
from castalia.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class FimOptions:
    """How documents are transformed. Cuts depend on the text, `seed` and `epoch`."""

    rate: float = 0.5
    """Share of documents that are cut."""
    spm_rate: float = 0.5
    """Share of those in the order suffix, prefix, middle."""
    tokens: tuple[str, ...] | None = None
    """Names or ids of the tokens before prefix, middle and suffix; None looks for known names."""
    seed: int = 0
    epoch: int = 0
    """Gives the same corpus other cuts for another pass over it."""

    def problems(self) -> list[str]:
        """Sentences about invalid options."""
        rates = {"--fim-rate": self.rate, "--spm-rate": self.spm_rate}
        problems = [
            f"{name} {rate}: expected a share from 0 to 1"
            for name, rate in rates.items()
            if not 0 <= rate <= 1
        ]
        if self.tokens is not None and len(set(self.tokens)) != 3:
            problems.append(
                f"--fim-tokens {','.join(self.tokens)}: expected PREFIX,MIDDLE,SUFFIX, three"
                " different tokens"
            )
        return problems


@dataclass(frozen=True)
class FimForm(TextForm):
    """Documents of which a share is transformed.

    See castalia.data.fim for the orders.
    """

    options: FimOptions
    sentinels: Sentinels

    @property
    def facts(self) -> dict[str, Any]:
        """Facts for PREFIX.json."""
        return {"fim": {**asdict(self.options), "tokens": list(self.sentinels)}}

    def encode(self, encoder: Encoder, texts: Sequence[bytes]) -> list[Encoded]:
        """Ids of the texts, transformed where their draw says so; empty texts stay empty."""
        cuts = [self.cut(text) for text in texts]
        # One call for all pieces: the encoder is fastest on many texts at once.
        ids, sizes = encoder([piece for cut in cuts for piece in cut])
        pieces = iter(split_ids(ids, sizes))
        documents = [
            self.transformed([next(pieces) for _ in cut], text)
            for cut, text in zip(cuts, texts, strict=True)
        ]
        lengths = np.array([len(document) for document in documents], np.int64)
        return [(np.concatenate([np.empty(0, ids.dtype), *documents]), lengths)]

    def cut(self, text: bytes) -> list[bytes]:
        """Prefix, middle and suffix of a text to transform; else the text alone."""
        chosen, _, first, second = draws(text, self.options)
        if not text or chosen >= int(self.options.rate * DRAW_LIMIT):
            return [text]
        pieces = parts_of(text.decode("utf-8"), (first, second))
        return [piece.encode("utf-8") for piece in pieces]

    def transformed(self, pieces: list[Any], text: bytes) -> Any:
        """The ids of a document from those of its pieces."""
        if len(pieces) == 1:
            return pieces[0]
        spm = draws(text, self.options)[1] < int(self.options.spm_rate * DRAW_LIMIT)
        return np.concatenate(self.sentinels.arranged(pieces, spm=spm)).astype(pieces[0].dtype)


def draws(text: bytes, options: FimOptions) -> tuple[int, int, int, int]:
    """Four integers below DRAW_LIMIT: whether to transform, in which order, and the two cuts.

    They depend on text, seed and epoch alone, so a document is cut alike in any part of any job.
    """
    return draws_of(f"{options.seed} {options.epoch} ".encode() + text)


def make_fim(options: FimOptions, tokenizer: Tokenizer) -> FimForm:
    """The form, with the ids of the three tokens.

    Raises  ConfigError if the tokenizer lacks them.
    """
    return FimForm(options, sentinels_of(tokenizer, options.tokens, "--fim-tokens"))
