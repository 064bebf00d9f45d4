"""The numbers of records beside their texts: labels of answers, margins of pairs."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from castalia.corpus.documents import BadDocumentError


def label_of(values: Mapping[str, Any]) -> float:
    """1 of a desirable answer, -1 of an undesirable one.

    Raises  BadDocumentError if the label is neither true nor false.
    """
    if values.get("label") is None:
        existing = ", ".join(sorted(values)) or "none"
        raise BadDocumentError(
            "a labelled answer needs the key 'label', true if it is desirable and false if not;"
            f" keys: {existing}"
        )
    label = values["label"]
    # True and 1 are equal in Python, and so are False and 0.
    if not isinstance(label, bool | int) or label not in (0, 1):
        raise BadDocumentError(f"'label' is {label!r}, expected true or false, or 1 or 0")
    if label:
        return 1.0
    return -1.0


def margin_of(values: Mapping[str, Any]) -> float:
    """How much better the preferred answer is said to be; 0 without a word on it.

    Raises  BadDocumentError if that is not a finite number.
    """
    margin = values.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not isfinite(margin):
        raise BadDocumentError(f"'margin' is {margin!r}, expected a finite number")
    return float(margin)
