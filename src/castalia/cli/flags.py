"""Options of a command in groups: a dataclass as a parameter stands for its fields, each an option of its own."""

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer takes it; it is called with its dataclasses, built out of the options."""
    signature, hints = inspect.signature(command), get_type_hints(command, include_extras=True)
    groups = {name: hints[name] for name in signature.parameters if is_dataclass(hints[name])}

    @wraps(command)
    def run(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        command(**values)

    found = [parameter for name, parameter in signature.parameters.items() if name not in groups]
    for kind in groups.values():
        hints |= (own := get_type_hints(kind, include_extras=True))
        kinds = inspect.Parameter.KEYWORD_ONLY
        found += [
            inspect.Parameter(f.name, kinds, default=f.default, annotation=own[f.name])
            for f in fields(kind)
        ]
    run.__signature__ = signature.replace(parameters=found)  # type: ignore[attr-defined]
    run.__annotations__ = {name: hint for name, hint in hints.items() if name not in groups}
    return run
