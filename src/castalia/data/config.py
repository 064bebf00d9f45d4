"""The config section `data`: token files, their order and how they are cut into rows."""

import math
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from castalia.config.base import Config
from castalia.config.changes import AT_RESUME
from castalia.config.kinds import Kind
from castalia.data.intervention_config import INTERVENTIONS, InterventionConfig


def as_list(value: object) -> object:
    """A single path means a list of one."""
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], BeforeValidator(as_list)]
TokenName = Annotated[str, BeforeValidator(str)]
"""A token by its text or its id."""
TEXTS = ("chat", "pairs", "labelled", "prompts")
"""Fields with files of text that become token files at the start of a run."""

OF_ONE_ROLE = (
    "train",
    "labels",
    "label_weights",
    "rewards",
    "mismatched",
    "mismatched_labels",
    "chosen",
    "rejected",
    "chosen_labels",
    "rejected_labels",
    "chosen_reference",
    "rejected_reference",
)
PREFIXES = (*OF_ONE_ROLE, "valid", *(f"valid_{name}" for name in OF_ONE_ROLE[1:]))
"""Fields with prefixes of token files."""

PAIR_PACKINGS = ("unpacked", "pack_until_overflow")
"""Packings under which both answers of a pair fill rows of their own."""
SIDES = [
    (f"{role}chosen{files}", f"{role}rejected{files}")
    for role in ("", "valid_")
    for files in ("", "_labels", "_reference")
]
"""Fields of the two sides of pairs, which name as many files."""
PAIRED_NAMES = {
    "train": "chosen and rejected",
    "valid": "valid_chosen and valid_rejected",
    "labels": "chosen_labels and rejected_labels",
    "valid_labels": "valid_chosen_labels and valid_rejected_labels",
}
"""Field of texts -> the fields of pairs in its place."""


