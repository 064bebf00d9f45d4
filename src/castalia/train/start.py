"""Start weights of a fresh run that `model.start` names: those of another run, a Hugging Face
folder or a hub model.

A run that has a checkpoint of its own resumes from it and never opens the start again.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.checkpoint import complete_steps
from castalia.checkpoint.keymap import matches, shown
from castalia.checkpoint.load import load_into, read_config, read_state
from castalia.checkpoint.tensors import StoredTensor
from castalia.core.errors import CheckpointError, ConfigError
from castalia.distributed import World
from castalia.distributed.layout import Sliceable
from castalia.formats.adapted import require_base, weights_hash
from castalia.formats.saved_model import SavedModel, open_model
from castalia.models import Decoder, ModelConfig
from castalia.runs.config import RunConfig
from castalia.train.progress import Progress
from castalia.train.resume import Stateful

OUTPUT = "unembed.weight"
SCORE = "score.weight"
HEAD_KEYS = ("head", "tie_word_embeddings")
"""Fields of the model that say what its output head is."""
VOCABULARY = ("embed.weight", OUTPUT)
"""The Decoder's weights with a row for each id."""
NO_STEP = -1
"""Stands for None where ranks exchange integers."""

POSITION = ("data", "guard", "mixture")
"""States that belong to a step of a run; the data come first, since a changed source explains what
it breaks."""

Draw = Callable[[str, Sequence[int]], Tensor]
"""(name, shape of the whole parameter) -> the weights that a run without a start begins with."""


