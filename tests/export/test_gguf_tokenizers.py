"""Tokenizers of GGUF files: llama.cpp splits a text as the model's own tokenizer does."""

import io
import json
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from castalia.checkpoint import Store
from castalia.config import dump_yaml
from castalia.export import export
from castalia.export.gguf import write_gguf
from castalia.export.gguf_vocabulary import QWEN2, SPACE, differences, vocabulary_values
from castalia.formats.saved_model import open_model
from castalia.models import Decoder
from castalia.models.families import build_model_config
from castalia.runs.config import RunConfig
from castalia.tokenizers.forms import CL100K, CharTokenizer, SentencePieceTokenizer
from castalia.tokenizers.special_ids import SpecialIds
from castalia.tokenizers.tokenizer import Tokenizer

TEXTS = [
    "The naïve café owner said: “¡Olé!” and poured 🍵 for two.",
    "A second guest, who came in late, asked for the same; they'd waited 12345 minutes.\n\n  Then",
    "def twice(x):\n    return 2 * x  # doubles\n",
    "  two spaces   three\ttab\r\nline",
    "It's 2024-05-06, isn't it? WE'LL SEE 1234567 たこ焼き",
    "",
]
CORPUS = [
    *TEXTS,
    "asked the same owner to pour two for the guest who came in late and said it's late",
]


def byte_level(pattern: str | None, ignore_merges: bool) -> Tokenizer:
    """A byte-level BPE that splits words by `pattern`, or as GPT-2 does."""
    inner = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if pattern is None:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_alone])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS * 3, trainer)
    return Tokenizer(inner.to_str(), "trained")


def trained_pieces(kind: str = "bpe", rule: str = "identity") -> bytes:
    """A SentencePiece model."""
    library = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5),
        model_writer=model,
        vocab_size=400 if kind == "bpe" else 330,
        model_type=kind,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name=rule,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def sentencepiece(metaspace: bool) -> Tokenizer:
    """A tokenizer.json as transformers converts LLaMA's: every pair that makes a piece merges."""
    library = pytest.importorskip("sentencepiece")
    pieces = library.SentencePieceProcessor(model_proto=trained_pieces())
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = []
    for piece, i in vocab.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in vocab and piece[cut:] in vocab and not piece.startswith("<"):
                merges.append((-pieces.get_score(i), cut, (piece[:cut], piece[cut:])))
    pairs = [pair for *_, pair in sorted(merges)]
    bpe = models.BPE(vocab, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    inner = tokenizers.Tokenizer(bpe)
    if metaspace:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        inner.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    special = [AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>")]
    inner.add_special_tokens(special)
    return Tokenizer(inner.to_str(), "converted")


CASES = {
    "gpt-2": lambda: byte_level(None, False),
    "llama-bpe": lambda: byte_level(CL100K, True),
    "dbrx": lambda: byte_level(CL100K, False),
    "qwen2": lambda: byte_level(QWEN2, False),
    "llama-pieces": lambda: SentencePieceTokenizer(trained_pieces(), "trained"),
    "llama": lambda: sentencepiece(metaspace=False),
    "llama-metaspace": lambda: sentencepiece(metaspace=True),
}


def written(path: Path, tokenizer: Tokenizer) -> Path:
    """A GGUF file of a tiny model with this tokenizer."""
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 512}
    config = build_model_config({"family": "llama", **sizes}, "a test")
    tensors = {name: torch.zeros(x.shape) for name, x in Decoder(config).state_dict().items()}
    special = SpecialIds.of_tokenizer(tokenizer)
    write_gguf(path, tensors, config, tokenizer, special, quantization="F32")
    return path


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_splits_text_as_the_tokenizer_does(tmp_path: Path, name: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    tokenizer = CASES[name]()
    reason = "space before a text that begins with a space"
    assert (reason in (differences(tokenizer) or "")) == (name == "llama-metaspace")
    path = written(tmp_path / "model.gguf", tokenizer)
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in TEXTS:
        if name == "llama-metaspace" and text.startswith(" "):
            continue
        ids = tokenizer.encode(text)
        theirs = model.tokenize(text.encode(), add_bos=False, special=False)
        assert theirs == ids, text
        assert model.detokenize(theirs).decode() in (text, f" {text}")
    values = vocabulary_values(tokenizer, 512, SpecialIds())
    form = "llama" if name in ("llama-metaspace", "llama-pieces") else name
    key = "model" if form == "llama" else "pre"
    assert values[f"tokenizer.ggml.{key}"][1] == form


def test_what_the_file_cannot_say_is_said_in_the_card() -> None:
    plain = json.loads(byte_level(None, False).inner.to_str())

    def changed(**sections: object) -> Tokenizer:
        return Tokenizer(json.dumps(plain | sections), "changed")

    nfc = changed(normalizer={"type": "NFC"})
    assert "no word for the normalizer of this tokenizer (NFC)" in differences(nfc)
    split = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    other = changed(pre_tokenizer={**split, "trim_offsets": True})
    assert "no name for how this tokenizer splits words" in differences(other)
    converted = json.loads(sentencepiece(metaspace=False).inner.to_str())
    model = converted["model"]
    pairs = model["merges"]
    twice = next(pair for pair in pairs if ["".join(p) for p in pairs].count("".join(pair)) > 1)
    without = [pair for pair in pairs if pair != twice]
    for merges, reason in (
        (without, f"does not merge {twice[0]!r} and {twice[1]!r}"),
        ([*without, twice], "not in the order of the tokens that they make"),
    ):
        other = Tokenizer(json.dumps(converted | {"model": {**model, "merges": merges}}), "other")
        assert reason in differences(other)
    words = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": True}
    two = SPACE * 2
    model = {**model, "vocab": model["vocab"] | {two: 400}, "merges": [*pairs, [SPACE, SPACE]]}
    cut = converted | {"pre_tokenizer": words, "normalizer": None, "model": model}
    assert "has tokens of several words" in differences(Tokenizer(json.dumps(cut), "cut"))
    unlike = Tokenizer(json.dumps(converted | {"model": {**model, "byte_fallback": False}}), "no")
    assert "byte-level BPE, which this tokenizer is not" in differences(unlike)
    mapped = SentencePieceTokenizer(trained_pieces(rule="nmt_nfkc"), "mapped")
    assert "no word for this tokenizer's normalizer" in differences(mapped)
    unigram = SentencePieceTokenizer(trained_pieces("unigram"), "unigram")
    assert "byte-level BPE, which this tokenizer is not" in differences(unigram)


@pytest.mark.parametrize("kind", ["char", "sentencepiece"])
def test_a_tokenizer_that_transformers_lacks_is_noted(tmp_path: Path, kind: str) -> None:
    """Castalia reads its own form again; AutoTokenizer finds no promise to read it."""
    tokenizer = CharTokenizer() if kind == "char" else CASES["llama-pieces"]()
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 512}
    config = build_model_config({"family": "llama", **sizes}, "a test")
    tensors = {f"model.{name}": value for name, value in Decoder(config).state_dict().items()}
    files = {"config.yaml": dump_yaml(RunConfig(model=config)), "tokenizer.json": tokenizer.text}
    Store(tmp_path / "checkpoints").save(1, tensors, {"step": 1}, files, asynchronous=False)
    (done,) = export(tmp_path, to="hf", output=tmp_path / "out", certificate=False)
    assert f"the tokenizer is of the kind {kind}" in done.notes[-1]
    assert done.notes[-1] in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()
    again = open_model(tmp_path / "out").tokenizer
    assert again is not None and again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    if kind == "sentencepiece":
        assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer.model
