"""GPT-NeoX's options of μP and DeepSpeed's schedulers."""

from typing import Any

import pytest
import yaml

from castalia.config.neox import read_neox
from castalia.config.values import flatten
from castalia.core.errors import ConfigError
from castalia.models import build_model_config
from castalia.optim.schedule import ScheduleConfig, make_schedule
from castalia.recipes import load_config

FILE = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "train_iters": 100,
    "train_batch_size": 4,
    "data_path": "x",
    "lr_decay_style": "cosine",
    "optimizer": {"type": "Adam", "params": {"lr": 2e-3}},
}


def values_of(**options: Any) -> dict[str, Any]:
    reading = read_neox({"a.yml": FILE | options})
    assert reading.problems == []
    return flatten(reading.values)


def notes_of(**options: Any) -> str:
    return " ".join(remark.text for remark in read_neox({"a.yml": FILE | options}).notes)


def problem_of(**options: Any) -> str:
    (problem,) = read_neox({"a.yml": FILE | options}).problems
    return problem.text


def test_mup_with_base_shapes_of_the_mup_package(tmp_path):
    shapes = {"0.word_embeddings.weight": [None, 32], "2.norm.weight": [32]}
    (tmp_path / "shapes.0").write_text("# comment\n" + yaml.safe_dump(shapes))
    options = {
        "use-mup": True,
        "base-shapes-file": str(tmp_path / "shapes"),
        "mup-init-scale": 2.0,
        "mup_embedding_mult": 3.0,
        "mup_rp_embedding_mult": 4.0,
        "mup_output_temp": 2.0,
        "mup_width_scale": 2,
        "coord-check": True,
    }
    values = values_of(**options)
    section = {
        key.removeprefix("model.mup."): value
        for key, value in values.items()
        if key.startswith("model.mup.")
    }
    assert section == {
        "base_width": 32,
        "base_head_dim": 16,
        "init_scale": 2.0,
        "embedding_mult": 3.0,
        "rp_embedding_mult": 4.0,
        "output_mult": 0.5,
        "attention_mult": 0.25,
    }
    model = build_model_config(
        {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 99}
        | {"mup": section},
        "a test",
    )
    # GPT-NeoX divides the scores by the width of a head, ours also by its root.
    assert model.score_factor * 16**-0.5 == pytest.approx(1 / 16)
    assert model.bias_factor == pytest.approx(4.0 * 16**0.5)
    notes = notes_of(**options)
    assert "coord_check is a command here" in notes and "GPT-NeoX never reads it" in notes
    # The width of the file itself, where GPT-NeoX would save the shapes.
    assert values_of(use_mup=True, save_base_shapes=True)["model.mup.base_width"] == 64
    assert "mup_output_temp" not in notes_of(use_mup=True, save_base_shapes=True)
    assert "twice" in notes_of(use_mup=True, save_base_shapes=True, init_method="small_init")


def test_mup_without_a_base_width_is_refused_and_settled_by_an_override(tmp_path):
    assert "there is no base_shapes_file" in problem_of(use_mup=True)
    assert "does not exist" in problem_of(use_mup=True, base_shapes_file="nowhere")
    (tmp_path / "other").write_text("a: [1, 2]\n")
    assert "has no width" in problem_of(use_mup=True, base_shapes_file=str(tmp_path / "other"))
    path = tmp_path / "a.yml"
    more = {"use_mup": True, "mup_init_scale": 2.0, "tokenizer_type": "CharLevelTokenizer"}
    path.write_text(yaml.safe_dump(FILE | more))
    with pytest.raises(ConfigError, match=r"set model\.mup\.base_width=N"):
        load_config([str(path)])
    mup = load_config([str(path), "model.mup.base_width=32"]).model.mup
    assert mup is not None and (mup.base_width, mup.init_scale) == (32, 2.0)
    ignored = read_neox({"a.yml": FILE | {"mup_init_scale": 2.0}}).ignored
    assert ignored["belongs to use_mup, which is off"] == ["mup_init_scale"]


def deepspeed(kind: str, n: int, p: dict[str, Any], lr: float = 2e-3) -> float:
    """DeepSpeed's rate at its step n, from deepspeed/runtime/lr_schedules.py."""
    import math

    warm = p["warmup_num_steps"]
    rise = min(1.0, math.log(n + 1) / math.log(warm))
    if p.get("warmup_type") == "linear":
        rise = n / warm
    if kind == "WarmupCosineLR":
        low, floor = p["warmup_min_ratio"], p["cos_min_ratio"]
        if n < warm:
            return lr * (low + (1 - low) * rise)
        done = (n - warm) / (p["total_num_steps"] - warm)
        return lr * (floor + (1 - floor) / 2 * (1 + math.cos(math.pi * done)))
    low, high = p["warmup_min_lr"], p["warmup_max_lr"]
    if n < warm:
        return low + (high - low) * rise
    if kind == "WarmupLR":
        return high
    left = max(0.0, (p["total_num_steps"] - n) / (p["total_num_steps"] - warm))
    return low + (high - low) * left


RISE = {"warmup_min_lr": 1e-4, "warmup_max_lr": 3e-3, "warmup_num_steps": 20}
RATIOS = {"warmup_min_ratio": 0.1, "warmup_num_steps": 20, "cos_min_ratio": 0.05}
SCHEDULERS = {
    "WarmupLR": RISE,
    "WarmupDecayLR": RISE | {"total_num_steps": 90},
    "WarmupCosineLR": RATIOS | {"total_num_steps": 90, "warmup_type": "linear"},
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_of_deepspeed(kind):
    params = SCHEDULERS[kind]
    options = {"scheduler": {"type": kind, "params": params}}
    values = values_of(**options)
    config = {
        key.removeprefix("schedule."): value
        for key, value in values.items()
        if key.startswith("schedule.")
    }
    rate = make_schedule(ScheduleConfig(**config), values["optim.lr"], 100)
    for n in (1, 2, 10, 19, 21, 50, 89, 99):
        expected = deepspeed(kind, min(n, params.get("total_num_steps", n)), params)
        assert rate(n) == pytest.approx(expected, rel=1e-6), n
    assert f"scheduler {kind} of DeepSpeed takes the place of" in notes_of(**options)


def test_one_cycle_and_what_is_refused():
    cycle = {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3, "cycle_first_step_size": 30}
    values = values_of(scheduler={"type": "OneCycle", "params": cycle})
    assert (values["schedule.warmup_steps"], values["schedule.decay_steps"]) == (30, 60)
    assert (values["schedule.warmup_start"], values["optim.lr"]) == (1e-4, 1e-3)
    decay = cycle | {"decay_step_size": 5, "decay_lr_rate": 0.1}
    assert "falls on after" in problem_of(scheduler={"type": "OneCycle", "params": decay})
    assert "needs params.cycle_max_lr" in problem_of(
        scheduler={"type": "OneCycle", "params": {"cycle_min_lr": 1e-4}}
    )
    assert "castalia lr-find" in problem_of(scheduler={"type": "LRRangeTest"})
    assert "choose one of WarmupLR" in problem_of(scheduler={"type": "Plateau"})
    assert "needs params.total_num_steps" in problem_of(scheduler={"type": "WarmupDecayLR"})
    assert "resumes with the schedule of its own" in notes_of(use_checkpoint_lr_scheduler=True)
