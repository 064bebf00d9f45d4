"""The names of the harness's own tasks, read from 14,000 files in half a second.

The harness parses all of them as YAML, which takes seven seconds. A name needs five keys of a file
alone, which stand at the beginning of lines.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from lm_eval import tasks
from lm_eval.tasks._index import Entry, TaskIndex

KEYS = re.compile(
    r"""^["']?(task|group|tag|include|class)["']?[ \t]*:[ \t]*"""
    r"""(?P<value>[^\n]*(?:\n[ \t]*- [^\n]*)*)""",
    re.M,
)
"""A key with its value: the rest of the line, or the lines of a list."""
PLAIN = re.compile(r"[A-Za-z_][\w./-]*")
"""A value that is the same text in YAML."""


@lru_cache(maxsize=1)
def own_tasks() -> dict[str, Entry]:
    """Every task, group and tag of the harness by name, as its TaskManager indexes them.

    Source  lm-eval 0.4.13, tasks/_index.py: TaskIndex.build.
    """
    index: dict[str, Entry] = {}
    known: dict[Path, dict[str, Any]] = {}
    root = Path(tasks.__file__).parent
    for path in sorted(root.rglob("*.yaml"), key=lambda path: path.as_posix()):
        config = with_included(path, known)
        if any(key in config for key in ("task", "group", "class")):
            try:
                TaskIndex.process_cfg(config, path, index)
            except (TypeError, KeyError, ValueError):
                # The harness leaves such a file out.
                continue
    for entry in index.values():
        # These are not the whole config, which is read from the file.
        entry.cfg = None
    return index


def with_included(path: Path, known: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """The keys of a file and of those that it includes; its own win."""
    if path in known:
        return known[path]
    # Against files that include one another.
    known[path] = {}
    try:
        own = keys_of(path.read_text(encoding="utf-8"))
    except OSError:
        return {}
    keys: dict[str, Any] = {}
    included = own.pop("include", None) or []
    for name in [included] if isinstance(included, str) else included:
        keys |= with_included((path.parent / name).resolve(), known)
    known[path] = keys | own
    return known[path]


def keys_of(text: str) -> dict[str, Any]:
    """The five keys of a file's text, those that it has."""
    keys: dict[str, Any] = {}
    for found in KEYS.finditer(text):
        value = found["value"]
        if PLAIN.fullmatch(value.strip()):
            keys[found[1]] = value.strip()
            continue
        try:
            # Lists and quotes are YAML; `!function` and its like are not needed.
            keys[found[1]] = yaml.load(value.replace("!", ""), yaml.CSafeLoader)
        except yaml.YAMLError:
            keys[found[1]] = value
    return keys
