"""GRPO and REINFORCE against TRL, and REINFORCE against GPT-NeoX's formulas, on one batch."""

from dataclasses import replace

import pytest
import torch
from tests.parity.test_neox_transformers import pair, small_config, their_name
from torch import Tensor, nn

from castalia.data import Batch
from castalia.losses import Grpo, Reinforce, Scored
from castalia.losses.advantages import group_advantages, leave_one_out, over_running_mean

transformers = pytest.importorskip("transformers", reason="needs castalia[hf]")
trl = pytest.importorskip("trl", reason="the oracle of GRPO")

PROMPTS, GROUP, PROMPT, ANSWER = 2, 3, 4, 6
ROWS = PROMPTS * GROUP
GRPO = {
    "dapo": {},
    "grpo": {"loss_type": "grpo", "beta": 0.3},
    "bnpo": {"loss_type": "bnpo", "beta": 0.3, "corrected_kl": False},
    "dr_grpo": {"loss_type": "dr_grpo", "epsilon_high": 0.5},
    "gspo": {"ratio": "answer", "beta": 0.3, "temperature": 0.7},
}


@pytest.fixture(scope="module")
def models():
    """Our decoder and transformers' model with its weights; both are policies, one the oracle."""
    return pair(small_config(num_layers=2, hidden_size=32, hidden_dropout=0.0))


