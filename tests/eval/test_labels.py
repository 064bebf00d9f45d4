"""What a path says about its model: suite, name, run and step."""

import json
from pathlib import Path

import pytest

from castalia.eval.labels import (
    Arithmetic,
    ahead,
    arithmetic,
    facts_of_run,
    is_computed_so,
    labels_of,
    origin_of,
    size_in,
)
from castalia.inference import LanguageModel, load
from castalia.recipes import load_config
from castalia.results import Labels, Result
from castalia.train.evaluated import labels_at as labels_in_training


def test_every_form_of_a_run_has_the_same_labels(run_folder: Path, speaker: LanguageModel):
    forms = ("", "/checkpoints", "/checkpoints/step-00000220", "/step220", "@220")
    labels = {labels_of(f"{run_folder}{form}", speaker) for form in forms}
    assert labels == {labels_of(run_folder, speaker)}
    (one,) = labels
    assert (one.suite, one.model, one.step) == (run_folder.parent.name, "tiny", 220)
    assert (one.seed, one.last_step, one.tokens) == (1234, 143000, 220 * 1024 * 64)
    assert (one.engine, one.dtype, one.checkpoint) == ("torch", "fp32", f"{run_folder}/step220")
    row = one.result("lambada", "acc", 0.5, shots=0)
    assert isinstance(row, Result)
    assert (row.model, row.parameters, row.task, row.shots) == (
        "tiny",
        one.parameters,
        "lambada",
        0,
    )


def test_the_seed_is_that_of_the_start_weights(tmp_path: Path):
    for text, seed in (("seed: 3", 3), ("seed: 3\nweight_seed: 5\ndata_seed: 7", 5)):
        (tmp_path / "config.yaml").write_text(f"{text}\n")
        assert facts_of_run(tmp_path)["seed"] == seed
    config = load_config(["debug", "seed=3", "weight_seed=5", "data_seed=7"])
    assert labels_in_training(Labels("suite", "tiny"), config, 0, saved=False).seed == 5


def test_how_an_engine_computes_is_part_of_the_labels(run_folder: Path):
    step = run_folder / "step0"
    exact = labels_of(step, load(step, engine="native", dtype="int8"))
    quick = labels_of(step, load(step, engine="native", dtype="auto"))
    assert (exact.engine, exact.dtype) == ("native", "int8")
    # Layers this small are not measured, so that auto scores as it decodes.
    assert (quick.engine, quick.dtype) == ("native", "int8")
    engine = load(step, engine="native", dtype="auto").engine
    engine.scoring = "bf16"
    assert arithmetic(engine) == "int8, scored in bf16"
    assert ahead(str(step), Arithmetic("native", "auto")) == ("native", "auto")
    for label in ("int8", "int8, scored in bf16", "auto"):
        assert is_computed_so(label, "auto") and not is_computed_so(label, "auto, cache in bf16")
    assert is_computed_so("int8, scored in fp32, cache in bf16", "auto, cache in bf16")
    assert not is_computed_so("fp32", "auto") and not is_computed_so("int8, scored in bf16", "int8")


@pytest.mark.parametrize(
    "path, expected",
    [
        ("EleutherAI/pythia-1.4b@step3000", ("EleutherAI", "pythia-1.4b", 3000)),
        ("hf://me/toy", ("me", "toy", None)),
        ("/x/y/pythia-70m/step100", ("y", "pythia-70m", 100)),
        ("/x/save/global_step10", ("x", "save", 10)),
        ("/x/models/opt-125m", ("models", "opt-125m", None)),
        ("/x/models/opt-125m/model.gguf", ("models", "opt-125m", None)),
        ("/x/models/opt-125m/opt-q8.gguf", ("opt-125m", "opt-q8", None)),
    ],
)
def test_a_path_without_a_run_names_its_model(path: str, expected: tuple[object, ...]):
    origin = origin_of(path)
    assert (origin.suite, origin.model, origin.step) == expected
    assert origin.run is None


def test_an_export_belongs_to_its_run_and_another_folder_in_it_does_not(tmp_path: Path):
    run = tmp_path / "suite" / "small"
    (run / "exports" / "hf" / "step8").mkdir(parents=True)
    (run / "other" / "step8").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 7\n")
    (run / "env.json").write_text(json.dumps({}))
    assert origin_of(run / "exports" / "hf" / "step8") == ("suite", "small", run, 8)
    assert origin_of(run / "other" / "step8") == ("small", "other", None, 8)


def test_the_size_is_what_the_name_says():
    names = ["pythia-1b-bf16", "OPT-125M", "bloom-1.7b", "bloom-7b1", "debug", "seed1-19m"]
    assert [size_in(name) for name in names] == ["1b", "125m", "1.7b", None, None, "19m"]
