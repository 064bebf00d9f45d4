"""Start weights: a model of any saved form goes on in a run, on any layout, with or without its
state."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tests.fixtures.training_shell import OnRanks
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from castalia.checkpoint import find_checkpoint, read, read_state
from castalia.core.errors import CheckpointError, ConfigError, DataError
from castalia.data import IndexedDatasetWriter
from castalia.distributed import World
from castalia.formats.saved_model import open_model
from castalia.models.init import init_parameter
from castalia.optim import Rules
from castalia.recipes.load import load_config
from castalia.runs.config import RunConfig
from castalia.train.run import run
from castalia.train.start import StartRecord, open_start
from castalia.train.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))
SIZES = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 257}
KEPT = ("step", "loss", "lr", "grad_norm", "tokens", "rows_hash")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of a token file of bytes."""
    prefix = tmp_path_factory.mktemp("tokens") / "text"
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for size in random.integers(20, 300, 40):
            writer.add(random.integers(97, 123, size))
    return str(prefix)


def hugging_face(folder: Path, rows: int, **options: Any) -> Path:
    """A folder that transformers wrote, of a GPTNeoX with random weights, biases and norms too."""
    torch.manual_seed(1)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 128,
    }
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=rows, **settings | options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of 257 ids, padded to 384 rows."""
    return hugging_face(tmp_path_factory.mktemp("hub") / "tiny", 384)


def config_of(start: Path, output: Path, **model: Any) -> RunConfig:
    """A run of the sizes of `folder`."""
    sizes = SIZES | {"max_position_embeddings": 128, "start": str(start)} | model
    return RunConfig(output=str(output), model=sizes, data={"seq_length": 16})


def opened(start: Path, output: Path, **model: Any) -> Any:
    """The start weights as one rank opens them."""
    return open_start(config_of(start, output, **model), ALONE)


def values(start: Any, config: RunConfig) -> dict[str, torch.Tensor]:
    """The start value of every weight."""
    from castalia.train.build import build_model

    return dict(build_model(config, ALONE, Rules(config.optim), start).named_parameters())


def test_four_ranks_hold_the_folder_bit_for_bit_and_read_their_slices(
    on_ranks: OnRanks, folder: Path, tmp_path: Path
) -> None:
    results = on_ranks("start.py", 4, folder, tmp_path / "run")
    whole = sorted(open_model(folder).tensors)
    for layout in ("tp x fsdp", "pp x fsdp", "cp x tp", "padded"):
        ours = [result[layout] for result in results]
        assert [result["wrong"] for result in ours] == [[]] * 4, layout
        assert sorted({name for result in ours for name in result["names"]}) == whole
        if layout != "padded":
            assert [result["read"] for result in ours] == [result["held"] for result in ours]
        size = sum(weight.numel() for weight in open_model(folder).tensors.values())
        assert max(result["read"] for result in ours) < 0.6 * size, layout


def test_one_rank_holds_the_folder_and_half_precision_is_widened(
    folder: Path, tmp_path: Path
) -> None:
    half = hugging_face(tmp_path / "half", 384)
    stored = {k: v.to(torch.bfloat16) for k, v in load_file(half / "model.safetensors").items()}
    save_file(stored, half / "model.safetensors", {"format": "pt"})
    for source in (folder, half):
        config = config_of(source, tmp_path / "run")
        weights = values(open_start(config, ALONE), config)
        for name, tensor in open_model(source).tensors.items():
            assert weights[name].dtype == torch.float32 and weights[name].equal(tensor.float())


def test_a_different_vocabulary_is_padded_or_cut_on_demand(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"384 ids, this model has 400: model\.start_vocab=pad"):
        opened(folder, run, vocab_size=400)
    with pytest.raises(ConfigError, match=r"384 ids, this model has 200: model\.start_vocab=cut"):
        opened(folder, run, vocab_size=200, start_vocab="pad")
    stored = open_model(folder).tensors
    for ids, way, copied, rows in ((400, "pad", 384, 512), (200, "cut", 200, 256)):
        config = config_of(folder, run, vocab_size=ids, start_vocab=way)
        weights = values(open_start(config, ALONE), config)
        for name in ("embed.weight", "unembed.weight"):
            drawn = init_parameter(name, (rows, 32), config.model, config.seed)
            assert weights[name][:copied].equal(stored[name][:copied])
            assert weights[name][copied:].equal(drawn[copied:])
    # Rows of padding alone are no other vocabulary: 257 ids in 272 rows here, in 384 there.
    config = config_of(folder, run, make_vocab_size_divisible_by=16)
    embed = values(open_start(config, ALONE), config)["embed.weight"]
    assert embed.shape == (272, 32) and embed[:257].equal(stored["embed.weight"][:257])
    assert not embed[257:].equal(stored["embed.weight"][257:272])


def test_missing_and_left_over_weights_are_named(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    names = {"embed_out.weight", "lm_head.weight"} & weights.keys()
    save_file({k: v for k, v in weights.items() if k not in names}, copy / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"lacks 'unembed.weight'; to draw them, set model\.start_missing=\[unembed\.weight\]",
    ):
        opened(copy, tmp_path / "run")
    config = config_of(copy, tmp_path / "run", start_missing=["unembed.*"])
    start = open_start(config, ALONE)
    drawn = init_parameter("unembed.weight", (384, 32), config.model, config.seed)
    filled = values(start, config)
    assert filled["unembed.weight"].equal(drawn)
    assert filled["embed.weight"].equal(open_model(folder).tensors["embed.weight"])
    notes = start.notes(start.record(), None)
    assert any("'unembed.weight' drawn (model.start_missing)" in note for note in notes)
    save_file(weights | {"extra.bias": torch.zeros(2)}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no rule knows: 'extra\.bias'"):
        opened(copy, tmp_path / "run")


def test_a_language_model_becomes_a_reward_model(folder: Path, tmp_path: Path) -> None:
    tied = hugging_face(tmp_path / "tied", 384, tie_word_embeddings=True)
    for source in (folder, tied):
        config = RunConfig(
            output=str(tmp_path / "run"),
            model=SIZES | {"max_position_embeddings": 128, "start": str(source), "head": "score"},
            data={"seq_length": 16},
            loss={"kind": "reward"},
        )
        start = open_start(config, ALONE)
        weights = values(start, config)
        assert start.drawn == ["score.weight"] and "unembed.weight" not in weights
        assert weights["score.weight"].equal(
            init_parameter("score.weight", (1, 32), config.model, config.seed)
        )
        stored = open_model(source).tensors
        for name in weights.keys() - {"score.weight"}:
            assert weights[name].equal(stored[name])
        read, head = start.notes(start.record(), None)
        assert read.startswith(f"start weights: {len(weights) - 1} tensors of")
        assert "its output matrix is left out and the score head is drawn" in head


def test_a_model_of_another_shape_is_refused_with_its_keys(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        opened(folder, tmp_path / "run", num_layers=3, rotary_pct=0.5)
    for text in (
        "model.num_layers is 2 there, 3 here",
        "model.rotary_pct is 0.25 there, 0.5 here",
        "to train that one, set model.num_layers=2 model.rotary_pct=0.25",
    ):
        assert text in str(refused.value)
    # Neither how weights were drawn, nor the length, nor the arithmetic of the tables is a shape.
    assert opened(
        folder,
        tmp_path / "run",
        init_method="normal",
        max_position_embeddings=256,
        rope_numerics="neox_v1_fp16",
        intermediate_size=128,
    )


def test_state_is_refused_where_there_is_none(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "run")
    train = config.train.model_copy(update={"start_optimizer": True, "start_step": True})
    with pytest.raises(
        ConfigError,
        match=r"holds weights only.* set train\.start_optimizer=false train\.start_step",
    ):
        open_start(config.model_copy(update={"train": train}), ALONE)
    with pytest.raises(ConfigError, match=r"train\.start_step=true.*model\.start is not set"):
        load_config(["debug", "train.start_step=true"])
    with pytest.raises(ConfigError, match=r"model\.start \S+ is in output"):
        load_config(["debug", f"output={tmp_path}", f"model.start={tmp_path}/step3"])


def test_a_published_pythia_folder_goes_on_with_the_loss_of_transformers(
    tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`castalia train pythia-70m model.start=FOLDER`, made narrow and short."""
    start = hugging_face(tmp_path / "pythia", 50304, hidden_act="gelu")
    words = ["pythia-70m", f"model.start={start}", "model.num_layers=2", "model.hidden_size=32"]
    words += ["model.num_attention_heads=4", "model.max_position_embeddings=128", "precision=fp32"]
    words += [
        "model.rope_numerics=fp32",
        "model.activation=gelu",
        f"data.train={tokens}",
        "data.seq_length=16",
    ]
    words += ["data.tokenizer=null", "train.batch_size=4", "train.steps=1", "train.eval_every=null"]
    words += ["train.micro_batch_size=null", f"output={tmp_path / 'run'}", "device=cpu"]
    config = load_config(words)
    (batch,) = next(Trainer(config, ALONE).training_batches())
    run(config, ["castalia"])
    reference = GPTNeoXForCausalLM.from_pretrained(start, dtype=torch.float32)
    with torch.no_grad():
        logits = reference(
            batch.tokens
        ).logits  # rows of padding count in the softmax, as in GPT-NeoX
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    (line,) = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert "note: start weights: 28 tensors of" in capsys.readouterr().out
    # As Pythia was trained; the published folders say gelu, and no more of the tables than fp32.
    trained = {"activation": "gelu_tanh", "rope_numerics": "neox_v1_fp16"}
    other = config.model_copy(
        update={"model": config.model.model_copy(update=trained), "output": str(tmp_path)}
    )
    opened_start = open_start(other, ALONE)
    assert opened_start is not None
    notes = opened_start.notes(opened_start.record(), None)
    assert "model.activation is 'gelu' in the start and 'gelu_tanh' here" in notes


