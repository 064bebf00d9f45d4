"""Tokens to batches: token files, tokenizers, GPT-NeoX's sample order, packing and the loader.

What needs torch or the config is imported on first use: processes that only prepare text need neither.
"""

from typing import TYPE_CHECKING

from castalia.core.lazy import lazy
from castalia.data.indexed import IndexedDataset, IndexedDatasetWriter, best_dtype
from castalia.data.labels import read_rewards
from castalia.data.order import NeoxOrder, split_documents, weight_by_num_documents
from castalia.data.packed import PackedDataset, Span
from castalia.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from castalia.data.batch import IGNORED, Batch
    from castalia.data.blending import blend
    from castalia.data.config import DataConfig
    from castalia.data.fingerprint import changed
    from castalia.data.loader import StepLoader
    from castalia.data.pairwise import PairwiseDataset
    from castalia.data.run_rows import BlendedRows, RunRows, build_rows, check_vocab

__all__ = [
    "IGNORED",
    "Batch",
    "BlendedRows",
    "DataConfig",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "NeoxOrder",
    "PackedDataset",
    "PairwiseDataset",
    "RunRows",
    "Span",
    "StepLoader",
    "Tokenizer",
    "best_dtype",
    "blend",
    "build_rows",
    "changed",
    "check_vocab",
    "load_tokenizer",
    "read_rewards",
    "split_documents",
    "train_tokenizer",
    "weight_by_num_documents",
]
HEAVY = {
    "IGNORED": "batch",
    "Batch": "batch",
    "StepLoader": "loader",
    "DataConfig": "config",
    "blend": "blending",
}
HEAVY |= {"changed": "fingerprint", "PairwiseDataset": "pairwise"}
HEAVY |= dict.fromkeys(("BlendedRows", "RunRows", "build_rows", "check_vocab"), "run_rows")
"""Public names whose module imports torch or pydantic."""
__getattr__ = lazy(__name__, HEAVY)
