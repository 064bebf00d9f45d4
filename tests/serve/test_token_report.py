r"""Log-probabilities of every kind of tokenizer: texts joined are the text, parts `bytes:\xf0`."""

import io
import random
from collections.abc import Callable

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from castalia.inference import LanguageModel
from castalia.inference.decoding import Ending
from castalia.inference.sampling import Sampling
from castalia.models import Decoder, NeoxConfig
from castalia.tokenizers.forms import CharTokenizer, SentencePieceTokenizer
from castalia.tokenizers.tokenizer import Tokenizer, load_tokenizer, train_bpe

pytest.importorskip("fastapi")
from castalia.serve.answers import chat_logprobs, completion_logprobs
from castalia.serve.scheduler import ServedText
from castalia.serve.scored_tokens import ScoredToken
from castalia.serve.token_report import ReportedToken, TokenReport

PROMPT = "The naïve café 🍵"
REST = " owner said: “¡Olé!” and poured 🍵 for two, 日本語 🍵🍵."
LONG = 400


def metaspace() -> Tokenizer:
    """LLaMA's kind: ▁ for a space, bytes for unknown characters, a space before every text."""
    specials = ["<unk>", "<s>", "</s>"]
    names = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    names += sorted({letter for letter in PROMPT + REST if letter.isascii()} - {" "})
    merges = [("▁", "T"), ("▁T", "h"), ("▁Th", "e"), ("▁", "f"), ("a", "n"), ("an", "d")]
    names += [left + right for left, right in merges]
    model = models.BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=merges,
        byte_fallback=True,
        unk_token="<unk>",
    )
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens(specials)
    return Tokenizer(inner.to_str())


def wordpiece() -> Tokenizer:
    """BERT's kind: a space before every token but ##parts."""
    words = [
        "[UNK]",
        "[SEP]",
        "the",
        "naïve",
        "ca",
        "##fé",
        "owner",
        "said",
        "日",
        "##本",
        ",",
        ".",
    ]
    inner = tokenizers.Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=False)
    return Tokenizer(inner.to_str())


def sentencepiece() -> Tokenizer:
    """A .model with byte fallback, run by its own library."""
    library = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(["The owner said and poured for two", "The guest came in late"] * 9),
        model_writer=written,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return SentencePieceTokenizer(written.getvalue(), "a.model")


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": lambda: load_tokenizer("bytes"),
    "char": CharTokenizer,
    "byte-level": lambda: train_bpe([PROMPT + REST] * 3, 300),
    "metaspace": metaspace,
    "wordpiece": wordpiece,
    "sentencepiece": sentencepiece,
}


def model_of(tokenizer: Tokenizer | None, rows: int = 600) -> LanguageModel:
    """A model of this vocabulary; its weights do not matter."""
    config = NeoxConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        vocab_size=rows if tokenizer is None else tokenizer.vocab_size,
        max_position_embeddings=LONG,
    )
    return LanguageModel(Decoder(config), tokenizer)


Tokens = list[ReportedToken]


def reported(
    model: LanguageModel,
    prompt: list[int],
    tokens: list[int],
    ending: Ending = Ending(),
    echo: str = "",
    scored: bool = False,
) -> tuple[str, Tokens, list[tuple[str, Tokens]]]:
    """The text, its tokens in a whole answer, and text and tokens of each chunk of a stream."""
    text = model.continuation(prompt, len(tokens), ending)
    served = ServedText(text, Sampling(), print, model.config.vocab_size, 2, score_prompt=scored)
    likeliest = [(i, -1.5 - i / 1000) for i in range(0, model.config.vocab_size, 7)]
    news = [ScoredToken(token, -1.0, likeliest) for token in prompt if scored]
    stream = TokenReport(model, served, echo)
    chunks: list[tuple[str, Tokens]] = []
    pending: list[ScoredToken] = list(news)
    piece = echo if scored else ""
    for token in tokens:
        news.append(ScoredToken(token, -1.0, likeliest))
        pending.append(news[-1])
        piece += text.push(token)
        chunks.append((piece, stream.take(piece, pending, text.finish_reason)))
        pending = []
        piece = ""
        if text.finish_reason is not None:
            break
    written = text.completion().text
    begun = echo if scored else ""
    whole = TokenReport(model, served, echo).take(begun + written, news, text.finish_reason)
    return written, whole, chunks


