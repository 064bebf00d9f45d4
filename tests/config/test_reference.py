"""The keys of a config as a reference, on the screen and in the docs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from castalia.config.fields import leaves
from castalia.config.neox_keys import NAMES
from castalia.config.neox_paths import neox_names
from castalia.config.reference import entries
from castalia.config.units import unit_of
from castalia.runs.config import RunConfig

DOCS = Path(__file__).resolve().parents[2] / "docs"
STALE = "the page is not current: run `make docs`, or python -m castalia.pages"


def output(*words):
    """What a command prints, in a process without the guests of other tests."""
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def keys_of_tables(text):
    """The name in the first cell of each row of the tables of a page."""
    return [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with every generated page, as `make docs` writes them now."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "README.md").touch()
    (folder / "options.md").write_text("<<<<<<< HEAD\n")
    said = output("castalia.pages", str(folder))
    assert f"{folder}/options.md: written" in said
    return folder


def test_the_pages_of_options_are_current(written):
    for name in ("options.md", "gpt-neox-options.md"):
        assert (DOCS / name).read_text() == (written / name).read_text(), f"{name}: {STALE}"


def test_the_page_of_options_names_every_key(written):
    listed = keys_of_tables((written / "options.md").read_text())
    found = json.loads(output("castalia", "show", "--keys", "--json"))
    assert {entry["key"] for entry in found} <= set(listed)
    # A key that holds a section, or a list of them, is no leaf itself.
    plain = {entry["key"] for entry in found if "section" not in entry["values"]}
    assert plain <= set(leaves(RunConfig))
    section = output("castalia", "show", "--keys", "schedule", "--markdown")
    assert set(keys_of_tables(section)) < set(listed) and "| `wsd` |" in section


def test_the_page_of_gpt_neox_names_every_argument_once(written):
    text = (written / "gpt-neox-options.md").read_text()
    arguments, _, nested = text.partition("## Keys of dictionaries")
    assert sorted(keys_of_tables(arguments)) == NAMES
    assert "| arguments of GPT-NeoX | 318 |" in text
    assert (
        "| `hysteresis` | honoured | [`loss_scale.hysteresis`](options.md#loss_scale) |" in nested
    )
    lines = dict(zip(keys_of_tables(arguments), arguments.split("\n| `")[1:], strict=True))
    assert "refused | accepted: `null`, `false`" in lines["amp"]
    assert "without effect | CUDA kernels and fusions" in lines["rope_fusion"]
    assert "honoured | the old name of `gradient_accumulation_steps`" in lines["gas"]


def test_every_key_has_its_values_default_and_meaning():
    found = {entry.key: entry for entry in entries(RunConfig)}
    # Guests of other tests are members like any other: a key more is no fault.
    assert set(leaves(RunConfig)) <= found.keys()
    assert all(entry.text and "\n" not in entry.text and entry.values for entry in found.values())
    assert all("value" not in entry.values.split() for entry in found.values())
    facts = {key: found[key][1:3] for key in found}
    assert facts["optim.clip"] == ("number > 0 | null", "1")
    assert facts["mixing.floor"] == ("number >= 0, <= 1", "0")
    assert facts["precision"][0].startswith("auto | fp32 | bf16 | fp16")
    assert facts["train.recompute"] == ("true or false | full | selective | integer > 0", "false")
    assert facts["guard.skip_steps"] == ("list of integer > 0", "[]")
    assert facts["model.hidden_size"] == ("integer > 0", "required")
    assert facts["launch.include"] == ("text", '""')
    assert facts["mixing.exhaustion"] == ("text | mapping", "repeat")
    assert found["train.steps"].at_resume and not found["train.batch_size"].at_resume


def test_units_and_names_of_gpt_neox():
    found = {entry.key: entry for entry in entries(RunConfig)}
    units = {
        "data.seq_length": "tokens",
        "train.batch_size": "rows",
        "train.steps": "steps",
        "guard.hang_seconds": "seconds",
        "schedule.warmup": "share",
        "schedule.fall_steps": "steps",
        "mixing.eps": "share",
        "model.hidden_size": "channels",
        "parallel.tp": "ranks",
        "seed": "",
        "output": "",
    }
    assert {key: found[key].unit for key in units} == units
    assert unit_of("odm, exp3: guaranteed share of every source; in tokens") == "share"
    assert unit_of("Distance, in tokens, from which all share the last bucket.") == "tokens"
    assert unit_of("The dynamic scale starts at 2 ** this.") == ""
    assert found["model.tie_word_embeddings"].neox == ("no_weight_tying",)
    assert found["loss_scale.window"].neox == ("fp16.loss_scale_window",)
    assert "gas" in found["train.batch_size"].neox
    # A mapping of text has no keys of its own.
    sections = {key.rpartition(".")[0] for key in found}
    unknown = neox_names().keys() - found.keys() - sections
    assert all(key.startswith("launch.slurm.") for key in unknown), unknown