NEOX = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "pos_emb": "rotary",
    "no_weight_tying": True,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "tokenizer_type": "CharLevelTokenizer",
    "train_iters": 6,
    "train_batch_size": 4,
    "lr_decay_style": "linear",
    "warmup": 0.5,
    "checkpoint_factor": 1,
    "eval_interval": 100,
    "log_interval": 1,
}
"""A GPT-NeoX file of a tiny run whose learning rate changes at every step."""


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory, tokens: str) -> Any:
    """Callable: train what a GPT-NeoX file says in a folder of this name; returns (folder, its
    metrics)."""
    root = tmp_path_factory.mktemp("neox")

    def train(name: str, *words: str, **options: Any) -> tuple[Path, list[dict[str, Any]]]:
        values = NEOX | {"data_path": tokens, "split": "1,0,0", "save": str(root / name)} | options
        if "load" in options:
            values["load"] = str(root / options["load"])
        (root / f"{name}.yml").write_text(yaml.safe_dump(values))
        run(load_config([str(root / f"{name}.yml"), "device=cpu", *words]), ["castalia"])
        lines = (root / name / "metrics.jsonl").read_text().splitlines()
        return root / name, [
            {key: value for key, value in json.loads(line).items() if key in KEPT} for line in lines
        ]

    return train