@dataclass
class StartRecord:
    """Where the run's weights came from, kept in every checkpoint; empty where they were drawn."""

    facts: dict[str, Any] = field(default_factory=dict)
    base: SavedModel | None = None
    """The opened base of an adapter, which a resume compares with that of the run."""

    def state_dict(self) -> dict[str, Any]:
        """path, folder, step, sha256 (file name -> hash), names of drawn tensors, and which state
        came along."""
        return self.facts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The record of the run's first start, whatever model.start says now.

        Raises  CheckpointError if an adapter would resume over another base.
        """
        if self.base is not None:
            require_base("the run's checkpoint", state, self.base)
        self.facts = state

    def note(self, asked: str | None) -> str | None:
        """What a resumed run says where `model.start` is not the start that it once had."""
        began = self.facts.get("path")
        # A run that is named from another directory has the same path as an absolute one.
        if asked is None or (began and f"/{asked}".endswith(f"/{began}")):
            return None
        return (
            f"model.start {asked} is not read: the run began with {began or 'drawn weights'} and"
            " resumes from its own checkpoint"
        )


@dataclass
class StartWeights:
    """The opened start of a run, and how it fits the run's model."""

    config: RunConfig
    saved: SavedModel
    rows: int
    """Rows of the vocabulary's matrices that are copied; further ones are drawn."""
    drawn: list[str]
    """Weights that the start lacks."""

    def over(self, draw: Draw) -> Callable[[str, Sequence[int]], Sliceable]:
        """The start value of each parameter: read where the start has it, drawn elsewhere."""

        def value(name: str, shape: Sequence[int]) -> Sliceable:
            if name in self.drawn:
                return draw(name, shape)
            stored = self.saved.tensors.stored(name)
            if name in VOCABULARY:
                return VocabularyRows(stored, self.rows, lambda: draw(name, shape))
            return stored

        return value

    def restore(
        self,
        tensors: Mapping[str, Tensor],
        elsewhere: Collection[str],
        states: Mapping[str, Stateful],
        progress: Progress,
    ) -> None:
        """Take from the start what train.start_optimizer and train.start_step ask for beside the
        weights.

        tensors    the run's live tensors, by their names in a checkpoint; `elsewhere` those of
                   other pipeline stages.
        states     the run's states, by their names in state.json.
        Raises     CheckpointError if the optimizer's state does not fit; DataError if the data are
                   not the start's.
        """
        train = self.config.train
        if not (train.start_optimizer or train.start_step):
            return
        state = read_state(self.saved.folder)
        before = state["progress"]
        # Adam corrects its moments by the number of updates behind them; the schedule counts the
        # run's own.
        behind = before["updates"] + before.get("updates_before", 0)
        if train.start_optimizer:
            load_into(self.saved.folder, tensors, "optim.", elsewhere)
            progress.updates_before = behind
            # A scale of 1, that of other arithmetic, would underflow under fp16.
            if read_config(self.saved.folder).get("precision", "fp32") == self.config.precision:
                states["loss_scale"].load_state_dict(state["loss_scale"])
        if train.start_step:
            progress.step = before["step"]
            progress.tokens = before["tokens"]
            if train.start_optimizer:
                progress.updates = before["updates"]
                progress.updates_before = behind - before["updates"]
            self.restore_position(state, states)

    def restore_position(self, state: dict[str, Any], states: Mapping[str, Stateful]) -> None:
        """The states that go by the step: a position means something in the same data only, so
        these are compared."""
        for name in POSITION:
            if name not in states:
                continue
            if name not in state:
                raise CheckpointError(
                    f"train.start_step: {self.saved.folder} has no state {name!r}, which this run"
                    " needs; set train.start_step=false to begin at step 0"
                )
            saved = state[name]
            if name == "data":
                # A branch is there to read other text from here on, in the same order.
                own = states[name].state_dict().get("interventions")
                saved = {**saved, "interventions": own}
            states[name].load_state_dict(saved)

    def record(self) -> StartRecord:
        """What the checkpoints of the run say about its start. Reads every file of the start for
        its hash."""
        adapts = self.config.adapter.kind != "none"
        return StartRecord(
            base=self.saved if adapts else None,
            facts={
                "path": str(self.config.model.start),
                "folder": str(self.saved.folder.absolute()),
                "step": self.saved.step,
                "sha256": self.saved.hashes(),
                "drawn": self.drawn,
                "optimizer": self.config.train.start_optimizer,
                "continued": self.config.train.start_step,
                # By value, for a base that is exported or moved; it takes a pass over the weights.
                **({"weights": weights_hash(self.saved)} if adapts else {}),
            },
        )

    def notes(self, record: StartRecord, tokenizer: str | None) -> list[str]:
        """Lines of the start table: what was read, and what differs without being an error.

        `tokenizer` is the text of the run's own tokenizer.json.
        """
        name, digest = next(iter(record.facts["sha256"].items()))
        new_head = gets_score_head(self.config.model, self.saved)
        read = len([name for name in self.saved.tensors if not (new_head and name == OUTPUT)])
        notes = [f"start weights: {read} tensors of {self.saved.folder}, {name} {digest[:12]}"]
        if new_head:
            notes.append(
                "start weights: a language model's; its output matrix is left out and the score"
                " head is drawn"
            )
        if drawn := [name for name in self.drawn if not (new_head and name == SCORE)]:
            notes.append(f"start weights: {shown(drawn)} drawn (model.start_missing)")
        if self.rows != self.config.model.padded_vocab_size:
            notes.append(
                f"start weights: {self.rows} of {self.config.model.padded_vocab_size} rows of the"
                " vocabulary are the start's, the others are drawn"
            )
        notes += [
            f"model.{name} is {there!r} in the start and {here!r} here"
            for name, there, here in self.other_arithmetic()
        ]
        theirs = self.saved.tokenizer
        if theirs is not None and tokenizer is not None and theirs.text != tokenizer:
            notes.append(
                f"the tokenizer of model.start is not data.tokenizer {self.config.data.tokenizer}:"
                " the same ids may stand for other text"
            )
        return notes

    def other_arithmetic(self) -> list[tuple[str, Any, Any]]:
        """(field, value there, value here) of what changes the numbers a little and no weight."""
        there = self.saved.config
        here = self.config.model
        return [
            (name, getattr(there, name), getattr(here, name))
            for name in sorted(here.ARITHMETIC)
            if getattr(there, name, None) != getattr(here, name, None)
        ]


