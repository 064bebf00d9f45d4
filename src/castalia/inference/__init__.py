"""Texts out of checkpoints: `load`, `LanguageModel`, exports to Hugging Face and CTranslate2.

What needs torch is imported when it is asked for.
"""

from typing import TYPE_CHECKING

from castalia.core.lazy import lazy

if TYPE_CHECKING:
    from castalia.inference.ct2 import Ct2Model
    from castalia.inference.ct2_hub import GeneratorCT2fromHfHub, TranslatorCT2fromHfHub
    from castalia.inference.decoding import Completion
    from castalia.inference.exports import Exported, export
    from castalia.inference.fidelity import parity
    from castalia.inference.language_model import LanguageModel
    from castalia.inference.loading import load

__all__ = [
    "Completion",
    "Ct2Model",
    "Exported",
    "GeneratorCT2fromHfHub",
    "LanguageModel",
    "TranslatorCT2fromHfHub",
    "export",
    "load",
    "parity",
]

PLACES = {
    "Completion": "decoding",
    "Ct2Model": "ct2",
    "Exported": "exports",
    "GeneratorCT2fromHfHub": "ct2_hub",
    "LanguageModel": "language_model",
    "TranslatorCT2fromHfHub": "ct2_hub",
    "export": "exports",
    "load": "loading",
    "parity": "fidelity",
}

__getattr__ = lazy(__name__, PLACES)
