"""`Changes`: which keys of a run's config may change when the run is resumed.

    steps: Annotated[PositiveInt, AT_RESUME] = 143000
    guard: Annotated[GuardConfig, AT_RESUME] = GuardConfig()

The mark stands on the field itself, or on a section for all that is inside. A field without a mark
alters the model, the update rule or the data order, and stays as it is for the whole run.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from castalia.config.fields import sections


@dataclass(frozen=True)
class Changes:
    """Marks a field by when its value may change; the innermost mark of a key decides."""

    when: Literal["never", "at resume"]


AT_RESUME = Changes("at resume")


def may_change(kind: type[BaseModel], key: str) -> bool:
    """Whether the dotted `key` of a config of class `kind` may change when a run is resumed.

    An unknown key may not. A key of a plain mapping, such as `launch.environment.PATH`, follows
    the field that holds the mapping.
    """
    free = False
    classes: list[type[BaseModel]] = [kind]
    for name in key.split("."):
        fields = [cls.model_fields[name] for cls in classes if name in cls.model_fields]
        marks = [mark for field in fields for mark in field.metadata if isinstance(mark, Changes)]
        if marks:
            # A section chosen by name has several classes: one that says "never" holds for all.
            free = all(mark.when == "at resume" for mark in marks)
        classes = [section for field in fields for section in sections(field)]
    return free