def recorded(
    start: StartWeights | None, world: World, tokenizer: str | None
) -> tuple[StartRecord, list[str]]:
    """The record of a fresh run's start, and the lines about it; on the leading rank.

    `tokenizer` is the text of the run's own tokenizer.json.
    """
    # Rank 0 alone writes state.json, and hashing reads every file of the start.
    if start is None or not world.leads:
        return StartRecord(), []
    record = start.record()
    return record, start.notes(record, tokenizer)


class VocabularyRows:
    """A matrix whose first rows are stored and whose other rows are drawn."""

    def __init__(self, stored: StoredTensor, copied: int, draw: Callable[[], Tensor]) -> None:
        self.stored = stored
        self.copied = copied
        self.draw = draw

    def __getitem__(self, part: tuple[slice, ...], /) -> Tensor:
        rows, *columns = part
        if rows.stop <= self.copied:
            return self.stored[part]
        # Drawn whole, as every parameter is, and only on ranks that hold such rows.
        out = self.draw()[part].clone()
        count = self.copied - rows.start
        if count > 0:
            out[:count] = self.stored[(slice(rows.start, self.copied), *columns)]
        return out


def open_start(config: RunConfig, world: World, *, again: bool = False) -> StartWeights | None:
    """The start of a fresh run; None where weights are drawn, or come from the run's own
    checkpoint. `again` opens it for a resumed run, too, which still needs the weights as they were.

    Raises  ConfigError if its model is another one; CheckpointError if weights are missing, left
            over or damaged.
    """
    path = config.model.start
    if path is None:
        return None
    resumes = world.agree(len(complete_steps(Path(config.output) / "checkpoints")))
    # The checkpoints of an adapter lack the base, which a resume reads again.
    if resumes and config.adapter.kind == "none" and not again:
        return None
    saved = open_on_all_ranks(path, world)
    if saved.prompt is not None:
        raise ConfigError(
            f"model.start {path} is a soft prompt over another model, which cannot become weights;"
            " start from its base"
        )
    require_state(config, saved)
    require_same_model(config.model, saved)
    rows = rows_to_copy(config.model, saved)
    drawn = compare_weights(config.model, saved)
    return StartWeights(config, saved, rows, drawn)


def open_on_all_ranks(path: str, world: World) -> SavedModel:
    """The same model on every rank, checked on one.

    Rank 0 compares the hashes of all files, which takes a pass over them, and chooses the step: of
    a run that is still being trained, another rank could already see a newer one.
    """
    # Missing weights are judged below, by our names and with the way out.
    lenient = ("*",)
    saved = open_model(path, optional=lenient) if world.leads else None
    step = world.agree(NO_STEP if saved is None or saved.step is None else saved.step)
    if saved is not None:
        return saved
    return open_model(path, step=None if step == NO_STEP else step, check=False, optional=lenient)


def require_state(config: RunConfig, saved: SavedModel) -> None:
    """Refuse to continue from weights that come without the state of a run.

    Raises  ConfigError.
    """
    train = config.train
    wanted = [f"train.{name}" for name in ("start_optimizer", "start_step") if getattr(train, name)]
    # An imported model is a checkpoint, too, without the state of a run.
    has_state = saved.is_checkpoint and "progress" in read_state(saved.folder)
    if wanted and not has_state:
        raise ConfigError(
            f"{' and '.join(wanted)}: {saved.folder} holds weights only, not a checkpoint of a"
            f" Castalia run; set {' '.join(f'{name}=false' for name in wanted)} to start from the"
            " weights alone"
        )
    if train.start_step and saved.step is not None and saved.step >= train.steps:
        raise ConfigError(
            f"train.start_step continues at step {saved.step} of {saved.folder}, but train.steps is"
            f" {train.steps}; raise train.steps, or set train.start_step=false to count from 0"
        )


