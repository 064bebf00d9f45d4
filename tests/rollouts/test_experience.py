"""GRPO and REINFORCE in the real loop: learning, records, resumes, and faults of the input."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tests.rollouts import rewarding

import castalia
from castalia.checkpoint import Store
from castalia.core.errors import ConfigError, DataError, TrainingError
from castalia.data import load_tokenizer
from castalia.distributed import World, initialize
from castalia.models import Decoder, NeoxConfig
from castalia.models.init import start_weights
from castalia.monitor import read_metrics
from castalia.recipes import load_config
from castalia.train.hooks import Hook, Metrics, Save, Validate
from castalia.train.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))
NAMES = "tests.rollouts.rewarding"
SMALL = (
    "debug",
    "model.num_layers=1",
    "model.hidden_size=32",
    "data.corpus=null",
    "data.packing=unpacked",
    "data.seq_length=32",
    "train.batch_size=4",
    "loss.max_tokens=8",
    "optim.lr=1e-2",
    "checkpoint.steps=[]",
    "checkpoint.every=null",
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """A file of 24 prompts with a further column."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"say {i} ", "target": i}) for i in range(24)]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def make(prompts, tmp_path):
    """Callable that builds a Trainer; rewards are named by function."""

    def build(*overrides, rewards="share_of_e", hooks=(), folder="run") -> Trainer:
        named = ",".join(f"{NAMES}:{name}" for name in rewards.split())
        base = [*SMALL, f"data.prompts={prompts}", f"output={tmp_path / folder}"]
        base += ["loss.kind=grpo", f"loss.rewards=[{named}]"]
        return Trainer(load_config([*base, *overrides]), ALONE, hooks=hooks)

    return build


def steps_of(trainer: Trainer) -> list[dict]:
    return list(read_metrics(Path(trainer.config.output) / "metrics.jsonl"))


class Kill(Hook):
    """Ends the process's run after step 3, whose checkpoint is written."""

    def after_step(self, step):
        if step.number == 3:
            raise KeyboardInterrupt


def lines_of(trainer: Trainer) -> list[dict]:
    file = Path(trainer.config.output) / "samples" / "rollouts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    "overrides",
    [
        ("loss.kind=grpo",),
        ("loss.kind=reinforce", "loss.baseline=leave_one_out", "loss.kl_div_beta=0"),
    ],
    ids=["grpo", "reinforce"],
)
def test_the_model_learns_what_is_rewarded(make, prompts, overrides):
    held_out = (f"data.valid_prompts={prompts}", "train.eval_every=40", "train.eval_batches=1")
    trainer = make(
        *overrides,
        *held_out,
        "train.steps=40",
        hooks=[Validate(), Metrics()],
    )
    trainer.fit()
    steps = steps_of(trainer)
    assert steps[0]["reward"] < 0.1
    assert steps[-1]["reward"] > 0.95 and steps[-1]["valid_reward"] > 0.95
    assert steps[-1]["entropy"] < 0.3 * steps[0]["entropy"]
    assert steps[0]["answer_tokens"] == pytest.approx(8, abs=0.5) and 0 <= steps[0]["ended"] <= 1
    assert all(step["clipped"] == 0 for step in steps)  # one update an answer
    # The first step and every tenth after it, with all answers to its prompts.
    written = lines_of(trainer)
    assert sorted({line["step"] for line in written}) == [1, 11, 21, 31]
    assert len(written) == 4 * 4 * 8
    first = [line for line in written if line["step"] == 1]
    assert sum(line["reward"] for line in first) / 32 == pytest.approx(steps[0]["reward"])
    assert written[-1]["completion"].count("e") / len(written[-1]["completion"]) > 0.9


def test_answers_that_were_cut_off_can_be_left_out_of_the_loss(make):
    trainer = make("train.steps=1", "loss.mask_truncated=true")
    (batch,) = trainer.prepared(next(trainer.training_batches()))
    groups = trainer.experience.rollout(next(trainer.training_batches()), 0, "prompts")
    judged = [one for group in groups.values() for one in group]
    ended = {(place, one.number): one.answer for place, group in groups.items() for one in group}
    assert len({one.answer.has_ended for one in judged}) == 2, "both kinds are drawn"
    for row, index in enumerate(batch.index.tolist()):
        answer = ended[divmod(index, trainer.config.loss.completions)]
        targets = int((batch.labels[row] >= 0).sum())
        assert targets == (len(answer.ids) if answer.has_ended else 0)