class DataConfig(Config):
    """Token files, their weights and the packing. Only data/ reads these fields."""

    seq_length: PositiveInt = 2048
    """Tokens of a row that the model sees. A stored row has one more, the last target."""
    # A resume compares files, labels and weights by content, so their paths may move.
    train: Annotated[Paths, AT_RESUME] = []
    """Prefixes of the .bin/.idx token files to train on, one per source; s3://BUCKET/PREFIX reads
    by range."""
    weights: Annotated[list[float] | None, AT_RESUME] = None
    """Weight of each train source in the blend; null means equal weights. 0 leaves a source out."""
    valid: Annotated[Paths, AT_RESUME] = []
    """Prefixes to validate on. Empty with a single train prefix means its share in `split`."""
    valid_weights: Annotated[list[float] | None, AT_RESUME] = None
    """Weight of each valid source in the blend; null means equal weights. 0 leaves a source out."""
    document_alpha: Annotated[PositiveFloat | None, AT_RESUME] = None
    """Weight every source by its number of documents: with share s of all documents, s to this
    power, times 1 - s, as GPT-NeoX's weight_by_num_documents; in place of weights and
    valid_weights."""
    labels: Annotated[Paths, AT_RESUME] = []
    """Label files, one per train prefix, with one label per token: -100 means that the token is not
    a target. Empty means that every token is a target."""
    valid_labels: Annotated[Paths, AT_RESUME] = []
    """Label files of the valid prefixes; with `split`, `labels` apply to validation too."""
    label_weights: Annotated[Paths, AT_RESUME] = []
    """Files with one number per token, one per train prefix: how much each target counts in the
    loss. Empty means 1. `data.chat` makes them of messages with a weight."""
    valid_label_weights: Annotated[Paths, AT_RESUME] = []
    """Those of the valid prefixes."""
    chat: Annotated[Paths, AT_RESUME] = []
    """Files of conversations to fine-tune on, JSON lines or Parquet, one source each: records with
    `messages`, or `prompt` and `completion`, or `text`. Prepared at the start of the run, once."""
    valid_chat: Annotated[Paths, AT_RESUME] = []
    """Files of conversations to validate on. Empty with a single `chat` means its share in
    `split`."""
    pairs: Annotated[Paths, AT_RESUME] = []
    """Files of preferences: `chosen` and `rejected` answers to a `prompt`."""
    valid_pairs: Annotated[Paths, AT_RESUME] = []
    """Files of preferences to validate on."""
    labelled: Annotated[Paths, AT_RESUME] = []
    """Files of answers with a label: `prompt`, `completion` and `label`."""
    valid_labelled: Annotated[Paths, AT_RESUME] = []
    """Files of answers with a label to validate on."""
    prompts: Annotated[Paths, AT_RESUME] = []
    """Files of prompts that the model answers itself."""
    valid_prompts: Annotated[Paths, AT_RESUME] = []
    """Files of prompts to validate on."""
    chat_template: Annotated[str | None, AT_RESUME] = None
    """A file with a Jinja chat template, or its text, or `plain` or `chatml`; null takes that of
    the tokenizer. Kept with the tokenizer in every checkpoint."""
    chat_roles: Annotated[list[str], AT_RESUME] = ["assistant"]
    """Roles whose messages are targets."""
    chat_only_last: Annotated[bool, AT_RESUME] = False
    """Only the last message of a conversation is a target."""
    prepared_in: Annotated[str | None, AT_RESUME] = None
    """Folder of the token files that are made of `chat`, `pairs`, `labelled` and `prompts`, and of
    `corpus`; null is `data` in the run's folder. Files are found by content, so that several runs
    may share one."""
    chosen: Annotated[Paths, AT_RESUME] = []
    """Token files of the preferred answers of pairs, one per source, in place of `train`: document
    d of one forms a pair with document d of the file of the same place in `rejected`."""
    rejected: Annotated[Paths, AT_RESUME] = []
    """Token files of the rejected answers of pairs, one for each of `chosen`."""
    chosen_labels: Annotated[Paths, AT_RESUME] = []
    """Label files of `chosen`, as `labels` are those of `train`: -100 for a prompt's tokens."""
    rejected_labels: Annotated[Paths, AT_RESUME] = []
    """Label files of `rejected`."""
    chosen_reference: Annotated[Paths, AT_RESUME] = []
    """Log-probabilities under a reference model, one file for each of `chosen`, one float for each
    token: number t is that of token t + 1, in nats."""
    rejected_reference: Annotated[Paths, AT_RESUME] = []
    """Log-probabilities under a reference model, one file for each of `rejected`."""
    valid_chosen: Annotated[Paths, AT_RESUME] = []
    """Preferred answers to validate on."""
    valid_rejected: Annotated[Paths, AT_RESUME] = []
    """Rejected answers to validate on, one file for each of `valid_chosen`."""
    valid_chosen_labels: Annotated[Paths, AT_RESUME] = []
    """Label files of `valid_chosen`; with `split`, `chosen_labels` apply to validation too."""
    valid_rejected_labels: Annotated[Paths, AT_RESUME] = []
    """Label files of `valid_rejected`."""
    valid_chosen_reference: Annotated[Paths, AT_RESUME] = []
    """Log-probabilities under a reference model of `valid_chosen`."""
    valid_rejected_reference: Annotated[Paths, AT_RESUME] = []
    """Log-probabilities under a reference model of `valid_rejected`."""
    rewards: Annotated[Paths, AT_RESUME] = []
    """Files with one number for each document, one per train prefix: above 0 for a desirable
    answer, below 0 for an undesirable one; of pairs, the margin of each. `data.labelled` makes
    them."""
    valid_rewards: Annotated[Paths, AT_RESUME] = []
    """Those of the valid prefixes."""
    mismatched: Annotated[Paths, AT_RESUME] = []
    """Token files of each prompt of `train` with the answer to another one, which `loss.kind=kto`
    estimates its divergence by; the run makes them."""
    mismatched_labels: Annotated[Paths, AT_RESUME] = []
    """Label files of `mismatched`."""
    valid_mismatched: Annotated[Paths, AT_RESUME] = []
    """As `mismatched`, of the valid prefixes."""
    valid_mismatched_labels: Annotated[Paths, AT_RESUME] = []
    """Label files of `valid_mismatched`."""
    split: str | None = None
    """Shares of a single train prefix's documents for train, valid and test: `969, 30, 1`. Null
    trains on all of them."""
    order: Literal["neox", "file"] = "neox"
    """neox packs and shuffles the train documents as GPT-NeoX does. file serves ready rows of
    seq_length + 1 tokens in the order of the train files, such as Pythia's preshuffled ones or
    those of `castalia data materialize`."""
    tokenizer: Annotated[str | None, AT_RESUME] = None
    """A tokenizer.json or its folder, OWNER/NAME of the hub, or `bytes` for the byte-level
    tokenizer; kept with every checkpoint."""
    corpus: str | None = None
    """Corpus built from text on this machine when `train` is empty: `python`, `tiny` or `mini`."""
    fim_rate: float = Field(0.0, ge=0, le=1)
    """Share of the documents that are cut in three with the middle moved to the end, as they are
    served; another pass cuts them elsewhere. `castalia prepare --fim-rate` cuts them once."""
    fim_spm_rate: float = Field(0.5, ge=0, le=1)
    """Share of those in the order suffix, prefix, middle."""
    fim_tokens: tuple[TokenName, TokenName, TokenName] | None = None
    """Tokens before prefix, middle and suffix, by name or id; null looks for known names."""
    # Compared by content, too: in a branch they may be others.
    interventions: Annotated[
        list[Annotated[InterventionConfig, Kind(INTERVENTIONS, "swap")]], AT_RESUME
    ] = []
    """Changes of the training rows from one step to another, each seeing what those before it left:
    swap, regex, function, drop, insert. `castalia intervene` shows what they change."""
    eod_mask_loss: bool = False
    """Exclude from the loss the target after an end-of-document token, as in GPT-NeoX."""
    packing: Literal["packed", "pack_until_overflow", "unpacked", "best_fit"] = "packed"
    """How documents become rows, under order `neox`. packed: one stream, cut every seq_length
    tokens. pack_until_overflow: whole documents until one does not fit. unpacked: one document per
    row. best_fit: the longest documents first, each into the fullest row with room for it, longer
    ones cut. Padding is not a target."""
    allow_chopped: bool = True
    """Use documents longer than a row under other packings than packed: best_fit cuts them, the
    others drop their end. False leaves them out."""
    neox_exact: bool = False
    """Reproduce pack_until_overflow and unpacked with GPT-NeoX's faults: a row with room ends with
    the first token of an unrelated document, the documents of a split are numbered from the file's
    first, and documents whose labels within a row are all -100 are left out."""
    document_mask: Literal["documents", "eod"] | None = None
    """Keep the documents of a row apart: a token attends to its own document only, positions begin
    at 0 in each, and a document's last token does not predict the next document's first.
    `documents` uses the boundaries known to the order; `eod` uses end-of-document ids, which ready
    rows need. Null treats a row as one text, as in GPT-NeoX."""
    order_cache: bool | str = True
    """Where to keep the index maps of large orders (64 MiB and more): true means PREFIX.order
    beside the token file, a path means one folder for all sources, false means nowhere. Maps are
    found by content, so they never go stale."""
    cache: Annotated[str | None, AT_RESUME] = None
    """Folder of what was read of token files in a bucket; null is Castalia's cache folder."""
    cache_gib: Annotated[PositiveFloat | None, AT_RESUME] = None
    """Most of each such file that is kept, in GiB; null keeps all that was read."""
    workers: Annotated[NonNegativeInt, AT_RESUME] = 0
    """Processes that read ahead; 0 reads ahead in a thread of the training process."""
    allow_changed: Annotated[bool, AT_RESUME] = False
    """Resume even though the data differ from the checkpoint's."""
    verify: Annotated[Literal["background", "start", "never"], AT_RESUME] = "background"
    """When files are compared with the SHA-256 that PREFIX.json has of them, or a list
    PREFIX.sha256. Files of up to 64 MiB before the first step; larger ones, which a fingerprint
    samples, in the background of the steps, which damage stops, or all at the start."""

    @model_validator(mode="after")
    def check(self) -> "DataConfig":
        """Check the weights, and fields that exclude each other."""
        self.check_texts()
        self.check_pairs()
        sources = [len(self.train_prefixes), len(self.valid_prefixes)]
        for name in self.texts:
            sources = [len(getattr(self, name)), len(getattr(self, f"valid_{name}"))]
        check_weights("weights", self.weights, sources[0])
        check_weights("valid_weights", self.valid_weights, sources[1])
        if self.document_alpha is not None and (self.weights or self.valid_weights):
            raise ValueError(
                "document_alpha weights the sources by their documents, and weights or"
                " valid_weights by numbers; set one of them to null"
            )
        if self.split is not None and sources[0] > 1:
            raise ValueError(
                "split needs a single train prefix; with several, list the valid prefixes in"
                " data.valid"
            )
        if self.neox_exact and self.packing == "best_fit":
            raise ValueError(
                "neox_exact: GPT-NeoX has no best_fit packing; set neox_exact to false"
            )
        if self.fim_rate and (self.labels or self.texts or self.paired):
            raise ValueError(
                "fim_rate moves tokens within a row, so that labels of tokens, conversations and"
                " pairs lose their places; set fim_rate to 0"
            )
        if self.fim_rate and self.interventions:
            raise ValueError(
                "fim_rate moves the tokens that interventions change; set fim_rate to 0, or remove"
                " interventions"
            )
        if self.order == "file":
            self.check_ready_rows()
        return self

    @property
    def texts(self) -> list[str]:
        """Those of TEXTS that have training files."""
        return [name for name in TEXTS if getattr(self, name)]

    def check_texts(self) -> None:
        """Check the files that are prepared at the start of a run.

        Raises  ValueError.
        """
        if len(self.texts) > 1:
            raise ValueError(
                f"{' and '.join(self.texts)} are rows of different kinds; a run reads one of them"
            )
        idle = [f"valid_{name}" for name in TEXTS if getattr(self, f"valid_{name}")]
        idle = [name for name in idle if name.removeprefix("valid_") not in self.texts]
        if idle:
            name = idle[0].removeprefix("valid_")
            raise ValueError(f"{idle[0]} validates a run on {name}: name its files in {name}, too")

    @property
    def train_prefixes(self) -> list[str]:
        """Token files of the train sources; of pairs, those of the preferred answers."""
        return self.chosen or self.train

    @property
    def valid_prefixes(self) -> list[str]:
        """Token files of the valid sources; of pairs, those of the preferred answers."""
        return self.valid_chosen or self.valid

    @property
    def paired(self) -> bool:
        """Whether the rows are pairs of a preferred and a rejected answer."""
        return bool(self.chosen or self.pairs)

    def check_pairs(self) -> None:
        """Check that both sides of the pairs have as many files, and that nothing else is read.

        Raises  ValueError.
        """
        for chosen, rejected in SIDES:
            counts = [len(getattr(self, name)) for name in (chosen, rejected)]
            if counts[0] != counts[1]:
                raise ValueError(
                    f"{chosen} names {counts[0]} files and {rejected} {counts[1]}, but each file of"
                    " one forms pairs with the file of the same place in the other"
                )
        if self.valid_chosen and not self.paired:
            raise ValueError(
                "valid_chosen: a run that validates on pairs trains on pairs; set chosen"
            )
        if not self.paired:
            return
        for name, names in PAIRED_NAMES.items():
            if getattr(self, name):
                pairs = "chosen" if self.chosen else "pairs"
                raise ValueError(
                    f"{name}: a run reads either texts or pairs, and {pairs} names pairs; use the"
                    f" names of pairs, such as {names}, or remove {pairs}"
                )
        if self.packing not in PAIR_PACKINGS or self.order != "neox":
            raise ValueError(
                f"packing {self.packing} under order {self.order} cannot keep the two answers of a"
                " pair in rows of their own: set data.packing=unpacked, or pack_until_overflow, and"
                " data.order=neox"
            )

    def check_ready_rows(self) -> None:
        """Check for fields that need documents, which ready rows do not have.

        Raises  ValueError.
        """
        if self.packing != "packed":
            raise ValueError(
                f"packing {self.packing} cuts documents into rows, but order `file` serves ready"
                " rows; choose one"
            )
        if self.document_mask == "documents":
            raise ValueError(
                "document_mask `documents`: the documents of ready rows are unknown; use `eod`"
            )
        if self.split is not None:
            raise ValueError(
                "split divides documents, but order `file` serves ready rows; set split to null"
            )


def check_weights(field: str, weights: list[float] | None, sources: int) -> None:
    """Check that there is one weight per source, and that they can be blended.

    Raises  ValueError if not.
    """
    if weights is None:
        return
    if len(weights) != sources:
        raise ValueError(
            f"{field} has {len(weights)} numbers for {sources} sources; give one per source"
        )
    if min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ValueError(f"{field} must be finite numbers >= 0 and not all 0, got {weights}")
