"""`castalia batches`: modes, one JSON value of each, the options of Pythia's viewers."""

import json

import numpy as np
import pytest

from castalia.data import IndexedDatasetWriter


@pytest.fixture
def ready(tmp_path):
    """A file of 40 ready rows, of 2,049 tokens as Pythia's are."""
    with IndexedDatasetWriter(tmp_path / "ready", np.uint16) as writer:
        for row in range(40):
            writer.add(np.arange(row, row + 2049))
    return str(tmp_path / "ready")


def test_one_json_value_of_each_mode(command, four_steps, tmp_path):
    for words, keys in (
        ("", {"steps", "mode", "rows"}),
        ("--verify", {"steps", "mode", "verified"}),
        (f"--mode save --output {tmp_path / 'saved'}", {"written", "skipped", "output", "seconds"}),
        (f"--output {tmp_path / 'rows.jsonl'}", {"written", "skipped", "output", "seconds"}),
        (f"--ids {tmp_path / 'ids.npy'}", {"ids", "rows_hash"}),
    ):
        code, out, _ = command(
            "batches", str(four_steps), "--steps", "1:3", "--json", *words.split()
        )
        found = json.loads(out)
        assert code == 0 and found["steps"] == [1, 3] and keys <= found.keys()
    assert np.load(tmp_path / "ids.npy").shape == (4, 65)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    code, out, _ = command("data", "view", str(four_steps), "--steps", "1:3")
    assert code == 0 and out.splitlines() == lines
    code, out, _ = command("batches", str(four_steps), "--step", "2", "--mode", "text")
    assert code == 0 and out.startswith("step 2, row 0, source ")


def test_the_options_of_pythias_viewers(command, ready, tmp_path):
    words = ["train.batch_size=8", "--start_iteration", "1", "--end_iteration", "3"]
    code, _, err = command("batches", *words, "--load_path", ready, "--save_path", str(tmp_path))
    # The newer viewer has the last step in, the first one left it out.
    assert code == 0, err
    assert np.load(tmp_path / "indicies.npy")[::8, 0].tolist() == [8, 16, 24]
    config = tmp_path / "dummy_config.yml"
    config.write_text(
        f'{{"train_data_paths": ["{ready}"], "num_layers": 1, "hidden_size": 32, "train_iters": 5,'
        ' "num_attention_heads": 2, "seq_length": 2048, "max_position_embeddings": 2048,'
        ' "train_micro_batch_size_per_gpu": 4}'
    )
    words = ["--start_iteration", "0", "--end_iteration", "2", "--conf_dir", str(config)]
    output = tmp_path / "saved"
    code, _, err = command("batches", "--mode", "save", *words, "--save_path", str(output))
    assert code == 0, err
    assert "castalia batches" in err and "--steps 0:2 --mode save" in err
    assert sorted(path.name for path in output.glob("*.npy")) == [
        "batch0_bs4.npy",
        "batch1_bs4.npy",
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "--mode sve --steps 1",
            "--mode sve: expected save, custom, text, jsonl, parquet;",
        ),
        ("--mode save --steps 1", "--mode save needs --output FOLDER"),
        ("--mode custom --steps 1", "--mode custom and --fn MODULE:FUNCTION go together"),
        ("--fn a:b --mode save --steps 1", "--mode custom and --fn MODULE:FUNCTION go together"),
        ("--ids a --mode text --steps 1", "--ids and --jsonl are without --mode text and --output"),
        ("--steps 4", "step 4, but the run has steps 0 to 3"),
        ("--steps 3:1", "--steps 3:1: no step; the end is exclusive and comes after the"),
        ("--mode text --steps 1 data.tokenizer=null", "--mode text needs the tokenizer of the"),
        ("", "castalia batches needs --steps; for example: castalia batches runs/demo"),
    ],
)
def test_what_is_refused(command, four_steps, words, says):
    code, out, err = command("batches", str(four_steps), *words.split())
    assert (code, out) == (2, "") and says in err
