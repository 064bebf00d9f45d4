"""One side of order.py in a process of its own: index maps by Castalia or by Megatron-core."""

import hashlib
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine
import worker

SEED = 1234
Maps = tuple[Any, Any, Any]


class Castalia:
    """castalia.data.NeoxOrder, in memory."""

    absent = None

    def __init__(self, case: dict[str, Any]) -> None:
        from castalia import __version__

        self.case = case
        self.version = __version__
        self.sizes = lengths(case)

    def maps(self) -> Maps:
        """Documents, rows and their shuffle."""
        from castalia.data import NeoxOrder

        order = NeoxOrder(
            self.sizes,
            seq_length=self.case["length"],
            num_samples=self.case["rows"],
            seed=SEED,
        )
        return order.doc_idx, order.sample_idx, order.shuffle_idx


class Megatron:
    """Megatron-core's GPTDataset, the part that builds its index maps, without its cache."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.absent = None
        if case["folder"]:
            sys.path.insert(0, case["folder"])
        try:
            import megatron.core
            from megatron.core.datasets import helpers  # noqa: F401
            from megatron.core.datasets.gpt_dataset import GPTDataset
            from megatron.core.datasets.utils import Split
        except ImportError as error:
            self.version = ""
            self.absent = f"cannot be imported ({error}); see --megatron"
            return
        self.version = megatron.core.__version__
        sizes = lengths(case)
        self.data = GPTDataset.__new__(GPTDataset)
        self.data.config = Namespace(
            defer_npy_index_mmap=False,
            path_to_cache=None,
            mock=True,
            sequence_length=case["length"],
            add_extra_token_to_sequence=1,
            random_seed=SEED,
        )
        self.data.dataset = Namespace(sequence_lengths=sizes)
        self.data.indices = np.arange(len(sizes), dtype=np.int32)
        self.data.num_samples = case["rows"]
        self.data.index_split = Split.train

    def maps(self) -> Maps:
        """Documents, rows and their shuffle."""
        maps: Maps = self.data._build_document_sample_shuffle_indices()
        return maps


def lengths(case: dict[str, Any]) -> Any:
    """Log-normal document lengths that make a few rows more than asked for in one epoch."""
    mean = 1.001 * case["rows"] * case["length"] / case["documents"]
    raw = np.random.default_rng(0).lognormal(0.0, 1.0, case["documents"])
    return np.maximum(raw * (mean / raw.mean()), 1).astype(np.int32)


def built(side: Any) -> dict[str, Any]:
    """One build: its seconds, the peak of memory over that before it, and what shows that both
    sides have built the same."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = machine.resident_bytes()
    start = time.perf_counter()
    maps = side.maps()
    spent = time.perf_counter() - start
    grown = (machine.resident_bytes("VmHWM") - before) / 1e9
    digest = hashlib.sha256()
    for array in maps:
        digest.update(np.ascontiguousarray(array, np.int64))
    return {
        "rows": len(maps[2]),
        "seconds": round(spent, 3),
        "grown_gb": round(grown, 3),
        "digest": digest.hexdigest(),
    }


def ready(side: Any) -> dict[str, Any]:
    """Which version answers, or why none does."""
    return {"version": side.version, "absent": side.absent}


def main() -> None:
    """Serve the side that the case names."""
    sides: dict[str, Callable[..., Any]] = {"castalia": Castalia, "megatron-core": Megatron}
    case = json.loads(sys.argv[1])
    worker.serve(lambda: sides[case["side"]](case), {"ready": ready, "build": built})


if __name__ == "__main__":
    main()