@pytest.mark.parametrize("scored", [False, True], ids=["text", "echo"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_joined_tokens_are_the_text(kind: str, scored: bool) -> None:
    model = model_of(KINDS[kind]())
    assert model.tokenizer is not None
    # The rest as it stands behind the prompt: no space of its own before it.
    prompt = model.encode(PROMPT)
    tokens = model.encode(PROMPT + REST)[len(prompt) :]
    echo = model.decode(prompt) if scored else ""
    text, whole, chunks = reported(model, prompt, tokens, echo=echo, scored=scored)
    assert text == model.decode([*prompt, *tokens])[len(model.decode(prompt)) :] != ""
    if kind != "wordpiece":
        assert text == REST
    given = echo + text
    assert b"".join(token.raw for token in whole).decode() == given
    end = 0
    for token in whole:
        if token.text.startswith("bytes:"):
            # A part of a character stands where the character does.
            assert end <= token.offset < len(given)
            escaped = token.text.removeprefix("bytes:")
            assert escaped.encode().decode("unicode_escape").encode("latin-1") == token.raw
        else:
            assert given.startswith(token.text, token.offset)
        end = token.offset
    # In a stream, each token comes with the text that it begins in.
    assert [token for _, tokens in chunks for token in tokens] == whole
    end = 0
    for piece, tokens in chunks:
        assert all(end <= token.offset < end + len(piece) for token in tokens)
        end += len(piece)
    assert end == len(given)
    # Every candidate has a key of its own.
    counted = completion_logprobs(whole)
    assert counted is not None
    for token, named in zip(whole, counted.top_logprobs, strict=True):
        ids = {candidate.token for candidate in token.likeliest} | {token.token}
        assert len(named) == len(ids) and named[token.text] == -1.0


@pytest.mark.parametrize("kind", list(KINDS))
def test_any_tokens_are_the_same_in_a_stream(kind: str) -> None:
    """Broken characters, special tokens, stop strings inside characters."""
    model = model_of(KINDS[kind]())
    draw = random.Random(0)
    endings = [
        Ending(),
        Ending(stop=["e"]),
        Ending(stop=["é", "🍵 for"]),
        Ending(stop=[" "], keep_stop=True),
        Ending(stop=["o"], min_tokens=70),
        Ending(stop_token_ids=[model.encode("o")[-1]], ignore_eos=True, skip_special=True),
    ]
    for ending in endings:
        tokens = [draw.randrange(model.config.vocab_size) for _ in range(60)]
        tokens += model.encode(PROMPT + REST) + tokens[:20]
        text, whole, chunks = reported(model, model.encode("a"), tokens, ending)
        assert "".join(piece for piece, _ in chunks) == text
        assert [token for _, tokens in chunks for token in tokens] == whole
        offsets = [token.offset for token in whole]
        assert offsets == sorted(offsets) and all(offset <= len(text) for offset in offsets)


def test_a_part_of_a_character_is_written_in_bytes() -> None:
    model = model_of(load_tokenizer("bytes"))
    _, whole, _ = reported(model, model.encode("a"), [*"é🍵\\".encode()])
    assert [token.text for token in whole] == [
        "bytes:\\xc3",
        "bytes:\\xa9",
        "bytes:\\xf0",
        "bytes:\\x9f",
        "bytes:\\x8d",
        "bytes:\\xb5",
        "\\",
    ]
    assert [token.offset for token in whole] == [0, 0, 1, 1, 1, 1, 2]
    listed = chat_logprobs(whole)
    assert listed is not None
    assert [entry["bytes"] for entry in listed["content"]] == [[byte] for byte in "é🍵\\".encode()]
    # Bytes that never become a character are what the decoder writes for them.
    text, whole, _ = reported(model, model.encode("a"), [0xFF, ord("b"), 0xE2, 0x80, ord("c")])
    assert text == "\ufffdb\ufffdc"
    assert [token.offset for token in whole][:3] == [0, 1, 2] and whole[-1].offset == 3


def test_one_text_of_two_tokens_is_two_keys() -> None:
    tokenizer = metaspace()
    model = model_of(tokenizer)
    letter = tokenizer.ids["a"]
    byte = tokenizer.ids["<0x61>"]
    text = model.continuation(model.encode("T"), 1)
    served = ServedText(text, Sampling(), print, model.config.vocab_size, 2)
    scored = ScoredToken(letter, -2.0, [(byte, -1.0), (letter, -2.0)])
    text.push(letter)
    counted = completion_logprobs(TokenReport(model, served, "").take("a", [scored], "length"))
    assert counted is not None
    assert counted.tokens == ["a"]
    assert counted.top_logprobs == [{"a": -2.0, f"token_id:{byte}": -1.0}]


def test_the_token_that_ends_a_text_is_named_and_a_stop_string_is_cut() -> None:
    model = model_of(metaspace())
    end = model.eod_id
    assert end is not None
    (the,) = model.encode("The")
    ids = model.encode("The and")
    text, whole, _ = reported(model, [the], [*ids[1:], end])
    assert [token.text for token in whole] == [" ", "and", "</s>"] and text == " and"
    assert whole[-1].offset == 4
    # A text that begins behind the end of another has no space before its first word.
    text, whole, _ = reported(model, [end], ids)
    assert text == "The and" and [token.text for token in whole] == ["The", " ", "and"]
    text, whole, _ = reported(model, [the], [*ids[1:], *ids], Ending(stop=["d"]))
    assert text == " an" and [token.text for token in whole] == [" ", "and"]
    text, whole, _ = reported(model, [the], ids[1:], Ending(stop_token_ids=[ids[-1]]))
    assert text == " " and [token.text for token in whole] == [" ", "and"]


def test_a_prompt_that_the_tokenizer_rewrites_is_placed_as_it_was_given() -> None:
    inner = train_bpe([PROMPT + REST] * 3, 300).inner
    inner.normalizer = normalizers.NFC()
    model = model_of(Tokenizer(inner.to_str()))
    prompt = "cafe\u0301 owner"
    text, whole, chunks = reported(
        model, model.encode(prompt), model.encode(" sa"), echo=prompt, scored=True
    )
    given = prompt + text
    words = [token for token in whole if token.raw.startswith(b" ")]
    assert len(words) == 2
    assert all(given.startswith(token.text, token.offset) for token in words)
    assert [token for _, tokens in chunks for token in tokens] == whole


def test_without_a_tokenizer_tokens_are_ids() -> None:
    _, whole, _ = reported(model_of(None), [1], [5, 6])
    counted = completion_logprobs(whole)
    assert counted is not None and counted.tokens == ["token_id:5", "token_id:6"]
    assert counted.top_logprobs[0] is not None and "token_id:7" in counted.top_logprobs[0]


def test_alternatives_at_the_beginning_lose_the_space_that_the_token_loses() -> None:
    model = model_of(metaspace())
    assert model.tokenizer is not None and model.eod_id is not None
    text, whole, _ = reported(model, [model.eod_id], model.encode("The The"))
    assert (text, [token.text for token in whole]) == ("The The", ["The", " The"])
    space = model.tokenizer.ids["▁"]
    written = [[one.text for one in token.likeliest if one.token == space] for token in whole]
    assert written == [[""], [" "]]