def test_load_without_finetune_goes_on_bit_for_bit(
    neox: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first, whole = neox("first")
    folder, lines = neox("continued", load="first", iteration=3)
    assert lines == whole[3:]
    ours, theirs = read(find_checkpoint(folder), ""), read(find_checkpoint(first), "")
    assert all(ours[name].equal(theirs[name]) for name in theirs) and ours.keys() == theirs.keys()
    record = read_state(find_checkpoint(folder))["start"]
    step = first / "checkpoints" / "step-00000003"
    assert record["step"] == 3 and record["folder"] == str(step)
    assert record["sha256"] == open_model(step).hashes() and list(record["sha256"])
    assert json.loads((folder / "env.json").read_text())["start"] == record
    # With a checkpoint of its own, a run needs its start no more.
    shutil.move(step, step.with_name("elsewhere"))
    _, longer = neox("continued", "train.steps=7", load="first", iteration=3)
    assert longer[:3] == lines and len(longer) == 4
    assert json.loads((folder / "env.json").read_text())["start"] == record
    shutil.move(step.with_name("elsewhere"), step)
    assert "is not read" not in capsys.readouterr().out
    neox("continued", "model.start=nowhere", "train.steps=8", load="first", iteration=3)
    assert f"note: model.start nowhere is not read: the run began with {first}" in (
        capsys.readouterr().out
    )
    config = open_model(folder).config
    assert config == open_model(first).config and "start" not in config.model_dump()


def test_the_start_of_a_run_that_is_named_from_another_directory() -> None:
    record = StartRecord({"path": "runs/base"})
    assert record.note("runs/base") is None and record.note("/home/me/runs/base") is None
    assert "began with runs/base" in str(record.note("/home/me/otherruns/base"))
    assert "began with drawn weights" in str(StartRecord().note("runs/base"))


def test_finetune_takes_the_weights_alone(neox: Any) -> None:
    _, whole = neox("first")
    folder, lines = neox("tuned", load="first", finetune=True)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in lines] == [line["lr"] for line in whole]
    assert [line["rows_hash"] for line in lines] == [line["rows_hash"] for line in whole]
    assert lines[0]["loss"] < whole[0]["loss"]
    assert read_state(find_checkpoint(f"{folder}@1"))["progress"]["updates"] == 1


