"""Both ends of a certificate as programs read them: transformers, or Castalia itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.checkpoint.hf import DTYPES
from castalia.core.errors import CastaliaError
from castalia.core.extras import quiet_torchao, require
from castalia.export.certificate import Logits, Reader, own_program, torch_reader
from castalia.formats.saved_model import open_model
from castalia.inference.exported import ExportFolder

AUTO_CLASSES = {
    "vocab": "AutoModelForCausalLM",
    "score": "AutoModelForSequenceClassification",
}
"""The class of transformers that loads a folder, by the model's option `head`."""


def own_reader(written: ExportFolder, note: str | None = None) -> Reader:
    """Castalia's reader of the folder on its torch engine in fp32.

    Takes   note: why the program that the files are made for does not read them.
    """

    def opened() -> Logits:
        try:
            source = open_model(written.folder)
        except CastaliaError as error:
            # The missing program is what the user can mend.
            raise CastaliaError(note or str(error)) from None
        return torch_reader(source).open()

    return Reader(own_program("torch"), "fp32", opened, note)


def transformers_reader(folder: Path, numbers: str, head: str) -> Reader:
    """transformers over a Hugging Face folder, in the dtype that it stores.

    Takes   head: the model's option, which decides the class that loads it.
    """
    library: Any = require("transformers", "hf", "the certificate of a Hugging Face folder")

    def opened() -> Logits:
        # Its first model imports torchao, if that is installed.
        with quiet(library), quiet_torchao():
            try:
                # As it loads the file itself: casting the model afterwards would round its rotary
                # frequencies, too, which stay in fp32.
                model = (
                    getattr(library, AUTO_CLASSES[head])
                    .from_pretrained(folder, local_files_only=True, dtype=DTYPES[numbers])
                    .eval()
                )
            except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError) as error:
                first = str(error).strip().partition("\n")[0]
                raise CastaliaError(
                    f"transformers {library.__version__} cannot load {folder.name}: {first}"
                ) from None

        @torch.inference_mode()
        def logits(ids: Sequence[int]) -> Tensor:
            out: Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()
            return out

        @torch.inference_mode()
        def scores(ids: Sequence[int]) -> Tensor:
            # Its forward pass returns the last score alone.
            hidden = model.base_model(torch.tensor([list(ids)]), use_cache=False)[0][0]
            out: Tensor = model.score(hidden).float()
            return out

        if head == "score":
            return scores
        return logits

    return Reader(f"transformers {library.__version__}", numbers, opened)


@contextmanager
def quiet(library: Any) -> Iterator[None]:
    """Without transformers' progress bars, which would stand between the lines of an export."""
    logging = library.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
