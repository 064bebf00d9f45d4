"""Help answers at once: no verb imports torch or another heavy library before it works."""

import subprocess
import sys

import pytest

VERBS = (
    "demo",
    "prepare",
    "data",
    "mixing",
    "show",
    "train",
    "launch",
    "generate",
    "export",
    "serve",
)
HEAVY = ("torch", "transformers", "ctranslate2", "tokenizers", "numpy", "yaml", "safetensors")
PROBE = """
import sys
sys.argv = ["castalia", *{arguments!r}]
from castalia.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
loaded = [name for name in {heavy!r} if name in sys.modules]
print("HEAVY", loaded)
"""


def run_help(*arguments: str) -> str:
    """Output of `castalia ARGUMENTS` with the heavy modules that it loaded at the end."""
    code = PROBE.format(arguments=list(arguments), heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_lists_the_verbs():
    text = run_help("--help")
    assert "HEAVY []" in text
    for verb in VERBS:
        assert verb in text


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb):
    text = run_help(verb, "--help")
    assert "HEAVY []" in text and "Usage" in text and len(text.splitlines()) > 6


def test_version():
    assert run_help("--version").startswith("castalia 0.")


def test_importing_the_package_is_light():
    code = f"import sys, castalia; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "[]"
    )


def test_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "castalia", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "train" in done.stdout


def test_unknown_verb_fails():
    done = subprocess.run(
        [sys.executable, "-m", "castalia", "trian"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "trian" in done.stderr
