"""Texts out of checkpoints: `load`, `LanguageModel`, exports to Hugging Face and CTranslate2.

What needs torch is imported when it is asked for.
"""

from typing import TYPE_CHECKING

from castalia.core.lazy import lazy

if TYPE_CHECKING:
    from castalia.inference.ct2 import Ct2Model
    from castalia.inference.decoding import Completion
    from castalia.inference.exports import Exported, export
    from castalia.inference.language_model import LanguageModel
    from castalia.inference.source import load

__all__ = ["Completion", "Ct2Model", "Exported", "LanguageModel", "export", "load"]

PLACES = {
    "Completion": "decoding",
    "Ct2Model": "ct2",
    "Exported": "exports",
    "LanguageModel": "language_model",
    "export": "exports",
    "load": "source",
}

__getattr__ = lazy(__name__, PLACES)
