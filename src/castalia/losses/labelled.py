"""What a run on answers with a label needs of its data. Needs no torch."""

from castalia.data.config import DataConfig
from castalia.losses.loss import LOSSES, LossConfig


def labelled_problems(data: DataConfig, loss: LossConfig, rows: int) -> list[str]:
    """What answers with a label need, and a loss of them; `rows` are those of a micro-batch."""
    kind = loss.kind
    reads = LOSSES[kind].rows
    if reads != "labelled":
        others = ", ".join(name for name in LOSSES if LOSSES[name].rows == "labelled")
        return [
            f"loss.kind {kind} reads {reads}, but data.labelled has answers with a label; choose a"
            f" loss of these: {others}"
        ]
    problems = []
    if named := without_labels(data):
        problems.append(
            f"loss.kind {kind} reads answers with a label, but data.{named} has none; name them in"
            " data.labelled, or give data.rewards, a number for each document"
        )
    if data.packing != "unpacked" or data.order != "neox":
        problems.append(
            f"loss.kind {kind} needs each answer in a row of its own: set data.packing=unpacked and"
            " data.order=neox"
        )
    if getattr(loss, "kl", None) == "halves" and rows < 2:
        problems.append(
            "loss.kl=halves compares the halves of a micro-batch, which has one row; raise"
            " train.micro_batch_size, or set loss.kl=mismatched"
        )
    return problems


def without_labels(data: DataConfig) -> str | None:
    """The data that a config names without labels; None if they have some, or none are named."""
    if data.labelled:
        return None
    if data.texts:
        return data.texts[0]
    if data.train:
        return None if data.rewards else "train without rewards"
    return "corpus" if data.corpus else None
