"""The term-frequency study: its questions, its counts, its tables, and what the published says."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from castalia.cli.app import app
from castalia.config import dump_yaml
from castalia.core.errors import CheckpointError, ConfigError, DataError
from castalia.corpus import prepare
from castalia.stream.opening import open_stream
from castalia.studies import term_frequency as study_room
from castalia.studies.term_frequency import FrequencyStudy, require_room, term_frequency
from castalia.studies.term_frequency_prompts import Questions, is_right
from castalia.studies.term_frequency_rows import Key, Row, gaps, means, read_published

PUBLISHED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "pythia-evals" / "csv"
STATEMENT = "{x1} {op} {x2} is {answer}."


def test_questions_are_those_of_the_published_study():
    questions = Questions(range(100), range(1, 51))
    (first, *_, last) = items = list(questions.items("multiplication", 0))
    assert first.prompt == "Q:What is 0 times 1? A:" and first.answer == 0
    assert len(items) == 5000 and (last.x1, last.x2, last.answer) == (99, 50, 4950)
    two = list(questions.items("addition", 2))[355]
    own = "Q:What is 7 plus 6? A:"
    examples = two.prompt.removesuffix(own).split("\n\n")
    assert two.prompt.endswith("\n\n" + own) and len(examples) == 3 and examples[2] == ""
    for example in examples[:2]:
        x1, x2, answer = map(
            int, re.fullmatch(r"Q:What is (\d+) plus (\d+)\? A: (\d+)", example).groups()
        )
        assert x1 != 7 and 1 <= x2 <= 50 and answer == x1 + x2
    assert list(questions.items("addition", 4))[355].prompt.startswith(two.prompt.removesuffix(own))
    assert is_right(" 56\n57", 56) and is_right(" It is 56.", 56)
    assert not is_right(" 5\n56", 56) and not is_right("\n56", 56) and not is_right("", 0)
    for template, problem in (
        ("{x1} {op} {x2} is {anwser}", "unknown field {anwser}.*did you mean 'answer'"),
        ("{answer} is {x1} {op} {x2}", "and {answer} after them"),
        ("{x1} times {x2} is {answer}", "once each"),
    ):
        with pytest.raises(ConfigError, match=problem):
            Questions(range(2), range(1, 3), template).check()


def test_gaps_compare_the_ends_of_the_frequencies():
    rows = [Row("m", 5, "addition", 0, x1, x1 / 10, 0.0) for x1 in range(6)]
    counts = {("m", 5, x1): 100 - x1 for x1 in range(6)}
    # The three most frequent are 0, 1 and 2.
    assert gaps(rows, counts) == {Key("m", 5, "addition", 0): pytest.approx(-30.0)}
    assert gaps(rows, {}) == {} and gaps(rows, dict.fromkeys(counts, 0)) == {}


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published CSV files")
def test_published_accuracies(tmp_path):
    rows = read_published(PUBLISHED / "pythia-1.3b-deduped" / "term_frquency_all_shots.csv")
    assert len(rows) == 6000
    final = means(row for row in rows if row.step == 143000 and row.shots == 16)
    named = {(key.model, key.task): round(value, 3) for key, value in final.items()}
    assert named == {
        ("pythia-1.4b-deduped", "addition"): 0.051,
        ("pythia-1.4b-deduped", "multiplication"): 0.058,
    }


class Calculator:
    """A model that knows the sums of the operands below `knows`."""

    class config:  # noqa: N801
        max_position_embeddings = 64

    def __init__(self, knows: int) -> None:
        self.knows = knows

    def encode(self, text: str) -> list[str]:
        return text.split()

    def complete(self, prompts, new_tokens, stop, temperature):
        assert stop == ["\n", "."] and temperature == 0.0
        for prompt in prompts:
            x1, x2 = map(int, re.search(r"(\d+) plus (\d+) is$", prompt).groups())
            yield type("Completion", (), {"text": f" {x1 + x2 if x1 < self.knows else 0}. 1"})


STUDY = FrequencyStudy(
    Questions(range(2, 6), range(1, 3), STATEMENT, " "), ["addition"], [0, 2], "2:", new_tokens=8
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run on statements whose operand 2 comes most often, and 5 least; its weights are gone."""
    folder = tmp_path_factory.mktemp("calculated")
    (folder / "texts.jsonl").write_text(
        "".join(
            json.dumps({"text": f"{x1} plus {x2} is {x1 + x2}."}) + "\n"
            for x1 in (2, 3, 4, 5)
            for x2 in range(10, 10 + 40 // x1)
        )
    )
    prepare(str(folder / "texts.jsonl"), str(folder / "texts"), "bytes")
    run = folder / "run"
    words = ["debug", "data.seq_length=32", "train.batch_size=4", "train.steps=4"]
    words += [f"data.train={folder / 'texts'}", "data.tokenizer=bytes", "data.corpus=null"]
    for step in (0, 2, 4):
        saved = run / "checkpoints" / f"step-{step:08}"
        saved.mkdir(parents=True)
        (saved / "COMPLETE").touch()
    (run / "config.yaml").write_text(dump_yaml(open_stream([*words, f"output={run}"]).config))
    (run / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n')
    return run


def pieces_of(run: Path) -> list[str]:
    """The decoded text of every document's piece that the run has read."""
    stream = open_stream(str(run))
    text = []
    for block in stream.blocks(stream.places(0, 4)):
        for row, spans in zip(block.tokens, block.spans, strict=True):
            for ids in np.split(row, np.cumsum([span.length for span in spans])):
                text.append(stream.tokenizer.decode(ids[ids < 256]))
    return text


def test_the_study_from_end_to_end(run, tmp_path, monkeypatch):
    loaded = []

    def load(path):
        loaded.append(path)
        if len(loaded) == 2:
            raise KeyboardInterrupt  # a kill between two checkpoints
        return Calculator(knows=4)

    monkeypatch.setattr(study_room, "load_exact", load)
    output = tmp_path / "study"
    with pytest.raises(KeyboardInterrupt):
        term_frequency([str(run)], STUDY, output, say=lambda text: None)
    with (output / "rows.jsonl").open("a") as file:
        file.write('[["run", 4, "additi')
    record = term_frequency([str(run)], STUDY, output, say=lambda text: None)
    assert [Path(path).name for path in loaded] == ["step2", "step4", "step4"]
    assert [(line["step"], line["shots"], line["accuracy"]) for line in record["table"]] == [
        (2, 0, 0.5), (2, 2, 0.5), (4, 0, 0.5), (4, 2, 0.5)
    ]  # fmt: skip
    assert term_frequency([str(run)], STUDY, output, say=lambda text: None) == record
    assert len(loaded) == 3
    # A checkpoint that was trained again is measured again, and the others stay.
    weights = json.loads((output / "weights.json").read_text())
    weights["run step 4"] = "of another training"
    (output / "weights.json").write_text(json.dumps(weights))
    assert term_frequency([str(run)], STUDY, output, say=lambda text: None) == record
    assert [Path(path).name for path in loaded[3:]] == ["step4"]

    lines = (output / "accuracy.csv").read_text().splitlines()
    assert lines[0] == "model,checkpoint,task,fewshot,acc,acc_stderr,x1,count"
    assert len(lines) == 1 + 2 * 2 * 4
    counted = {}
    for line in lines[1:]:
        _, step, _, _, _, _, x1, number = line.split(",")
        counted[step, x1] = int(number)
    text = pieces_of(run)
    for x1 in "2345":
        found = sum(len(re.findall(rf"\b{x1}\b", piece)) for piece in text)
        assert counted["4", x1] == found >= counted["2", x1] > 0
    assert json.loads((output / "table.json").read_text()) == record
    page = (output / "index.html").read_text()
    assert page.count("<svg") == 1 and page.count("<polyline") == 2
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "| run | 2 | 50.0% | 50.0% |" in (output / "table.md").read_text()
    # Its own CSV is read like a published one, with the frequencies.
    again = term_frequency([str(output / "accuracy.csv")], STUDY, tmp_path / "again")
    assert again["table"] == record["table"]

    with pytest.raises(ConfigError, match="holds a study with seed 0, now it is 1"):
        other = FrequencyStudy(Questions(range(2, 6), range(1, 3), STATEMENT, " ", 1))
        term_frequency([str(run)], other, output)


def test_windows_count_numbers_beside_numbers(run):
    study = FrequencyStudy(Questions(range(2, 15), range(1, 3)), frequency="windows")
    table = study_room.operand_counts(open_stream(str(run)), [0, 4], study, 1)
    want = dict.fromkeys(range(2, 15), 0)
    for words in (re.findall(r"\w+", piece) for piece in pieces_of(run)):
        for i, one in enumerate(words):
            # With one to three words between them.
            for other in words[i + 2 : i + 5]:
                if {one, other} <= set(map(str, want)):
                    want[int(one)] += 1
                    want[int(other)] += 1
    assert table == {0: dict.fromkeys(want, 0), 4: want} and want[2] > 0


def test_what_cannot_be_studied(run, tmp_path, monkeypatch):
    monkeypatch.setattr(study_room, "load_exact", lambda path: Calculator(knows=4))

    def castalia(*words: str) -> str:
        done = CliRunner().invoke(
            app, ["study", "term-frequency", *words, "--output", str(tmp_path / "s")]
        )
        assert isinstance(done.exception, ConfigError | DataError | CheckpointError)
        return str(done.exception)

    assert "--operands '5': expected A:B" in castalia(str(run), "--operands", "5")
    assert "--shots: expected an integer, got 'x'" in castalia(str(run), "--shots", "x")
    assert "unknown task 'adition'" in castalia(str(run), "--tasks", "adition")
    assert "choose alone or windows" in castalia(str(run), "--frequency", "often")
    assert "no checkpoint of step 3" in castalia(str(run), "--checkpoints", "3")
    text = castalia(str(run), "--checkpoints", "4", "--operands", "0:3", "--seconds", "1:2")
    assert "16 shots and an answer take" in text and "use fewer --shots" in text
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("model,acc\na,1\n")
    assert "no column checkpoint, task, fewshot, acc_stderr" in castalia(str(wrong))
    wrong.write_text("model,checkpoint,task,fewshot,acc,acc_stderr\na,1,piqa,0,1,0\n")
    assert "wrong.csv:2: unknown task 'piqa'" in castalia(str(wrong))


def test_the_longest_question_of_any_task_must_fit():
    questions = Questions(range(90, 92), range(50, 51))
    study = FrequencyStudy(questions, tasks=("addition", "multiplication"), shots=(4,))
    (sums, products) = (
        max(len(item.prompt) for item in questions.items(task, 4)) for task in study.tasks
    )
    assert sums < products
    room = SimpleNamespace(max_position_embeddings=sums + study.new_tokens)
    model = SimpleNamespace(config=room, encode=list)
    with pytest.raises(ConfigError, match=rf"take {products + 16} tokens, its context has"):
        require_room(model, study, SimpleNamespace(title="tiny step 4"))
