"""The Jinja environment of chat templates, as transformers sets it up.

Source  transformers 5.23, utils/chat_template_utils.py: `_cached_compile_jinja_template`.
"""

import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

from castalia.core.errors import ConfigError
from castalia.core.extras import require


@lru_cache(maxsize=16)
def compiled(text: str, where: str) -> Any:
    """The template, ready to render; `where` names it in errors.

    Raises  ConfigError if it is not a valid Jinja template, or jinja2 is not installed.
    """
    jinja2 = require("jinja2", "chat", f"the chat template {where}")
    try:
        return environment(where).from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"{where}: line {error.lineno}: invalid Jinja template: {error.message}"
        ) from None
    # A {% break %} outside a loop, or nesting beyond what Python compiles.
    except (SyntaxError, RecursionError, ValueError) as error:
        raise ConfigError(f"{where}: invalid Jinja template: {error}") from None


@lru_cache(maxsize=16)
def names_read(text: str, where: str) -> frozenset[str]:
    """The variables and functions that a template reads without setting them first."""
    meta = require("jinja2.meta", "chat", f"the chat template {where}")
    sandboxed = environment(where)
    sandboxed.globals.clear()  # they would not be listed
    return frozenset(meta.find_undeclared_variables(sandboxed.parse(text)))


def environment(where: str) -> Any:
    """A sandbox with the globals and filters that templates of the hub rely on."""
    jinja2 = require("jinja2", "chat", f"the chat template {where}")
    sandbox = require("jinja2.sandbox", "chat", f"the chat template {where}")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    # Templates come from downloaded folders: the sandbox denies them Python's internals.
    @jinja2.pass_context
    def unchanged(context: Any, value: Any) -> Any:
        return value

    # Nothing is computed while a template is compiled, before any limit of the server holds: no
    # optimizer, and a function that needs the context before each output.
    sandboxed = sandbox.ImmutableSandboxedEnvironment(
        optimized=False,
        finalize=unchanged,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", generation_blocks()],
    )
    sandboxed.globals["raise_exception"] = raise_exception
    sandboxed.globals["strftime_now"] = clock()
    sandboxed.globals["dict"] = PlainDict()
    sandboxed.globals["namespace"] = guarded_namespace()
    sandboxed.filters["tojson"] = as_json
    return sandboxed


def clock(moment: str | None = None) -> Callable[[str], str]:
    """The function `strftime_now`, at a fixed `moment` in ISO 8601 or at the clock's."""

    def strftime_now(form: str) -> str:
        now = datetime.now() if moment is None else datetime.fromisoformat(moment)
        return now.strftime(form)

    return strftime_now


class PlainDict:
    """`dict` without the attributes of a type."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As dict.fromkeys."""
        return dict.fromkeys(*args)


def guarded_namespace() -> Any:
    """Jinja's `namespace`, which may not hold names of Python's internals."""
    jinja2 = require("jinja2", "chat", "a chat template")

    class Namespace(jinja2.utils.Namespace):  # type: ignore[name-defined]
        """A namespace whose names do not begin with an underscore."""

        # Positional alone, so that a template may set an attribute named `self`.
        def __init__(self, /, *args: Any, **values: Any) -> None:
            super().__init__()
            for name, value in dict(*args, **values).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(
                    f"a namespace cannot hold {name!r}: names with an underscore in front are"
                    " Python's"
                )
            super().__setitem__(name, value)

    return Namespace


def generation_blocks() -> Any:
    """The tag {% generation %}, which marks the assistant's words in some templates.

    Its content is rendered unchanged, in a scope of its own.
    """
    extensions: Any = require("jinja2.ext", "chat", "a chat template")
    nodes: Any = require("jinja2.nodes", "chat", "a chat template")

    class Generation(extensions.Extension):
        """{% generation %} ... {% endgeneration %}."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            """The nodes between the tags, called as the body of a macro."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

        def content(self, caller: Any) -> Any:
            """The rendered content."""
            return caller()

    return Generation


def as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`; Jinja's own escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
