"""The loss of a reward model against its formula, and the head that it trains."""

import collections
import types

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from castalia.checkpoint.hf import hf_keymap, write_hf
from castalia.core.errors import ConfigError
from castalia.data import Batch
from castalia.data.labels import IGNORED
from castalia.losses import Reward, Scored
from castalia.losses.scored import last_tokens
from castalia.models import Decoder, parameter_counts
from castalia.models.families import FAMILIES
from castalia.models.init import init_parameter
from castalia.recipes import load_config

TEXTS = [[97, 98, 99, 100, 101, 256], [97, 98, 99, 256], [97, 98, 102, 103], [97, 98, 256]]
PROMPT = 2
T = 8


def batch_of(texts: list[list[int]], reward: list[float] | None = None) -> Batch:
    """Rows of a prompt of two tokens and an answer, padded to T."""
    tokens = torch.zeros(len(texts), T + 1, dtype=torch.int64)
    labels = torch.full((len(texts), T + 1), IGNORED)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text)
        labels[row, PROMPT : len(text)] = torch.tensor(text[PROMPT:])
    places = torch.arange(len(texts))
    values = None if reward is None else torch.tensor(reward)
    return Batch(tokens[:, :-1], labels[:, 1:], places.int() * 0, places // 2, reward=values)


@pytest.fixture(scope="module")
def model() -> Decoder:
    """A tiny reward model."""
    config = FAMILIES["neox"].Config(
        num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=257, head="score"
    )
    model = Decoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Matrices larger than at a start, so that scores differ.
            factor = 5 if parameter.ndim == 2 else 1
            parameter.copy_(factor * init_parameter(name, parameter.shape, config, 1))
    return model


def test_a_reward_model_has_a_score_in_place_of_the_vocabulary(model):
    names = {name for name, _ in model.named_parameters()}
    assert "score.weight" in names and "unembed.weight" not in names
    assert model.score.weight.shape == (1, 32)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size == parameter_counts(model.config).total
    tied = Decoder(model.config.model_copy(update={"tie_word_embeddings": True}))
    assert {name for name, _ in tied.named_parameters()} == names
    with pytest.raises(ConfigError, match=r"model\.head=score is a reward model"):
        model.head(torch.zeros(1, 1, 32))
    words = Decoder(model.config.model_copy(update={"head": "vocab"}))
    with pytest.raises(ConfigError, match=r"model\.head=vocab is a language model"):
        words.scores(torch.zeros(1, 32))


def test_a_text_is_scored_at_its_last_token(model):
    batch = batch_of(TEXTS)
    assert last_tokens(batch.labels).tolist() == [5, 3, 3, 2]
    scores = Scored.by(model, batch).scores(batch)
    for text, score in zip(TEXTS, scores, strict=True):
        # The text alone, without padding.
        alone = model(torch.tensor([text]))[0, -1] @ model.score.weight[0]
        assert score.item() == pytest.approx(alone.item(), rel=1e-5)
    # A row that is full to its last target lacks the place after it.
    full = torch.arange(T)[None]
    assert last_tokens(full).tolist() == [T - 1]


@pytest.mark.parametrize(
    ("options", "rewards"),
    [
        ({}, None),
        ({"margin": 0.5, "center": 0.1}, [1.0, 0.2, 0.0, -0.5]),
        ({"z_loss": 0.3}, None),
    ],
)
def test_the_loss_is_its_formula(model, options, rewards):
    batch = batch_of(TEXTS, rewards)
    loss = Reward(Reward.Config(**options))
    out = loss(Scored.by(model, batch), batch)
    better, worse = Scored.by(model, batch).scores(batch).view(-1, 2).unbind(1)
    margin = torch.tensor([0.8, 0.5]) + 0.5 if rewards else 0.0
    exact = -F.logsigmoid(better - worse - margin).sum()
    exact += options.get("center", 0) * (better + worse).square().sum()
    exact += options.get("z_loss", 0) * (better.square() + worse.square()).sum()
    assert out.total.item() == pytest.approx(exact.item(), rel=1e-6)
    assert out.weight == loss.weight(batch) == 2
    means = {name: (mean.sum / mean.weight).item() for name, mean in out.metrics.items()}
    assert means["accuracy"] == (better > worse).double().mean().item()
    assert means["reward_margin"] == pytest.approx((better - worse).mean().item(), rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"center": 0.05}])
def test_loss_and_gradients_are_trls(model, options, tmp_path):
    """On the model that transformers loads from our weights."""
    from trl import RewardTrainer

    write_hf(tmp_path, model.state_dict(), model.config, end_ids=[256], pad_id=0)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batch = batch_of(TEXTS, [0.9, 0.4, 0.0, -0.3] if options else None)
    trainer = RewardTrainer.__new__(RewardTrainer)
    trainer.model = theirs.eval()
    trainer.args = types.SimpleNamespace(center_rewards_coefficient=options.get("center"))
    keep = types.SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer.accelerator = keep
    trainer._total_train_tokens = 0
    trainer._metrics = {"eval": collections.defaultdict(list)}
    # TRL has all preferred answers first, and their texts end where padding begins.
    order = [0, 2, 1, 3]
    tokens = torch.nn.functional.pad(batch.tokens, (0, 1))[order]
    inputs = {"input_ids": tokens, "attention_mask": (tokens > 0).long()}
    if options:
        inputs["margin"] = torch.tensor([0.5, 0.3])
    exact = trainer.compute_loss(theirs, inputs)
    exact.backward()
    model.zero_grad()
    out = Reward(Reward.Config(**options))(Scored.by(model, batch), batch)
    (out.total / out.weight).backward()
    assert out.total.item() / 2 == pytest.approx(exact.item(), abs=1e-5)
    means = {name: (mean.sum / mean.weight).item() for name, mean in out.metrics.items()}
    metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    assert means["accuracy"] == pytest.approx(metrics["accuracy"])
    assert means["reward_margin"] == pytest.approx(float(metrics["margin"]), rel=1e-4)
    named = dict(theirs.named_parameters())
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    biggest = max(gradient.abs().max().item() for gradient in ours.values())
    for name, gradient in hf_keymap(model.config).to_theirs(ours).items():
        assert (gradient - named[name].grad).abs().max() < 1e-5 * max(1, biggest), name


def test_scores_before_each_target_as_in_gpt_neox(model):
    batch = batch_of(TEXTS[:2])
    loss = Reward(Reward.Config(at="targets"))
    hidden = model(batch.tokens)
    values = (hidden @ model.score.weight[0])[:, 1:3]  # two targets in both rows
    exact = -F.logsigmoid(values[0] - values[1]).sum()
    out = loss(Scored.by(model, batch), batch)
    assert out.total.item() == pytest.approx(exact.item(), rel=1e-5)
    assert out.weight == loss.weight(batch) == 2


def test_a_pair_without_an_answer_does_not_count(model):
    batch = batch_of([*TEXTS[:2], TEXTS[2], [97, 98]])
    loss = Reward()
    out = loss(Scored.by(model, batch), batch)
    alone = loss(Scored.by(model, batch_of(TEXTS[:2])), batch_of(TEXTS[:2]))
    assert out.weight == loss.weight(batch) == 1
    assert out.total.item() == pytest.approx(alone.total.item(), rel=1e-6)


def test_the_loss_and_the_head_of_a_run_must_fit():
    with pytest.raises(ConfigError, match=r"reward reads the score of a text, .*model.head=score"):
        load_config(["debug", "loss.kind=reward"])
    with pytest.raises(ConfigError, match=r"next_token reads the logits .*model.head=vocab or"):
        load_config(["debug", "model.head=score"])
