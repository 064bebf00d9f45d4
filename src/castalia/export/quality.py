"""The effect of quantization: an engine compared with the float32 model on held-out text."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.checkpoint import read_config
from castalia.config.anchor import CONFIG, anchored, run_folder_of
from castalia.core.errors import CastaliaError, ConfigError, DataError
from castalia.data.indexed import IndexedDataset
from castalia.formats.saved_model import open_model
from castalia.inference.engine import Engine
from castalia.inference.loading import load
from castalia.inference.torch_engine import TorchEngine
from castalia.tokenizers.tokenizer import Tokenizer

TOKENS = 2048
"""Most held-out tokens that are read."""
ROW_TOKENS = 256
"""Tokens of one row; fewer if the model's limit is lower."""


@dataclass(frozen=True)
class Quality:
    """An engine against float32 on the same tokens, each given those before it in its row."""

    tokens: int
    """Number of predictions compared."""
    text: str
    """Name of the held-out text."""
    perplexity: float
    perplexity_fp32: float
    kl: float
    """Mean of KL(float32 || engine), in nats a token."""
    kl_p99: float
    """Its 99th percentile."""
    greedy_agreement: float
    """Share of positions where both have the same most likely token."""

    def line(self) -> str:
        """One line for the screen."""
        return (
            f"perplexity {self.perplexity:.4g} (float32 {self.perplexity_fp32:.4g}),"
            f" KL {self.kl:.3g} nats, greedy agreement {self.greedy_agreement:.2%}"
            f" on {self.tokens} tokens of {self.text}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class HeldOutText:
    """Rows of token ids, and the name of their text."""

    name: str
    rows: list[list[int]]


def held_out(
    given: str | Path | None, checkpoint: Path, tokenizer: Tokenizer | None, limit: int
) -> HeldOutText | None:
    """Rows of held-out tokens, from `given` or else from the run's data.valid.

    Takes    given: a text file, or the prefix of token files.
    Returns  None if nothing is given and the run's validation data does not exist on this machine.
    Raises   ConfigError for a text without a tokenizer; DataError if the text is unreadable or too
             short.
    """
    if given is not None:
        tokens = tokens_of(Path(given), tokenizer)
        return HeldOutText(Path(given).name, in_rows(tokens, str(given), limit))
    try:
        config = read_config(checkpoint)
    except (CastaliaError, OSError):  # a Hugging Face folder has no config of a run
        return None
    folder = run_folder_of(checkpoint / CONFIG)
    if folder is not None:
        config = anchored(config, folder)
    prefixes = (config.get("data") or {}).get("valid") or []
    existing = [prefix for prefix in prefixes if Path(f"{prefix}.idx").is_file()]
    if not existing:
        return None
    # An equal share of every source: quantization may hurt code more than prose.
    share = TOKENS // len(existing) + 1
    tokens = [token for prefix in existing for token in first_tokens(prefix, share)]
    return HeldOutText("the run's validation data", in_rows(tokens, existing[0], limit))


def tokens_of(path: Path, tokenizer: Tokenizer | None) -> list[int]:
    """Ids of a text file, or of PREFIX.bin."""
    if Path(f"{path}.idx").is_file():
        return first_tokens(str(path), TOKENS + 1)
    if tokenizer is None:
        raise ConfigError(
            f"{path} is text and the checkpoint has no tokenizer; give the prefix of token files"
        )
    try:
        # 16 characters a token are more than any text has, and a large file is not encoded whole.
        return tokenizer.encode(path.read_text(encoding="utf-8")[: 16 * TOKENS])
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the held-out text {path}: {error}") from None


def first_tokens(prefix: str, count: int) -> list[int]:
    """The first `count` tokens of token files."""
    tokens: list[int] = []
    data = IndexedDataset(prefix)
    for i in range(len(data)):
        tokens += data[i][: count - len(tokens)].tolist()
        if len(tokens) >= count:
            break
    return tokens


def in_rows(tokens: list[int], where: str, limit: int) -> list[list[int]]:
    """Rows of ROW_TOKENS or the model's limit, TOKENS in all; a last row of one token is dropped.

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
    """Compare `engine` with `exact`; both softmaxes omit the vocabulary's padding."""
    by_row = [compared(engine, exact, row) for row in text.rows]
    kl, same, ours, theirs = (torch.cat(parts) for parts in zip(*by_row, strict=True))
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
    """exp of the mean negative log-likelihood; exp(700) is close to the largest float."""
    return math.exp(min(losses.mean().item(), 700))


def compared(
    engine: Engine, exact: Engine, ids: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each prediction of a row: KL in nats, equal greedy token, both losses."""
    q = all_logprobs(engine, ids)
    p = all_logprobs(exact, ids)
    # Rounding makes the KL of equal distributions slightly negative.
    kl = (p.exp() * (p - q)).sum(1).double().clamp_min(0)
    labels = torch.tensor(ids[1:])[:, None]
    return (
        kl,
        p.argmax(1) == q.argmax(1),
        -q.gather(1, labels)[:, 0].double(),
        -p.gather(1, labels)[:, 0].double(),
    )


def all_logprobs(engine: Engine, ids: Sequence[int]) -> Tensor:
    """Log-probabilities of all tokens after each but the last: T ids -> (T - 1, V) float32."""
    return engine.logits(ids)[:-1, : engine.config.vocab_size].float().cpu().log_softmax(1)


def table(quality: Quality) -> Iterator[str]:
    """Rows of a Markdown table."""
    yield "| | float32 | this export |"
    yield "|---|---|---|"
    yield f"| perplexity | {quality.perplexity_fp32:.4f} | {quality.perplexity:.4f} |"
    kl = f"{quality.kl:.3g} / {quality.kl_p99:.3g}"
    yield f"| KL(float32 \\|\\| export), mean / 99th percentile, nats | 0 | {kl} |"
    yield f"| same greedy token | 100% | {quality.greedy_agreement:.2%} |"


@dataclass(frozen=True)
class Parity:
    """An engine against float32 on held-out text."""

    engine: str
    decoding: Quality
    """Quality of the logits that tokens are drawn from."""
    scoring_perplexity: float
    """Perplexity of `logprobs`, over the padded vocabulary; dtype=auto computes them in bf16."""
    scoring_perplexity_fp32: float
    scoring_error: float
    """Mean |log p - log p of float32|, in nats a token."""

    def __str__(self) -> str:
        scored = (
            f"perplexity {self.scoring_perplexity:.4g} (float32 {self.scoring_perplexity_fp32:.4g})"
        )
        return (
            f"{self.engine} decodes: {self.decoding.line()}\n"
            f"{self.engine} scores: {scored},"
            f" mean error of a log-probability {self.scoring_error:.3g} nats"
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
