"""What quantization changes: an engine against the float32 model on held-out text."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.checkpoint import read_config
from castalia.checkpoint.saved_model import open_model
from castalia.core.errors import CastaliaError, ConfigError, DataError
from castalia.data.indexed import IndexedDataset
from castalia.data.tokenizer import Tokenizer
from castalia.inference.engine import Engine
from castalia.inference.loading import load
from castalia.inference.torch_engine import TorchEngine

TOKENS = 2048
"""Held-out tokens that are read."""
ROW_TOKENS = 256
"""Tokens of a text that is read at once, or fewer if the model's limit is lower."""


@dataclass(frozen=True)
class Quality:
    """An engine against float32 on the same tokens, each given those before it in its row."""

    tokens: int
    """Predictions that were compared."""
    text: str
    """Where the tokens come from."""
    perplexity: float
    perplexity_fp32: float
    kl: float
    """Mean of KL(float32 || engine), in nats a token."""
    kl_p99: float
    """Its 99th percentile."""
    greedy_agreement: float
    """Share of tokens whose most likely successor is the same."""

    def line(self) -> str:
        """One line for the screen."""
        return (
            f"perplexity {self.perplexity:.4g} (float32 {self.perplexity_fp32:.4g}), KL {self.kl:.3g} nats,"
            f" greedy agreement {self.greedy_agreement:.2%} on {self.tokens} tokens of {self.text}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class HeldOutText:
    """Rows of token ids, and the name of what they are."""

    name: str
    rows: list[list[int]]


def held_out(
    given: str | Path | None, checkpoint: Path, tokenizer: Tokenizer | None, limit: int
) -> HeldOutText | None:
    """Rows of held-out tokens: of `given`, a text file or the prefix of token files; else of the
    run's data.valid.

    None when nothing is given and the run names no validation data that is there.
    Raises  ConfigError if a text is given and there is no tokenizer; DataError if it cannot be
            read or is too short.
    """
    if given is not None:
        return HeldOutText(
            Path(given).name, in_rows(tokens_of(Path(given), tokenizer), str(given), limit)
        )
    try:
        prefixes = (read_config(checkpoint).get("data") or {}).get("valid") or []
    except (CastaliaError, OSError):  # a Hugging Face folder has no config of ours
        return None
    there = [prefix for prefix in prefixes if Path(f"{prefix}.idx").is_file()]
    if not there:
        return None
    share = TOKENS // len(there) + 1
    tokens = [token for prefix in there for token in first_tokens(prefix, share)]
    return HeldOutText("the run's validation data", in_rows(tokens, there[0], limit))


def tokens_of(path: Path, tokenizer: Tokenizer | None) -> list[int]:
    """Ids of a text file, or of PREFIX.bin."""
    if Path(f"{path}.idx").is_file():
        return first_tokens(str(path), TOKENS + 1)
    if tokenizer is None:
        raise ConfigError(
            f"{path} is text and the checkpoint has no tokenizer; give the prefix of token files"
        )
    try:
        return tokenizer.encode(path.read_text(encoding="utf-8")[: 16 * TOKENS])
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the held-out text {path}: {error}") from None


def first_tokens(prefix: str, count: int) -> list[int]:
    """The first `count` tokens of token files."""
    found: list[int] = []
    data = IndexedDataset(prefix)
    for i in range(len(data)):
        found += [int(token) for token in data[i][: count - len(found)]]
        if len(found) >= count:
            break
    return found


def in_rows(tokens: list[int], where: str, limit: int) -> list[list[int]]:
    """Rows of ROW_TOKENS or what the model reads, TOKENS in all; a rest of one token is left out.

    Raises  DataError if there are fewer than two tokens.
    """
    width = min(ROW_TOKENS, limit)
    tokens = tokens[:TOKENS]
    rows = [tokens[i : i + width] for i in range(0, len(tokens), width)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise DataError(f"{where} has {len(tokens)} tokens; held-out text needs at least 2")
    return rows


def measure(engine: Engine, exact: Engine, text: HeldOutText) -> Quality:
    """Compare `engine` with `exact`, over the tokens that exist: the vocabulary's padding is left
    out of both."""
    found = [compared(engine, exact, row) for row in text.rows]
    kl, same, ours, theirs = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Quality(
        tokens=len(kl),
        text=text.name,
        perplexity=perplexity(ours),
        perplexity_fp32=perplexity(theirs),
        kl=kl.mean().item(),
        kl_p99=kl.quantile(0.99).item(),
        greedy_agreement=same.float().mean().item(),
    )


def perplexity(losses: Tensor) -> float:
    """exp of the mean negative log-likelihood."""
    return math.exp(min(losses.mean().item(), 700))


def compared(
    engine: Engine, exact: Engine, ids: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each prediction in a row: KL in nats, whether the likeliest token is the same, both
    losses."""
    q, p = (each(one, ids) for one in (engine, exact))
    kl = (p.exp() * (p - q)).sum(1).double().clamp_min(0)
    labels = torch.tensor(ids[1:])[:, None]
    return (
        kl,
        p.argmax(1) == q.argmax(1),
        -q.gather(1, labels)[:, 0].double(),
        -p.gather(1, labels)[:, 0].double(),
    )


def each(engine: Engine, ids: Sequence[int]) -> Tensor:
    """Log-probabilities of all tokens after each of a row but the last: (T - 1, V) float32."""
    return engine.logits(ids)[:-1, : engine.config.vocab_size].float().cpu().log_softmax(1)


def table(found: Quality) -> Iterator[str]:
    """Rows of a Markdown table."""
    yield "| | float32 | this export |"
    yield "|---|---|---|"
    yield f"| perplexity | {found.perplexity_fp32:.4f} | {found.perplexity:.4f} |"
    yield f"| KL(float32 \\|\\| export), mean / 99th percentile, nats | 0 | {found.kl:.3g} / {found.kl_p99:.3g} |"
    yield f"| same greedy token | 100% | {found.greedy_agreement:.2%} |"


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

    Takes   a checkpoint as `load` does, and the options of `load`; heldout: a text file or the
            prefix of token files, by default the run's data.valid.
    Raises  ConfigError if there is no held-out text; what `load` raises.
    """
    source = open_model(checkpoint)
    text = held_out(heldout, source.folder, source.tokenizer, source.config.max_position_embeddings)
    if text is None:
        raise ConfigError(
            f"{checkpoint} names no held-out text; give heldout, a text file or a token prefix"
        )
    measured = load(checkpoint, engine=engine, dtype=dtype).engine
    exact = TorchEngine.from_checkpoint(source)
    ours = torch.cat([measured.logprobs(row).cpu() for row in text.rows])
    theirs = torch.cat([exact.logprobs(row).cpu() for row in text.rows])
    return Parity(
        engine=f"{measured.name} {measured.numbers}",
        decoding=measure(measured, exact, text),
        scoring_perplexity=perplexity(-ours.double()),
        scoring_perplexity_fp32=perplexity(-theirs.double()),
        scoring_error=(ours - theirs).abs().mean().item(),
    )