def require_same_model(model: ModelConfig, saved: SavedModel) -> None:
    """Refuse a start whose weights belong to a model of another shape.

    Raises  ConfigError naming every key that differs, with the start's value.
    """
    here = model.weights_shape()
    there = saved.config.weights_shape()
    if gets_score_head(model, saved):
        there |= {key: here[key] for key in HEAD_KEYS}
    keys = [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
    if not keys:
        return
    differences = "; ".join(
        f"model.{key} is {there.get(key)!r} there, {here.get(key)!r} here" for key in keys
    )
    settings = " ".join(f"model.{key}={there[key]}" for key in keys if key in there)
    raise ConfigError(
        f"model.start {saved.folder} is another model: {differences}; to train that one, set"
        f" {settings}"
    )


def gets_score_head(model: ModelConfig, saved: SavedModel) -> bool:
    """Whether a reward model starts from a language model: its score head is drawn, and the matrix
    of the vocabulary is left behind."""
    return model.head == "score" and saved.config.head == "vocab"


def rows_to_copy(model: ModelConfig, saved: SavedModel) -> int:
    """Rows of the vocabulary's matrices that are taken from the start.

    Rows of padding belong to no id, so their number may differ freely. All rows are copied where
    both have as many.
    Raises  ConfigError if the vocabularies differ and model.start_vocab does not say what to do.
    """
    there = saved.config
    if same_vocabulary(model, saved):
        if model.padded_vocab_size == there.padded_vocab_size:
            return model.padded_vocab_size
        return min(model.vocab_size, there.padded_vocab_size)
    way = "pad" if model.vocab_size > there.vocab_size else "cut"
    if model.start_vocab != way:
        meaning = {"pad": "draws the rows of new ids", "cut": "drops the rows beyond"}[way]
        raise ConfigError(
            f"model.start {saved.folder} has {there.vocab_size} ids, this model has"
            f" {model.vocab_size}: model.start_vocab={way} {meaning}; or set"
            f" model.vocab_size={there.vocab_size}"
        )
    return min(model.vocab_size, there.vocab_size)


def same_vocabulary(model: ModelConfig, saved: SavedModel) -> bool:
    """Whether both models have the same number of ids.

    A Hugging Face folder without a tokenizer tells the rows alone, so there the number of ids that
    pads to them agrees.
    """
    there = saved.config
    if saved.is_checkpoint or saved.tokenizer is not None:
        return model.vocab_size == there.vocab_size
    rows = there.padded_vocab_size
    # 128 is GPT-NeoX's default of make_vocab_size_divisible_by: 50277 ids pad to Pythia's 50304
    # rows.
    return rows in (model.vocab_size, model.padded_vocab_size, -(-model.vocab_size // 128) * 128)


def compare_weights(model: ModelConfig, saved: SavedModel) -> list[str]:
    """Names of the weights that the start lacks and model.start_missing lets the run draw.

    Raises  CheckpointError naming the weights that are missing, left over or of another shape.
    """
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in Decoder(model).named_parameters()}
    missing = [name for name in shapes if name not in saved.tensors]
    may_lack = list(model.start_missing)
    may_have: list[str] = []
    if gets_score_head(model, saved):
        may_lack.append(SCORE)
        may_have.append(OUTPUT)
    refused = [name for name in missing if not matches(name, may_lack)]
    problems = []
    if refused:
        patterns = ",".join(refused)
        problems.append(
            f"lacks {shown(refused)}; to draw them, set model.start_missing=[{patterns}]"
        )
    if left_over := [name for name in saved.tensors if name not in (*shapes, *may_have)]:
        problems.append(
            f"also has {shown(left_over)}, which this model lacks; check the model section of the"
            " config"
        )
    problems += other_shapes(shapes, saved)
    if problems:
        raise CheckpointError(f"model.start {saved.folder} {'; it '.join(problems)}")
    return missing


def other_shapes(shapes: Mapping[str, tuple[int, ...]], saved: SavedModel) -> list[str]:
    """Weights whose shape differs in more than the rows of the vocabulary."""
    out = []
    for name, here in shapes.items():
        if name not in saved.tensors:
            continue
        there = saved.tensors.stored(name).shape
        first = 1 if name in VOCABULARY else 0
        if len(there) != len(here) or there[first:] != here[first:]:
            out.append(f"has {name} in shape {list(there)}, this model in {list(here)}")
    return out
