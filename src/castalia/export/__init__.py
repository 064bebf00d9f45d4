"""Checkpoints as other programs read them: Hugging Face, CTranslate2, GGUF and native files.

Names are imported when first used, so that the package loads without torch.
"""

from typing import TYPE_CHECKING

from castalia.core.lazy import lazy

if TYPE_CHECKING:
    from castalia.export.ct2_hub import GeneratorCT2fromHfHub, TranslatorCT2fromHfHub
    from castalia.export.exports import export
    from castalia.export.push import Push
    from castalia.export.quality import parity
    from castalia.export.record import Exported

__all__ = [
    "Exported",
    "GeneratorCT2fromHfHub",
    "Push",
    "TranslatorCT2fromHfHub",
    "export",
    "parity",
]

PLACES = {
    "Exported": "record",
    "GeneratorCT2fromHfHub": "ct2_hub",
    "Push": "push",
    "TranslatorCT2fromHfHub": "ct2_hub",
    "export": "exports",
    "parity": "quality",
}
__getattr__ = lazy(__name__, PLACES)