def test_rewards_get_the_columns_of_their_prompts(make):
    rewarding.CALLS.clear()
    trainer = make(
        "train.steps=1",
        "loss.completions=2",
        "loss.reward_weights=[0.5,10]",
        rewards="noted only_odd",
    )
    batches = next(trainer.training_batches())
    (answers,) = trainer.prepared(batches)
    (call,) = rewarding.CALLS
    assert [f"say {number} " for number in call["target"]] == call["prompts"]
    assert call["prompts"][0] == call["prompts"][1] != call["prompts"][2]
    assert all(isinstance(text, str) for text in call["completions"])
    # Half of the number, and 10 more where the other reward judges and likes it.
    expected = [0.5 * number + (10.0 if number % 2 else 0.0) for number in call["target"]]
    assert answers.reward.tolist() == expected
    groups = answers.reward.view(-1, 2)
    assert torch.equal(answers.group, batches[0].index.repeat_interleave(2))
    assert answers.advantage.abs().max() == 0.0 and (groups[:, 0] == groups[:, 1]).all()
    # Prompts are no targets; what follows them is.
    for row, (tokens, labels) in enumerate(zip(answers.tokens, answers.labels, strict=True)):
        prompt = trainer.experience.tokenizer.encode(call["prompts"][row])
        assert tokens[: len(prompt)].tolist() == prompt
        places = (labels >= 0).nonzero()[:, 0]
        assert places[0] == len(prompt) - 1 and 1 <= len(places) <= 8
        assert torch.equal(labels[places[:-1]], tokens[places[:-1] + 1])


def test_the_same_texts_however_they_are_cut(make):
    """Neither micro-batches nor the number of texts at once change an answer."""
    one = make("train.steps=2")
    other = make(
        "train.steps=2",
        "train.micro_batch_size=2",
        "loss.answers_at_once=4",
        "loss.texts_at_once=5",
    )
    (whole,) = one.prepared(next(one.training_batches()))
    parts = other.prepared(next(other.training_batches()))
    assert len(parts) == 4 and {len(part.tokens) for part in parts} == {8}
    rows = torch.cat([part.tokens for part in parts])
    order = torch.cat([part.index for part in parts]).argsort()
    assert torch.equal(rows[order], whole.tokens[whole.index.argsort()])
    assert torch.equal(
        torch.cat([part.advantage for part in parts])[order],
        whole.advantage[whole.index.argsort()],
    )
    # Another step, other draws of the same prompts.
    again = one.experience.rollout(next(one.training_batches()), 1, "prompts")
    first = one.experience.rollout(next(one.training_batches()), 0, "prompts")
    assert first.keys() == again.keys()
    assert all(
        a[0].answer != b[0].answer for a, b in zip(first.values(), again.values(), strict=True)
    )


def test_the_native_engine_writes_the_same_answers(make):
    """On a packed copy in memory, which is made anew for each set of answers."""
    trainers = [make("train.steps=2", f"loss.engine={engine}") for engine in ("torch", "native")]
    for _ in range(2):
        texts = []
        for trainer in trainers:
            batches = next(trainer.training_batches())
            (answers,) = trainer.prepared(batches)
            texts.append(answers.tokens)
            trainer.take_step(batches)
        assert torch.equal(*texts)
    with pytest.raises(ConfigError, match=r"native computes whole models .* set loss.engine=torch"):
        make("loss.engine=native", "loss.dtype=fp16")


@pytest.mark.parametrize(
    "overrides",
    [
        ("loss.updates=2", "loss.beta=0.3", "loss.temperature=2"),
        ("loss.kind=reinforce", "loss.kl_div_beta=0"),
    ],
    ids=["two updates and a reference", "running mean"],
)
def test_a_killed_run_goes_on_bit_for_bit(make, overrides):
    """Killed between the two updates of one set of answers, and with a baseline of earlier ones."""
    overrides = (
        *overrides,
        "checkpoint.steps=[3]",
        "train.steps=5",
        "checkpoint.asynchronous=false",
    )
    whole = make(*overrides, hooks=[Metrics()], folder="whole")
    whole.fit()
    killed = make(*overrides, hooks=[Metrics(), Save(), Kill()], folder="killed")
    with pytest.raises(KeyboardInterrupt):
        killed.fit()
    resumed = make(*overrides, hooks=[Metrics(), Save()], folder="killed")
    resumed.fit()
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    ours, theirs = ([step["reward"] for step in steps_of(trainer)] for trainer in (whole, resumed))
    assert ours == theirs and len(ours) == 5
    if "loss.updates=2" in overrides:
        # Both updates of a set see the same answers.
        assert ours[0] == ours[1] != ours[2] == ours[3]
        assert any(step["clipped"] > 0 for step in steps_of(whole))
        divergences = [step["kl"] for step in steps_of(whole)]
        assert divergences[0] == pytest.approx(0.0, abs=1e-9) and min(divergences[1:]) > 1e-4


