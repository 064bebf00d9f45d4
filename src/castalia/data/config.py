"""What is read, in which order, in rows of which length."""

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, NonNegativeInt, PositiveInt, model_validator

from castalia.config.base import Config
from castalia.config.changes import AT_RESUME


def as_list(value: object) -> object:
    """One path stands for a list of one."""
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], BeforeValidator(as_list)]


class DataConfig(Config):
    """Token files, their weights and the packing. Only data/ reads these fields."""

    seq_length: PositiveInt = 2048
    """Tokens in one row that the model sees; a stored row has one more, the last target."""
    # A resume compares files, labels and weights by content, so their paths may move.
    train: Annotated[Paths, AT_RESUME] = []
    """Prefixes of .bin/.idx token files to train on, one a source; each is blended by its weight."""
    weights: Annotated[list[float] | None, AT_RESUME] = None
    """Weight of each train source; null gives every source the same."""
    valid: Annotated[Paths, AT_RESUME] = []
    """Prefixes to validate on; empty with a single train prefix means that prefix's share in `split`."""
    valid_weights: Annotated[list[float] | None, AT_RESUME] = None
    """Weight of each valid source; null gives every source the same."""
    labels: Annotated[Paths, AT_RESUME] = []
    """Label files, one a train prefix, of the same lengths: -100 where a token is no target. Empty: each token is."""
    valid_labels: Annotated[Paths, AT_RESUME] = []
    """Label files of the valid prefixes; with `split`, `labels` hold for validation too."""
    split: str | None = None
    """Documents of a single train prefix for train, valid, test: `969, 30, 1`. Null trains on all of them."""
    order: Literal["neox", "file"] = "neox"
    """neox packs and shuffles the train documents as GPT-NeoX does; file serves ready rows of seq_length + 1 tokens as
    they lie in the train files, such as Pythia's preshuffled ones or those of `castalia data materialize`."""
    tokenizer: Annotated[str | None, AT_RESUME] = None
    """A tokenizer.json, or `bytes` for the byte-level one; kept with every checkpoint."""
    corpus: str | None = None
    """A corpus that Castalia builds out of text on this machine when `train` is empty: `python` or `tiny`."""
    eod_mask_loss: bool = False
    """Leave out of the loss what follows an end-of-document token, as GPT-NeoX's option does."""
    packing: Literal["packed", "pack_until_overflow", "unpacked", "best_fit"] = "packed"
    """How documents become rows, under order `neox`. packed: one stream, cut every seq_length tokens;
    pack_until_overflow: whole documents until one does not fit; unpacked: one document a row; best_fit: each document,
    the longest first, into the fullest row that has room, longer ones cut. What a row lacks is no target."""
    allow_chopped: bool = True
    """Other packings than packed take documents longer than a row: cut by best_fit, without their end by the others.
    False leaves them out."""
    neox_exact: bool = False
    """pack_until_overflow and unpacked as GPT-NeoX has them, faults included: a row with room ends with the first token
    of a document that does not belong to it, documents of a split count from the file's first, and documents whose
    labels within a row are all -100 are left out."""
    document_mask: Literal["documents", "eod"] | None = None
    """Each document of a row by itself: a token attends to its own document alone, positions begin at 0 in each, and
    no last token is asked for the next document's first. `documents` goes by the boundaries that the order knows,
    `eod` by end-of-document ids, which ready rows need. Null: all of a row is one text, as in GPT-NeoX."""
    order_cache: bool | str = True
    """Where the index maps of a large order (64 MB and more) are kept: true is PREFIX.order beside the token file, a
    path is a folder for all sources, false is nowhere. They are found again by content, so none is ever out of date."""
    workers: Annotated[NonNegativeInt, AT_RESUME] = 0
    """Processes that read ahead; 0 reads in the training process."""
    allow_changed: Annotated[bool, AT_RESUME] = False
    """Resume although the data differ from those of the checkpoint."""

    @model_validator(mode="after")
    def check(self) -> "DataConfig":
        """Weights match their sources."""
        for name, paths, weights in (
            ("", self.train, self.weights),
            ("valid_", self.valid, self.valid_weights),
        ):
            if weights is None:
                continue
            if len(weights) != len(paths):
                raise ValueError(
                    f"{name}weights has {len(weights)} numbers for {len(paths)} sources; give one a source"
                )
            if min(weights) < 0 or not 0 < sum(weights) < math.inf:
                raise ValueError(f"{name}weights must be numbers >= 0 and not all 0, got {weights}")
        if self.split is not None and len(self.train) > 1:
            raise ValueError(
                "split needs a single train prefix; with several, name the valid prefixes in data.valid"
            )
        if self.packing != "packed" and self.order == "file":
            raise ValueError(
                f"packing {self.packing} makes rows, but order `file` serves ready ones; choose one"
            )
        if self.neox_exact and self.packing == "best_fit":
            raise ValueError(
                "neox_exact: GPT-NeoX has no packing best_fit; set neox_exact to false"
            )
        if self.document_mask == "documents" and self.order == "file":
            raise ValueError(
                "document_mask `documents`: of ready rows no boundaries are known; write `eod`"
            )
        if self.split is not None and self.order == "file":
            raise ValueError(
                "split divides documents, but order `file` serves ready rows; set split to null"
            )
        return self
