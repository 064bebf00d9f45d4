"""The time of a training step on this machine, measured on a small piece of the model.

The piece has the model's kind of blocks, at most two, and a small vocabulary, and runs forward and
backward on few tokens. Its FLOP/s give the time of a whole step. What a piece does not show is left
out: the optimizer's update, communication, checkpoints, and waiting for data.

The table of castalia.machine is not read here, though it has the rates of products in both
precisions: norms, attention, activations, the loss and the conversions between dtypes gain
otherwise than products do, so that only a piece of the model tells what a step gains.
"""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import ValidationError

from castalia.core.memory import keep_freed_memory
from castalia.cost.estimate import Estimate
from castalia.data import Batch
from castalia.losses.scored import Scored
from castalia.models import Decoder, ModelConfig
from castalia.models.config import TransformerConfig
from castalia.models.flops import flops_per_token
from castalia.products import use_onednn
from castalia.runs.config import RunConfig
from castalia.runs.machine_products import expected_products
from castalia.train.precision import arithmetic

LAYERS = 2
"""Blocks of the piece, at most."""
VOCABULARY = 4096
"""Ids of the piece, at most: the head is a product like the others."""
WIDTH = {"cpu": 768, "cuda": 8192}
"""Width of the piece, at most: a CPU's rate no longer rises with wider products, and memory is
scarcer."""
TOKENS = {"cpu": (8, 64, 512), "cuda": (512, 2048, 8192)}
"""Tokens of a pass, ascending. The more, the nearer to training; the last is some 10 GFLOP at the
widths of small models."""
PATIENCE = 0.2
"""Seconds of a pass beyond which no larger one is tried: `castalia show` waits for it, and fp16 on
a CPU without instructions for it is a hundred times slower."""
FASTER = 1.05
"""bf16 is chosen where a pass in fp32 takes this many times as long. What `auto` chooses is then
never slower than the other by more than that."""
MEASURING = 0.6
"""Seconds of a precision after which no further pass of a size is made."""
PASSES = 5
"""Passes of one size, at most; the first one compiles kernels and takes memory."""


class StepTime(NamedTuple):
    """Time of one optimizer step."""

    seconds: float
    tokens_per_second: float
    """Of all ranks."""
    about: str
    """What was measured, in words."""


def time_step(config: RunConfig, cost: Estimate) -> StepTime | None:
    """Measure a piece of the model on the device of `cost`; None if this machine lacks it.

    Ranks on GPUs work side by side; ranks on CPUs are taken to share this machine.
    """
    if cost.device == "cuda" and not torch.cuda.is_available():
        return None
    keep_freed_memory()
    device = torch.device(cost.device)
    piece = piece_of(config.model, cost.device)
    model = random_model(piece, device)
    let_multiply(model, config, device)
    model.recompute = config.train.recompute
    precision: str = config.precision
    if precision == "auto":
        precision = faster_precision(config, device)
    if precision == "fp8":
        # The piece has plain layers, whose products are in bf16.
        precision = "bf16"
    (seconds,), rows, length = largest_pass(
        model, [precision], device, cost.micro_rows, config.data.seq_length
    )
    rate = flops_per_token(piece, length) * rows * length / seconds
    at_once = 1
    if cost.device == "cuda":
        at_once = cost.processes
    step = cost.flops_per_token * config.tokens_per_step / (rate * at_once)
    about = f"{piece.num_layers} of {config.model.num_layers} layers"
    if piece.hidden_size < config.model.hidden_size:
        about += f", {piece.hidden_size} of {config.model.hidden_size} wide"
    about += f", {rows * length:,} tokens in {precision} on {name_of(device)}"
    return StepTime(step, config.tokens_per_step / step, about)


def faster_precision(config: RunConfig, device: torch.device) -> str:
    """bf16 or fp32, whichever is faster here; fp16 needs a loss scale and is never chosen."""
    return preferred(times_as_long(config, "fp32", "bf16", device))


def preferred(factor: float) -> str:
    """The precision that `auto` stands for where fp32 takes `factor` times as long as bf16."""
    return "bf16" if factor >= FASTER else "fp32"


def times_as_long(config: RunConfig, precision: str, other: str, device: torch.device) -> float:
    """Time of a forward and backward pass in `precision` over that in `other`."""
    model = random_model(piece_of(config.model, device.type), device)
    let_multiply(model, config, device)
    micro_rows = config.train.micro_batch_size or config.train.batch_size
    names = [precision, other]
    seconds, *_ = largest_pass(model, names, device, micro_rows, config.data.seq_length)
    return seconds[0] / seconds[1]


