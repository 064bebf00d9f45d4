"""Checkpoints as other programs read them: Hugging Face, CTranslate2, GGUF and native files.

Names are imported when first used, so that the package loads without torch.
"""

from typing import TYPE_CHECKING

from castalia.core.lazy import lazy

if TYPE_CHECKING:
    from castalia.export.ct2_hub import GeneratorCT2fromHfHub, TranslatorCT2fromHfHub
    from castalia.export.exports import Exported, export
    from castalia.export.quality import parity

__all__ = ["Exported", "GeneratorCT2fromHfHub", "TranslatorCT2fromHfHub", "export", "parity"]

PLACES = {
    "Exported": "exports",
    "GeneratorCT2fromHfHub": "ct2_hub",
    "TranslatorCT2fromHfHub": "ct2_hub",
    "export": "exports",
    "parity": "quality",
}
__getattr__ = lazy(__name__, PLACES)
