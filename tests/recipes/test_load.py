"""From presets, files and overrides to one config: precedence, notes, helpful errors."""

from pathlib import Path

import pytest

from castalia.config import dump_yaml
from castalia.config.fields import leaves
from castalia.config.foreign import KEYS, OURS
from castalia.core.errors import ConfigError
from castalia.recipes import in_folder, load_config, preset_names, resolve
from castalia.recipes.pythia import NAMES, VARIANTS
from castalia.runs.config import RunConfig
from castalia.tokenizers.tokenizer import load_tokenizer, train_tokenizer

SMALL_NEOX = """
{
  "num-layers": 2, "hidden-size": 64, "num-attention-heads": 4, "pos-emb": "rotary",
  "seq-length": 32, "max-position-embeddings": 32, "train-iters": 10,
  "train_micro_batch_size_per_gpu": 4,
}
"""
PYTHIA_FILE = Path(__file__).resolve().parents[1] / "config" / "neox_70m.yml"


def write(folder, name, text):
    """A file, as the string that a user types."""
    (folder / name).write_text(text)
    return str(folder / name)


def message_of(*sources):
    """The error's text."""
    with pytest.raises(ConfigError) as caught:
        resolve(sources)
    return str(caught.value)


def test_preset_then_file_then_override(tmp_path):
    file = write(
        tmp_path,
        "mine.yaml",
        "recipe: pythia-70m\noptim: {lr: 2e-3, eps: 1e-7}\ntrain: {steps: 10}\n",
    )
    resolved = resolve([file, "train.steps=20"])
    config = resolved.config
    assert (config.optim.lr, config.optim.eps, config.optim.betas) == (2e-3, 1e-7, (0.9, 0.95))
    assert config.train.steps == 20
    assert config.model.num_layers == 6
    assert resolved.recipe == "pythia-70m"
    assert resolved.changes == {
        "train.steps": (143000, 20),
        "optim.lr": (1e-3, 2e-3),
        "optim.eps": (1e-8, 1e-7),
    }


def test_a_section_that_the_recipe_lacks_differs_by_what_was_chosen(tmp_path):
    url = f"file://{tmp_path}/copy"
    changes = resolve(["debug", f"checkpoint.mirror={url}"]).changes
    assert changes == {"checkpoint.mirror.url": (None, url)}
    changes = resolve(["debug", f"checkpoint.mirror={{url: {url}, retries: 0}}"]).changes
    assert changes == {
        "checkpoint.mirror.url": (None, url),
        "checkpoint.mirror.retries": (None, 0),
    }


def test_order_of_the_sources_does_not_matter_between_kinds(tmp_path):
    file = write(tmp_path, "more.yaml", "train: {steps: 10}\n")
    assert load_config(["train.batch_size=4", file, "debug"]) == load_config(
        ["debug", file, "train.batch_size=4"]
    )


def test_later_files_and_later_overrides_win(tmp_path):
    first = write(tmp_path, "a.yaml", "train: {steps: 10, log_every: 3}\n")
    second = write(tmp_path, "b.yaml", "train: {steps: 11}\n")
    config = load_config(["debug", first, second, "seed=1", "seed=2"])
    assert (config.train.steps, config.train.log_every, config.seed) == (11, 3, 2)


def test_the_config_of_a_run_repeats_it(tmp_path):
    config = load_config(["pythia-14m", "train.steps=5", "precision=fp32"])
    file = write(tmp_path, "config.yaml", dump_yaml(config))
    assert load_config([file]) == config
    assert load_config([str(tmp_path), "seed=7"]).seed == 7


def test_a_suffix_may_be_left_out(tmp_path):
    write(tmp_path, "mine.yml", "recipe: debug\nseed: 7\n")
    assert load_config([str(tmp_path / "mine")]).seed == 7


def test_a_file_without_a_recipe_must_be_whole(tmp_path):
    file = write(tmp_path, "mine.yaml", "model: {num_layers: 2}\n")
    text = message_of(file)
    assert text.startswith("3 problems in the config (mine.yaml):")
    assert "model.hidden_size: a value is required" in text


