"""What `auto` means on this machine, and what it gains: measured on small pieces of a Pythia."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from castalia.distributed.world import choose_device
from castalia.formats.saved_model import SavedModel
from castalia.inference.native_engine import NativeEngine
from castalia.machine import Machine
from castalia.recipes import load_config
from castalia.runs.machine_products import FASTER
from castalia.train.timing import preferred, random_model, times_as_long

TRAINED = "pythia-14m"
"""The model whose piece stands for those that are trained on one machine."""
ASKED = "pythia-70m"
"""The model whose piece stands for those that generate and score here."""
SIZES = {"num_layers": 2, "vocab_size": 16384}
"""Of the piece: in float32 it is larger than most caches, and it is packed in an instant."""
SCORED = 256
"""Tokens of the text that is scored."""
BATCHES = (1, 8)
"""Texts that are decoded at once."""
TRAINED_ROWS = 512
"""Rows of the products whose library is chosen, as many as the table has."""
ROUNDS = 12
SECONDS = 0.8
"""Time of one comparison after which no further round begins; two are made in any case."""


def choices(machine: Machine) -> list[dict[str, Any]]:
    """Every choice, with how many times as fast it is as the other one."""
    return [*inference_choices(), training_choice(), *products_choice(machine)]


def inference_choices() -> list[dict[str, Any]]:
    """What dtype=auto of the native engine means for decoding and for scoring."""
    source = random_source()
    engines = {
        dtype: NativeEngine.from_checkpoint(source, dtype, "cpu") for dtype in ("auto", "fp32")
    }
    auto = engines["auto"]
    by = "by the compiled step" if auto.compiled is not None else "by torch's operators"
    found = []
    for batch in BATCHES:
        works = {dtype: decoding(engine, batch) for dtype, engine in engines.items()}
        text = "1 text" if batch == 1 else f"{batch} texts at once"
        found.append(choice(f"decoding {text}", f"{auto.numbers} {by}", best_times(works)))
    works = {dtype: scoring(engine) for dtype, engine in engines.items()}
    found.append(choice("scoring", auto.scoring, best_times(works)))
    return found


def choice(what: str, chosen: str, times: Mapping[str, float]) -> dict[str, Any]:
    """A choice of dtype=auto against the exact engine."""
    return {
        "for": what,
        "option": "dtype=auto",
        "chosen": chosen,
        "factor": times["fp32"] / times["auto"],
        "than": "dtype=fp32",
        "measured_on": f"a piece of {ASKED}",
    }


def training_choice() -> dict[str, Any]:
    """What precision=auto means."""
    factor = times_as_long(
        load_config([TRAINED]), "fp32", "bf16", choose_device("auto", local_rank=0)
    )
    chosen = preferred(factor)
    than = "bf16"
    if chosen == than:
        than = "fp32"
    else:
        factor = 1 / factor
    return {
        "for": "training",
        "option": "precision=auto",
        "chosen": chosen,
        "factor": factor,
        "than": than,
        "measured_on": f"a piece of {TRAINED}",
    }


def products_choice(machine: Machine) -> list[dict[str, Any]]:
    """What train.products=auto means, by the table; nothing where there is one library alone."""
    gain = machine.training_gain(TRAINED_ROWS)
    if not gain:
        return []
    libraries = ["onednn", "torch"]
    factor = gain
    if gain < FASTER:
        libraries.reverse()
        factor = 1 / gain
    return [
        {
            "for": "training in fp32",
            "option": "train.products=auto",
            "chosen": libraries[0],
            "factor": factor,
            "than": libraries[1],
            "measured_on": f"products of {TRAINED_ROWS} rows",
        }
    ]


def random_source() -> SavedModel:
    """A small model with weights whose values do not matter."""
    config = load_config([ASKED]).model.model_copy(update=SIZES)
    tensors = random_model(config, torch.device("cpu")).state_dict()
    return SavedModel(Path(), config, tensors, None, None)  # type: ignore[arg-type]


def decoding(engine: NativeEngine, batch: int) -> Callable[[], object]:
    """One step of `batch` texts."""
    slots = engine.slots(batch, ROUNDS + 2)
    every = list(range(batch))
    return lambda: slots.feed(every, [[1]] * batch)


def scoring(engine: NativeEngine) -> Callable[[], object]:
    """A text of SCORED tokens."""
    ids = [1] * SCORED
    return lambda: engine.logprobs(ids)


def best_times(works: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Best seconds of each, after one call that warms up; they take turns."""
    best = dict.fromkeys(works, math.inf)
    for work in works.values():
        work()
    begun = time.perf_counter()
    for turn in range(ROUNDS):
        if turn > 1 and time.perf_counter() - begun > SECONDS:
            break
        for name, work in works.items():
            start = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - start)
    return best
