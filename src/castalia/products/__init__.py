"""The products of linear layers in float32, by torch's library or by oneDNN."""

from castalia.products.linear import (
    ONEDNN,
    TORCH,
    WIDE,
    OnednnLinear,
    Products,
    head_products,
    use_onednn,
)

__all__ = [
    "ONEDNN",
    "TORCH",
    "WIDE",
    "OnednnLinear",
    "Products",
    "head_products",
    "use_onednn",
]
