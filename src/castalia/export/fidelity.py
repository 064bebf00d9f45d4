"""`parity`: how far an engine is from the float32 model, in decoding and in scoring."""

from dataclasses import dataclass
from pathlib import Path

import torch

from castalia.checkpoint.saved_model import open_model
from castalia.core.errors import ConfigError
from castalia.export.quality import Quality, held_out, measure, perplexity
from castalia.inference.loading import load, torch_engine


@dataclass(frozen=True)
class Parity:
    """An engine against float32 on held-out text."""

    engine: str
    decoding: Quality
    """Of the logits that tokens are drawn from."""
    scoring_perplexity: float
    """Of `logprobs`, over the padded vocabulary; with dtype=auto they are computed in bf16."""
    scoring_perplexity_fp32: float
    scoring_error: float
    """Mean |log p - log p of float32|, in nats a token."""

    def __str__(self) -> str:
        scored = (
            f"perplexity {self.scoring_perplexity:.4g} (float32 {self.scoring_perplexity_fp32:.4g})"
        )
        return (
            f"{self.engine} decodes: {self.decoding.line()}\n"
            f"{self.engine} scores: {scored}, mean error of a log-probability {self.scoring_error:.3g} nats"
        )


def parity(
    checkpoint: str | Path,
    *,
    engine: str = "native",
    dtype: str | None = None,
    heldout: str | Path | None = None,
) -> Parity:
    """Compare an engine over a checkpoint with the checkpoint in float32.

    Takes   a checkpoint as `load` does, and the options of `load`; heldout: a text file or the prefix of token files,
            by default the run's data.valid.
    Raises  ConfigError if there is no held-out text; what `load` raises.
    """
    source = open_model(checkpoint)
    text = held_out(heldout, source.folder, source.tokenizer, source.config.max_position_embeddings)
    if text is None:
        raise ConfigError(
            f"{checkpoint} names no held-out text; give heldout, a text file or a token prefix"
        )
    made, exact = load(checkpoint, engine=engine, dtype=dtype).engine, torch_engine(source)
    ours, theirs = (
        torch.cat([one.logprobs(row).cpu() for row in text.rows]) for one in (made, exact)
    )
    return Parity(
        engine=f"{made.name} {made.numbers}",
        decoding=measure(made, exact, text),
        scoring_perplexity=perplexity(-ours.double()),
        scoring_perplexity_fp32=perplexity(-theirs.double()),
        scoring_error=(ours - theirs).abs().mean().item(),
    )
