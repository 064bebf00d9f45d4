"""Castalia with its required dependencies alone: each verb works, or says in one sentence which
extra is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from castalia.core.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
RUN = "runs/a"
SMALL = "model.num_layers=1 model.hidden_size=32 train.batch_size=2 train.steps=2"
WORKING = (
    f"train debug {SMALL} output={RUN}",
    f"train {RUN} train.steps=3",
    f"show {RUN}",
    f"generate {RUN} --prompt a --max-new-tokens 2",
    f"generate {RUN} --prompt a --max-new-tokens 2 --engine torch",
    f"export {RUN} --to hf --output out/hf",
    f"export {RUN} --to native --output out/native",
    f"export {RUN} --to neox --output out/neox",
    f"export {RUN} --to gguf --output out/gguf --quantization F32",
    "generate out/hf --prompt a --max-new-tokens 2",
    f"upload {RUN} --repo me/a --dry-run",
    "runs",
    f"verify {RUN} out/hf out/native",
    f"audit {RUN}",
    f"batches {RUN} --step 1",
    f"data view {RUN} --step 1",
    f"trace {RUN} import",
    "suite mini --plan",
)
REFUSED = {
    f"report {RUN}": "report",
    f"view {RUN}": "report",
    f"eval {RUN} --tasks lambada_openai": "eval",
    f"eval {RUN} --tasks bits_per_byte": "results",
    f"serve {RUN}": "serve",
    f"index {RUN}": "trace",
    f"weights {RUN} --output w.parquet": "parquet",
    f"memorize {RUN} --output m.parquet": "parquet",
    f"generate {RUN} --engine ct2 --prompt a": "ct2",
    f"generate {RUN} --engine openvino --prompt a": "openvino",
    f"generate {RUN} --engine llama.cpp --prompt a": "llama",
    f"generate {RUN} --prompt a --json-schema {{}}": "grammar",
    f"train debug {SMALL} precision=fp8 output=runs/b": "optim",
    "prepare text.parquet --tokenizer bytes --output x": "parquet",
}
"""Verb -> the extra that it names."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """What each verb did, all in one process."""
    folder = tmp_path_factory.mktemp("required")
    (folder / "text.parquet").write_bytes(b"PAR1 and so on")
    lines = [*WORKING, *REFUSED]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "HF_TOKEN": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fixtures.required_only"],
        input=json.dumps([line.split() for line in lines]),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(lines, map(tuple, json.loads(done.stdout)), strict=True))


@pytest.mark.parametrize("line", WORKING)
def test_it_works_without_an_extra(answers, line: str) -> None:
    status, _, err = answers[line]
    assert status == 0, err


@pytest.mark.parametrize("line", REFUSED)
def test_it_names_the_missing_extra(answers, line: str) -> None:
    status, out, err = answers[line]
    extra = REFUSED[line]
    assert extra in EXTRAS
    *notes, sentence = err.strip().splitlines()
    assert status in (1, 2), (out, err)
    assert sentence.startswith("castalia: error: ") and "Traceback" not in err
    assert "which is not installed: pip install" in sentence and f"[{extra}]'" in sentence, notes
