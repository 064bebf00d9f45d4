"""`castalia generate`: prompts of every origin; text and JSON lines; one-sentence errors."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from castalia.checkpoint import Store
from castalia.cli import main
from castalia.config import dump_yaml
from castalia.distributed import initialize
from castalia.inference import load
from castalia.models import Decoder, NeoxConfig
from castalia.models.init import start_weights
from castalia.runs.config import RunConfig
from castalia.tokenizers.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level run with random weights."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = NeoxConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        vocab_size=257,
        max_position_embeddings=64,
        rotary_pct=0.5,
    )
    load_tokenizer("bytes").save(folder / "tokenizer.json")
    files = {
        "config.yaml": dump_yaml(RunConfig(model=config, data={"seq_length": 64})),
        "tokenizer.json": (folder / "tokenizer.json").read_text("utf-8"),
    }
    model = Decoder(config)
    initialize(model, start_weights(model.config, 0))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.{name}": tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }
    Store(folder / "checkpoints").save(7, tensors, {"step": 7}, files, asynchronous=False)
    return folder


class Answer:
    """What one call of the command printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], code: int) -> None:
        self.code = code
        self.out, self.err = capsys.readouterr()

    def records(self) -> list[dict]:
        """JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def castalia(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Call the command in this process."""

    def call(*words: object, stdin: str = "", tty: bool = False) -> Answer:
        keyboard = io.StringIO(stdin)
        keyboard.isatty = lambda: tty  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", keyboard)
        monkeypatch.setattr(sys, "argv", ["castalia", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Answer(capsys, code)

    return call


def test_one_prompt_prints_the_continuation(castalia, run: Path) -> None:
    answer = castalia("generate", run, "--prompt", "def", "--max-new-tokens", 9)
    assert answer.code == 0 and answer.out == load(run).generate("def", 9) + "\n"


def test_a_faster_dtype_is_said_once_beside_the_text(
    castalia, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        "castalia.inference.default_engine.quicker",
        lambda model, rows: asked.append((model.engine.name, rows)) or "it is faster",
    )
    words = ("generate", run, "--prompt", "def", "--prompt", "The", "--max-new-tokens", 3)
    answer = castalia(*words, "--engine", "torch", "--json")
    assert answer.err.count("castalia: it is faster") == 1 and "faster" not in answer.out
    assert asked == [("torch", 1)]


def test_several_prompts_are_shown_with_their_texts(castalia, run: Path) -> None:
    answer = castalia(
        "generate", run / "step7", "--prompt", "def", "--prompt", "The", "--max-new-tokens", 5
    )
    one, two = load(run).generate(["def", "The"], 5)
    assert answer.out == f"def{one}\n\nThe{two}\n"


def test_json_records(castalia, run: Path) -> None:
    answer = castalia(
        "generate", run, "--prompt", "def", "--prompt", "The", "--max-new-tokens", 5, "--json"
    )
    records = answer.records()
    assert [set(record) for record in records] == [
        {"prompt", "text", "tokens", "finish_reason", "seconds"}
    ] * 2
    done = load(run).complete(["def", "The"], 5)
    for record, want in zip(records, done, strict=True):
        assert (record["prompt"], record["text"], record["tokens"]) == (
            want.prompt,
            want.text,
            want.tokens,
        )
        assert record["finish_reason"] == "length" and record["seconds"] > 0


def test_draws_repeat_with_a_seed_and_do_not_depend_on_the_output_form(castalia, run: Path) -> None:
    words = [
        "generate",
        run,
        "--temperature",
        1.5,
        "--top-k",
        50,
        "--top-p",
        0.9,
        "--seed",
        4,
        "--max-new-tokens",
        12,
    ]
    records = castalia(*words, "--prompt", "A", "--prompt", "B", "--json").records()
    texts = castalia(*words, "--prompt", "A", "--prompt", "B").out
    assert texts == f"A{records[0]['text']}\n\nB{records[1]['text']}\n"
    drawn = load(run).generate("A", 12, temperature=1.5, top_k=50, top_p=0.9, seed=4)
    assert records[0]["text"] == drawn


def test_penalties_and_schemas(castalia, run: Path, tmp_path: Path) -> None:
    words = ["generate", run, "--prompt", "A", "--max-new-tokens", 30, "--json"]
    penalties = ["--repetition-penalty", 1.5, "--frequency-penalty", 0.5, "--presence-penalty", 0.2]
    (record,) = castalia(
        *words, *penalties, "--temperature", 1, "--min-p", 0.1, "--seed", -1
    ).records()
    assert record["text"] == load(run).generate(
        "A",
        30,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        presence_penalty=0.2,
        temperature=1.0,
        min_p=0.1,
        seed=-1,
    )
    pytest.importorskip("llguidance")
    (tmp_path / "schema.json").write_text('{"enum": ["up", "down"]}')
    for more in ([], ["--draft", "lookup"]):
        (record,) = castalia(*words, "--json-schema", tmp_path / "schema.json", *more).records()
        assert json.loads(record["text"]) in ("up", "down")
    answer = castalia(*words, "--json-schema", tmp_path / "none.json")
    assert answer.code == 1 and "cannot read the JSON schema in" in answer.err
    answer = castalia(*words, "--seed", 2**63)
    assert answer.code == 2 and "--seed" in answer.err


def test_several_texts_of_a_prompt(castalia, run: Path, tmp_path: Path) -> None:
    """The best beams with their scores, drawn texts, and what both look like in each form."""
    model = load(run)
    words = ["generate", run, "--prompt", "A", "--prompt", "def", "--max-new-tokens", 6]
    search = ["--num-beams", 3, "--num-return-sequences", 2, "--length-penalty", 0.5]
    search += ["--early-stopping", "never", "--logit-bias", "97=-100", "--logit-bias", "98=1.5"]
    done = model.complete(
        ["A", "def"],
        6,
        num_beams=3,
        num_return_sequences=2,
        length_penalty=0.5,
        early_stopping="never",
        logit_bias={97: -100.0, 98: 1.5},
    )
    records = castalia(*words, *search, "--json").records()
    assert [record["text"] for record in records] == [one.text for one in done]
    assert [record["score"] for record in records] == [one.score for one in done]
    assert castalia(*words, *search).out == (
        f"A{done[0].text}\n\nA{done[1].text}\n\ndef{done[2].text}\n\ndef{done[3].text}\n"
    )
    typed = castalia("generate", run, "--max-new-tokens", 6, *search, stdin="def\n", tty=True)
    assert typed.out == f"> {done[2].text}\n\n{done[3].text}\n> \n"
    draws = ["--num-return-sequences", 2, "--temperature", 1.5, "--typical-p", 0.9, "--seed", 6]
    draws += ["--no-repeat-ngram-size", 2, "--min-tokens", 3]
    drawn = model.generate(
        ["A", "def"],
        6,
        num_return_sequences=2,
        temperature=1.5,
        typical_p=0.9,
        seed=6,
        no_repeat_ngram_size=2,
        min_tokens=3,
    )
    assert [one["text"] for one in castalia(*words, *draws, "--json").records()] == drawn
    assert castalia(*words, *draws).out == (
        f"A{drawn[0]}\n\nA{drawn[1]}\n\ndef{drawn[2]}\n\ndef{drawn[3]}\n"
    )
    answer = castalia(*words, *draws, "--draft", "lookup", "--output", tmp_path / "out.jsonl")
    assert answer.err.endswith("out.jsonl: 4 texts\n")
    contexts = [
        json.loads(line)["context"] for line in (tmp_path / "out.jsonl").read_text().splitlines()
    ]
    assert contexts == ["A", "A", "def", "def"]


def test_prompts_from_files_and_standard_input(castalia, run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "three\\nlines"}\n{"prompt": ""}\n')
    words = ["generate", run, "--max-new-tokens", 2, "--json"]
    plain = castalia(*words, "--file", tmp_path / "prompts.txt", "--prompt", "zero").records()
    assert [record["prompt"] for record in plain] == ["zero", "one", "two"]
    lines = castalia(*words, "--file", tmp_path / "prompts.jsonl").records()
    assert [record["prompt"] for record in lines] == ["three\nlines", ""]
    piped = castalia(*words, stdin="four\nfive\n").records()
    assert [record["prompt"] for record in piped] == ["four", "five"]


def test_a_conversation_on_a_terminal(castalia, run: Path) -> None:
    answer = castalia(
        "generate", run, "--max-new-tokens", 4, stdin="def\n" + "x" * 80 + "\nThe\n", tty=True
    )
    one, two = load(run).generate(["def", "The"], 4)
    assert answer.code == 0 and answer.out == f"> {one}\n> > {two}\n> \n"
    assert "the prompt has 80 tokens" in answer.err


def test_a_stop_string_may_be_a_new_line(castalia, run: Path) -> None:
    text = load(run).generate("def", 40)
    stop = text[3:5]
    answer = castalia("generate", run, "--prompt", "def", "--max-new-tokens", 40, "--stop", stop)
    assert answer.out == text[: text.index(stop)] + "\n"
    from castalia.cli.generate import unescaped

    assert unescaped(r"a\n\tb") == "a\n\tb"


def test_the_limit_of_the_model_is_said(castalia, run: Path) -> None:
    answer = castalia("generate", run, "--prompt", "x" * 60)
    assert "ended at the model's limit of 64 tokens" in answer.err


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "p.txt", "has no prompts"),
        (b"ok\n\xff\n", "p.txt", "is not UTF-8 text: byte 3"),
        (b'{"prompt": "a"}\n{"prompt": \n', "p.jsonl", "line 2: not JSON"),
        (
            b'{"prompt": "a"}\n\n{"text": "b"}\n',
            "p.jsonl",
            'line 3: expected an object with a text under "prompt"',
        ),
        (b'{"prompt": "a\\ud800b"}\n', "p.jsonl", "line 1: the prompt is not valid Unicode"),
        (None, "p.txt", "No such file"),
    ],
)
def test_bad_prompt_files(
    castalia, run: Path, tmp_path: Path, content: bytes | None, name: str, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    answer = castalia("generate", run, "--file", tmp_path / name)
    assert answer.code == 1 and answer.out == ""
    assert (
        answer.err.startswith("castalia: error: ")
        and message in answer.err
        and answer.err.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a", "--temperature", "-1"], "temperature must be a number >= 0"),
        (["--prompt", "a" * 64], "the prompt has 64 tokens but the model reads at most 64"),
        (
            ["--prompt", "a", "--dtype", "int9"],
            "unknown dtype 'int9' for a checkpoint; choose one of fp32, bf16, fp16, auto, int8,"
            " int4; did you mean 'int8'?",
        ),
        (["--prompt", "a\udcffb"], "--prompt is not valid Unicode: character 1 is U+DCFF"),
        (["--prompt", "a", "--stop", "\ud83c"], "a stop string is not valid Unicode: character 0"),
        ([], "no prompt; give --prompt TEXT"),
        (["--prompt", "a", "--min-p", "1.5"], "min_p must be from 0 to 1, got 1.5"),
        (["--prompt", "a", "--num-beams", "0"], "num_beams must be >= 1, got 0"),
        (["--prompt", "a", "--length-penalty", "2"], "length_penalty=2.0 needs a beam search"),
        (["--prompt", "a", "--early-stopping", "ever"], "--early-stopping must be true, false or"),
        (["--prompt", "a", "--logit-bias", "a"], "--logit-bias must be ID=X, such as 50=-2.5"),
        (["--prompt", "a", "--num-return-sequences", "2"], "greedy texts would be the same"),
        (["--prompt", "a", "--num-beams", "2", "--draft", "lookup"], "not go with a draft"),
        (["--prompt", "a", "--chat"], "the model has no chat template beside its tokenizer"),
        (["--prompt", "a", "--system", "b"], "--system is a message of a conversation: add --chat"),
        (["--samples", "2", "--chat"], "--samples has no prompt, and --chat answers one"),
    ],
)
def test_bad_options(castalia, run: Path, words: list[str], message: str) -> None:
    answer = castalia("generate", run, *words)
    assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1


