"""The stage between the rows and the passes where a loss learns from answers of the model itself:
prompts come in, answers with rewards and advantages go out."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.data import Batch, RunRows, load_tokenizer
from castalia.distributed import World
from castalia.eval.aside import Peers, undisturbed, whole_model
from castalia.inference import LanguageModel
from castalia.inference.engine import Engine
from castalia.inference.native_engine import NativeEngine
from castalia.inference.sampling import Sampling
from castalia.inference.torch_engine import TorchEngine
from castalia.losses import Scored
from castalia.losses.policy import Policy
from castalia.models import Decoder
from castalia.native.weights import packed_weights
from castalia.rollouts.answers import Drawing, Prompt, ends_of_texts, write_answers
from castalia.rollouts.prompts import PromptRecords, require_room
from castalia.rollouts.records import RolloutFile, as_json, facts_of, from_json
from castalia.rollouts.rewards import Answered, open_rewards, total_rewards
from castalia.rollouts.rows import Judged, answer_rows, padding_rows, prompts_of
from castalia.runs.config import RunConfig
from castalia.train.answer_references import AnswerReferences
from castalia.train.mismatched import Divergence
from castalia.train.precision import DTYPES, arithmetic

if TYPE_CHECKING:
    from castalia.train.trainer import Trainer

VALIDATION = -1
"""In place of a step where the answers of a validation are drawn: the same draws each time."""
Groups = dict[int, list[Judged]]
"""Answers by the place of their prompt."""


@dataclass
class Experience:
    """Answers of the model in training, as batches for its loss.

    All ranks take part: those with the same rows share the work, and each gets the answers of all.
    Raises  ConfigError for a reward that cannot be imported; DataError for a prompt that is too
            long.
    """

    config: RunConfig
    world: World
    loss: Policy
    rows: RunRows
    weights: Callable[[], Mapping[str, Tensor]]
    """The weights in training of this rank, without copies of another pipeline stage's."""
    progressed: Callable[[], None]
    references: AnswerReferences | None
    """None where the loss does not compare with a reference."""

    def __post_init__(self) -> None:
        options = self.loss.config
        assert self.config.data.tokenizer is not None, "a rule of the config"
        self.tokenizer = load_tokenizer(self.config.data.tokenizer)
        self.special = ends_of_texts(self.tokenizer, self.config.model.vocab_size)
        refused = NativeEngine.refuses(self.config.model)
        if options.engine == "native" and refused is not None:
            raise ConfigError(f"loss.engine: {refused}; set loss.engine=torch")
        self.rewards = open_rewards(options, self.tokenizer, str(self.world.device))
        most = self.config.data.seq_length - options.max_tokens
        self.records = {}
        # Of the rows as they are served once: the answers to them count several times.
        served_once = getattr(self.rows.train, "rows", self.rows.train)
        for option, served in (("prompts", served_once), ("valid_prompts", self.rows.valid)):
            if served is not None:
                require_room(served, most, f"data.{option}")
                self.records[option] = PromptRecords(served, self.tokenizer)
        self.sampling = Sampling(
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p
        )
        # What lasts from step to step, and is saved with it.
        self.history: list[float] = []
        self.kept: Groups = {}
        self.kept_for = -1
        self.count = 0
        self.file = RolloutFile(self.config.output)

    def state_dict(self) -> dict[str, Any]:
        """The state for a resume, as JSON values: equal on all ranks."""
        kept = {str(place): [as_json(one) for one in group] for place, group in self.kept.items()}
        return {"history": self.history, "kept": kept, "kept_for": self.kept_for}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.history = list(state["history"])
        self.kept_for = state["kept_for"]
        self.kept = {
            int(place): [from_json(one) for one in group] for place, group in state["kept"].items()
        }
        # After a rollback some steps run again: their answers are not written twice.
        self.file.is_open = False

    def train_batches(
        self, micro_batches: Sequence[Batch], step: int, metrics: dict[str, Any]
    ) -> list[Batch]:
        """The answers that step `step`, counted from 0, learns from; adds to its metrics.

        Raises  TrainingError about a reward, on all ranks.
        """
        updates = self.loss.config.updates
        began = time.perf_counter()
        if self.kept_for != step // updates:
            self.kept = self.rollout(micro_batches, step // updates, "prompts")
            self.kept_for = step // updates
            metrics |= facts_of(self.kept.values(), [reward.name for reward in self.rewards])
            metrics["rollout_seconds"] = round(time.perf_counter() - began, 4)
            if self.world.leads and self.is_recorded(step):
                records = self.records["prompts"]
                self.file.write(step + 1, self.kept, lambda place: records.at(place).prompt)
        batches = self.batches(micro_batches, self.kept, "prompts", step)
        if (step + 1) % updates == 0:
            # The last step with them: no checkpoint needs them any more.
            self.kept = {}
            self.kept_for = -1
        return batches

    def valid_batches(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        """The answers to held-out prompts; the state of the training stays as it is."""
        history = list(self.history)
        groups = self.rollout(micro_batches, VALIDATION, "valid_prompts")
        self.history = history
        return self.batches(micro_batches, groups, "valid_prompts", VALIDATION)

    def rollout(self, micro_batches: Sequence[Batch], number: int, option: str) -> Groups:
        """Answers to the prompts of all ranks, with rewards and advantages, on every rank.

        Takes   number: of this set of answers in the run, which decides the draws; option: whose
                prompts these are, a field of `data`.
        """
        self.count += 1
        peers = Peers(self.world, lambda: False, self.progressed, f"rollout/{self.count}")
        with undisturbed(self.world.device), peers.together():
            # A piece of the prompts for each rank that has them.
            part, parts = self.world.share_of_rows
            mine = [prompt for batch in micro_batches for prompt in prompts_of(batch)][part::parts]
            own = self.answered(mine, number, option, peers)
            groups = {place: group for each in peers.gather(own) for place, group in each}
        places = sorted(groups)
        rewards = torch.tensor(
            [[one.reward for one in groups[place]] for place in places], dtype=torch.float64
        )
        advantages = self.loss.advantages(rewards, self.history).tolist()
        for place, row in zip(places, advantages, strict=True):
            pairs = zip(groups[place], row, strict=True)
            groups[place] = [one._replace(advantage=value) for one, value in pairs]
        return groups

    def answered(
        self, prompts: Sequence[Prompt], number: int, option: str, peers: Peers
    ) -> list[tuple[int, list[Judged]]]:
        """Answers to this rank's prompts, with their rewards, by the place of the prompt."""
        options = self.loss.config
        model = self.config.model.without_start()
        dtype = DTYPES[options.dtype]
        weights = self.weights()
        whole = whole_model(weights, model, self.world, peers, dtype, self.config.adapter)
        speaker = LanguageModel(self.engine_of(whole), self.tokenizer, None, self.special)
        drawing = Drawing(
            self.sampling,
            options.completions,
            options.max_tokens,
            options.texts_at_once,
            self.config.seed,
            number,
        )
        prompts = [prompt._replace(place=self.origin(prompt, option)) for prompt in prompts]
        groups = write_answers(speaker, prompts, drawing)
        records = self.records[option]
        answered = []
        for prompt, group in zip(prompts, groups, strict=True):
            record = records.at(prompt.place)
            answered += [Answered(record, prompt.ids, answer) for answer in group]
        rewards = total_rewards(self.rewards, answered)
        judged = [
            Judged(one.answer, place % options.completions, total, parts, None)
            for place, (one, (total, parts)) in enumerate(zip(answered, rewards, strict=True))
        ]
        by_prompt = [
            judged[i : i + options.completions] for i in range(0, len(judged), options.completions)
        ]
        if options.updates > 1:
            by_prompt = self.with_log_probabilities(whole, prompts, by_prompt)
        return [(prompt.place, group) for prompt, group in zip(prompts, by_prompt, strict=True)]

    def engine_of(self, whole: Decoder) -> Engine:
        """What writes answers with the weights of a model."""
        if self.loss.config.engine == "torch":
            return TorchEngine(whole)
        # In memory: the packed copy is gone when its answers are written.
        tensors = whole.state_dict()
        return NativeEngine(packed_weights(tensors, whole.config, self.loss.config.dtype))

    def origin(self, prompt: Prompt, option: str) -> int:
        """The place that a prompt had when its answers were drawn."""
        return prompt.place if option == "valid_prompts" else self.rows.train.origin(prompt.place)

    @torch.no_grad()
    def with_log_probabilities(
        self, whole: Decoder, prompts: Sequence[Prompt], groups: Sequence[list[Judged]]
    ) -> list[list[Judged]]:
        """The answers with the log-probability of each of their tokens, as the loss computes it."""
        options = self.loss.config
        scored = []
        for prompt, group in zip(prompts, groups, strict=True):
            length = len(prompt.ids) + options.max_tokens
            batch = answer_rows([prompt], [group], length, options.completions).trimmed()
            batch = batch.to(self.world.device)
            with arithmetic(self.config.precision, self.world.device):
                found = Scored.by(whole, batch).divided(options.temperature)
                _, losses_BT = found.losses(batch.labels)
            rows = zip(group, losses_BT, batch.labels >= 0, strict=True)
            scored.append([one._replace(sampled=(-row[own]).tolist()) for one, row, own in rows])
        return scored

    def batches(
        self, micro_batches: Sequence[Batch], groups: Groups, option: str, step: int
    ) -> list[Batch]:
        """The answers to each micro-batch of prompts, loss.answers_at_once of a group at a time."""
        options = self.loss.config
        at_once = options.answers_at_once or options.completions
        length = self.config.data.seq_length
        batches = []
        for batch in micro_batches:
            prompts = prompts_of(batch)
            found = [groups[self.origin(prompt, option)] for prompt in prompts]
            for first in range(0, options.completions, at_once):
                part = [group[first : first + at_once] for group in found]
                if prompts:
                    made = answer_rows(
                        prompts,
                        part,
                        length,
                        options.completions,
                        only_ended=self.loss.only_ended,
                    )
                else:
                    made = padding_rows(length, at_once)
                batches.append(made)
        if self.references is None:
            return batches
        train = self.config.train
        rows = train.batch_size if step == VALIDATION else train.batches.size(step)
        return self.references.fill(batches, rows, length)

    def is_recorded(self, step: int) -> bool:
        """Whether the answers of a step are written: the first, and every so many after it."""
        every = self.loss.config.record_every
        before = step - self.loss.config.updates
        return every > 0 and (before < 0 or step // every != before // every)


def make_experience(trainer: "Trainer") -> "Experience | Divergence | None":
    """The stage before the passes that the run's loss needs; None for most. One that learns from
    answers has a state."""
    if getattr(trainer.config.loss, "kl", None) == "mismatched":
        return Divergence(trainer)
    if not isinstance(trainer.loss, Policy):
        return None
    experience = Experience(
        trainer.config,
        trainer.world,
        trainer.loss,
        trainer.rows,
        trainer.checkpoints.own_weights,
        trainer.watchdog.progressed,
        AnswerReferences(trainer, trainer.loss) if trainer.loss.beta else None,
    )
    trainer.states["experience"] = experience
    trainer.checkpoints.logs.add(lambda: experience.file.log)
    return experience
