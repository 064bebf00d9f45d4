"""What becomes of the documents of a job: which token files, and how texts turn into what these hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from castalia.corpus.documents import Wanted
from castalia.corpus.encoding import Encoded, Encoder
from castalia.data.indexed import best_dtype
from castalia.data.tokenizer import Tokenizer

TOKENS, LABELS, REWARDS = "tokens", "labels", "rewards"


class Output(NamedTuple):
    """One token file of a job: the number of its key, what it holds, and as which dtype."""

    key: int
    kind: str
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Texts:
    """Texts as they are: their ids. The other forms build on this one; all pickle, and their repr tells two apart."""

    @property
    def named(self) -> bool:
        """Whether even a single key stands in the names of the outputs."""
        return False

    @property
    def facts(self) -> dict[str, Any]:
        """What PREFIX.json says about the form."""
        return {}

    def kinds(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """What is written for each key, the tokens first, and its dtype."""
        return {TOKENS: best_dtype(tokenizer.vocab_size)}

    def outputs(self, keys: Sequence[str], tokenizer: Tokenizer) -> list[Output]:
        """All token files of a job."""
        kinds = self.kinds(tokenizer)
        return [Output(i, kind, dtype) for i in range(len(keys)) for kind, dtype in kinds.items()]

    def wanted(
        self, keys: Sequence[str], keep: Sequence[str], mend: Callable[[str], str] | None
    ) -> Wanted:
        """What to take of each document."""
        return Wanted(tuple(keys), tuple(keep), mend)

    def encode(self, encoder: Encoder, texts: Sequence[bytes]) -> list[Encoded]:
        """What goes into each output of a key, in the order of `kinds`; a text without a token is left out of all."""
        return [encoder(texts)]