def test_unknown_preset_gets_the_nearest_and_the_list():
    text = message_of("pythia-70")
    assert text == "unknown preset or config file 'pythia-70'; did you mean 'pythia-70m'?"
    text = message_of("zzzz")
    assert text.startswith("unknown preset or config file 'zzzz'; presets: debug, demo, mini, pyt")
    assert all(name in text for name in preset_names() if name not in (*NAMES, *VARIANTS))
    assert "pythia-12b; each pythia also with -deduped, most with -v0; of other families" in text


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train.dropout=0.1", "did you mean 'model.hidden_dropout'?"),
        ("train.dropout", "did you mean 'model.hidden_dropout'?"),
        ("model.attn_dropout=0", "did you mean 'model.attention_dropout'?"),
        ("model.lora_dropout=0", "model.lora_dropout: unknown key; there are no adapters"),
        ("optim.name=lion", "optim.name: unknown key; did you mean 'optim.kind'?"),
        ("optim.name=adan", "optim.name: unknown key; did you mean 'optim.kind' (adafactor"),
        ("optim.name", "optim.name: unknown key; did you mean 'optim.kind' (adafactor"),
        ("optim.lr", "'optim.lr' needs a value: optim.lr=VALUE"),
        ("optim.learning_rate=1", "did you mean 'optim.lr'?"),
        ("train.warmup_steps=9", "did you mean 'schedule.warmup'?"),
        ("train.save_every=9", "did you mean 'checkpoint.every'?"),
        ("checkpoint.frequency=9", "unknown key; choose one of steps, every, keep"),
        ("train.num_epochs=2", "did you mean 'train.epochs'?"),
        ("train.fp16=true", "did you mean 'precision'?"),
        ("model.n_layers=2", "did you mean 'model.num_layers'?"),
        ("model.vocab=2", "did you mean 'model.vocab_size'?"),
        ("model.hidden_sise=2", "did you mean 'model.hidden_size'?"),
        ("data.path=x", "did you mean 'data.train'?"),
        (
            "train.train_iters=3",
            "train.train_iters: this is GPT-NeoX's name; here it is train.steps",
        ),
        ("model=pythia-70m", "got 'pythia-70m'; model.family is one of neox"),
        ("optim=adamw", "did you mean optim.kind=adamw?"),
        ("pythia", "unknown preset or config file 'pythia'; presets: "),
        ("llama", "unknown preset or config file 'llama'; presets: "),
    ],
)
def test_a_hint_is_right_or_there_is_none(word, says):
    text = message_of("debug", word)
    assert says in text and text.count("did you mean") == says.count("did you mean"), text


def test_names_of_other_trainers_stand_for_keys_that_exist():
    known = set(leaves(RunConfig))
    assert set(KEYS) <= known
    # A name that is ours would never reach the table.
    own = {key for key in OURS if any(key == name.split(".")[-1] for name in known)}
    # Of the sections `mixing`, `eval`, `loss`, `optim` and `adapter`, and other things there.
    others = {"epsilon", "iterations", "dropout"}
    assert own <= {"warmup_steps", "max_epochs", "batch", "dtype", *others}
    assert "did you mean 'train.batch_size'?" in message_of("debug", "batch=16")
    assert "did you mean 'precision'?" in message_of("debug", "dtype=bf16")


def test_spaces_around_an_equals_sign():
    text = message_of("debug", "train.steps", "=", "5")
    assert text == "write an override as one word, a.b=c, without spaces around the ="


def test_a_word_too_long_for_a_file_name():
    assert (
        load_config(["debug", f"checkpoint.steps={list(range(200))}"]).checkpoint.steps[-1] == 199
    )
    assert message_of("x" * 300).startswith("unknown preset or config file 'xxx")


def test_a_preset_typed_as_a_file():
    assert (
        message_of("pythia-70m.yml")
        == "no config file pythia-70m.yml; for the preset write pythia-70m"
    )


def test_two_presets_and_none(tmp_path):
    assert "a config has one preset, got 2: debug, pythia-70m" in message_of("debug", "pythia-70m")
    assert "name a preset, a YAML file or a run's folder first; presets: debug" in message_of(
        "train.steps=1"
    )
    assert "is not a run: it has no config.yaml" in message_of(str(tmp_path))
    assert message_of("rnus/first").startswith("no run folder or config file rnus/first; a model")
    assert message_of("debug", "train.steps") == "'train.steps' needs a value: train.steps=VALUE"


