"""Tokens to text while they arrive: whole characters only, and nothing that may still become a stop string."""

from collections.abc import Callable, Sequence

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are not yet a whole character."""


class TextStream:
    """Turns one row's tokens into pieces of text; the pieces joined are the decoded text, cut before a stop string.

    A character whose last bytes are still to come is held back, and so is an ending that a stop string may begin with.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode = decode
        self.stop = [text for text in stop if text]
        self.tokens: list[int] = []
        self.context = 0
        """First token of the window that is decoded again: decoders treat a token differently after another one."""
        self.read = 0
        """Tokens whose text is in `text`."""
        self.text = ""
        """Everything decoded so far, what is held back included."""
        self.released = 0
        """Characters of `text` that were handed out."""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one token; return the text that is certain now, which may be empty."""
        assert not self.stopped, "a stop string ended this text"
        self.tokens.append(token)
        self.decode_more(final=False)
        return self.release(final=False)

    def finish(self) -> str:
        """No more tokens: return what was held back, broken characters included."""
        if not self.stopped:
            self.decode_more(final=True)
        return self.release(final=True)

    def decode_more(self, *, final: bool) -> None:
        """Move the text of new tokens into `text`, unless it ends inside a character."""
        known = self.decode(self.tokens[self.context : self.read])
        longer = self.decode(self.tokens[self.context :])
        if final or not longer.endswith(BROKEN):
            self.text += longer[len(known) :]
            self.context, self.read = self.read, len(self.tokens)

    def release(self, *, final: bool) -> str:
        """Hand out what no stop string can take back."""
        # A stop string can only begin in what is not released: anything earlier would have been held back.
        found = [at for text in self.stop if (at := self.text.find(text, self.released)) >= 0]
        if found and not self.stopped:
            self.stopped = True
            self.text = self.text[: min(found)]
        end = len(self.text) if final or self.stopped else len(self.text) - self.held_back()
        piece = self.text[self.released : end]
        self.released = end
        return piece

    def held_back(self) -> int:
        """Length of the longest ending of the text that is the beginning of a stop string."""
        tail = self.text[self.released :]
        lengths = (
            n
            for text in self.stop
            for n in range(min(len(text) - 1, len(tail)), 0, -1)
            if tail.endswith(text[:n])
        )
        return max(lengths, default=0)
