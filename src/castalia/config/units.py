"""The unit of a number in a config, read from its docstring: every field says what it counts.

"Steps between validations; null never validates"    steps
"Longest sequence, in tokens, that ..."              tokens
"Share of the horizon over which the rate rises"     share
"""

import re

NOUNS = {
    "width": "channels",
    "dimension": "channels",
    "channels": "channels",
    "ids": "ids",
    "tokens": "tokens",
    "lengths": "tokens",
    "distance": "tokens",
    "places": "tokens",
    "rows": "rows",
    "documents": "documents",
    "batches": "batches",
    "steps": "steps",
    "step": "steps",
    "updates": "updates",
    "iterations": "iterations",
    "passes": "passes",
    "blocks": "blocks",
    "layers": "layers",
    "heads": "heads",
    "groups": "groups",
    "buckets": "buckets",
    "experts": "experts",
    "mlps": "experts",
    "ranks": "ranks",
    "stages": "stages",
    "copies": "copies",
    "hosts": "hosts",
    "gpus": "GPUs",
    "processes": "processes",
    "threads": "threads",
    "seconds": "seconds",
    "minutes": "minutes",
    "bytes": "bytes",
    "examples": "examples",
    "answers": "answers",
    "samples": "samples",
    "resamples": "samples",
    "checkpoints": "checkpoints",
    "rollbacks": "rollbacks",
    "overflows": "overflows",
    "requests": "requests",
    "files": "files",
    "share": "share",
    "shares": "share",
    "fraction": "share",
    "probability": "share",
    "mass": "share",
    "factor": "factor",
    "times": "times",
}
"""A noun at the head of a docstring -> the unit of the number."""
STATED = re.compile(
    r"\bin (tokens|steps|rows|seconds|minutes|days|bytes|KiB|MiB|GiB|TFLOP/s|nats|bits"
    r"|percent)\b"
)
PREFIX = re.compile(r"^[a-z][\w, -]*: ")
"""The kinds that the text is for: `infinite only: `, `odm, exp3: `."""
ADJECTIVES = """
    number numbers of the a an most maximum minimum largest smallest longest shortest least
    greatest first last optimizer guaranteed equal clean consecutive newton-schulz further earlier
    later every held-out newest likely
"""
"""Words before the noun that do not change the unit."""


def unit_of(text: str) -> str:
    """The unit that the docstring `text` of a number gives; empty for a number without one."""
    sentence = re.split(r"[.;]", PREFIX.sub("", text), maxsplit=1)[0]
    stated = STATED.search(sentence)
    if stated:
        return stated.group(1)
    for word in sentence.split():
        noun = word.strip(",:()`").lower()
        if noun in NOUNS:
            return NOUNS[noun]
        if noun not in ADJECTIVES.split():
            break
    return ""
