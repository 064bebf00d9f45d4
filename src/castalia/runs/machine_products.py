"""The library of the products of fp32 on a CPU: chosen for `train.products=auto`.

Two libraries round in different orders, so that a run keeps the one it began with and all of its
ranks use the same.
"""

from pathlib import Path

import torch

from castalia.config import read_yaml
from castalia.core.errors import ConfigError
from castalia.distributed import World
from castalia.machine import this_machine
from castalia.machine.onednn import has_onednn
from castalia.products.linear import LEAST
from castalia.runs.config import RunConfig

FASTER = 1.03
"""oneDNN is chosen where the products of a layer are this many times as fast with it: measured
rates differ by so much from one time to the next."""
CHOICES = ("torch", "onednn")


def with_products(config: RunConfig, world: World) -> RunConfig:
    """The config with the library that `auto` stands for, equal on all ranks.

    The precision of the config is not `auto` any more.
    Raises  ConfigError for oneDNN where torch comes without it.
    """
    given = config.train.products
    matters = is_exact_cpu(config, world.device)
    if given == "onednn" and matters and not has_onednn():
        raise ConfigError(
            "train.products=onednn: torch comes without oneDNN on this machine; use"
            " train.products=auto"
        )
    if given != "auto":
        return config
    chosen = 0
    # Every rank is asked for oneDNN: machines may differ.
    if matters and world.smallest(has_onednn()) and world.leads:
        # Rank 0 alone: two measurements of the same thing may differ.
        chosen = CHOICES.index(recorded_products(config) or faster_products(config))
    train = config.train.model_copy(update={"products": CHOICES[world.agree(chosen)]})
    return config.model_copy(update={"train": train})


def uses_onednn(config: RunConfig, device: torch.device) -> bool:
    """Whether oneDNN computes the products of a run, whose library is not `auto` any more."""
    # Frozen weights in integers are multiplied otherwise, by a class of their own.
    stored = config.adapter.base == "fp32"
    return config.train.products == "onednn" and stored and is_exact_cpu(config, device)


def is_exact_cpu(config: RunConfig, device: torch.device) -> bool:
    """Whether the products of a run are in fp32, on a CPU, of whole matrices."""
    return config.precision == "fp32" and device.type == "cpu" and config.parallel.tp == 1


def recorded_products(config: RunConfig) -> str | None:
    """The library of the run in the output folder; None for a fresh run."""
    path = Path(config.output) / "config.yaml"
    if not path.is_file():
        return None
    recorded: str = read_yaml(path).get("train", {}).get("products", "auto")
    # Without a record it began when torch's was the only one.
    return recorded if recorded in CHOICES else "torch"


def expected_products(config: RunConfig, device: torch.device) -> str:
    """The library of a fresh run, were its precision fp32."""
    exact = config.model_copy(update={"precision": "fp32"})
    if not is_exact_cpu(exact, device) or not has_onednn():
        return "torch"
    given = config.train.products
    return faster_products(config) if given == "auto" else given


def faster_products(config: RunConfig) -> str:
    """The library that is faster for the products of fp32 in training on this CPU."""
    rows = product_rows(config)
    # A model of small products keeps torch's in any case, and is not worth two seconds.
    if not has_onednn() or rows * largest_layer(config) < LEAST:
        return "torch"
    return faster_library(rows)


def faster_library(rows: int) -> str:
    """The library that is measured to be faster for products of so many rows."""
    return "onednn" if this_machine().training_gain(rows) >= FASTER else "torch"


def product_rows(config: RunConfig) -> int:
    """Rows of the products of a rank's micro-batch: its tokens."""
    rows = config.train.micro_batch_size or config.train.batch_size
    return rows * config.rows_at_once * config.data.seq_length


def largest_layer(config: RunConfig) -> int:
    """Weights of the largest product, about: of an MLP, or of the head."""
    width = config.model.hidden_size
    return width * max(4 * width, config.model.padded_vocab_size)


def products_notes(given: RunConfig, config: RunConfig) -> list[str]:
    """What is to be said of the library that was chosen."""
    if given.train.products != "auto" or config.train.products == "torch":
        return []
    return [
        "train.products=auto is onednn on this machine: products of fp32 are faster with it than"
        " with torch's own library"
    ]
