"""What an audit found."""

from typing import Any, NamedTuple


class Finding(NamedTuple):
    """One fault."""

    kind: str
    """`same_weights`, `order`, `missing`, ...; see KINDS."""
    where: str
    """The revision, file or model that it is about."""
    what: str
    """What is wrong, in a sentence."""


KINDS = {
    "damaged": "a file or a checkpoint that cannot be read, or does not have its hash",
    "hash": "a file that differs from the list of hashes, or is in one of the two only",
    "incomplete": "a step that was not saved completely",
    "files": "a file that the other revisions have, or that a manifest does not list",
    "tensors": "a tensor that is missing or more, or has another shape or dtype",
    "config": "a config.json that differs from the other revisions'",
    "not_finite": "weights that are NaN or infinite",
    "same_weights": "two revisions with equal tensors, though the learning rate was not 0",
    "same_shard": "a file with the tensors of another revision",
    "same_tensors": "some tensors that are those of another revision",
    "order": "weights that lie elsewhere on the way than their step says",
    "mixed_shard": "a file whose weights lie elsewhere on the way than the other files'",
    "progress": "a checkpoint whose own record contradicts its step",
    "missing": "revisions of the expected grid that are not there",
    "extra": "revisions that the expected grid does not have",
    "start": "start weights that are not those of the run's seed",
    "descent": "checkpoints that did not begin at their step 0",
    "unfinished": "a member of a suite that lacks steps",
    "member": "a run that is not the member of the suite whose name it has",
    "batches": "members of one stream that read different batches",
}
"""Kind of finding -> what it means."""


class Report(NamedTuple):
    """The outcome of an audit."""

    findings: list[Finding]
    checked: dict[str, int]
    """How much was read: models, revisions, tensors, bytes."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "ok": self.ok,
            "findings": [finding._asdict() for finding in self.findings],
            "checked": self.checked,
        }
