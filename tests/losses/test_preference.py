"""DPO, ORPO and SimPO against TRL: loss and every gradient of one batch on the same tiny model."""

import collections
import itertools
import types

import pytest
import torch
from tests.parity.test_neox_transformers import pair, small_config, their_name

from castalia.core.errors import ConfigError
from castalia.data import IGNORED, Batch
from castalia.losses import DPO, ORPO, Scored, SimPO
from castalia.recipes import load_config

trl = pytest.importorskip("trl", reason="an oracle of the tests")
PROMPT = 3
LENGTHS = [(9, 6), (4, 12), (7, 7)]
BETA = 0.3


def batch_of(lengths, prompt=PROMPT, seed=6):
    """Pairs with answers of so many tokens after the prompt, as the loader has them."""
    generator = torch.Generator().manual_seed(seed)
    width = prompt + max(itertools.chain(*lengths))
    tokens = torch.zeros(2 * len(lengths), width, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORED)
    for row, length in enumerate(itertools.chain(*lengths)):
        text = torch.randint(1, 190, (prompt + length,), generator=generator)
        if row % 2:
            text[:prompt] = tokens[row - 1, :prompt]
        tokens[row, : len(text)] = text
        labels[row, prompt : len(text)] = text[prompt:]
    group = torch.arange(len(lengths)).repeat_interleave(2)
    source = torch.zeros(len(tokens), dtype=torch.int32)
    return Batch(tokens[:, :-1], labels[:, 1:], source, group, group=group), tokens, labels


@pytest.fixture(scope="module")
def models():
    """Our model and transformers' with equal weights, and two references with others."""
    ours, theirs = pair(small_config())
    reference, their_reference = pair(small_config())
    with torch.no_grad():
        for one, other in ((reference, their_reference),):
            named = dict(other.named_parameters())
            for name, parameter in one.named_parameters():
                parameter.add_(0.02 * torch.cos(torch.arange(parameter.numel())).view_as(parameter))
                named[their_name(name)].copy_(parameter)
    return ours, theirs.eval(), reference, their_reference.eval()


def our_result(loss, model, batch):
    """Mean loss, gradients and metrics."""
    model.zero_grad()
    out = loss(Scored.by(model, batch), batch)
    weight = loss.weight(batch)
    assert weight == out.weight
    (out.total / weight).backward()
    gradients = {their_name(name): weights.grad for name, weights in model.named_parameters()}
    metrics = {name: float(mean.sum / mean.weight) for name, mean in out.metrics.items()}
    return float(out.total.detach() / weight), gradients, metrics


def compare(ours, loss, model):
    """Loss and gradients are equal to 1e-5, in parts of the loss and of the largest gradient where
    they are above 1."""
    model.zero_grad()
    loss.backward()
    assert ours[0] == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
    biggest = max(weights.grad.abs().max() for weights in model.parameters())
    assert biggest > 1e-3
    for name, weights in model.named_parameters():
        assert (weights.grad - ours[1][name]).abs().max() < 1e-5 * max(1, biggest), name


@pytest.fixture(scope="module")
def dpo_trainer(models):
    """TRL's trainer as far as a loss needs it."""
    from accelerate import Accelerator
    from trl.trainer.dpo_trainer import add_fused_lm_head

    trainer = trl.DPOTrainer.__new__(trl.DPOTrainer)
    outputs = ["log_probs", "entropy", "is_top1", "mean_logits"]
    trainer.model = models[1]
    trainer.ref_model = models[3]
    add_fused_lm_head(trainer.model, outputs=outputs)
    add_fused_lm_head(trainer.ref_model, outputs=outputs)
    trainer.accelerator = Accelerator(cpu=True)
    trainer.args = types.SimpleNamespace(gradient_checkpointing_kwargs=None)
    trainer.args.gradient_checkpointing = False
    trainer.beta = BETA
    trainer.loss_weights = [1.0]
    trainer.f_divergence_type = "reverse_kl"
    trainer.ld_alpha = None
    trainer.precompute_ref_logps = trainer.use_weighting = trainer.aux_loss_enabled = False
    trainer._total_train_tokens = 0
    trainer._tp_size = 1
    return trainer


FORMS = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "robust": {"label_smoothing": 0.2},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "sigmoid_norm": {"form": "sigmoid", "length_normalized": True},
}


@pytest.mark.parametrize("name", FORMS)
def test_dpo_is_trls(name, models, dpo_trainer):
    ours, theirs, reference, _ = models
    batch, tokens, labels = batch_of(LENGTHS)
    with torch.no_grad():
        _, losses = Scored.by(reference, batch).losses(batch.labels)
    batch = Batch(**{**vars(batch), "reference": -losses})
    config = DPO.Config(**{"beta": BETA, "form": name} | FORMS[name])
    result = our_result(DPO(config), ours, batch)

    # TRL has all preferred answers first.
    order = [0, 2, 4, 1, 3, 5]
    dpo_trainer.loss_types = [name]
    dpo_trainer.label_smoothing = config.label_smoothing
    dpo_trainer._metrics = {"eval": collections.defaultdict(list)}
    inputs = {
        "input_ids": tokens[order],
        "attention_mask": (tokens > 0).long()[order],
        "completion_mask": (labels >= 0).long()[order],
    }
    loss = dpo_trainer._compute_loss(theirs, inputs, False)
    compare(result, loss, theirs)
    metrics = {key: values[-1] for key, values in dpo_trainer._metrics["eval"].items()}
    for mine, other in {
        "accuracy": "rewards/accuracies",
        "reward_margin": "rewards/margins",
        "reward_chosen": "rewards/chosen",
        "reward_rejected": "rewards/rejected",
        "logp_chosen": "logps/chosen",
        "logp_rejected": "logps/rejected",
    }.items():
        assert result[2][mine] == pytest.approx(metrics[other], abs=1e-4), mine


