"""Held-out loss by source, summarized as one number in several ways.

A mixture that wins by one of them may lose by another.
"""

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
    """Summarize held-out losses over the sources that have a held-out token.

    loss_sum, tokens  (K,) summed nats and target tokens.
    natural           (K,) weights of the sources in the training data, such as their tokens.
    bytes_per_token   mean UTF-8 bytes of a token, by source, where known.

    Returns  "token_weighted": nats a token over all tokens;
             "natural": mean over the sources weighted by `natural`;
             "mean": unweighted mean over the sources;
             "worst" and "worst_source";
             "perplexity": mean of exp(loss), the measure of the ODM paper (arXiv:2312.02406);
             "bits_per_byte": mean over the sources whose bytes are known;
             "sources": by name {"loss", "tokens", "bits_per_byte" where known}.
    Raises   ConfigError if no source has a token, or a vector has the wrong length.
    """
    sums = np.asarray(loss_sum, np.float64)
    counts = np.asarray(tokens, np.float64)
    if not sums.shape == counts.shape == (len(sources),) or not counts.any():
        raise ConfigError(
            f"scores: expected sums and tokens of {len(sources)} sources, not all 0,"
            f" got {counts.tolist()}"
        )
    present = np.flatnonzero(counts > 0).tolist()
    losses = sums[present] / counts[present]
    by_name: dict[str, dict[str, float]] = {}
    for i, loss in zip(present, losses, strict=True):
        by_name[sources[i]] = {"loss": float(loss), "tokens": int(counts[i])}

    out: dict[str, Any] = {"token_weighted": float(sums.sum() / counts.sum())}
    if natural is not None:
        weights = np.asarray(natural, np.float64)[present]
        if weights.sum() > 0:
            out["natural"] = float(losses @ weights / weights.sum())
    out["mean"] = float(losses.mean())
    out["worst"] = float(losses.max())
    out["worst_source"] = sources[present[int(losses.argmax())]]
    out["perplexity"] = float(np.exp(losses).mean())

    bits: list[float] = []
    for name, entry in by_name.items():
        if bytes_per_token and name in bytes_per_token:
            # Gao et al. 2020 (the Pile), arXiv:2101.00027, section 3.1
            entry["bits_per_byte"] = entry["loss"] / math.log(2) / bytes_per_token[name]
            bits.append(entry["bits_per_byte"])
    if bits:
        out["bits_per_byte"] = float(np.mean(bits))
    return out | {"sources": by_name}