def test_all_unreadable_files_are_named_at_once(tmp_path):
    first, second = write(tmp_path, "a.yml", "{a: [1"), write(tmp_path, "b.yml", "- 1")
    text = message_of(first, second)
    assert "a.yml" in text and "b.yml" in text


def test_all_problems_of_overrides_at_once():
    text = message_of(
        "debug", "optim.lrr=1", "train.steps=-1", "nonsense=1", "precision=fp9", "output="
    )
    assert "5 problems in the config (debug)" in text
    assert "output: must not be empty" in text
    assert "optim.lrr: unknown key; did you mean 'optim.lr'?" in text
    assert "train.steps: must be greater than 0, got -1" in text


def test_names_of_gpt_neox_as_overrides_get_ours():
    text = message_of("debug", "train_iters=10", "rope-fusion=true")
    assert "train_iters: this is GPT-NeoX's name; here it is train.steps" in text
    assert "rope-fusion: this is GPT-NeoX's name and has no effect here" in text
    assert "num_layers: unknown key; did you mean 'model.num_layers'?" in message_of(
        "debug", "num_layers=2"
    )


def test_a_batch_that_the_recipes_micro_batch_does_not_divide():
    resolved = resolve(["pythia-70m", "train.batch_size=12"])
    assert resolved.config.train.micro_batch_size == 4
    assert resolved.notes[0].startswith(
        "train.micro_batch_size is 4: train.batch_size 12 is not divisible by the recipe's 32"
    )
    assert "is not divisible by train.micro_batch_size 5" in message_of(
        "pythia-70m", "train.batch_size=12", "train.micro_batch_size=5"
    )


def test_a_tokenizer_with_more_ids_than_the_recipe_widens_the_vocabulary(tmp_path):
    tokenizer = str(tmp_path / "tokenizer.json")
    train_tokenizer(["a text of words and more words"] * 9, 280, tokenizer)
    resolved = resolve(["debug", f"data.tokenizer={tokenizer}"])
    ids = load_tokenizer(tokenizer).vocab_size
    assert resolved.config.model.vocab_size == ids > 257
    assert resolved.notes == [
        f"model.vocab_size is {ids}, the ids of {tokenizer}: the recipe's 257 are fewer"
    ]
    # What is said outright holds, and published models keep a vocabulary that is large enough.
    said = load_config(["debug", f"data.tokenizer={tokenizer}", "model.vocab_size=999"])
    assert said.model.vocab_size == 999
    kept = resolve(["pythia-70m", f"data.tokenizer={tokenizer}"])
    assert (kept.config.model.vocab_size, kept.notes) == (
        load_config(["pythia-70m"]).model.vocab_size,
        resolve(["pythia-70m"]).notes,
    )


def test_a_schedule_longer_than_the_run_is_noted():
    assert any(
        "schedule.decay_steps 143000 goes beyond" in note
        for note in resolve(["pythia-14m", "train.steps=9"]).notes
    )
    assert resolve(["pythia-14m", "train.steps=9", "schedule.decay_steps=null"]).notes == []


