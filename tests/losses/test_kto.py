"""KTO against TRL and against GPT-NeoX's formula: loss and every gradient of one batch."""

import collections
import types
from dataclasses import replace

import pytest
import torch
from tests.losses.test_preference import compare, models, our_result  # noqa: F401

from castalia.core.errors import ConfigError
from castalia.data import IGNORED, Batch
from castalia.losses import KTO, Scored
from castalia.losses.kto import log_ratios
from castalia.recipes import load_config

trl = pytest.importorskip("trl", reason="an oracle of the tests")
PROMPTS = [2, 4, 3, 3]
ANSWERS = [6, 3, 9, 4]
LABELS = [1.0, -1.0, -1.0, 1.0]
BETA = 0.3
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.7}


def rows(prompts, answers):
    """Padded tokens and labels of prompts with answers."""
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens[row, : len(prompt) + len(answer)] = torch.cat([prompt, answer])
        labels[row, len(prompt) : len(prompt) + len(answer)] = answer
    return tokens, labels


@pytest.fixture(scope="module")
def texts():
    """Prompts, answers, and the answers in the order in which TRL mismatches them."""
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(1, 190, (n,), generator=generator) for n in PROMPTS]
    answers = [torch.randint(1, 190, (n,), generator=generator) for n in ANSWERS]
    return prompts, answers, [answers[-1], *answers[:-1]]


def batch_of(tokens, labels, reference, reward=None):
    """Rows as the loader has them, with the reference's log-probabilities."""
    index = torch.arange(len(tokens))
    batch = Batch(tokens[:, :-1], labels[:, 1:], index.int() * 0, index)
    with torch.no_grad():
        _, losses = Scored.by(reference, batch).losses(batch.labels)
    reward = None if reward is None else torch.tensor(reward)
    return replace(batch, reference=-losses, reward=reward)


def mean_ratio(model, batch):
    """Mean log-ratio of model and reference."""
    with torch.no_grad():
        _, losses = Scored.by(model, batch).losses(batch.labels)
    return log_ratios(-losses, batch).mean()


@pytest.fixture(scope="module")
def trainer(models):  # noqa: F811
    """TRL's trainer as far as a loss needs it."""
    from accelerate import Accelerator
    from trl.trainer.kto_trainer import add_fused_lm_head

    trainer = trl.KTOTrainer.__new__(trl.KTOTrainer)
    for name, model in (("model", models[3]), ("ref_model", models[1])):
        add_fused_lm_head(model, outputs=["log_probs", "entropy", "is_top1", "mean_logits"])
        setattr(trainer, name, model)
    trainer.accelerator = Accelerator(cpu=True)
    trainer.args = types.SimpleNamespace(gradient_checkpointing_kwargs=None)
    trainer.args.gradient_checkpointing = False
    trainer.beta = BETA
    vars(trainer).update(WEIGHTS)
    trainer.precompute_ref_logps = trainer.aux_loss_enabled = False
    trainer._total_train_tokens = 0
    trainer._tp_size = 1
    return trainer


@pytest.mark.parametrize("form", ["kto", "apo_zero"])
def test_kto_is_trls(form, models, trainer, texts):  # noqa: F811
    # This way round the mean log-ratio of mismatched answers is above 0.
    reference, _, ours, theirs = models
    prompts, answers, others = texts
    tokens, labels = rows(prompts, answers)
    other_tokens, other_labels = rows(prompts, others)
    batch = batch_of(tokens, labels, reference, LABELS)
    config = KTO.Config(beta=BETA, form=form, **WEIGHTS)
    if form == "kto":
        kl = mean_ratio(ours, batch_of(other_tokens, other_labels, reference)).clamp(min=0).float()
        # Otherwise nothing would be compared.
        assert kl > 0.01
        batch = replace(batch, baseline=kl.expand(len(tokens)))
    result = our_result(KTO(config), ours, batch)

    trainer.loss_type = {"kto": "kto", "apo_zero": "apo_zero_unpaired"}[form]
    trainer.calculate_KL = form == "kto"
    trainer._metrics = {"eval": collections.defaultdict(list)}
    inputs = {"label": torch.tensor(LABELS) > 0}
    for key, ids, targets in (("", tokens, labels), ("KL_", other_tokens, other_labels)):
        inputs[f"{key}input_ids"] = ids
        inputs[f"{key}attention_mask"] = (ids > 0).long()
        inputs[f"{key}completion_mask"] = (targets >= 0).long()
    if form != "kto":
        inputs = {key: value for key, value in inputs.items() if not key.startswith("KL_")}
    loss = trainer._compute_loss(theirs, inputs, False)
    compare(result, loss, theirs)
    metrics = {key: values[-1] for key, values in trainer._metrics["eval"].items()}
    assert result[2]["kl"] == pytest.approx(metrics["kl"], abs=1e-4)
    assert result[2]["reward_desirable"] == pytest.approx(metrics["rewards/chosen"], abs=1e-4)
    assert result[2]["reward_undesirable"] == pytest.approx(metrics["rewards/rejected"], abs=1e-4)


def test_halves_are_gpt_neoxs(models, texts):  # noqa: F811
    """Its formula on whole logits, with weights of each answer's own."""
    ours, theirs, reference, their_reference = models
    tokens, labels = rows(*texts[:2])
    batch = batch_of(tokens, labels, reference, LABELS)
    result = our_result(KTO(KTO.Config(beta=BETA, kl="halves", **WEIGHTS)), ours, batch)

    def logps(model):
        picked = model(tokens).logits[:, :-1].log_softmax(2)
        picked = picked.gather(2, tokens[:, 1:, None])[..., 0]
        return (picked * (labels[:, 1:] >= 0)).sum(1)

    with torch.no_grad():
        reference_logps = logps(their_reference)
    ratio = logps(theirs) - reference_logps
    kl = ratio.detach().clamp(min=0).view(2, 2).mean(1).flip(0).repeat_interleave(2)
    label = torch.tensor(LABELS)
    weight = torch.where(label > 0, WEIGHTS["desirable_weight"], WEIGHTS["undesirable_weight"])
    halves = weight * (1 - torch.sigmoid(BETA * label * (ratio - kl)))
    compare(result, 0.5 * (halves[:2] + halves[2:]).mean(), theirs)


def test_a_row_without_an_answer_does_not_count(models, texts):  # noqa: F811
    ours, _, reference, _ = models
    tokens, labels = rows(*texts[:2])
    batch = batch_of(tokens, labels, reference, LABELS)
    batch.labels[3] = IGNORED
    loss = KTO(KTO.Config(kl="none"))
    out = loss(Scored.by(ours, batch), batch)
    three = batch_of(tokens[:3], labels[:3], reference, LABELS[:3])
    alone = loss(Scored.by(ours, three), three)
    assert out.weight == loss.weight(batch) == 3
    assert out.total.item() == pytest.approx(alone.total.item(), rel=1e-6)


def test_wrong_options_are_refused():
    with pytest.raises(ConfigError, match="apo_zero compares with 0, not with kl halves"):
        load_config(["debug", "loss.kind=kto", "loss.form=apo_zero", "loss.kl=halves"])
    with pytest.raises(ConfigError, match="are both 0"):
        load_config(
            ["debug", "loss.kind=kto", "loss.desirable_weight=0", "loss.undesirable_weight=0"]
        )
