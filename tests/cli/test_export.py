"""`castalia export`: what it writes where, what it prints, and one-sentence errors."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from castalia.checkpoint import Store
from castalia.config import dump_yaml
from castalia.distributed import initialize
from castalia.models import Decoder, NeoxConfig
from castalia.models.init import start_weights
from castalia.runs.config import RunConfig
from castalia.tokenizers.tokenizer import load_tokenizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A byte-level run with start weights and three checkpoints."""
    folder = tmp_path / "run"
    config = NeoxConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=257, rotary_pct=0.5
    )
    load_tokenizer("bytes").save(folder / "tokenizer.json")
    files = {
        "config.yaml": dump_yaml(RunConfig(model=config)),
        "tokenizer.json": (folder / "tokenizer.json").read_text("utf-8"),
    }
    model = Decoder(config)
    initialize(model, start_weights(model.config, 0))
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for step in (0, 1, 1000):
        Store(folder / "checkpoints").save(step, tensors, {"step": step}, files, asynchronous=False)
    return folder


@pytest.fixture
def castalia(command: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """castalia(*words): `castalia export`; (exit status, stdout, stderr)."""
    return functools.partial(command, "export")


def test_one_checkpoint_goes_to_the_output_itself(castalia, run: Path, tmp_path: Path) -> None:
    code, out, _ = castalia(run / "step1", "--to", "hf", "--output", tmp_path / "out")
    assert code == 0 and out.startswith(f"{tmp_path / 'out'}  hf fp32  step 1  ")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_without_output_it_goes_into_the_run(castalia, run: Path) -> None:
    pytest.importorskip("ctranslate2")
    assert castalia(run, "--to", "hf")[0] == 0
    assert castalia(run, "--to", "ct2")[0] == 0
    assert castalia(run / "step0", "--to", "ct2", "--quantization", "float32")[0] == 0
    assert sorted(str(item.parent.relative_to(run)) for item in run.rglob("export.json")) == [
        "exports/ct2-float32/step0",
        "exports/ct2-int8/step1000",
        "exports/hf/step1000",
    ]


def test_several_steps_as_json_lines(castalia, run: Path, tmp_path: Path) -> None:
    code, out, _ = castalia(
        run, "--to", "hf", "--output", tmp_path / "out", "--steps", "step1000, 0", "--json"
    )
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [record["step"] for record in records] == [0, 1000]
    assert [Path(record["folder"]).name for record in records] == ["step0", "step1000"]
    assert all(record["bytes"] > 0 and record["notes"] == [] for record in records)
    assert castalia(run, "--to", "hf", "--all", "--dtype", "bf16")[1].count("hf bf16") == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "ggfu"], "unknown export format 'ggfu'; choose one of hf, ct2"),
        (["--to", "hf", "--steps", "one"], "--steps 'one': expected step numbers"),
        (["--to", "hf", "--steps", "1", "--all"], "--all or --steps, not both"),
        (["--to", "hf", "--quantization", "int8"], "hf takes a dtype, not a quantization"),
    ],
)
def test_wrong_options_are_one_sentence(
    castalia, run: Path, words: list[str], message: str
) -> None:
    code, out, err = castalia(run, *words)
    assert (
        code == 2
        and out == ""
        and err.startswith("castalia: error: ")
        and message in err
        and err.count("\n") == 1
    )
    assert not (run / "exports").exists()


def test_a_second_export_needs_force(castalia, run: Path) -> None:
    assert castalia(run, "--to", "hf")[0] == 0
    code, _, err = castalia(run, "--to", "hf")
    assert code == 2 and "exists already; use --force" in err
    assert castalia(run, "--to", "hf", "--force")[0] == 0


def test_a_damaged_checkpoint_is_named(castalia, run: Path, tmp_path: Path) -> None:
    weights = next((run / "checkpoints" / "step-00000001").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    code, _, err = castalia(run / "step1", "--to", "hf", "--output", tmp_path / "out")
    assert code == 1 and weights.name in err
    assert not (tmp_path / "out").exists()
