"""Log-probabilities of a text's tokens, each with its own text and place.

The texts of the tokens joined are the text. A token that holds a part of a character is written in
bytes, and stands at the character that it is a part of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from castalia.inference.decoding import FinishReason
from castalia.inference.language_model import LanguageModel
from castalia.inference.text import TextStream, shared
from castalia.serve.scheduler import ServedText
from castalia.serve.scored_tokens import ScoredToken
from castalia.tokenizers.forms import OtherTokenizer
from castalia.tokenizers.token_texts import TokenTexts, spelled


@dataclass
class Candidate:
    """One of the likeliest tokens at a position."""

    token: int
    text: str
    raw: bytes
    logprob: float


@dataclass
class ReportedToken:
    """A token as an answer shows it."""

    token: int
    text: str
    raw: bytes
    """Its UTF-8."""
    offset: int
    """Characters of the answer's text before it."""
    logprob: float | None
    likeliest: list[Candidate] = field(default_factory=list)
    closes: bool = False
    """Whether it ended the text and is not a part of it."""


class Placing:
    """Places tokens in the text that they make, behind `context`, from character `start` on."""

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        texts: TokenTexts | None,
        context: Sequence[int],
        start: int,
    ) -> None:
        self.texts = texts
        self.start = start
        self.stream = TextStream(decode, context=context)
        self.open: list[ReportedToken] = []
        """Tokens of a character that is not whole yet."""

    @property
    def end(self) -> int:
        """Characters before the next token."""
        return self.start + len(self.stream.text)

    def place(self, scored: ScoredToken) -> ReportedToken:
        """The next token. Its offset may still move while it is `open`."""
        before = len(self.stream.text)
        self.stream.push(scored.token)
        raw = self.raw(scored.token)
        token = ReportedToken(
            scored.token, self.text(scored.token), raw, self.start + before, scored.logprob
        )
        self.open.append(token)
        dropped = False
        if self.stream.read == len(self.stream.tokens):
            if len(self.open) == 1 and self.texts is not None:
                # Beginnings of texts are written differently: the decoder has the last word.
                token.text = self.stream.text[before:]
                token.raw = token.text.encode("utf-8")
                dropped = raw == b" " + token.raw
            self.close(before)
        token.likeliest = self.candidates(scored, token, dropped)
        return token

    def close(self, before: int) -> None:
        """Place the tokens of characters that are whole now, the first at character `before`."""
        written = self.stream.text[before:]
        ids = self.stream.tokens[len(self.stream.tokens) - len(self.open) :]
        for number, token in enumerate(self.open[1:], start=1):
            # What the tokens before it have settled: a part of a character settles nothing.
            settled = shared(self.stream.decode(ids[:number]), written)
            token.offset = self.start + before + settled
        self.open = []

    def candidates(
        self, scored: ScoredToken, token: ReportedToken, dropped: bool
    ) -> list[Candidate]:
        """The likeliest tokens at a position; `dropped`: a space before them is not written."""
        likeliest = []
        for other, logprob in scored.top:
            raw = self.raw(other)
            text = self.text(other)
            if other == scored.token:
                raw = token.raw
                text = token.text
            elif dropped:
                raw = raw.removeprefix(b" ")
                text = spelled(raw)
            likeliest.append(Candidate(other, text, raw, logprob))
        return likeliest

    def raw(self, token: int) -> bytes:
        """The bytes of a token; none without a tokenizer."""
        return b"" if self.texts is None else self.texts.bytes_of(token)

    def text(self, token: int) -> str:
        """The text of a token; without a tokenizer, its id."""
        return by_id(token) if self.texts is None else spelled(self.texts.bytes_of(token))

    def closing(self, scored: ScoredToken) -> ReportedToken:
        """A token that ends the text, under its name: it is not a part of the text."""
        name = by_id(scored.token) if self.texts is None else self.texts.name_of(scored.token)
        self.stream.finish()
        token = ReportedToken(scored.token, name, name.encode("utf-8"), self.end, scored.logprob)
        token.closes = True
        token.likeliest = self.candidates(scored, token, dropped=False)
        return token


class TokenReport:
    """The tokens of one text, given out with the text that they are a part of.

    Whether a text arrives in one event or in many, the tokens and their places are the same.
    """

    def __init__(self, model: LanguageModel, served: ServedText, echo: str) -> None:
        texts = model.token_texts
        self.text = served.continuation
        self.tokenizer = model.tokenizer
        self.echo = echo
        self.unscored = 0
        """Tokens of the prompt that are still to come."""
        self.prompt = Placing(model.decode, texts, [], 0)
        self.written = Placing(self.text.stream.decode, texts, self.text.stream.before, len(echo))
        self.context = len(self.written.stream.tokens)
        self.given = len(echo)
        """Characters of the answer's text that were given out."""
        if served.score_prompt:
            # The text of a scored echo is given out with its tokens, that of another before.
            self.unscored = len(served.continuation.ids)
            self.given = 0
        self.waiting: list[ReportedToken] = []

    def take(
        self, text: str, tokens: Sequence[ScoredToken], finish_reason: FinishReason | None
    ) -> list[ReportedToken]:
        """The tokens that begin inside the text given out so far, `text` included.

        Tokens that lie behind a stop string's cut are dropped; those of a character that is not
        whole wait for it.
        """
        self.given += len(text)
        closing = []
        for scored in tokens:
            if self.unscored:
                self.unscored -= 1
                placed = self.prompt.place(scored)
                # An empty prompt starts from a token that is not echoed.
                if self.echo or self.tokenizer is None:
                    self.waiting.append(placed)
                if not self.unscored and self.prompt.stream.text != self.echo:
                    self.place_in_echo()
            elif finish_reason is not None and self.all_placed():
                closing.append(self.written.closing(scored))
            else:
                self.waiting.append(self.written.place(scored))
        count = 0
        while count < len(self.waiting) and self.waiting[count].offset < self.given:
            count += 1
        if finish_reason is not None and not self.text.stream.stopped:
            count = len(self.waiting)
        ready = self.waiting[:count]
        self.waiting = self.waiting[count:]
        return ready + closing

    def place_in_echo(self) -> None:
        """Place the prompt's tokens in the prompt as it was given, which the tokenizer rewrote.

        Composed accents and lower case, for instance, are not what was echoed.
        """
        tokenizer = self.tokenizer
        # Only the tokenizers library tells the place of each token.
        if tokenizer is None or isinstance(tokenizer, OtherTokenizer) or not self.echo:
            return
        encoding = tokenizer.inner.encode(self.echo, add_special_tokens=False)
        if encoding.ids != self.text.ids:
            return
        end = 0
        for token, (begin, next_end) in zip(self.waiting, encoding.offsets, strict=True):
            # Some tokenizers leave out the space that a token begins with.
            token.offset = begin
            if self.echo[end:begin].isspace():
                token.offset = end
            end = next_end

    def all_placed(self) -> bool:
        """Whether every token of the finished text has its place: one more token ended it."""
        return len(self.written.stream.tokens) - self.context == len(self.text.tokens)


def by_id(token: int) -> str:
    """A token by its id, as vLLM writes it."""
    return f"token_id:{token}"
