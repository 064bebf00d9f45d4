"""Checkpoints of each format that was ever written stay readable, and the page about them is
true."""

import re
from pathlib import Path

import torch

from castalia.checkpoint import find_checkpoint, load_into, read_config, verify

DOCS = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"


def test_format_1_is_read():
    folder = find_checkpoint(Path(__file__).with_name("format_1") / "step3")
    assert verify(folder) == []
    tensors = {
        "model.embed.weight": torch.zeros(3, 2),
        "model.half": torch.zeros(4, dtype=torch.bfloat16),
        "optim.step": torch.tensor(0),
    }
    assert load_into(folder, tensors) == {"tokens": 96}
    assert tensors["model.embed.weight"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert tensors["model.half"].tolist() == [0, 1, 2, 3]
    assert tensors["optim.step"] == 3
    assert read_config(folder) == {"seed": 5}


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]
    names = {}
    exec(example, names)
    assert (names["step"], names["state"]) == (1000, {"tokens": 8192})
    assert torch.equal(names["weights"]["weight"], names["tensors"]["model.weight"])
