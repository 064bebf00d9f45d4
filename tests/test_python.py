"""Castalia from Python: the door of the package, its verbs, and objects that say what they are."""

import doctest
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import castalia
from castalia.core.errors import ConfigError, DataError
from castalia.monitor import table
from castalia.recipes.training import override_words


class SaysMore(doctest.OutputChecker):
    """An example without an expected result may print, as training does."""

    def check_output(self, want: str, got: str, flags: int) -> bool:
        """As doctest, but an example that expects nothing accepts everything."""
        # What a verb prints comes before the value that the example shows.
        return not want or super().check_output(want, got[-len(want) :], flags)


def run_examples(thing: object, name: str) -> int:
    """Run the examples in a docstring, in the working directory; the number of them."""
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner(checker=SaysMore())
    reports: list[str] = []
    examples = 0
    for test in finder.find(thing, name):
        runner.run(test, out=reports.append)
        examples += len(test.examples)
    assert not runner.failures, "".join(reports)
    return examples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples, which resume each other's runs."""
    return tmp_path_factory.mktemp("python")


@pytest.mark.parametrize(
    "name",
    ["", "train", "load", "prepare", "read_metrics", "load_config", "Trainer", "recipes.training"],
)
def test_examples_of_help_run(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "text.jsonl").write_text('{"text": "A document."}\n{"text": "Another one."}\n')
    thing = castalia
    for part in name.split(".") if name else []:
        thing = getattr(thing, part)
    if name == "recipes.training":
        thing = thing.train
    assert run_examples(thing, f"castalia.{name}") >= 2


def test_the_door_is_quick_and_lists_what_is_behind_it():
    code = (
        "import sys, castalia;"
        "names = {'train', 'load', 'prepare', 'read_metrics', 'data', 'mixing', 'serve'};"
        "assert names <= set(dir(castalia));"
        "assert not [name for name in sys.modules if name.startswith('castalia.')];"
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules);"
        "assert castalia.data.__name__ == 'castalia.data' and 'Batch' in dir(castalia.data);"
        "from castalia.runs.config import RunConfig;"
        "assert callable(castalia.train) and 'Trainer' in dir(castalia.train);"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="module 'castalia' has no attribute 'trian'") as error:
        castalia.trian  # noqa: B018
    # With these Python adds the nearest name to the message of a traceback.
    assert (error.value.name, error.value.obj) == ("trian", castalia)


def test_settings_are_overrides_by_name():
    assert override_words({"steps": 20, "lr": 1e-3, "output": Path("runs/a")}) == [
        "train.steps=20",
        "optim.lr=0.001",
        'output="runs/a"',
    ]
    nested = {"optim": {"betas": (0.9, 0.99)}, "checkpoint.steps": [1], "precision": None}
    assert override_words(nested) == [
        "optim.betas=[0.9, 0.99]",
        "checkpoint.steps=[1]",
        "precision=null",
    ]
    with pytest.raises(ConfigError) as error:
        override_words({"stesp": 3, "kind": "lion"})
    assert "stesp: unknown setting; did you mean 'steps'?" in str(error.value)
    assert "kind: several sections have this key; write **{'" in str(error.value)
    with pytest.raises(ConfigError, match="a config holds numbers, text, lists and mappings"):
        override_words({"seed": object()})
    with pytest.raises(ConfigError, match="append_eox: unknown setting of prepare; did you mean"):
        castalia.prepare("text.jsonl", "data/text", "bytes", append_eox=True)


def test_metrics_as_a_table(tmp_path, monkeypatch):
    lines = [
        '{"step": 1, "loss": 5.5, "sources": {"web": {"loss": 5.0}}}',
        '{"step": 2, "loss": null, "skipped": "no targets"}',
        '{"step": 3, "lo',  # cut off by a crash
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    metrics = castalia.read_metrics(tmp_path)
    assert metrics.columns == ["step", "loss", "sources/web/loss", "skipped"]
    assert metrics["step"].tolist() == [1, 2] and metrics["step"].dtype == np.int64
    assert metrics["loss"][0] == 5.5 and np.isnan(metrics["loss"][1]) and len(metrics) == 2
    assert metrics["skipped"].tolist() == [None, "no targets"]
    with pytest.raises(KeyError, match="no column 'los'; have: step, loss"):
        metrics["los"]
    assert repr(metrics).splitlines()[2].split() == ["loss", "5.5", "nan"]
    assert dict(castalia.read_metrics(tmp_path / "metrics.jsonl")).keys() == set(metrics)
    with pytest.raises(DataError, match=r"no run folder .*nowhere; `castalia runs` lists runs"):
        castalia.read_metrics(tmp_path / "nowhere")
    with pytest.raises(DataError, match=f"did you mean '{tmp_path}'"):
        castalia.read_metrics(tmp_path.with_name(tmp_path.name[1:]))
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"no metrics.jsonl in .*: it is not the folder of a run"):
        castalia.read_metrics(tmp_path)


def test_metrics_as_a_data_frame(tmp_path):
    pandas = pytest.importorskip("pandas")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.5}\n{"step": 2, "loss": 5.0}\n')
    frame = castalia.read_metrics(tmp_path)
    assert isinstance(frame, pandas.DataFrame) and frame["loss"].tolist() == [5.5, 5.0]


def test_objects_say_what_they_are(tmp_path):
    config = castalia.load_config(["debug", "train.steps=3"])
    assert "train=TrainConfig(steps=3, batch_size=12)" in repr(config)
    assert str(config) == repr(config)
    assert castalia.load_config("debug") == castalia.load_config(["debug"])
    assert "optim=AdamWConfig(lr=0.002)" in repr(config) and "launch" not in repr(config)
    castalia.prepare(Path(__file__), tmp_path / "text", "bytes", append_eod=True)
    tokens = castalia.data.IndexedDataset(tmp_path / "text")
    order = castalia.data.NeoxOrder(tokens.sizes, seq_length=8, num_samples=20, seed=1)
    rows = castalia.data.PackedDataset(tokens, order)
    assert repr(order).endswith("rows of 8 tokens, 1 epochs, seed 1)")
    assert repr(rows) == f"PackedDataset('{tmp_path}/text', {len(rows):,} rows of 8 tokens)"
    served = castalia.data.BlendedRows([rows])
    loader = castalia.data.StepLoader(served, batch_size=4, micro_batch_size=2)
    assert repr(loader) == f"StepLoader({served!r}, 2 micro-batches of 2 rows a step from step 0)"
    assert repr(next(iter(loader))[0]) == "Batch(2 rows of 8 tokens, on cpu)"
    mixer = castalia.mixing.make_mixer("static", ["web", "code"], prior=[0.75, 0.25])
    assert repr(mixer) == "Static(web 75.0%, code 25.0%)"
    planner = castalia.mixing.Planner(mixer, sizes=[9, 9], rows=4, seed=0)
    assert repr(planner) == f"Planner(4 rows a step, step 0 planned, {mixer!r})"
    assert repr(castalia.checkpoint.Store(tmp_path)) == f"Store('{tmp_path}', newest step None)"
    policy = castalia.checkpoint.SavePolicy(config.checkpoint, 3)
    assert repr(policy) == "SavePolicy(4 checkpoints up to step 3)"
    state = castalia.models.Decoder(config.model).new_state(2, 16)
    assert repr(state) == "ModelState(4 layers, 2 rows of at most 16 tokens, 0 in the longest)"
