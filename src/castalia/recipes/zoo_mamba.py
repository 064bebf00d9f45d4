"""Published Mamba and Mamba 2, with GPT-NeoX-20B's tokenizer."""

from typing import Any

from castalia.recipes.shapes import M, Published

SHAPES = {
    # Gu and Dao 2023, arXiv:2312.00752, section 4.2.2 and table 12: layers, width, and 5 times the
    # learning rate of GPT-3's model of the size.
    "mamba-130m": ("mamba", 24, 768, 3e-3),
    "mamba-370m": ("mamba", 48, 1024, 1.5e-3),
    "mamba-790m": ("mamba", 48, 1536, 1.25e-3),
    "mamba-1.4b": ("mamba", 48, 2048, 1e-3),
    "mamba-2.8b": ("mamba", 64, 2560, 8e-4),
    # Dao and Gu 2024, arXiv:2405.21060, table 10.
    "mamba2-130m": ("mamba2", 24, 768, 3e-3),
    "mamba2-370m": ("mamba2", 48, 1024, 1.5e-3),
    "mamba2-780m": ("mamba2", 48, 1536, 1.25e-3),
    "mamba2-1.3b": ("mamba2", 48, 2048, 1e-3),
    "mamba2-2.7b": ("mamba2", 64, 2560, 8e-4),
}
ROWS = {"mamba": 50280, "mamba2": 50288}
"""Rows of the embeddings: 50,277 ids, padded to multiples of 8 and 16."""
LEAST_LR = 1e-5
"""The last learning rate of all of them; arXiv:2312.00752, appendix E.2.1."""


def published_shape(family: str, layers: int, width: int, lr: float) -> Published:
    """A model of 300B tokens of the Pile in rows of 2,048, half a million a step."""
    options: dict[str, Any] = {"tie_word_embeddings": True}
    rest = (ROWS[family], lr, 3e11, M // 2, 2048, options)
    return Published(family, layers, width, 0, *rest, min_lr_share=LEAST_LR / lr)


STATE_SPACES = {name: published_shape(*shape) for name, shape in SHAPES.items()}
