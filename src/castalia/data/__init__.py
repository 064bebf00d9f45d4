"""From tokens to batches: token files, tokenizers, GPT-NeoX's sample order, packing and the loader.

Names that need torch or the config are imported on first use, because processes that only prepare
text need neither.
"""

from typing import TYPE_CHECKING

from castalia.core.lazy import lazy
from castalia.data.indexed import IndexedDataset, IndexedDatasetWriter, best_dtype
from castalia.data.labels import IGNORED, read_rewards
from castalia.data.order import NeoxOrder, split_documents, weight_by_num_documents
from castalia.data.packed import PackedDataset
from castalia.data.row_source import DocumentSpan
from castalia.tokenizers.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from castalia.data.batch import Batch
    from castalia.data.blending import blend
    from castalia.data.config import DataConfig
    from castalia.data.fingerprint import changed
    from castalia.data.loader import StepLoader
    from castalia.data.pairwise import PairwiseDataset
    from castalia.data.run_rows import RunRows, build_rows
    from castalia.data.served import BlendedRows
    from castalia.data.vocabulary import check_vocab

__all__ = [
    "IGNORED",
    "Batch",
    "BlendedRows",
    "DataConfig",
    "DocumentSpan",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "NeoxOrder",
    "PackedDataset",
    "PairwiseDataset",
    "RunRows",
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
LAZY = {
    "Batch": "batch",
    "BlendedRows": "served",
    "DataConfig": "config",
    "PairwiseDataset": "pairwise",
    "RunRows": "run_rows",
    "StepLoader": "loader",
    "blend": "blending",
    "build_rows": "run_rows",
    "changed": "fingerprint",
    "check_vocab": "vocabulary",
}
"""Public name -> the module that has it, for modules that import torch or pydantic, or are seldom
needed."""
__getattr__ = lazy(__name__, LAZY)