def test_a_reward_model_judges_prompt_and_answer(make, tmp_path, run_folder):
    config = NeoxConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, vocab_size=257, head="score"
    )
    model = Decoder(config)
    initialize(model, start_weights(config, 1))
    torch.nn.init.normal_(model.score.weight)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    files = {
        "config.yaml": yaml.safe_dump({"model": config.model_dump(mode="json")}),
        "tokenizer.json": load_tokenizer("bytes").text,
    }
    store = Store(tmp_path / "judge" / "checkpoints")
    store.save(1, tensors, {"step": 1}, files, asynchronous=False)
    named = f"loss.reward_model={tmp_path / 'judge'}"
    trainer = make("train.steps=1", "loss.reward_weights=[0,2]", named)
    (answers,) = trainer.prepared(next(trainer.training_batches()))
    rows = zip(answers.tokens, answers.filled, strict=True)
    exact = castalia.load(tmp_path / "judge").scores([row[:n].tolist() for row, n in rows])
    assert answers.reward.tolist() == pytest.approx([2 * score for score in exact], rel=1e-5)
    assert answers.reward.std() > 0.1
    with pytest.raises(ConfigError, match=r"has model\.head=vocab: .* not the score of a text"):
        make(f"loss.reward_model={run_folder}")


def test_an_adapter_learns_from_rewards(make, run_folder):
    """Its reference is the base, the same model without the adapter."""
    trainer = make(
        f"model.start={run_folder}",
        "model={num_layers: 2, hidden_size: 64, num_attention_heads: 4, vocab_size: 257,"
        " rotary_pct: 0.5, max_position_embeddings: 256}",
        "adapter.kind=lora",
        "loss.beta=0.1",
        "train.steps=3",
        hooks=[Metrics()],
    )
    base = {
        name: weight.clone()
        for name, weight in trainer.model.state_dict().items()
        if "lora" not in name
    }
    trainer.fit()
    steps = steps_of(trainer)
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-9) and steps[-1]["kl"] > 0
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in base.items())


def test_a_pass_over_the_prompts_with_two_updates_each(make):
    """The rows of a run with one update, each step twice."""

    def rows_of(*overrides):
        trainer = make("train.epochs=1", "train.micro_batch_size=2", *overrides)
        batches = trainer.training_batches()
        steps = trainer.config.train.steps
        return [torch.cat([batch.tokens for batch in next(batches)]) for _ in range(steps)]

    once = rows_of()
    twice = rows_of("loss.updates=2")
    assert len(once) == 6 and len(twice) == 12
    for step, rows in enumerate(once):
        assert torch.equal(rows, twice[2 * step]) and torch.equal(rows, twice[2 * step + 1])


WRONG = {
    "raising": "tests.rollouts.rewarding:raising raised KeyError: 'answer'",
    "too_few": "too_few returned 31 numbers for 32 completions",
    "infinite": r"infinite returned inf for the completion .* of .*record \d+; expected a finite",
    "nothing": r"no reward judges the completion .*record \d+: all of .*nothing returned None",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_faulty_reward_is_named(make, name):
    trainer = make("train.steps=1", rewards=name)
    with pytest.raises(TrainingError, match=WRONG[name]):
        trainer.fit()


CONFIGS = {
    ("optim.kind=schedule_free",): "draws answers with the weights that it trains",
    ("loss.rewards=[]",): "loss.kind grpo has no reward: name functions in loss.rewards",
    ("loss.rewards=[shorter]",): "expected module:function, for instance rewards:is_short",
    ("loss.rewards=[nowhere.to:find]",): "cannot import the module 'nowhere.to'",
    (f"loss.rewards=[{NAMES}:share_of_f]",): "did you mean 'share_of_e'",
    (f"loss.rewards=[{NAMES}:no_function]",): "no_function is not a function",
    ("loss.reward_weights=[1,2]",): "loss.reward_weights has 2 numbers for 1 rewards",
    ("loss.completions=1",): "grpo compares the answers to a prompt, but completions is 1",
    ("loss.kind=reinforce", "loss.updates=2"): "set updates to 1, or loss.kind to grpo",
    ("loss.answers_at_once=3",): "loss.completions 8 is not divisible by loss.answers_at_once 3",
    ("data.packing=packed",): "set data.packing=unpacked",
    ("data.tokenizer=null",): "rewards judge texts; set data.tokenizer",
    ("loss.max_tokens=32",): "leaves no room for a prompt in rows of data.seq_length 32",
    ("data.prompts=[]", "data.corpus=tiny"): "data.corpus is something else; name the prompts",
}


@pytest.mark.parametrize("overrides", CONFIGS, ids=lambda overrides: overrides[-1])
def test_a_config_that_cannot_work(make, overrides):
    with pytest.raises(ConfigError) as raised:
        make(*overrides)
    assert CONFIGS[overrides] in str(raised.value)


def test_prompts_for_a_loss_that_reads_texts(prompts):
    with pytest.raises(ConfigError, match=r"prompts without answers; choose .*: grpo, reinforce"):
        load_config(["debug", "data.corpus=null", f"data.prompts={prompts}"])


def test_prompts_that_cannot_be_answered(make, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "short"}\n{"prompt": "' + "long " * 6 + '"}\n')
    with pytest.raises(DataError, match=r"record 2 of .* has a prompt of 30 tokens, .* leaves 24"):
        make(f"data.prompts={file}")
    file.write_text('{"prompt": "good"}\n{"text": "none"}\n')
    with pytest.raises(DataError, match="a prompt has the key 'prompt'; keys: text"):
        make(f"data.prompts={file}")
