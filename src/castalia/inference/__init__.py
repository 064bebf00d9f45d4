"""Generation and scoring of text: `load`, `LanguageModel`, and the engines behind them.

Names are imported when first used, so that the package loads without torch.
"""

from typing import TYPE_CHECKING

from castalia.core.lazy import lazy

if TYPE_CHECKING:
    from castalia.inference.decoding import Completion
    from castalia.inference.language_model import LanguageModel
    from castalia.inference.loading import load

__all__ = ["Completion", "LanguageModel", "load"]

PLACES = {
    "Completion": "decoding",
    "LanguageModel": "language_model",
    "load": "loading",
}
__getattr__ = lazy(__name__, PLACES)
