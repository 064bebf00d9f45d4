"""The losses of a reference model by source, which DoReMi's mixer measures a run against.

Source  Xie et al. 2023, arXiv:2305.10429: a small model is trained on the prior mixture, and a proxy is then trained
        with more of the sources whose loss is far above that model's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from castalia.core.errors import DataError
from castalia.core.files import write_json
from castalia.data import DataConfig, IndexedDataset
from castalia.data.rows_by_source import SourcePack, rows_by_source
from castalia.data.run_rows import source_names
from castalia.inference import load
from castalia.mixing import scores
from castalia.models import Decoder
from castalia.models.cross_entropy import fused_cross_entropy


def write_reference(
    path: str | Path, checkpoint: str | Path, prefixes: Sequence[str], **options: Any
) -> dict[str, Any]:
    """Write what mixing.reference=FILE reads: {"checkpoint", "losses": {source: nats a token}}; returns the scores."""
    found = reference_losses(checkpoint, prefixes, **options)
    losses = {name: entry["loss"] for name, entry in found["sources"].items()}
    write_json(path, {"checkpoint": str(checkpoint), "losses": losses})
    return found


def reference_losses(
    checkpoint: str | Path,
    prefixes: Sequence[str],
    *,
    seq_length: int,
    rows: int | None = 256,
    batch: int = 16,
    seed: int = 1234,
) -> dict[str, Any]:
    """Nats a token of a checkpoint on each source: `castalia.mixing.scores` of rows of the token files.

    checkpoint  a run's folder, which means its newest checkpoint, or one checkpoint, as `castalia.load` takes it.
    prefixes    token files, one a source; a source has the name that training gives it.
    seq_length  tokens in a row. rows: rows of each source at most, by GPT-NeoX's order under `seed`; None takes all.
    batch       rows that the model reads at a time.
    Raises      DataError if a source is too short for a row or has an id that the model does not know.
    """
    model, names = load(checkpoint).model, source_names(list(prefixes))
    config = DataConfig(seq_length=seq_length, train=list(prefixes))
    packs = rows_by_source(
        [IndexedDataset(prefix) for prefix in prefixes], config, seed
    ).row_sources
    counts = [
        min(len(pack.order.shuffle_idx), rows or len(pack.order.shuffle_idx)) for pack in packs
    ]
    sums = [
        sum_over_rows(model, pack, count, batch) for pack, count in zip(packs, counts, strict=True)
    ]
    return scores(names, sums, np.array(counts) * seq_length)


@torch.no_grad()
def sum_over_rows(model: Decoder, pack: SourcePack, count: int, batch: int) -> float:
    """Summed loss of the first `count` rows of a source, in nats."""
    total, device, ids = 0.0, model.head_weight.device, model.config.vocab_size
    model.eval()
    for first in range(0, count, batch):
        rows = np.stack([pack[i] for i in range(first, min(first + batch, count))])
        if rows.max() >= ids:
            raise DataError(
                f"{pack.dataset.prefix} has token id {rows.max()}, but the model's vocabulary has {ids} ids"
            )
        tokens = torch.from_numpy(rows).to(device)
        hidden_NC = model(tokens[:, :-1]).flatten(0, 1)
        total += float(
            fused_cross_entropy(hidden_NC, model.head_weight, tokens[:, 1:].flatten()).total
        )
    return total
