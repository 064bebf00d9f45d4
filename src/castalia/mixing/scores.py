"""Held-out loss by source as one number: there are several, and a mixture that wins on one may lose on another."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from castalia.core.errors import ConfigError


def scores(
    sources: Sequence[str],
    loss_sum: ArrayLike,
    tokens: ArrayLike,
    *,
    natural: ArrayLike | None = None,
    bytes_per_token: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Every way to put the sources together, over those that have a held-out token.

    loss_sum, tokens  (K,) summed nats and target tokens.
    natural           (K,) weights of the sources in the training data, such as their tokens.
    bytes_per_token   UTF-8 bytes that a token stands for, by source, where known.

    Returns  "token_weighted": nats a token over all tokens; "natural": over the sources by `natural`; "mean": each
             source the same; "worst" and "worst_source"; "perplexity": the mean of exp(loss), the measure of ODM's
             paper; "bits_per_byte": the mean over the sources whose bytes are known; "sources": by name {"loss",
             "tokens", and where known "bits_per_byte"}.
    Raises   ConfigError if no source has a token, or a vector has the wrong length.
    """
    sums, counts = np.asarray(loss_sum, np.float64), np.asarray(tokens, np.float64)
    if not sums.shape == counts.shape == (len(sources),) or not counts.any():
        raise ConfigError(
            f"scores: expected sums and tokens of {len(sources)} sources, not all 0, got {counts.tolist()}"
        )
    there = np.flatnonzero(counts > 0).tolist()
    losses = sums[there] / counts[there]
    named = {
        sources[i]: {"loss": float(loss), "tokens": int(counts[i])}
        for i, loss in zip(there, losses, strict=True)
    }
    out: dict[str, Any] = {"token_weighted": float(sums.sum() / counts.sum())}
    if natural is not None and (weights := np.asarray(natural, np.float64)[there]).sum() > 0:
        out["natural"] = float(losses @ weights / weights.sum())
    out["mean"] = float(losses.mean())
    out["worst"], out["worst_source"] = float(losses.max()), sources[there[int(losses.argmax())]]
    out["perplexity"] = float(np.exp(losses).mean())
    known = [name for name in named if name in (bytes_per_token or {})]
    for name in known:
        named[name]["bits_per_byte"] = (
            named[name]["loss"] / math.log(2) / (bytes_per_token or {})[name]
        )
    if known:
        out["bits_per_byte"] = float(np.mean([named[name]["bits_per_byte"] for name in known]))
    return out | {"sources": named}
