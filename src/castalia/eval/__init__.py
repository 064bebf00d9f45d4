"""Quality of checkpoints: tasks of lm-evaluation-harness, bits per byte of held-out text, losses by
source.

Public names are imported when they are asked for: the section `eval` of a config needs no torch.
"""

from typing import TYPE_CHECKING

from castalia.core.lazy import lazy

if TYPE_CHECKING:
    from castalia.eval.bits import HeldOut, SourceBits, bits_per_byte
    from castalia.eval.harness.evaluate import Evaluation, evaluate
    from castalia.eval.harness.tasks import TaskSet, open_tasks
    from castalia.eval.reference import reference_losses, write_reference

__all__ = [
    "Evaluation",
    "HeldOut",
    "SourceBits",
    "TaskSet",
    "bits_per_byte",
    "evaluate",
    "open_tasks",
    "reference_losses",
    "write_reference",
]
PLACES = {
    "Evaluation": "harness.evaluate",
    "HeldOut": "bits",
    "SourceBits": "bits",
    "TaskSet": "harness.tasks",
    "bits_per_byte": "bits",
    "evaluate": "harness.evaluate",
    "open_tasks": "harness.tasks",
    "reference_losses": "reference",
    "write_reference": "reference",
}
__getattr__ = lazy(__name__, PLACES)