def let_multiply(model: Decoder, config: RunConfig, device: torch.device) -> None:
    """Give the piece the products that a run has in fp32; in another precision it has its own."""
    if expected_products(config, device) == "onednn":
        use_onednn(model)


def piece_of(model: ModelConfig, device: str) -> ModelConfig:
    """The model with few blocks, a small vocabulary and at most a certain width."""
    changes: dict[str, int] = {
        "num_layers": min(LAYERS, model.num_layers),
        "vocab_size": min(VOCABULARY, model.vocab_size),
    }
    if isinstance(model, TransformerConfig) and model.hidden_size > WIDTH[device]:
        changes |= narrower(model, WIDTH[device])
    elif model.hidden_size > WIDTH[device]:
        changes |= halved(model, WIDTH[device])
    return model.model_copy(update=changes)


def narrower(model: TransformerConfig, width: int) -> dict[str, int]:
    """Sizes of about `width` in the model's proportions, with its heads' own width."""
    heads = max(1, model.num_attention_heads * width // model.hidden_size)
    # Each head of keys keeps its number of query heads, or serves them all.
    group = min(heads, model.num_attention_heads // model.kv_heads)
    key_heads = heads // group
    heads = key_heads * group
    hidden = max(2, model.hidden_size * heads // model.num_attention_heads)
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_kv_heads": key_heads,
        "attention_head_dim": model.head_dim,
        "intermediate_size": max(1, model.ffn_size * hidden // model.hidden_size),
    }


def halved(model: ModelConfig, width: int) -> dict[str, int]:
    """A width of at most `width` by halves; none where the heads of the layers do not allow it."""
    hidden = model.hidden_size
    while hidden > width and hidden % 2 == 0:
        hidden //= 2
    try:
        type(model).model_validate(model.model_dump() | {"hidden_size": hidden})
    except ValidationError:
        return {}
    return {"hidden_size": hidden}


def random_model(piece: ModelConfig, device: torch.device) -> Decoder:
    """The model of a config, with weights whose values do not matter."""
    with torch.device("meta"):
        model = Decoder(piece)
    model.to_empty(device=device)
    # A measurement must not move the random numbers of a caller.
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        for parameter in model.parameters():
            # Not zeros, and no denormal numbers: both have speeds of their own.
            parameter.uniform_(-0.02, 0.02)
    return model


class MeasuredPass(NamedTuple):
    """Times of one size of pass."""

    seconds: list[float]
    """Of each precision."""
    rows: int
    length: int


def largest_pass(
    model: Decoder,
    precisions: Sequence[str],
    device: torch.device,
    micro_rows: int,
    seq_length: int,
) -> MeasuredPass:
    """The largest pass of TOKENS, or the first one that takes longer than PATIENCE.

    Its rows are no more and no longer than those of the run.
    """
    for most in TOKENS[device.type]:
        length = min(seq_length, most)
        rows = min(micro_rows, most // length)
        seconds = best_seconds(model, precisions, device, rows, length)
        # The slowest decides: a ratio needs all of them at one size.
        if max(seconds) > PATIENCE:
            break
    return MeasuredPass(seconds, rows, length)


def best_seconds(
    model: Decoder, precisions: Sequence[str], device: torch.device, rows: int, length: int
) -> list[float]:
    """Best time of a pass over `rows` rows of `length` tokens in each of the precisions."""
    best = [math.inf] * len(precisions)
    begun = time.perf_counter()
    for turn in range(PASSES):
        # Two at least: the first one warms up.
        if turn > 1 and time.perf_counter() - begun > MEASURING * len(precisions):
            break
        # In turns, and the best of each: whatever else the machine does only adds to it, and slows
        # all of them alike.
        for at, precision in enumerate(precisions):
            best[at] = min(best[at], pass_seconds(model, precision, device, rows, length))
    return best


def pass_seconds(
    model: Decoder, precision: str, device: torch.device, rows: int, length: int
) -> float:
    """Seconds of one forward and backward pass over `rows` rows of `length` tokens."""
    tokens = torch.zeros(rows, length, dtype=torch.int64, device=device)
    places = torch.zeros(rows, dtype=torch.int64, device=device)
    batch = Batch(tokens, tokens, places.int(), places)
    began = time.perf_counter()
    with arithmetic(precision, device):
        scored = Scored.by(model, batch)
        if model.config.head == "score":
            total = scored.scores(batch).sum()
        else:
            total, _ = scored.losses(batch.labels)
    total.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def name_of(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    plural = "" if threads == 1 else "s"
    return f"a CPU with {threads} thread{plural}"
