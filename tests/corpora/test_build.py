"""The corpora: what is in them, what is held out, and that they are built once."""

import itertools
import json
import random
from pathlib import Path

import pytest
from ahocorasick_rs import AhoCorasick

from castalia.core.errors import ConfigError, DataError
from castalia.corpora import texts
from castalia.corpora.build import (
    CORPORA,
    PARTS,
    CorpusRecipe,
    TextSource,
    at_most,
    build_corpus,
    read_sources,
)
from castalia.corpora.heldout import FEWEST, Split, plain
from castalia.corpora.texts import TextDocument
from castalia.data import IndexedDataset, load_tokenizer
from castalia.recipes import load_config
from castalia.runs.named_corpus import ensure_corpus

WINDOW = 50


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus, built once for this file."""
    folder = tmp_path_factory.mktemp("corpus")
    build_corpus("tiny", folder, say=lambda line: None)
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Time of change and size of every file."""
    return {
        str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()
    }


def read_lines(path: Path) -> list[dict[str, str]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def paragraphs(seed: int) -> str:
    """Text that no other seed repeats."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(120))


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    """The documents of the python corpus."""
    return read_sources(CORPORA["python"], say=lambda line: None)


def test_nothing_held_out_in_the_python_corpus_occurs_in_training(splits: dict[str, Split]):
    train = "\n".join(plain(d.text).decode() for split in splits.values() for d in split.train)
    rng, windows = random.Random(1), {}
    for source, split in splits.items():
        assert len(split.valid) >= FEWEST, source
        for document in split.valid:
            text = plain(document.text).decode()
            assert text not in train, document.name
            places = [rng.randrange(max(1, len(text) - WINDOW)) for _ in range(10)]
            windows[source, document.name] = [text[at : at + WINDOW] for at in places]
    # All windows in one pass over eight million characters.
    every = list(dict.fromkeys(itertools.chain(*windows.values())))
    matches = AhoCorasick(every).find_matches_as_indexes(train, overlapping=True)
    found = {every[number] for number, _, _ in matches}
    assert all(window in train for window in found)
    hits = {place: sum(window in found for window in some) for place, some in windows.items()}
    assert max(hits.values()) <= 6, f"of 10 windows in the training text: {hits}"
    assert sum(hits.values()) <= 0.06 * 10 * len(hits)


def test_no_two_documents_of_the_python_corpus_are_the_same(splits: dict[str, Split]):
    every = [plain(d.text) for split in splits.values() for part in split for d in part]
    assert len(every) == len(set(every)) > 100
    for source, split in splits.items():
        size = sum(len(d.text.encode()) for part in split for d in part)
        assert size <= CORPORA["python"].sources[source].largest


def test_files_hold_what_corpus_json_says(tiny: Path):
    facts = json.loads((tiny / "corpus.json").read_text())
    assert facts["tokenizer"] == "bytes" and "reference" in facts["sources"]
    tokenizer = load_tokenizer("bytes")
    for source, parts in facts["sources"].items():
        for part in PARTS:
            lines = read_lines(tiny / part / f"{source}.jsonl")
            dataset = IndexedDataset(tiny / part / source)
            assert parts[part]["documents"] == len(lines) == len(dataset)
            assert parts[part]["tokens"] == dataset.sizes.sum() == parts[part]["bytes"] + len(lines)
            assert dataset[0].tolist() == [*tokenizer.encode(lines[0]["text"]), tokenizer.eod_id]
            assert [line["name"] for line in lines] == sorted(line["name"] for line in lines)
        sizes = [
            len(line["text"].encode()) for line in read_lines(tiny / "valid" / f"{source}.jsonl")
        ]
        assert parts["valid"]["document_bytes"] == sizes
        assert 1 < parts["valid"]["zlib_bits_per_byte"] < 8


def test_a_second_call_finds_it_and_changes_nothing(tiny: Path):
    before, said = snapshot(tiny), []
    corpus = build_corpus("tiny", tiny, said.append)
    assert snapshot(tiny) == before and said == []
    assert corpus.prefixes("train") == [str(tiny / "train" / source) for source in corpus.sources]


def test_two_builds_are_the_same_bytes(tiny: Path, tmp_path: Path):
    build_corpus("tiny", tmp_path, say=lambda line: None)
    files = [
        path.relative_to(tiny)
        for path in tiny.rglob("*")
        if path.suffix in (".jsonl", ".bin", ".idx")
    ]
    assert len(files) >= 6
    assert all((tiny / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


def test_an_incomplete_or_cut_off_folder_is_built_again(tiny: Path, tmp_path: Path):
    said: list[str] = []
    build_corpus("tiny", tmp_path, say=lambda line: None)
    whole = (tmp_path / "train" / "reference.bin").read_bytes()
    for spoil in (
        lambda: (tmp_path / "train" / "reference.bin").write_bytes(whole[:100]),
        lambda: (tmp_path / "corpus.json").write_text("{"),
        lambda: (tmp_path / "valid" / "reference.idx").unlink(),
    ):
        spoil()
        build_corpus("tiny", tmp_path, said.append)
        assert said and (tmp_path / "train" / "reference.bin").read_bytes() == whole
        said.clear()


def test_a_source_that_this_python_lacks_is_left_out_and_said():
    some = [TextDocument(f"d{i:02}", paragraphs(i)) for i in range(30)]
    recipe = CorpusRecipe(
        {
            "here": TextSource(lambda: some, 10**6, "words"),
            "tests": TextSource(list, 10**6, "the tests"),
        }
    )
    said: list[str] = []
    assert list(read_sources(recipe, said.append)) == ["here"]
    assert said == ["corpus: skipped tests (the tests): this Python has 0 such documents"]
    with pytest.raises(DataError, match="has none of the texts"):
        read_sources(CorpusRecipe({"tests": recipe.sources["tests"]}), said.append)


def test_special_tokens_and_half_characters_are_left_out():
    some = [TextDocument(f"d{i:02}", paragraphs(i)) for i in range(30)]
    bad = [
        TextDocument("x1", paragraphs(31) + "<|endoftext|>"),
        TextDocument("x2", paragraphs(32) + "\ud800"),
    ]
    splits = read_sources(CorpusRecipe({"a": TextSource(lambda: some + bad, 10**6, "")}), print)
    assert not {"x1", "x2"} & {d.name for part in splits["a"] for d in part}


def test_a_long_source_is_sampled_by_content_and_keeps_its_order():
    some = [TextDocument(f"d{i:02}", paragraphs(i)) for i in range(30)]
    size = len(some[0].text)
    few = at_most(some, 10 * size + 5)
    assert len(few) == 10 and [d.name for d in few] == sorted(d.name for d in few)
    assert {d.text for d in at_most(some[::-1], 10 * size + 5)} == {d.text for d in few}


def test_files_that_are_not_utf8_too_short_or_too_long_are_skipped(tmp_path: Path):
    contents = {
        "good": b"x" * 300,
        "latin": b"\xff" * 300,
        "short": b"x",
        "long": b"x" * (texts.LARGEST_DOCUMENT + 1),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = [(name, tmp_path / name) for name in (*contents, "absent")]
    assert [d.name for d in texts.read_documents(files)] == ["good"]


def test_docstrings_come_in_order_and_broken_code_has_none():
    code = '"""Top."""\nclass A:\n    """In A."""\n    def f(self):\n        """In f."""\n'
    assert texts.docstrings_of(code) == "Top.\n\nIn A.\n\nIn f."
    assert texts.docstrings_of("def (") == ""


def test_sources_do_not_hold_each_other():
    assert not any(
        d.name.startswith(("test/", "pydoc_data/", "site-packages/")) for d in texts.library_code()
    )


def test_ensure_corpus_names_the_files_once(tmp_path: Path):
    config = load_config(["debug", f"output={tmp_path}"])
    found = ensure_corpus(config, say=lambda line: None)
    assert found.data.tokenizer == "bytes" and len(found.data.train) == len(found.data.valid) >= 1
    assert all(Path(f"{prefix}.bin").is_file() for prefix in (*found.data.train, *found.data.valid))
    assert ensure_corpus(found, say=print) is found
    assert found.model_copy(update={"data": config.data}) == config


def test_a_model_with_too_few_tokens_is_refused(tmp_path: Path):
    config = load_config(["debug", f"output={tmp_path}", "model.vocab_size=200"])
    with pytest.raises(ConfigError, match=r"has 257 tokens; set model\.vocab_size=257"):
        ensure_corpus(config, say=lambda line: None)


def test_an_unknown_corpus_gets_the_menu(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"unknown corpus 'pyhton'; choose one of mini, python, tiny.*'python'"
    ):
        build_corpus("pyhton", tmp_path)
