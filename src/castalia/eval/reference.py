"""A reference model's loss on each source, the baseline of the mixer `doremi`.

Source  Xie et al. 2023, arXiv:2305.10429: a small model is trained on the prior mixture; a proxy is
        then trained with more of the sources whose loss is far above that model's.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from castalia.core.errors import DataError
from castalia.core.files import write_json
from castalia.data import DataConfig, IndexedDataset
from castalia.data.row_source import RowSource
from castalia.data.rows_by_source import rows_by_source
from castalia.data.sources import Files, source_names
from castalia.eval.losses import TokensAndLabels, sum_of_losses
from castalia.inference import load
from castalia.mixing import scores


def write_reference(
    path: str | Path, checkpoint: str | Path, prefixes: Sequence[str], **options: Any
) -> dict[str, Any]:
    """Write the file that mixing.reference=FILE reads, and return the scores.

    The file is JSON: {"checkpoint": path, "losses": {source: nats a token}}.

    options  those of `reference_losses`.
    """
    result = reference_losses(checkpoint, prefixes, **options)
    losses = {name: entry["loss"] for name, entry in result["sources"].items()}
    write_json(path, {"checkpoint": str(checkpoint), "losses": losses})
    return result


def reference_losses(
    checkpoint: str | Path,
    prefixes: Sequence[str],
    *,
    seq_length: int,
    rows: int | None = 256,
    batch: int = 16,
    seed: int = 1234,
) -> dict[str, Any]:
    """Loss of a checkpoint on rows of each source's token file, as `castalia.mixing.scores`.

    checkpoint  a run's folder, which stands for its newest checkpoint, or one checkpoint, as
                `castalia.load` takes it.
    prefixes    token files, one per source, which has the name that training gives it.
    seq_length  tokens in a row.
    rows        rows of each source at most, in GPT-NeoX's order under `seed`; None for all.
    batch       rows in a forward pass.
    Raises      DataError if a source is too short for a row, or has a token id outside the model's
                vocabulary.
    """
    model = load(checkpoint, engine="torch").model
    names = source_names(list(prefixes))
    config = DataConfig(seq_length=seq_length, train=list(prefixes))
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    sums: list[float] = []
    counts: list[int] = []
    for pack in rows_by_source(Files(datasets), config, seed).row_sources:
        count = len(pack.order.shuffle_idx)
        if rows:
            count = min(count, rows)
        sums.append(sum_of_losses(model, batches(pack, count, batch, model.config.vocab_size)))
        counts.append(count)
    return scores(names, sums, np.array(counts) * seq_length)


def batches(
    pack: RowSource[Any], count: int, batch: int, vocab_size: int
) -> Iterator[TokensAndLabels]:
    """The first `count` rows of a source in batches.

    Raises  DataError for a token id outside the vocabulary.
    """
    for first in range(0, count, batch):
        rows = np.stack([pack[i] for i in range(first, min(first + batch, count))])
        if rows.max() >= vocab_size:
            raise DataError(
                f"{pack.dataset.prefix} has token id {rows.max()}, but the model's vocabulary has"
                f" {vocab_size} ids; use token files made with the model's tokenizer"
            )
        tokens = torch.from_numpy(rows)
        yield tokens[:, :-1], tokens[:, 1:]