def test_no_checkpoint(castalia, tmp_path: Path) -> None:
    answer = castalia("generate", tmp_path / "nothing", "--prompt", "a")
    assert answer.code == 1 and "no checkpoint at" in answer.err


def test_samples_from_nothing_become_neox_records(castalia, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples.jsonl"
    words = (
        "--samples",
        3,
        "--temperature",
        1.5,
        "--seed",
        2,
        "--max-new-tokens",
        6,
        "--output",
        out,
    )
    assert castalia("generate", run, *words).code == 0
    records = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    texts = load(run).generate([""] * 3, 6, temperature=1.5, seed=2)
    assert [record["text"] for record in records] == texts and len(set(texts)) == 3
    assert list(records[0]) == [
        "context",
        "text",
        "length",
        "finished",
        "message",
        "duration_seconds",
    ]
    assert (
        records[0]["context"] == ""
        and records[0]["length"] == 6
        and records[0]["finished"] is False
    )


def test_a_draft_changes_nothing(castalia, run: Path) -> None:
    words = ("generate", run, "--prompt", "def def def", "--prompt", "The", "--max-new-tokens", 20)
    plain = castalia(*words).out
    assert castalia(*words, "--draft", "lookup").out == plain
    assert castalia(*words, "--draft", run).out == plain
    answer = castalia(*words, "--draft", "look-up")
    assert answer.code == 1 and "no checkpoint at look-up" in answer.err


def test_a_prompt_of_several_lines_is_typed_in(castalia, run: Path, tmp_path: Path) -> None:
    words = ("--max-new-tokens", 5, "--prompt-end", "END", "--output", tmp_path / "talk.jsonl")
    answer = castalia("generate", run, *words, stdin="one\ntwo END\nthreeEND\n", tty=True)
    assert answer.code == 0, answer.err
    records = [
        json.loads(line) for line in (tmp_path / "talk.jsonl").read_text("utf-8").splitlines()
    ]
    assert [record["context"] for record in records] == ["one\ntwo ", "three"]
    assert records[1]["text"] == load(run).generate("three", 5)


def test_every_engine_by_name(castalia, run: Path) -> None:
    words = ("generate", run, "--prompt", "def", "--max-new-tokens", 9)
    plain = castalia(*words).out
    assert castalia(*words, "--engine", "native", "--dtype", "fp32").out == plain
    assert castalia(*words, "--dtype", "auto").code == 0
    assert "unknown engine 'fast'" in castalia(*words, "--engine", "fast").err
