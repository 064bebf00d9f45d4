"""The demo end to end in miniature: every stage, a second call, a lost file, no CTranslate2."""

import json
import shlex
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.main import get_command

from castalia.analysis.runs import read_json
from castalia.cli.app import app
from castalia.core.errors import ConfigError
from castalia.demo import sizing, stages
from castalia.demo.sizing import DemoSize, DemoSpeed, choose_precision, choose_size, fit_size
from castalia.demo.speech import Voice, bits_per_token, compare, same_share
from castalia.demo.stages import DemoRequest, run_demo, spaced
from castalia.recipes import load_config
from castalia.runs.config import RunConfig
from castalia.train.mixture import StaticBlend

SMALL = [
    "data.corpus=tiny",
    "data.tokenizer=bytes",
    "data.seq_length=32",
    "model.vocab_size=257",
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "train.steps=3",
    "train.batch_size=2",
    "precision=fp32",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished miniature and what it said."""
    folder, said = tmp_path_factory.mktemp("demo") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "DemoSize", partial(DemoSize, eval_tokens=2000, new_tokens=8))
        run_demo(DemoRequest(SMALL), str(folder), ["castalia", "demo"], said.append)
    return folder, said


def test_every_part_of_the_run_folder_is_there(demo: tuple[Path, list[str]]):
    folder, said = demo
    assert sorted(p.name for p in (folder / "checkpoints").glob("step-*")) == [
        f"step-0000000{i}" for i in range(4)
    ]
    assert (folder / "exports" / "hf" / "step3" / "model.safetensors").is_file()
    bits = read_json(folder / "evals" / "bits_per_byte.json")["checkpoints"]
    assert [mark["step"] for mark in bits] == [0, 1, 2, 3]
    assert 5 < bits[0]["sources"]["reference"]["bits_per_byte"] < 9  # bytes, hardly trained
    steps = {sample["step"] for sample in read_json(folder / "samples" / "samples.json")}
    assert steps == {0, 1, 2, 3}
    page = (folder / "report.html").read_text()
    assert "2 sources mixed by progress" in page
    assert "Bits per byte of stdlib, last" in page and "castalia fp32" in page
    assert said[-1] == f"report: {folder / 'report.html'}"


def test_shares_of_a_blend_are_its_weights(tmp_path):
    rows = SimpleNamespace(sources=["a", "b"], weights=[0.75, 0.25])
    trainer = SimpleNamespace(rows=rows, mixture=StaticBlend())
    assert stages.shares_of(trainer, tmp_path) == {"a": [0.75] * 3, "b": [0.25] * 3}


def test_the_exports_speak_as_the_model_does(demo: tuple[Path, list[str]]):
    pytest.importorskip("ctranslate2")
    voices = json.loads((demo[0] / "demo.json").read_text())["speech"]["voices"]
    assert [voice["name"] for voice in voices] == [
        "castalia fp32",
        "CTranslate2 float32",
        "CTranslate2 int8",
    ]
    assert voices[1]["bits_per_token"] == pytest.approx(voices[0]["bits_per_token"], abs=1e-4)
    assert voices[2]["bits_per_token"] == pytest.approx(voices[0]["bits_per_token"], abs=0.05)
    assert voices[2]["megabytes"] < 0.5 * voices[1]["megabytes"]


def test_a_second_call_says_that_it_is_done(demo: tuple[Path, list[str]]):
    folder, _ = demo
    before, said = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}, []
    run_demo(DemoRequest(SMALL), str(folder), ["castalia", "demo"], said.append)
    assert said[0] == f"the demo in {folder} is done; remove that folder to run it anew"
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_a_call_after_an_end_in_the_middle_does_only_what_is_left(
    demo: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, said = tmp_path / "run", []
    shutil.copytree(demo[0], folder)
    record = json.loads((folder / "demo.json").read_text())
    for stage in ("export", "compare", "report"):
        del record["stages"][stage]
    (folder / "demo.json").write_text(json.dumps(record))
    (folder / "report.html").unlink()
    monkeypatch.setattr(stages, "has_ctranslate2", lambda: False)
    monkeypatch.setattr(stages, "has_plotly", lambda: False)
    run_demo(DemoRequest(SMALL), str(folder), ["castalia", "demo"], said.append)
    headings = [line.strip() for line in said if line.startswith("\n[")]
    assert [heading[:5] for heading in headings] == ["[6/8]", "[7/8]", "[8/8]"]
    assert any("ctranslate2 is not installed" in line and "pip install" in line for line in said)
    assert any(f"then castalia report {folder}" in line for line in said)
    assert not said[-1].startswith("report:") and not (folder / "report.html").exists()
    monkeypatch.setattr(stages, "has_plotly", lambda: True)
    # The page that could not be written is what is left for the next call.
    run_demo(DemoRequest(SMALL), str(folder), ["castalia", "demo"], said.append)
    assert "CTranslate2 int8" not in (folder / "report.html").read_text()


def test_another_model_in_the_same_folder_is_refused(demo: tuple[Path, list[str]]):
    with pytest.raises(ConfigError, match=r"holds a run of another config.*model\.num_layers"):
        run_demo(
            DemoRequest([*SMALL, "model.num_layers=2"]), str(demo[0]), ["castalia"], lambda line: 0
        )


def test_other_data_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="use castalia train"):
        run_demo(DemoRequest(["data.train=x"]), str(tmp_path), ["castalia"], lambda line: 0)


def test_precision_is_the_users_then_the_runs_then_the_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def chosen(config: RunConfig, given: bool = False) -> str:
        return choose_precision(config, given=given, say=lambda line: None)

    config = load_config(["demo", f"output={tmp_path}"])
    assert chosen(config, given=True) == "fp32"
    for speed, faster in ((0.3, "fp32"), (1.0, "fp32"), (2.0, "bf16")):
        monkeypatch.setattr(sizing, "times_as_long", lambda *_, speed=speed: speed)
        assert chosen(config) == faster
    # Measured where the run is to be: a GPU beside it says nothing about a CPU.
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        sizing, "times_as_long", lambda *given: 2.0 if given[3].type == "cpu" else 0
    )
    on_cpu = load_config(["demo", f"output={tmp_path}", "device=cpu"])
    assert chosen(on_cpu) == "bf16"
    (tmp_path / "config.yaml").write_text("precision: fp32\n")
    assert chosen(config) == "fp32"
    auto = load_config(["demo", f"output={tmp_path}", "precision=auto"])
    assert chosen(auto, given=True) == "fp32"


def test_a_demo_shrinks_until_it_fits():
    config = load_config(["demo"])

    def seconds(speed: DemoSpeed, size: DemoSize) -> float:
        saved = len(sizing.saved_steps(config, size.steps))
        reading = saved * 5 * size.eval_tokens / speed.reading_rate
        speech = sizing.speech_seconds(speed, size.new_tokens)
        return size.steps * speed.step_seconds + reading + speech + saved * 0.6

    before = None
    # A fast machine has the whole demo; each slower one less, and always within the time.
    for step_seconds in (0.08, 0.15, 0.25, 0.45, 1.0, 2.0):
        speed = DemoSpeed(step_seconds, 4000 / step_seconds)
        size = choose_size(speed, config, minutes=4, spent=20, sources=5)
        assert seconds(speed, size) <= 220
        if before is not None:
            assert size.steps <= before.steps and size.eval_tokens <= before.eval_tokens
        if size.steps < 1000 and size.new_tokens == 64:
            assert seconds(speed, size) > 190  # and no more than necessary
        before = before or size
    assert before == DemoSize("fp32", 1000, minutes=4) and size.steps < 100
    # Twice the time is worth more steps; no time at all still trains and measures something.
    longer = choose_size(speed, config, minutes=8, spent=20, sources=5)
    assert longer.steps > 2 * size.steps
    least = choose_size(speed, config, minutes=0.5, spent=20, sources=5)
    assert (least.steps, least.eval_tokens) == (sizing.LEAST_STEPS, sizing.LEAST_EVAL_TOKENS)


def test_the_choice_is_said_with_what_it_costs(monkeypatch: pytest.MonkeyPatch):
    config = load_config(["demo", "device=cpu"])
    machine = SimpleNamespace(processor="A CPU", level="x86-64-v3", threads=2)
    monkeypatch.setattr(sizing, "this_machine", lambda: machine)

    def why(step_seconds: float) -> str:
        speed = DemoSpeed(step_seconds, 4000 / step_seconds)
        monkeypatch.setattr(sizing, "measure_speed", lambda *_: speed)
        return "; ".join(fit_size(config, [None] * 5, minutes=4, spent=lambda: 20.0).why)

    assert "the whole demo fits in 4 minutes: 1,000 steps" in why(0.08)
    slow = why(0.5)
    assert slow.startswith("A CPU (x86-64-v3, 2 threads) trains 4.1k tokens/s in fp32")
    assert "of 1,000 steps" in slow
    assert "a worse model; the whole demo: castalia demo --minutes 12 --output FOLDER" in slow


def test_a_demo_is_measured_and_keeps_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = [word for word in SMALL if not word.startswith("train.steps")]
    monkeypatch.setattr(sizing, "TRIAL_SECONDS", 0.01)
    monkeypatch.setattr(sizing, "name_of_machine", lambda device: "A CPU")

    class StoppedError(Exception):
        pass

    def stop(self: stages.Demo) -> None:
        """Training."""
        raise StoppedError

    monkeypatch.setattr(stages.Demo, "train", stop)
    said: list[str] = []
    folder = tmp_path / "run"
    with pytest.raises(StoppedError):
        run_demo(DemoRequest(small, minutes=3), str(folder), ["castalia"], said.append)
    assert any("trains" in line and "tokens/s in fp32" in line for line in said)
    size = json.loads((folder / "demo.json").read_text())["size"]
    assert size["minutes"] == 3 and size["steps"] >= sizing.LEAST_STEPS
    assert not (folder / "config.yaml").exists()  # the trial leaves nothing behind
    # The next call does not measure again, also without the option.
    monkeypatch.setattr(stages, "fit_size", lambda *_, **__: pytest.fail("measured again"))
    with pytest.raises(StoppedError):
        run_demo(DemoRequest(small), str(folder), ["castalia"], said.append)
    with pytest.raises(ConfigError, match="was begun for 3 minutes, not 5 minutes"):
        run_demo(DemoRequest(small, minutes=5), str(folder), ["castalia"], said.append)
    # Without its record, the run that is there says how long it is.
    (folder / "demo.json").unlink()
    (folder / "config.yaml").write_text("precision: fp32\ntrain: {steps: 77}\n")
    with pytest.raises(StoppedError):
        run_demo(DemoRequest(small), str(folder), ["castalia"], said.append)
    assert json.loads((folder / "demo.json").read_text())["size"]["steps"] == 77


def test_tokens_are_steps_and_exclude_other_lengths():
    assert stages.steps_of(DemoRequest(tokens=5000), 2048) == ["train.steps=3"]
    for request in (DemoRequest(["train.steps=3"], tokens=9), DemoRequest(minutes=1, tokens=9)):
        with pytest.raises(ConfigError, match="both say how long to train; give one of them"):
            stages.steps_of(request, 2048)


def test_the_preset_is_a_small_pythia():
    config = load_config(["demo"])
    assert config.checkpoint.steps == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert config.model.parallel_residual and not config.model.tie_word_embeddings
    assert config.data.corpus == "python" and config.model.vocab_size == 4096


def test_spaced_keeps_the_ends():
    assert spaced([0, 1, 2], 6) == [0, 1, 2]
    chosen = spaced(list(range(12)), 6)
    assert len(chosen) == 6 and (chosen[0], chosen[-1]) == (0, 11)


def test_same_share_counts_up_to_the_first_difference():
    assert same_share([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.5
    assert same_share([[1, 2], [5]], [[1, 2], [5]]) == 1.0
    assert same_share([[1, 2]], [[1, 2, 3, 4]]) == 0.5
    assert same_share([[]], [[]]) == 0.0


def test_compare_measures_each_voice_against_the_first():
    def voice(name: str, token: int, logprob: float) -> Voice:
        return Voice(
            name,
            lambda p, n: [[token] * n for _ in p],
            lambda ids: [logprob] * (len(ids) - 1),
            2_000_000,
        )

    one, other = compare(
        [voice("a", 1, -0.6931472), voice("b", 2, -1.3862944)], [[0]], [[1, 2, 3]], max_new_tokens=5
    )
    assert (one["same"], other["same"]) == (1.0, 0.0)
    assert one["bits_per_token"] == pytest.approx(1) and other["bits_per_token"] == pytest.approx(2)
    assert one["megabytes"] == 2 and other["made"] == [[2] * 5] and other["tokens_per_second"] > 0
    assert bits_per_token(voice("c", 1, -0.6931472), [[1, 2], [1, 2, 3]]) == pytest.approx(1)


def test_the_commands_on_the_page_are_understood():
    page = Path(__file__).resolve().parents[2] / "docs" / "demo.md"
    lines = [
        shlex.split(line)
        for line in page.read_text().splitlines()
        if line.startswith("castalia demo")
    ]
    assert len(lines) == 5
    command = get_command(app)
    for _, verb, *words in lines:
        values = command.commands[verb].make_context(verb, words).params
        overrides = values["overrides"] or []
        config = load_config(["demo", f"output={values['output']}", *overrides])
        stages.steps_of(DemoRequest(overrides, values["minutes"], values["tokens"]), 2048)
        assert config.output.startswith("runs/")
