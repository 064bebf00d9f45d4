"""Forms: how the documents of a job become ids, and which token files hold them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from castalia.corpus.documents import WantedFields
from castalia.corpus.encoding import Encoded, Encoder
from castalia.data.indexed import best_dtype
from castalia.tokenizers.tokenizer import Tokenizer

TOKENS = "tokens"
LABELS = "labels"
REWARDS = "rewards"
WEIGHTS = "weights"


class Output(NamedTuple):
    """One token file of a job."""

    key: int
    """Number of the key whose documents it holds."""
    kind: str
    """TOKENS, LABELS, WEIGHTS or REWARDS."""
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class TextForm:
    """Texts as they are. The other forms derive from this one.

    A form must pickle, for workers, and its repr must contain every setting: it is part of each
    part's identity.
    """

    @property
    def always_names_key(self) -> bool:
        """Whether the key is part of the output's name even if there is only one."""
        return False

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about the form for PREFIX.json."""
        return {}

    @property
    def moment(self) -> str | None:
        """The time that the texts depend on, in ISO 8601; None if on none."""
        return None

    def kinds(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The kinds of outputs for each key, tokens first, with their dtypes."""
        return {TOKENS: best_dtype(tokenizer.vocab_size)}

    def outputs(self, keys: Sequence[str], tokenizer: Tokenizer) -> list[Output]:
        """All token files of a job."""
        kinds = self.kinds(tokenizer)
        return [Output(i, kind, dtype) for i in range(len(keys)) for kind, dtype in kinds.items()]

    def wanted(
        self, keys: Sequence[str], keep: Sequence[str], mend: Callable[[str], str] | None
    ) -> WantedFields:
        """The fields to take of each document."""
        return WantedFields(tuple(keys), tuple(keep), mend)

    def encode(self, encoder: Encoder, texts: Sequence[bytes]) -> list[Encoded]:
        """The ids for each output of a key, in the order of `kinds`.

        A text without a token has size 0 in all of them.
        """
        return [encoder(texts)]
