"""The form of a text: a JSON schema, a choice, a regular expression or a grammar.

llguidance compiles the form and tells, after any tokens of a text, which tokens may follow.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.core.extras import require
from castalia.inference.text import shared
from castalia.tokenizers.forms import OtherTokenizer
from castalia.tokenizers.tokenizer import Tokenizer

BLANKS = r"( |\n[ \t]{0,12})"
"""White space between the parts of JSON: a space, or a line break and an indent. JSON allows any
amount, with which a weak model fills its whole budget."""
LARGEST = 1 << 16
"""Characters of a form. A schema with twice as many, all properties, compiles for 17 s."""
MOST_RULES = 500
"""Rules of a grammar, and references in a JSON schema. The library follows them by recursion: where
1,000 schemas name one another, a thread's stack overflows, and the process ends."""
NO_TEXT = "NoExtensionBias"
"""llguidance's reason where no token may follow."""
PURPOSE = "a text of a given form (JSON, a choice, a regular expression, a grammar)"


class GrammarError(ConfigError):
    """No token may come next, or the form is more than llguidance can follow."""


class Grammars:
    """Compiles forms for the tokens of one model.

    Takes   size: ids that can be drawn. ends: ids that end a text.
    Raises  ConfigError if llguidance is not installed, the tokenizer has no tokenizer.json, or no
            id ends a text.
    """

    def __init__(self, tokenizer: Tokenizer | None, size: int, ends: Sequence[int]) -> None:
        self.library: Any = require("llguidance", "grammar", PURPOSE)
        if tokenizer is None or isinstance(tokenizer, OtherTokenizer):
            raise ConfigError(f"{PURPOSE} needs a model with a tokenizer.json")
        if not ends:
            raise ConfigError(f"{PURPOSE} needs a tokenizer with an end-of-document token")
        self.size = size
        try:
            self.tokens = self.library.LLTokenizer(
                tokenizer.inner.to_str(), n_vocab=size, eos_token=list(ends)
            )
        except Exception as error:  # the library raises its own and plain exceptions
            raise ConfigError(
                f"{PURPOSE}: llguidance cannot read this tokenizer ({error})"
            ) from None

    def json(self, schema: Mapping[str, Any] | str, *, blanks: str | None = BLANKS) -> "Grammar":
        """Text that is JSON of a schema; `blanks` is the expression of its white space, or None."""
        options = {"whitespace_flexible": blanks is not None, "whitespace_pattern": blanks}
        try:
            if isinstance(schema, str):
                # Read, so that references are counted however they are spelled.
                schema = json.loads(schema)
            text = json.dumps(schema)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the JSON schema cannot be used: {error}") from None
        require_few(text.count('"$ref"'), "the JSON schema", "references")
        try:
            source = self.library.LLMatcher.grammar_from_json_schema(text, defaults=options)
        except ValueError as error:
            raise ConfigError(f"the JSON schema cannot be used: {error}") from None
        return self.compiled("JSON schema", source)

    def choice(self, texts: Sequence[str]) -> "Grammar":
        """One of these texts."""
        # One terminal: thousands of alternatives of a rule would exceed the parser's limit.
        rules = "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(text) for text in texts)
        return self.compiled("choice", self.library.LLMatcher.grammar_from_lark(rules))

    def regex(self, expression: str) -> "Grammar":
        """Text that a regular expression of Rust's syntax matches whole."""
        return self.compiled("regular expression", self.library.grammar_from("regex", expression))

    def grammar(self, rules: str) -> "Grammar":
        """Text of a grammar in Lark's form, or in GBNF."""
        # One a line in Lark and one a ::= in GBNF; and references of schemas within.
        marks = ("\n", "\r", "::=", "$ref", "\\u")
        require_few(max(rules.count(mark) for mark in marks), "the grammar", "rules")
        try:
            source = self.library.grammar_from("grammar", rules)
        except ValueError as error:
            raise ConfigError(f"the grammar cannot be used: {error}") from None
        return self.compiled("grammar", source)

    def compiled(self, kind: str, source: str) -> "Grammar":
        """The form, ready for use.

        Raises  ConfigError if it is not valid, or more than the library can do.
        """
        if len(source) > LARGEST:
            raise ConfigError(
                f"the {kind} has {len(source):,} characters; at most {LARGEST:,} are compiled"
            )
        matcher = self.library.LLMatcher(self.tokens, source, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"the {kind} cannot be used: {first_line(matcher.get_error())}")
        grammar = Grammar(matcher, self.size)
        # A form that no text has is found only when it is asked for a token.
        try:
            grammar.matcher().allowed([])
        except GrammarError as error:
            raise ConfigError(f"the {kind} cannot be used: {error}") from None
        return grammar


@dataclass(frozen=True, eq=False)
class Grammar:
    """The form of a text; each text follows it with a `TextMatcher` of its own."""

    start: Any
    """llguidance's matcher before the first token."""
    size: int

    def matcher(self) -> "TextMatcher":
        """The state before the first token of a text."""
        return TextMatcher(self.start.deep_copy(), self.size)


class TextMatcher:
    """How far one text has come in its form."""

    def __init__(self, matcher: Any, size: int) -> None:
        self.matcher = matcher
        self.read: list[int] = []
        words = (size + 31) // 32
        # llguidance writes one bit a token, in words of 32.
        self.bits = torch.zeros(words, dtype=torch.int32)
        self.size = size

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        """Which tokens may follow the text so far: (V,) bool.

        The text may be any that the form allows: rejected guesses are taken back.
        Raises  GrammarError if nothing may follow, or the form turns out too large.
        """
        # Speculative decoding asks after guesses, then without the ones that the model rejected.
        common = shared(self.read, tokens)
        if common < len(self.read):
            self.matcher.rollback(len(self.read) - common)
        rest = list(tokens[common:])
        # A draft may guess on after the end of the text, where nothing is left to read.
        taken = self.matcher.try_consume_tokens(rest)
        if taken < len(rest) and not self.matcher.is_stopped():
            # Every token came out of a mask of this form: the library gave up on the way, as it
            # does with a beam of a form whose expressions are too many.
            raise GrammarError("the form is too large to follow; make it simpler")
        self.read = list(tokens[: common + taken])
        self.matcher.unsafe_compute_mask_ptr(self.bits.data_ptr(), self.bits.nbytes)
        if self.matcher.is_error():
            reason = first_line(self.matcher.get_error())
            if reason == NO_TEXT:
                reason = "no text has this form"
            raise GrammarError(reason)
        return unpacked(self.bits)[: self.size]


def require_few(count: int, what: str, of: str) -> None:
    """Raises  ConfigError if a form has so many rules that they could overflow the stack."""
    if count > MOST_RULES:
        raise ConfigError(f"{what} has {count:,} {of}; at most {MOST_RULES:,} are compiled")


def unpacked(words: Tensor) -> Tensor:
    """The bits of int32 words (W,), lowest first: (32 W,) bool."""
    places = torch.arange(32, dtype=torch.int32)
    return (words[:, None] >> places & 1).bool().flatten()


def first_line(message: str) -> str:
    """The first line of an error; the rest is llguidance's state."""
    return message.strip().split("\n")[0]
