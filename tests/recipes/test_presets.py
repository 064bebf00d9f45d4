"""Presets: the published facts of every Pythia size."""

import pytest

from castalia.checkpoint.policy import SavePolicy
from castalia.core.errors import ConfigError
from castalia.models import TransformerConfig, build_model_config
from castalia.models.flops import active_parameters, parameter_counts
from castalia.monitor import read_metrics
from castalia.recipes import load_config, preset, preset_names
from castalia.recipes.pythia import SMALLER_BATCHES, V0_SIZES
from castalia.recipes.training import train
from castalia.train.timing import piece_of

# Total and non-embedding parameters of the released models (model cards of EleutherAI/pythia).
PUBLISHED = {
    "14m": (14_067_712, 1_189_888),
    "31m": (30_494_720, 4_739_072),
    "70m": (70_426_624, 18_915_328),
    "160m": (162_322_944, 85_056_000),
    "410m": (405_334_016, 302_311_424),
    "1b": (1_011_781_632, 805_736_448),
    "1.4b": (1_414_647_808, 1_208_602_624),
    "2.8b": (2_775_208_960, 2_517_652_480),
    "6.9b": (6_857_302_016, 6_444_163_072),
    "12b": (11_846_072_320, 11_327_027_200),
}
RATES = {
    "14m": 1e-3,
    "31m": 1e-3,
    "70m": 1e-3,
    "160m": 6e-4,
    "410m": 3e-4,
    "1b": 2.5e-4,
    "1.4b": 2e-4,
    "2.8b": 1.6e-4,
    "6.9b": 1.2e-4,
    "12b": 1.2e-4,
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_are_those_of_the_released_models(size):
    assert tuple(parameter_counts(load_config([f"pythia-{size}"]).model)) == PUBLISHED[size]


@pytest.mark.parametrize("size", PUBLISHED)
def test_recipe_of_every_size(size):
    config = load_config([f"pythia-{size}"])
    assert config.optim.lr == RATES[size]
    assert config.schedule.min_lr == pytest.approx(RATES[size] / 10, rel=1e-12)
    assert (config.schedule.name, config.schedule.warmup, config.schedule.decay_steps) == (
        "cosine_neox_v1",
        0.01,
        143_000,
    )
    assert config.train.steps * config.tokens_per_step == 299_892_736_000
    assert len(SavePolicy(config.checkpoint, config.train.steps).all_steps()) == 154
    assert (config.seed, config.optim.betas, config.optim.eps, config.optim.clip) == (
        1234,
        (0.9, 0.95),
        1e-8,
        1.0,
    )
    big = size in ("6.9b", "12b")
    assert config.model.init_method == ("normal" if big else "small_init")
    assert config.model.output_layer_init_method == ("scaled_normal" if big else "wang_init")
    assert config.model.padded_vocab_size == {"6.9b": 50432, "12b": 50688}.get(size, 50304)
    assert config.recipe == f"pythia-{size}" and config.output == f"runs/pythia-{size}"


def test_only_the_1b_on_the_standard_pile_is_bf16():
    precisions = {
        name: load_config([name]).precision for name in preset_names() if name.startswith("pythia")
    }
    assert len(precisions) == 20 + 16 + 5
    bf16 = {"pythia-1b", "pythia-1b-0.5MtokBS"}
    assert {name for name, precision in precisions.items() if precision == "bf16"} == bf16
    assert set(precisions.values()) == {"fp16", "bf16"}
    # .half() on the model rounded the frequencies of the rotary tables too.
    for name, precision in precisions.items():
        tables = "fp32" if precision == "bf16" else "neox_v1_fp16"
        assert load_config([name]).model.rope_numerics == tables


def saved_steps(config):
    """Steps of the checkpoints of a run."""
    return SavePolicy(config.checkpoint, config.train.steps).all_steps()


@pytest.mark.parametrize("size", V0_SIZES)
def test_the_first_version_of_a_size(size):
    config = load_config([f"pythia-{size}-v0"])
    later = load_config([f"pythia-{size}"])
    assert config.precision == "fp16" and config.output == f"runs/pythia-{size}-v0"
    assert config.train.steps * config.tokens_per_step == 299_892_736_000
    assert len(saved_steps(config)) == 143 and saved_steps(config)[-1] == config.train.steps
    if size in ("160m", "410m", "1.4b"):
        assert (config.train.steps, config.schedule.decay_steps) == (71_500, 71_250)
        assert config.train.batch_size == 2048 and saved_steps(config)[0] == 500
    else:
        assert (config.train.steps, config.schedule.decay_steps) == (143_000, 143_000)
        assert config.train.batch_size == 1024 and saved_steps(config)[0] == 1000
    lowest = 0.0 if size in ("6.9b", "12b") else later.schedule.min_lr
    assert config.schedule.min_lr == lowest
    assert tuple(parameter_counts(config.model)) == PUBLISHED[size]


@pytest.mark.parametrize("size", SMALLER_BATCHES)
def test_a_smaller_batch_reads_as_many_tokens(size):
    own = [name for name in preset_names() if name.startswith(f"pythia-{size}-")]
    (name,) = [name for name in own if name.endswith("MtokBS")]
    config = load_config([name])
    tokens = float(name.split("-")[2].removesuffix("MtokBS")) * 2**20
    assert config.tokens_per_step == tokens
    assert config.train.steps * config.tokens_per_step == 299_892_736_000
    assert len(saved_steps(config)) == 154
    assert config.schedule.decay_steps == config.train.steps


@pytest.mark.parametrize("size", [size for size in PUBLISHED if size != "1b"])
def test_deduped_differs_in_its_name_alone(size):
    standard, deduped = preset(f"pythia-{size}"), preset(f"pythia-{size}-deduped")
    assert {key for key in standard if standard[key] != deduped[key]} == {"recipe", "output"}


def test_debug_is_small_and_divides():
    config = load_config(["debug"])
    assert 0.5e6 < parameter_counts(config.model).total < 1.5e6
    assert all(config.train.batch_size % processes == 0 for processes in (1, 2, 3, 4, 6))
    assert config.precision == "fp32"
    assert (config.data.corpus, config.data.tokenizer, config.model.vocab_size) == (
        "tiny",
        "bytes",
        257,
    )
    assert {0, 1, 2, 4} <= set(config.checkpoint.steps)


def test_presets_do_not_share_their_values():
    preset("debug")["model"]["num_layers"] = 99
    assert preset("debug")["model"]["num_layers"] == 4


def test_unknown_preset_gets_the_nearest_and_the_list():
    with pytest.raises(
        ConfigError,
        match=r"unknown preset 'pythia-70'; choose one of .*12b.*; did you mean 'pythia-70m'\?",
    ):
        preset("pythia-70")


# Numbers of parameters of the published weights; PaLM's from its paper, in billions.
OTHERS = {
    "gpt-neox-20b": 20_554_567_680,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "codellama-7b": 6_738_546_688,
    "codellama-34b": 33_743_970_304,
    "mistral-7b": 7_241_732_096,
    "falcon-rw-1b": 1_311_625_216,
    "falcon-7b": 6_921_720_704,
    "falcon-40b": 41_303_293_952,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "olmo-2-7b": 7_298_617_344,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "olmoe-1b-7b": 6_919_161_856,
    "mixtral-8x7b": 46_702_792_704,
    "mamba-130m": 129_135_360,
    "mamba-2.8b": 2_768_345_600,
    "mamba2-130m": 128_989_632,
    "mamba2-2.7b": 2_702_599_680,
}
# Peng et al. 2025, arXiv:2503.14456, and of the first three arXiv:2404.05892 in billions, 1.60 and
# 3.10.
WITHOUT_HEADS = {
    "rwkv6-1.6b": 1_599_873_024,
    "rwkv6-3b": 3_099_863_040,
    "rwkv6-7b": 7_635_746_816,
    "rwkv7-0.1b": 191_034_624,
    "rwkv7-0.4b": 450_767_872,
    "rwkv7-1.5b": 1_527_404_544,
    "rwkv7-2.9b": 2_947_735_040,
}
"""Models whose layers have no heads of attention."""
ACTIVE = {"olmoe-1b-7b": 1.28, "mixtral-8x7b": 12.88}
"""Billions of parameters that work on a token: arXiv:2409.02060 has 1.3, arXiv:2401.04088 13."""
PALM = {"palm-8b": 8.63, "palm-62b": 62.50, "palm-540b": 540.35}


def test_models_of_other_families_have_the_published_number_of_parameters():
    known = OTHERS | WITHOUT_HEADS
    counted = {name: parameter_counts(load_config([name]).model).total for name in known}
    assert counted == known
    for name, billions in PALM.items():
        assert parameter_counts(load_config([name]).model).total / 1e9 == pytest.approx(
            billions, rel=3e-4
        )
    for name, billions in ACTIVE.items():
        assert round(active_parameters(load_config([name]).model) / 1e9, 2) == billions


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("debug-")])
def test_small_models_of_other_families_train(name, tmp_path):
    train(name, steps=2, output=str(tmp_path / name), log_every=1, device="cpu")
    first, second = (line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl"))
    assert 4 < second < first < 7


@pytest.mark.parametrize("name", [*OTHERS, *PALM])
def test_the_measured_piece_of_a_model_runs(name):
    piece = piece_of(load_config([name]).model, "cpu")
    assert piece.hidden_size <= 768 and piece.num_layers <= 4
    # As a config that a user writes: copies are not validated.
    again = build_model_config(piece.model_dump(), name)
    if not isinstance(again, TransformerConfig):
        return
    group = again.num_attention_heads // again.kv_heads
    whole = load_config([name]).model
    assert group in (whole.num_attention_heads // whole.kv_heads, again.num_attention_heads)
