"""Tokens to text as they arrive: whole characters, and nothing that may become a stop string."""

from collections.abc import Callable, Sequence
from copy import copy

from castalia.tokenizers.token_texts import BROKEN


class TextStream:
    """Turns the tokens of one text into pieces; joined, they are the decoded text before a stop.

    Two things are held back: a character whose last bytes have not arrived, and an ending that may
    be the beginning of a stop string.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: Sequence[str] = (),
        context: Sequence[int] = (),
        *,
        keep_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """`context` are the tokens before the text; they are decoded with it, but not returned."""
        self.decode = decode
        self.keep_stop = keep_stop
        """Whether the stop string that ends the text is part of it."""
        # An empty stop string would end every text at once.
        self.stop = [text for text in stop if text]
        # A prompt that ends inside a character has no text that could be continued.
        is_broken = decode(list(context)).endswith(BROKEN)
        self.before = () if is_broken else tuple(context)
        """Tokens before the text."""
        self.tokens = list(self.before)
        self.context = 0
        """First token of the window that is decoded again. Decoders write a token differently at
        the beginning of a text, so the window reaches back to tokens that are known."""
        self.read = len(self.tokens)
        """Number of tokens whose text is in `text`."""
        self.earliest = len(self.tokens) + min_tokens
        """A stop string that ends within this many tokens is text like any other."""
        self.too_early = 0
        """Number of characters of those tokens."""
        self.text = ""
        """Everything decoded so far, including the part held back."""
        self.released = 0
        """Number of characters of `text` that were returned."""
        self.stopped = False

    def fork(self) -> "TextStream":
        """A copy that goes on by itself."""
        twin = copy(self)
        # All else that changes are numbers and texts.
        twin.tokens = list(self.tokens)
        return twin

    def push(self, token: int) -> str:
        """Take one token; return the text that is certain now, which may be empty."""
        assert not self.stopped, "a stop string ended this text"
        self.tokens.append(token)
        self.decode_more(final=False)
        return self.release(final=False)

    def finish(self) -> str:
        """End the text: return the part held back, with broken characters."""
        if not self.stopped:
            self.decode_more(final=True)
        return self.release(final=True)

    def decode_more(self, *, final: bool) -> None:
        """Move the text of new tokens into `text`, unless it ends inside a character."""
        known = self.decode(self.tokens[self.context : self.read])
        longer = self.decode(self.tokens[self.context :])
        # A window that ends inside a character waits for its last bytes.
        if final or not longer.endswith(BROKEN):
            self.text += longer[len(known) :]
            self.context = self.read
            self.read = len(self.tokens)
        if len(self.tokens) <= self.earliest:
            self.too_early = len(self.text)

    def release(self, *, final: bool) -> str:
        """Return the text that no stop string can take back."""
        if not self.stopped:
            cuts = [cut for text in self.stop if (cut := self.cut(text)) is not None]
            if cuts:
                self.stopped = True
                self.text = self.text[: min(cuts)]
        end = len(self.text)
        if not final and not self.stopped:
            end -= self.held_back()
        piece = self.text[self.released : end]
        self.released = end
        return piece

    def cut(self, stop: str) -> int | None:
        """Where a stop string ends the text; None if it does not occur."""
        # Behind the released text: an earlier beginning would have been held back.
        start = self.text.find(stop, max(self.released, self.too_early - len(stop) + 1))
        if start < 0:
            return None
        if self.keep_stop:
            return start + len(stop)
        return start

    def held_back(self) -> int:
        """Length of the longest ending of the text that is the beginning of a stop string."""
        tail = self.text[self.released :]
        longest = 0
        for text in self.stop:
            for length in range(min(len(text) - 1, len(tail)), longest, -1):
                if tail.endswith(text[:length]):
                    longest = length
                    break
        return longest


def shared(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the common beginning of two texts, or of their tokens."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