def test_a_gpt_neox_file_is_a_config(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    resolved = resolve([write(tmp_path, "small.yml", SMALL_NEOX)])
    assert resolved.config.train.batch_size == 4
    assert resolved.config.output == "runs/small"
    assert any("train.batch_size is 4 rows" in note for note in resolved.notes)
    settled = resolve([str(tmp_path / "small"), "train.batch_size=8", "model.vocab_size=300"])
    assert not any(
        "train.batch_size" in note or "model.vocab_size" in note for note in settled.notes
    )
    assert settled.changes["train.batch_size"] == (4, 8)


def test_the_number_of_processes_sets_the_batch(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert load_config([write(tmp_path, "small.yml", SMALL_NEOX)]).train.batch_size == 12


def test_the_70m_file_equals_the_preset_but_for_what_it_names(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    resolved = resolve([str(PYTHIA_FILE), "train.batch_size=1024", "output=runs/x"])
    # A file does not say which GPT-NeoX reads it, and only v1.0 rounded the rotary tables.
    ours = load_config(["pythia-70m", "output=runs/x", "model.rope_numerics=fp32"])
    assert any("model.rope_numerics=neox_v1_fp16" in note for note in resolved.notes)
    theirs = resolved.config
    for room in (
        "model",
        "optim",
        "schedule",
        "loss_scale",
        "checkpoint",
        "parallel",
        "precision",
        "seed",
    ):
        assert getattr(theirs, room) == getattr(ours, room)
    assert theirs.train.model_copy(update={"eval_every": None}) == ours.train


def test_a_file_of_pythias_shape_is_told_its_batch(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    notes = resolve([str(PYTHIA_FILE)]).notes
    assert any(
        "the shape of pythia-70m" in note and "train.batch_size=1024" in note for note in notes
    )


def test_a_gpt_neox_file_over_a_preset(tmp_path):
    file = write(tmp_path, "setup.yml", '{"data_path": "x", "log-interval": 7}')
    config = load_config(["pythia-70m", file])
    assert (config.data.train, config.train.log_every) == (["x"], 7)
    assert config.optim == load_config(["pythia-70m"]).optim


def test_values_are_traced_to_the_gpt_neox_option(tmp_path):
    text = message_of(
        write(tmp_path, "small.yml", SMALL_NEOX.replace('"train-iters": 10', '"train-iters": 0'))
    )
    assert "train.steps: must be greater than 0, got 0 (train-iters in small.yml)" in text


def test_a_value_of_the_wrong_kind_is_one_problem(tmp_path):
    text = message_of(
        write(tmp_path, "small.yml", SMALL_NEOX.replace('"num-layers": 2', '"num-layers": "two"'))
    )
    assert text.startswith("1 problem in the config (small.yml):")
    assert "num-layers in small.yml: expected an integer, got 'two'" in text


def test_problems_of_file_and_override_come_out_together(tmp_path):
    file = write(tmp_path, "small.yml", SMALL_NEOX.replace("rotary", "alibis"))
    text = message_of(file, "optim.lrr=1")
    assert text.startswith("2 problems") and "pos_emb" in text and "optim.lrr" in text


def test_the_published_12b_files(tmp_path):
    missing_comma = SMALL_NEOX.replace('"rotary",', '"rotary"')
    text = message_of(write(tmp_path, "pythia-12b.yml", missing_comma))
    assert "a comma is missing before this place; the preset 'pythia-12b' has its values" in text
    swapped = (
        SMALL_NEOX.replace('"num-layers": 2', '"num-layers": 40')
        .replace(": 64", ": 5120")
        .replace(": 4,", ": 36,", 1)
    )
    file = write(tmp_path, "pythia-12b-deduped.yml", swapped)
    text = message_of(file)
    assert "hidden_size 5120 is not divisible by num_attention_heads 36" in text
    assert (
        "model.num_layers=36 model.num_attention_heads=40, or use the preset pythia-12b-deduped"
        in text
    )
    assert (
        load_config([file, "model.num_layers=36", "model.num_attention_heads=40"]).model.head_dim
        == 128
    )


def test_names_in_a_folder(tmp_path):
    """As `-d DIR` of GPT-NeoX's deepy.py, with presets, overrides and other files beside it."""
    (tmp_path / "configs" / "small").mkdir(parents=True)
    shape = write(tmp_path / "configs" / "small", "2L.yml", SMALL_NEOX)
    setup = write(tmp_path / "configs", "setup.yml", '{"save": "out"}')
    folder = str(tmp_path / "configs")
    words = in_folder(folder, ["small/2L", "setup", "train.steps=3"])
    assert words == [shape, setup, "train.steps=3"]
    assert load_config(words).output == "out"
    assert in_folder(folder, ["debug", shape]) == ["debug", shape]
    assert in_folder(None, ["debug"]) == ["debug"]
    with pytest.raises(ConfigError, match=r"no config file setap in .*did you mean 'setup'"):
        in_folder(folder, ["setap"])
    with pytest.raises(ConfigError, match="-d nowhere: no such folder"):
        in_folder("nowhere", ["debug"])