@pytest.fixture(scope="module")
def drawn() -> dict[str, Tensor]:
    """Prompts, answers of unequal length, and numbers for each: rewards, log-probabilities."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([6, 3, 5, 1, 6, 2])
    prompts = torch.randint(5, 180, (PROMPTS, PROMPT), generator=generator)
    return {
        "prompt_ids": prompts.repeat_interleave(GROUP, 0),
        "completion_ids": torch.randint(5, 180, (ROWS, ANSWER), generator=generator),
        "completion_mask": (torch.arange(ANSWER) < lengths[:, None]).long(),
        "rewards": torch.randn(PROMPTS, GROUP, generator=generator),
        "noise": torch.randn(2, ROWS, ANSWER, generator=generator) * 0.3,
    }


def make_trainer(kind: str, model: nn.Module, folder: object, **options: object):
    """TRL's trainer over a model; it draws nothing here."""
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<end>": 1}, "a"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<end>"
    )
    datasets = pytest.importorskip("datasets")
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS,
        num_generations=GROUP,
        max_completion_length=ANSWER,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_dropout=True,
        gradient_checkpointing=False,
        **options,
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * ROWS),
        processing_class=tokenizer,
    )
    # Set by the loop of transformers' trainer, which does not run here.
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def their_logps(model: nn.Module, drawn: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the answers, (ROWS, ANSWER)."""
    ids = torch.cat([drawn["prompt_ids"], drawn["completion_ids"]], 1)
    logits = model(input_ids=ids).logits[:, PROMPT - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(2, drawn["completion_ids"][..., None])[..., 0]


def our_batch(drawn: dict[str, Tensor], advantages: Tensor, **by_token: Tensor) -> Batch:
    """The same rows as ours: tokens, labels one place later, numbers where the labels are."""
    ids = torch.cat([drawn["prompt_ids"], drawn["completion_ids"]], 1)
    mask = torch.zeros_like(ids)
    mask[:, PROMPT:] = drawn["completion_mask"]
    placed = {}
    for name, values in by_token.items():
        placed[name] = torch.zeros(ROWS, PROMPT + ANSWER - 1)
        placed[name][:, PROMPT - 1 :] = values
    return Batch(
        tokens=ids[:, :-1],
        labels=ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100),
        source=torch.zeros(ROWS, dtype=torch.int32),
        index=torch.arange(ROWS),
        reward=drawn["rewards"].flatten(),
        advantage=advantages.flatten().float(),
        **placed,
    )


def require_equal(ours: nn.Module, theirs: nn.Module, loss, batch: Batch, expected: Tensor) -> dict:
    """The loss of our batch and all its gradients are those of `expected`; our metrics."""
    out = loss(Scored.by(ours, batch), batch)
    assert out.weight == loss.weight(batch)
    mean = out.total / out.weight
    assert float(mean.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    ours.zero_grad()
    theirs.zero_grad()
    mean.backward()
    expected.backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        exact = theirs_by_name[their_name(name)].grad
        assert torch.allclose(parameter.grad, exact, atol=1e-5, rtol=1e-4), name
    assert any(parameter.grad.abs().max() > 1e-3 for parameter in ours.parameters())
    return {name: float(mean.sum / mean.weight) for name, mean in out.metrics.items()}


@pytest.mark.parametrize("variant", GRPO)
def test_grpo_equals_trl(models, drawn, tmp_path, variant) -> None:
    ours, theirs = models
    options = GRPO[variant]
    same = ("loss_type", "epsilon", "epsilon_high", "temperature")
    their_options = {name: value for name, value in options.items() if name in same}
    trainer = make_trainer(
        "GRPO",
        theirs,
        tmp_path,
        use_bias_correction_kl=options.get("corrected_kl", True),
        importance_sampling_level="sequence" if variant == "gspo" else "token",
        **{"loss_type": "dapo"} | their_options,
    )
    # Given to the config, it would look for a reference model by name.
    trainer.beta = options.get("beta", 0.0)
    advantages = group_advantages(drawn["rewards"], "group")
    with torch.no_grad():
        logps = their_logps(theirs, drawn, options.get("temperature", 1.0))
    sampled, reference = logps + drawn["noise"]
    expected = trainer._compute_loss(
        theirs,
        {
            **drawn,
            "prompt_mask": torch.ones_like(drawn["prompt_ids"]),
            "advantages": advantages.flatten(),
            "old_per_token_logps": sampled,
            "ref_per_token_logps": reference,
            "num_items_in_batch": drawn["completion_mask"].sum(),
        },
    )
    batch = our_batch(drawn, advantages, sampled=sampled, reference=reference)
    loss = Grpo(Grpo.Config(completions=GROUP, max_tokens=ANSWER, **options))
    found = require_equal(ours, theirs, loss, batch, expected)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert found["clipped"] == pytest.approx(logged["clip_ratio/region_mean"], abs=1e-5)
    if "corrected_kl" in options:
        # With the correction TRL reports the corrected divergence.
        assert found["kl"] == pytest.approx(logged["kl"], abs=1e-4)


def test_leave_one_out_equals_rloo(models, drawn, tmp_path) -> None:
    ours, theirs = models
    trainer = make_trainer("RLOO", theirs, tmp_path, beta=0.0)
    advantages = leave_one_out(drawn["rewards"])
    logps = their_logps(theirs, drawn)
    mask = drawn["completion_mask"]
    expected = trainer._compute_loss(
        theirs,
        {
            **drawn,
            "prompt_mask": torch.ones_like(drawn["prompt_ids"]),
            "advantages": advantages.flatten(),
            "old_logps": (logps * mask).sum(1).detach(),
        },
    )
    # TRL's value is that of a ratio of 1; its gradient is that of the log-probabilities.
    value = -(advantages.flatten() * (logps * mask).sum(1)).mean().detach()
    expected = expected - expected.detach() + value
    loss = Reinforce(
        Reinforce.Config(
            completions=GROUP, baseline="leave_one_out", average="answers", kl_div_beta=0.0
        )
    )
    require_equal(ours, theirs, loss, our_batch(drawn, advantages), expected)


@pytest.mark.parametrize("kl_impl", ["abs", "mse", "kl"])
def test_reinforce_equals_the_formula_of_neox(models, drawn, kl_impl) -> None:
    ours, theirs = models
    history: list[float] = []
    advantages = over_running_mean(drawn["rewards"], history)
    rewards = drawn["rewards"]
    assert advantages[0].tolist() == rewards[0].tolist()  # no baseline before the first group
    assert torch.allclose(advantages[1], rewards[1] - rewards[0].mean())
    assert history == pytest.approx(rewards.mean(1).tolist())
    logps = their_logps(theirs, drawn)
    reference = logps.detach() + drawn["noise"][1]
    difference = logps - reference
    kl = {"abs": difference.abs(), "mse": difference**2 / 2, "kl": difference}[kl_impl]
    mask = drawn["completion_mask"]
    rows = ((-logps * advantages.reshape(-1, 1) + 0.2 * kl) * mask).sum(1)
    mean_kl = float((kl * mask).sum().detach() / mask.sum())
    batch = our_batch(drawn, advantages, reference=reference)
    for average, expected in (
        ("neox", (rows / mask.sum()).mean()),
        ("tokens", rows.sum() / mask.sum()),
    ):
        config = Reinforce.Config(kl_impl=kl_impl, kl_div_beta=0.2, average=average)
        loss = Reinforce(config)
        found = require_equal_once(ours, theirs, loss, batch, expected)
        assert found["kl"] == pytest.approx(mean_kl, abs=1e-5)


def require_equal_once(ours, theirs, loss, batch, expected) -> dict:
    """As `require_equal`, for one of several functions of the same graph."""
    out = loss(Scored.by(ours, batch), batch)
    mean = out.total / out.weight
    assert float(mean.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    names = dict(ours.named_parameters())
    gradients = torch.autograd.grad(mean, list(names.values()))
    by_name = dict(theirs.named_parameters())
    exact = torch.autograd.grad(
        expected, [by_name[their_name(name)] for name in names], retain_graph=True
    )
    for name, gradient, wanted in zip(names, gradients, exact, strict=True):
        assert torch.allclose(gradient, wanted, atol=1e-5, rtol=1e-4), name
    return {name: float(mean.sum / mean.weight) for name, mean in out.metrics.items()}


def test_advantages_of_groups() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    std = float(rewards[0].std()) + 1e-4
    scaled = group_advantages(rewards, "group")
    assert scaled[0].tolist() == pytest.approx([-2 / std, -1 / std, 3 / std])
    assert scaled[1].tolist() == [0.0, 0.0, 0.0]
    batch = group_advantages(rewards, "batch")
    assert batch[0, 2] == pytest.approx(3 / (float(rewards.std()) + 1e-4))
    assert group_advantages(rewards, "none")[0].tolist() == [-2.0, -1.0, 3.0]
    assert leave_one_out(rewards)[0].tolist() == [-3.0, -1.5, 4.5]
    history = [0.0] * 100
    over_running_mean(rewards, history)
    assert len(history) == 100 and history[-2:] == [3.0, 5.0]


def test_the_divergence_over_the_vocabulary(models, drawn) -> None:
    """kl_impl full: GPT-NeoX's sum over all tokens, against whole logits of both models."""
    ours, theirs = models
    other = pair(small_config(num_layers=2, hidden_size=32))[0]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    ids = torch.cat([drawn["prompt_ids"], drawn["completion_ids"]], 1)[:, :-1]
    advantages = leave_one_out(drawn["rewards"])
    batch = our_batch(drawn, advantages)
    with torch.no_grad():
        hidden = other(ids)
        log_q = other.head(hidden).log_softmax(-1)[:, PROMPT - 1 :]
    log_p = theirs(input_ids=ids).logits[:, PROMPT - 1 :].log_softmax(-1)
    mask = drawn["completion_mask"]
    kl = nn.functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    logps = log_p.gather(2, drawn["completion_ids"][..., None])[..., 0]
    rows = ((-logps * advantages.reshape(-1, 1) + 0.2 * kl) * mask).sum(1)
    batch = replace(batch, reference=torch.zeros(batch.labels.shape), reference_hidden=hidden)
    for average, expected in (
        ("neox", (rows / mask.sum()).mean()),
        ("tokens", rows.sum() / mask.sum()),
    ):
        loss = Reinforce(Reinforce.Config(kl_impl="full", kl_div_beta=0.2, average=average))
        loss.reference_head = other
        found = require_equal_once(ours, theirs, loss, batch, expected)
        mean = float((kl * mask).sum().detach() / mask.sum())
        assert mean > 0.005 and found["kl"] == pytest.approx(mean, abs=1e-5)
