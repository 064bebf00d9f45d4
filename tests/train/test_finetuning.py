"""Supervised fine-tuning from one command: the model of the start, the conversations, the
numbers."""

import json
import sys
from pathlib import Path

import pytest
import torch

from castalia.cli import main
from castalia.core.errors import ConfigError
from castalia.corpus.conversation import Chat
from castalia.data import Batch
from castalia.export import export
from castalia.inference import load
from castalia.losses import LOSSES, NextToken
from castalia.monitor import read_metrics
from castalia.recipes import load_config, resolve
from castalia.recipes.training import train
from castalia.train.trainer import Trainer

SMALL = {"device": "cpu", "precision": "fp32", "checkpoint.asynchronous": False}


@pytest.fixture(scope="module")
def start(tokens, tmp_path_factory) -> str:
    """Folder of a run of one step: one layer of width 32 over bytes."""
    folder = tmp_path_factory.mktemp("start") / "base"
    train(
        "debug",
        f"data.train={tokens}",
        "model.num_layers=1",
        "model.hidden_size=32",
        steps=1,
        output=str(folder),
        device="cpu",
    )
    return str(folder)


@pytest.fixture
def chats(tmp_path) -> str:
    """Path of 40 short conversations."""
    path = tmp_path / "chats.jsonl"
    records = [
        {
            "messages": [
                {"role": "user", "content": f"say {i % 7}"},
                {"role": "assistant", "content": f"{i % 7}, as you said"},
            ]
        }
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def words(start, chats, tmp_path) -> list[str]:
    """The words of `castalia train sft`."""
    return [
        "sft",
        f"model.start={start}",
        f"data.chat={chats}",
        "data.chat_template=plain",
        f"output={tmp_path}/tuned",
        "train.batch_size=4",
    ]


def test_the_start_gives_model_and_tokenizer(words, start, tmp_path):
    resolved = resolve(words)
    config = resolved.config
    assert (config.model.num_layers, config.model.hidden_size) == (1, 32)
    assert config.data.seq_length == config.model.max_position_embeddings == 128
    assert config.data.tokenizer == f"{start}/checkpoints/step-00000001/tokenizer.json"
    assert any(f"the model section is that of model.start {start}" in n for n in resolved.notes)
    assert "model.hidden_size" not in resolved.changes
    # A recipe that is no config before it has a start: its defaults are not differences.
    assert {"guard.nan", "optim.betas"}.isdisjoint(resolve(["lora", *words[1:]]).changes)
    # `castalia show` has something to reckon with: 4 kB in rows of 128 tokens, three times.
    assert config.train.steps == 7
    assert any(note.endswith("of data.chat; by their size about 7") for note in resolved.notes)
    # Overrides lie on top of what the start gives.
    changed = load_config([*words, "data.seq_length=32", "data.tokenizer=bytes"])
    assert (changed.data.seq_length, changed.data.tokenizer) == (32, "bytes")
    # A file without a model is a recipe of the same kind.
    Path(tmp_path / "own.yaml").write_text(f"model: {{start: {start}}}\noptim: {{lr: 1e-3}}\n")
    assert load_config([f"{tmp_path}/own.yaml"]).model == config.model
    with pytest.raises(ConfigError, match=r"^sft fine-tunes a model: name it with model.start="):
        load_config(["sft"])


def test_a_run_learns_its_answers_and_resumes(words, capsys, monkeypatch):
    words += ["optim.lr=1e-2", "data.split='90,10,0'", "train.eval_every=5", "train.epochs=4"]
    run = train(*words, **SMALL)
    out = capsys.readouterr().out
    model = load(run.config.output)
    # The template that was trained with, and the end of the answer, came along.
    (prompt,) = Chat(model, "Be kind.").prompts(["say 3"])
    assert prompt == "system:\nBe kind.\nuser:\nsay 3\nassistant:\n"
    (exported,) = export(run.config.output, to="hf", output=f"{run.config.output}/hf")
    assert Chat(load(exported.folder)).prompts(["say 3"]) == Chat(model).prompts(["say 3"])
    command = ["generate", run.config.output, "--chat", "--prompt", "say 3", "--json"]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["castalia", *command, "--max-new-tokens", "3"])
    with pytest.raises(SystemExit, match="0"):
        main()
    record = json.loads(capsys.readouterr().out)
    assert record["prompt"] == prompt.removeprefix("system:\nBe kind.\n")
    assert "chat: " in out and "40 records" in out
    # Padding is no part of a pass.
    assert "(4.00 epochs)" in out
    # 36 conversations in rows of 129 tokens, four passes in batches of 4 rows, rounded up.
    rows = len(run.rows.train.row_sources[0].order) // 4
    assert run.progress.step == run.config.train.steps == -(-4 * rows // 4)
    lines = read_metrics(f"{run.config.output}/metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    held_out = [line["valid_loss"] for line in lines if "valid_loss" in line]
    assert len(held_out) >= 2 and held_out[-1] < held_out[0]
    # The same command again, and the run's own config: nothing is prepared, nothing is trained.
    for again in (words, [run.config.output]):
        assert train(*again, **SMALL).progress.step == run.progress.step
        assert "40 records" not in capsys.readouterr().out


def test_long_texts_are_counted(words, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    records = [{"prompt": "a", "completion": "b" * size} for size in (5, 30, 31, 200)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    words += [f"data.chat={path}", "data.seq_length=32", "train.batch_size=1", "train.epochs=1"]
    steps = {}
    for chopped in (True, False):
        output = f"{tmp_path}/{chopped}"
        run = train(*words, **SMALL, output=output, **{"data.allow_chopped": chopped})
        steps[chopped] = run.progress.step
        fate = "are cut; a longer" if chopped else "are left out;"
        # 1 + 31 + 1 tokens fill a row of 33.
        said = "1 of 4 texts of long_messages_document are longer than a row of data.seq_length 32"
        assert f"{said} tokens and {fate}" in capsys.readouterr().out
    assert steps[True] > steps[False]


def test_weights_of_messages_and_of_prompts(start, tmp_path):
    """The loss of a batch is the weighted mean of its tokens' losses."""
    path = tmp_path / "weighed.jsonl"
    message = {"role": "assistant", "content": "the answer", "weight": 0.25}
    records = [
        {"messages": [{"role": "user", "content": "a?"}, message, {**message, "weight": 3}]},
        {"prompt": "the prompt", "completion": " and more"},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    seen = {}
    for prompt_weight in (0.0, 0.5):
        config = load_config(
            [
                "sft",
                f"model.start={start}",
                f"data.chat={path}",
                "data.chat_template=plain",
                f"output={tmp_path}/{prompt_weight}",
                "train.batch_size=1",
                f"loss.prompt_weight={prompt_weight}",
                *(f"{key}={value}" for key, value in SMALL.items()),
            ]
        )
        trainer = Trainer(config)
        (batch,) = next(trainer.batches(trainer.rows.train, 0))
        seen[prompt_weight] = batch
        counted = batch.labels >= 0
        expected = {0.25, 1.0, 3.0} | ({0.5} if prompt_weight else set())
        assert set(batch.weights[counted].tolist()) == expected
        hidden = trainer.model(batch.tokens, positions=batch.positions, segments=batch.segments)
        logits = hidden @ trainer.model.head_weight.T
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), reduction="none", ignore_index=-100
        )
        weights = (batch.weights * counted).flatten()
        sums = trainer.passes.run([batch], [trainer.loss.weight(batch)])
        assert trainer.loss.weight(batch) == pytest.approx(float(weights.sum()), rel=1e-12)
        assert float(sums.total) == pytest.approx(
            float((losses * weights).sum().detach()), rel=1e-6
        )
    # A padding token and the border of two conversations are no prompt.
    more = (seen[0.5].labels >= 0) & (seen[0.0].labels < 0)
    own = seen[0.5].segments[:, :-1] == seen[0.5].segments[:, 1:]
    assert more.any() and own[more[:, :-1]].all()


def test_a_loss_without_weights_is_what_it_was():
    labels = torch.tensor([[3, -100, 5]])
    plain = Batch(labels, labels, torch.zeros(1), torch.zeros(1))
    loss = LOSSES["next_token"](NextToken.Config())
    assert loss.weight(plain) == 2