def test_no_load_optim_goes_on_in_the_data_and_begins_the_schedule_anew(neox: Any) -> None:
    _, whole = neox("first")
    _, lines = neox("anew", load="first", iteration=3, no_load_optim=True)
    assert [line["step"] for line in lines] == [4, 5, 6]
    assert [line["rows_hash"] for line in lines] == [line["rows_hash"] for line in whole[3:]]
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in whole[3:]]
    assert lines[0]["loss"] == whole[3]["loss"], "the weights are those of step 3"
    assert [line["lr"] for line in lines] == [line["lr"] for line in whole[:3]]


def test_the_optimizer_alone_keeps_its_count_of_updates(neox: Any) -> None:
    _, whole = neox("first")
    folder, lines = neox(
        "moments", "train.start_optimizer=true", load="first", iteration=3, finetune=True
    )
    assert [line["lr"] for line in lines] == [line["lr"] for line in whole]
    progress = read_state(find_checkpoint(f"{folder}@2"))["progress"]
    assert (progress["updates"], progress["updates_before"]) == (2, 3)
    _, plain = neox("tuned 3", load="first", iteration=3, finetune=True)
    assert lines[0]["loss"] == plain[0]["loss"] and lines[2]["loss"] != plain[2]["loss"]


def test_a_position_is_refused_in_other_data_or_beyond_the_end(
    neox: Any, tmp_path: Path, tokens: str
) -> None:
    neox("first")
    with pytest.raises(ConfigError, match=r"continues at step 6 .*train\.steps is 6"):
        neox("late", load="first")
    with IndexedDatasetWriter(tmp_path / "other", "uint16") as writer:
        writer.add(np.arange(97, 122).repeat(60))
    with pytest.raises(DataError, match=r"the data differ .*data\.allow_changed=true"):
        neox("moved", load="first", iteration=3, data_path=str(tmp_path / "other"))
