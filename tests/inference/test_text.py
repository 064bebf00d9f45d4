"""TextStream: pieces add up to the text; half characters and possible stops are held back."""

from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.inference.text import TextStream
from castalia.tokenizers.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


def feed(text: str, stop: list[str]) -> tuple[list[str], TextStream]:
    """Every piece of a text that arrives byte by byte."""
    stream = TextStream(BYTES.decode, stop)
    pieces = []
    for token in BYTES.encode(text):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


@given(
    st.text(alphabet="ab🍵é \n", max_size=30),
    st.lists(st.text(alphabet="ab🍵é", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_pieces_are_the_text_up_to_the_first_stop(text: str, stop: list[str]) -> None:
    # Byte by byte, the stop string completed first wins, as for a reader of the stream.
    ends = [(text.find(word) + len(word), text.find(word)) for word in stop if word in text]
    first = min(end for end, _ in ends) if ends else None
    want = text[: min(start for end, start in ends if end == first)] if ends else text
    pieces, stream = feed(text, stop)
    assert "".join(pieces) == want
    assert stream.stopped == bool(ends)


def test_a_character_waits_for_its_last_byte() -> None:
    assert feed("é🍵", [])[0] == ["", "é", "", "", "", "🍵", ""]


def test_an_ending_that_may_become_a_stop_string_waits() -> None:
    assert feed("xENx", ["END"])[0] == ["x", "", "", "ENx", ""]
    assert feed("xEN", ["END"])[0] == ["x", "", "", "EN"]
    assert feed("xEND", ["END"])[0] == ["x", "", "", "", ""]


def test_half_a_character_at_the_end_is_shown_as_broken() -> None:
    stream = TextStream(BYTES.decode)
    assert stream.push(0xF0) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_bytes_that_are_no_text_come_out_as_the_decoder_writes_them() -> None:
    ids = [0x41, 0xFF, 0xC3, 0x42, 0xE2, 0x82, 0x43, 0xF0, 0x9F]
    stream = TextStream(BYTES.decode)
    assert "".join([*(stream.push(i) for i in ids), stream.finish()]) == BYTES.decode(ids)