def contrastive(trainer_class, module, tokens, labels, **options):
    """TRL's loss of a trainer without a reference, and its metrics."""
    trainer = trainer_class.__new__(trainer_class)
    vars(trainer).update(
        accelerator=types.SimpleNamespace(device="cpu", gather_for_metrics=lambda values: values),
        is_encoder_decoder=False,
        aux_loss_enabled=False,
        pad_token_id=0,
        padding_value=0,
        **options,
    )
    batch = {}
    for number, side in enumerate(("chosen", "rejected")):
        batch[f"{side}_input_ids"] = tokens[number::2]
        batch[f"{side}_attention_mask"] = (tokens[number::2] > 0).long()
        batch[f"{side}_labels"] = labels[number::2]
    return trainer.get_batch_loss_metrics(module, batch)


@pytest.mark.parametrize("wrong", [0.0, 0.2])
def test_simpo_and_smoothing_are_trls(models, wrong):
    from trl.experimental.cpo import CPOTrainer

    ours, theirs, _, _ = models
    batch, tokens, labels = batch_of(LENGTHS)
    common = {"beta": 2.0, "label_smoothing": wrong, "alpha": 0.0, "cpo_alpha": 0.0}
    result = our_result(SimPO(SimPO.Config(gamma=1.4, label_smoothing=wrong)), ours, batch)
    loss, metrics = contrastive(
        CPOTrainer, theirs, tokens, labels, loss_type="simpo", simpo_gamma=1.4, **common
    )
    compare(result, loss, theirs)
    assert result[2]["reward_margin"] == pytest.approx(metrics["rewards/margins"], abs=1e-4)
    # DPO without a reference, whose labels may be wrong.
    config = DPO.Config(beta=0.5, label_smoothing=wrong, reference="free")
    result = our_result(DPO(config), ours, batch)
    common["beta"] = 0.5
    loss, _ = contrastive(CPOTrainer, theirs, tokens, labels, loss_type="sigmoid", **common)
    compare(result, loss, theirs)


def test_orpo_is_trls(models):
    from trl.experimental.orpo import ORPOTrainer

    # TRL's first term also counts the prompt's tokens, and all tokens of a batch alike: a prompt of
    # one token, which has no prediction, and answers of one length make both terms the same.
    ours, theirs, _, _ = models
    batch, tokens, labels = batch_of([(9, 6), (9, 12)], prompt=1)
    result = our_result(ORPO(ORPO.Config(beta=0.7)), ours, batch)
    loss, metrics = contrastive(ORPOTrainer, theirs, tokens, labels, beta=0.7)
    compare(result, loss, theirs)
    assert result[2]["accuracy"] == pytest.approx(float(metrics["rewards/accuracies"]))


def test_a_pair_without_an_answer_does_not_count(models):
    model = models[0]
    batch, _, _ = batch_of(LENGTHS)
    cut = batch.labels.clone()
    cut[3] = IGNORED
    for loss in (DPO(DPO.Config(form="nca_pair")), ORPO(), SimPO()):
        kept = [0, 1, 4, 5]
        alone = Batch(
            *(getattr(batch, name)[kept] for name in ("tokens", "labels", "source", "index"))
        )
        one, gradients, metrics = our_result(loss, model, Batch(**vars(batch) | {"labels": cut}))
        two, expected, means = our_result(loss, model, alone)
        assert one == pytest.approx(two, rel=1e-6) and metrics == pytest.approx(means, rel=1e-5)
        for name, gradient in gradients.items():
            assert (gradient - expected[name]).abs().max() < 1e-6
            assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("loss.kind=dpo data.train=[x]", "the data are texts"),
        ("loss.kind=dpo data.chat=[x]", "the data are texts"),
        ("data.chosen=[x] data.rejected=[y] data.packing=unpacked", "choose a loss of pairs: dpo"),
        ("loss.kind=dpo loss.form=hinge loss.label_smoothing=0.1", "no effect on form hinge"),
        ("loss.kind=dpo loss.form=exo_pair", "needs label_smoothing"),
        ("loss.kind=dpo mixing.kind=ado", "does not return"),
        ("loss.kind=dpo loss.form=sigmoit", "sigmoid"),
    ],
)
def test_faults_of_a_config_are_named(words, message):
    with pytest.raises(ConfigError, match=message):
        load_config(["debug", *words.split()])
