"""Scores of texts by a reward model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.inference.torch_engine import hidden_of
from castalia.inference.torch_slots import device_of, padded
from castalia.models import Decoder
from castalia.models.model_config import ModelConfig

ROW_TOKENS = 8192
"""Tokens of one pass, padding included."""


def require_score_head(config: ModelConfig) -> None:
    """Raises  ConfigError if a model has no score head."""
    if config.head != "score":
        raise ConfigError(
            "this is a language model, which has no score head; load a reward model: a run of the"
            " recipe reward, or a Hugging Face folder of an architecture ForSequenceClassification"
        )


@torch.inference_mode()
def scores_after_each(model: Decoder, ids: Sequence[int]) -> Tensor:
    """The score of a text as far as each of its tokens, T ids -> (T, 1) float32."""
    return model.scores(hidden_of(model, ids))[:, None]


@torch.inference_mode()
def score_rows(model: Decoder, rows: Sequence[Sequence[int]]) -> list[float]:
    """The score of each row of ids, none of them empty, read at its last token."""
    scores = [0.0] * len(rows)
    # Rows of similar length share a pass; the longest come first, so that memory fails at once.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    at = 0
    while at < len(order):
        count = max(1, ROW_TOKENS // len(rows[order[at]]))
        some = order[at : at + count]
        at += len(some)
        tokens = padded([rows[i] for i in some]).to(device_of(model))
        hidden = model(tokens)
        last = torch.tensor([len(rows[i]) - 1 for i in some], device=tokens.device)
        values = model.scores(hidden[torch.arange(len(some), device=tokens.device), last])
        for i, value in zip(some, values.tolist(), strict=True):
            scores[i] = value
    return scores
