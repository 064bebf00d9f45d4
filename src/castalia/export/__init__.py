"""Checkpoints as other programs read them, and models of other programs as our checkpoints.

Names are imported when first used, so that the package loads without torch.
"""

from typing import TYPE_CHECKING

from castalia.core.lazy import lazy

if TYPE_CHECKING:
    from castalia.export.ct2_hub import GeneratorCT2fromHfHub, TranslatorCT2fromHfHub
    from castalia.export.exports import export
    from castalia.export.importing import Imported, import_model
    from castalia.export.push import Push
    from castalia.export.quality import parity
    from castalia.export.record import Exported

__all__ = [
    "Exported",
    "GeneratorCT2fromHfHub",
    "Imported",
    "Push",
    "TranslatorCT2fromHfHub",
    "export",
    "import_model",
    "parity",
]

PLACES = {
    "Exported": "record",
    "GeneratorCT2fromHfHub": "ct2_hub",
    "Imported": "importing",
    "Push": "push",
    "TranslatorCT2fromHfHub": "ct2_hub",
    "export": "exports",
    "import_model": "importing",
    "parity": "quality",
}
__getattr__ = lazy(__name__, PLACES)
