"""Help answers at once: no verb imports torch or another heavy library before it works."""

import itertools
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from tests.fixtures.forked_shell import ForkedShell

VERBS = (
    "demo",
    "doctor",
    "prepare",
    "data",
    "mixing",
    "show",
    "lr-find",
    "coord-check",
    "tune",
    "train",
    "launch",
    "study",
    "suite",
    "runs",
    "verify",
    "version",
    "audit",
    "weights",
    "intervene",
    "agreement",
    "generate",
    "eval",
    "trace",
    "index",
    "count",
    "memorize",
    "report",
    "results",
    "scaling",
    "memorization",
    "view",
    "batches",
    "export",
    "upload",
    "serve",
)
HEAVY = ("torch", "transformers", "ctranslate2", "tokenizers", "numpy", "yaml", "safetensors")
WARM = ("typer.rich_utils", "castalia.cli.app")
"""What the process imports whose forks run the commands: a heavy module would be seen in each."""
PROBE = """
import os, sys
import castalia.cli as cli
os.environ.update({variables!r})
def probed(main=cli.main):
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
    print("HEAVY", [name for name in {heavy!r} if name in sys.modules])
cli.main = probed
"""


@pytest.fixture(scope="module")
def run_help(tmp_path_factory) -> Iterator[Callable[..., str]]:
    """Callable: output of `castalia ARGUMENTS` with the heavy modules that it loaded at the end."""
    shell = ForkedShell(tmp_path_factory.mktemp("shell"), *WARM)

    def run(*arguments: str, **variables: str) -> str:
        code = PROBE.format(variables=variables, heavy=HEAVY)
        done = shell.castalia(list(arguments), code=code)
        assert done.returncode == 0, done.stderr
        return done.stdout

    yield run
    shell.close()


def test_help_lists_the_verbs(run_help):
    text = run_help("--help")
    assert "HEAVY []" in text
    for verb in VERBS:
        assert verb in text


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(run_help, verb):
    text = run_help(verb, "--help")
    assert "HEAVY []" in text and "Usage" in text and len(text.splitlines()) > 6


USAGE = {
    "train": "train [OPTIONS] CONFIG... [a.b=c ...]",
    "show": "show [OPTIONS] CONFIG... [a.b=c ...]",
    "demo": "demo [OPTIONS] [a.b=c ...]",
    "prepare": "prepare [OPTIONS] INPUT...",
    "data view": "data view [OPTIONS] CONFIG... [a.b=c ...]",
    "data merge": "data merge [OPTIONS] PREFIX...",
    "report": "report [OPTIONS] PATH...",
    "results": "results [OPTIONS] [PATH...]",
    "view": "view [OPTIONS] [PATH...]",
    "batches": "batches [OPTIONS] CONFIG... [a.b=c ...]",
    "mixing reference": "mixing reference [OPTIONS] CHECKPOINT [PREFIX...]",
    "count": "count [OPTIONS] CONFIG... [a.b=c ...]",
    "export": "export [OPTIONS] CHECKPOINT",
    "eval": "eval [OPTIONS] CKPT|RUN|SUITE... [dtype=int8 ...]",
    "runs": "runs [OPTIONS] [DIR]",
    "scaling": "scaling [OPTIONS] PATH...",
    "memorization": "memorization [OPTIONS] [NAME=]FILE...",
    "study term-frequency": "study term-frequency [OPTIONS] RUN|SUITE|CSV...",
    "study pronouns": "study pronouns [OPTIONS] RUN|SUITE...",
    "intervene": "intervene [OPTIONS] RUN FILE|a.b=c...",
    "suite": "suite [OPTIONS] SUITE [a.b=c ...]",
}


@pytest.mark.parametrize("verb", USAGE)
def test_the_usage_line_is_what_a_user_types(run_help, verb):
    text = run_help(*verb.split(), "--help", COLUMNS="100")
    (line,) = [line for line in text.splitlines() if "Usage:" in line]
    assert line.strip() == f"Usage: castalia {USAGE[verb]}"


@pytest.mark.parametrize("columns", ["60", "100", "160"])
def test_paragraphs_break_at_the_width_of_the_terminal(run_help, columns):
    text = run_help("data", "view", "--help", COLUMNS=columns)
    lines = [line.strip() for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("--steps A:B are"))
    paragraph = lines[start : lines.index("", start)]
    assert paragraph[-1].endswith("0:N.")
    # Each line but the last is full: the next word would not have fitted.
    for line, after in itertools.pairwise(paragraph):
        assert len(line) + 1 + len(after.split()[0]) > int(columns) - 2


def test_options_of_prepare_stand_in_panels(run_help):
    text = run_help("prepare", "--help", COLUMNS="100")
    titles = ["Input", "Tokenizer", "Output", "Chat", "Fill-in-the-middle", "Cluster"]
    places = [text.index(f"─ {title} ─") for title in titles]
    assert places == sorted(places)
    assert places[3] < text.index("--chat-template") < places[4] < text.index("--fim-rate")


def test_version(run_help):
    assert run_help("--version").startswith("castalia 0.")
    text = run_help("version")
    assert text.startswith("castalia 0.") and "\ntorch " in text and "HEAVY []" in text
    found = json.loads(run_help("version", "--json").partition("HEAVY")[0])
    assert found["python"] == platform.python_version() and found["torch"][0].isdigit()


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
