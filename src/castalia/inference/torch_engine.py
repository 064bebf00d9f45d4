"""The PyTorch model itself as an engine: every family of Castalia, on any device and dtype of
torch."""

from collections.abc import Iterator, Sequence
from copy import deepcopy

import torch
from torch import Tensor

from castalia.adapters.prompt_vectors import PromptVectors
from castalia.checkpoint.hf import DTYPES
from castalia.core.errors import CheckpointError, ConfigError
from castalia.formats.adapted import PROMPT
from castalia.formats.saved_model import SavedModel
from castalia.inference.engine import HEAD_ROWS, Engine, ScoringModel, Slots, logprobs_of
from castalia.models import Decoder, ModelState

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TorchSlots(Slots):
    """Slots that are the rows of one state, for models whose state can be rewound.

    Every row takes part in every step, because a batch of fixed size costs less than gathering the
    rows in use. A row without a token in this step reads zeros and is rewound past them.
    """

    def __init__(self, model: Decoder, count: int, length: int, dtype: torch.dtype) -> None:
        super().__init__(count, length)
        self.model = model
        self.dtype = dtype
        self.device = device_of(model)
        # One position more than asked for: a full row that idles has to put its zero somewhere.
        self.state = model.new_state(count, length + 1, dtype, self.device)

    @torch.inference_mode()
    def feed(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Slots`."""
        longest = max(len(ids) for ids in tokens)
        if (
            longest > 1
            and len(slots) < self.count
            and not any(self.lengths[slot] for slot in slots)
        ):
            return self.read_apart(slots, tokens)
        if longest > 1 and self.state.longest + longest > self.state.max_length:
            # Padding would not fit behind the longest row, so the tokens are read one by one.
            return torch.cat(
                [self.feed_all(slot, ids)[-1:] for slot, ids in zip(slots, tokens, strict=True)]
            )
        return self.read(slots, tokens)

    def read(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Tokens of any number for some slots in one pass over all rows."""
        rows: list[Sequence[int]] = [[] for _ in range(self.count)]
        for slot, ids in zip(slots, tokens, strict=True):
            rows[slot] = ids
            self.lengths[slot] += len(ids)
        batch = padded(rows).to(self.device)
        hidden = self.model(batch, state=self.state)
        # Without padding the state is right as it is; a rewind would wait for the device.
        if any(len(ids) < batch.shape[1] for ids in rows):
            self.rewind()
        return self.head_at(hidden, slots, tokens)

    def read_apart(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Prompts into empty slots, in a state of their own: the other rows would read zeros as
        long as the prompts."""
        batch = padded(prompts).to(self.device)
        state = self.model.new_state(len(batch), batch.shape[1], self.dtype, self.device)
        hidden = self.model(batch, state=state)
        self.state.write_rows(slots, state)
        for slot, ids in zip(slots, prompts, strict=True):
            self.lengths[slot] = len(ids)
        self.rewind()
        return self.head_at(hidden, range(len(prompts)), prompts)

    def head_at(
        self, hidden: Tensor, rows: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> Tensor:
        """Logits after the last token of each of some rows of hidden states (B, T, C)."""
        places = torch.tensor(list(rows), device=self.device)
        ends = torch.tensor([len(ids) - 1 for ids in tokens], device=self.device)
        return self.model.head(hidden[places, ends]).float()

    @torch.inference_mode()
    def feed_all(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """See `Slots`; in one pass if there is one slot."""
        if self.count > 1:
            return super().feed_all(slot, tokens)
        hidden = self.model(padded([tokens]).to(self.device), state=self.state)[0]
        self.lengths[slot] += len(tokens)
        return self.model.head(hidden).float()

    def rewind(self) -> None:
        """Bring the state to the lengths of the slots, which forgets padding and the zeros of idle
        rows."""
        lengths = torch.tensor(self.lengths, device=self.device)
        # Rows that were copied in are longer than the state has counted.
        self.state.lengths = torch.maximum(self.state.lengths, lengths)
        self.state.rewind(lengths)

    def copy(self, origin: int, target: int, tokens: int) -> None:
        """See `Slots`."""
        if origin != target:
            self.state.copy_row(origin, target, tokens)
        self.lengths[target] = tokens
        self.rewind()


class UnpaddedSlots(Slots):
    """Slots that are the rows of one state which cannot be rewound.

    Such a state can neither forget padding nor the zero of an idle row: a pass has as many tokens
    of each of its rows, and rows that have none left are not in it.
    """

    rewinds = False

    def __init__(self, model: Decoder, count: int, length: int, dtype: torch.dtype) -> None:
        super().__init__(count, length)
        self.model = model
        self.device = device_of(model)
        self.state = model.new_state(count, length, dtype, self.device)
        self.empty = model.new_state(1, 1, dtype, self.device)

    @torch.inference_mode()
    def feed(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Slots`."""
        ends: dict[int, Tensor] = {}
        start = 0
        # What all rows have is read together, then what all but the shortest have, and so on.
        for end in sorted({len(ids) for ids in tokens}):
            places = [i for i, ids in enumerate(tokens) if len(ids) > start]
            parts = [tokens[i][start:end] for i in places]
            hidden = self.read([slots[i] for i in places], parts)[:, -1]
            ends |= {i: hidden[row] for row, i in enumerate(places) if len(tokens[i]) == end}
            start = end
        return self.model.head(torch.stack([ends[i] for i in range(len(tokens))])).float()

    @torch.inference_mode()
    def feed_all(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """See `Slots`; one pass."""
        return self.model.head(self.read([slot], [tokens])[0]).float()

    def read(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states (B, T, C) of T more tokens of each of some slots, in one pass."""
        batch = torch.tensor([list(ids) for ids in tokens], device=self.device)
        T = batch.shape[1]
        hidden: Tensor
        whole = list(slots) == list(range(self.count))
        if whole:
            hidden = self.model(batch, state=self.state)
        else:
            rows = self.state.take_rows(slots, [self.lengths[slot] for slot in slots])
            hidden = self.model(batch, state=rows)
            self.state.write_rows(slots, rows)
        for slot in slots:
            self.lengths[slot] += T
        if not whole:
            self.state.count(self.lengths)
        return hidden

    @torch.inference_mode()
    def copy(self, origin: int, target: int, tokens: int) -> None:
        """See `Slots`.

        Raises  ValueError for a part of a sequence.
        """
        if tokens == 0:
            self.state.write_rows([target], self.empty)
        else:
            require_whole(tokens, self.lengths[origin])
            self.state.copy_row(origin, target, tokens)
        self.lengths[target] = tokens
        self.state.count(self.lengths)


def require_whole(tokens: int, length: int) -> None:
    """Raises  ValueError for a part of a sequence, whose state does not exist."""
    if tokens != length:
        raise ValueError(
            f"cannot cut {length} tokens to {tokens}: the state of the model cannot be rewound"
        )


class SeparateSlots(Slots):
    """One state for each slot, for models whose state can neither be rewound nor has rows."""

    rewinds = False

    def __init__(self, model: Decoder, count: int, length: int, dtype: torch.dtype) -> None:
        super().__init__(count, length)
        self.model = model
        self.length = length
        self.dtype = dtype
        self.device = device_of(model)
        self.states = [self.new_state() for _ in range(count)]

    def new_state(self) -> ModelState:
        """An empty state of one row."""
        return self.model.new_state(1, self.length, self.dtype, self.device)

    def feed(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Slots`."""
        parts = [self.hidden(slot, ids)[-1:] for slot, ids in zip(slots, tokens, strict=True)]
        return self.head(torch.cat(parts))

    def feed_all(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """See `Slots`; one pass."""
        return self.head(self.hidden(slot, tokens))

    @torch.inference_mode()
    def hidden(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """Hidden states (T, C) of T more tokens of a slot."""
        hidden: Tensor = self.model(padded([tokens]).to(self.device), state=self.states[slot])[0]
        self.lengths[slot] += len(tokens)
        return hidden

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states."""
        return self.model.head(hidden).float()

    @torch.inference_mode()
    def copy(self, origin: int, target: int, tokens: int) -> None:
        """See `Slots`.

        Raises  ValueError for a part of a sequence.
        """
        if tokens == 0:
            self.states[target] = self.new_state()
        else:
            require_whole(tokens, self.lengths[origin])
            if origin != target:
                # A state of any family: only its own copy is sure to hold all of it.
                self.states[target] = deepcopy(self.states[origin])
        self.lengths[target] = tokens


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of ids as (B, T) int64, with zeros on the right."""
    batch = torch.zeros(len(rows), max(len(ids) for ids in rows), dtype=torch.int64)
    for row, ids in zip(batch, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return batch


def model_slots(model: Decoder, count: int, length: int, dtype: torch.dtype) -> Slots:
    """Slots for a model whose activations have `dtype`, of the kind that its state allows."""
    # Asked of a state, not of the family: one layer of another kind decides for the whole model.
    state = model.new_state(1, 1, dtype, device_of(model))
    if state.rewinds:
        return TorchSlots(model, count, length, dtype)
    kind = UnpaddedSlots if state.has_rows else SeparateSlots
    return kind(model, count, length, dtype)


class TorchEngine(Engine):
    """A decoder in eval mode."""

    name = "torch"
    reads_checkpoints = True
    dtypes = ("fp32", "bf16", "fp16")
    devices = ("cpu", "cuda")
    batching = "continuous"
    scores = "in its dtype"

    def __init__(self, model: Decoder) -> None:
        super().__init__(model.config)
        self.model = model.eval()

    @classmethod
    def from_checkpoint(
        cls, source: SavedModel, dtype: str = "fp32", device: str = "cpu"
    ) -> "TorchEngine":
        """See `Engine`.

        Raises  CheckpointError if the weights do not fit the config; ConfigError for a device that
                does not exist.
        """
        place = choose_device(device)
        # On the meta device no memory is taken for weights that the checkpoint's replace at once.
        with torch.device("meta"):
            model = Decoder(source.config)
        weights = {}
        for name, tensor in source.tensors.items():
            weights[name] = tensor.to(place, DTYPES[dtype])
        if source.prompt is not None:
            with torch.device("meta"):
                model.prompt = PromptVectors(*source.prompt.shape)
            weights[PROMPT] = source.prompt.to(place, DTYPES[dtype])
        try:
            # assign: the tensors themselves become the parameters, without a copy.
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"the weights in {source.folder} do not fit its config: {error}"
            ) from None
        # A graph would keep the activations of every step.
        return cls(model.requires_grad_(False))

    @property
    def device(self) -> torch.device:
        """See `Engine`."""
        return device_of(self.model)

    @property
    def numbers(self) -> str:
        """The dtype of the weights."""
        return NAMES[self.model.embed.weight.dtype]

    def slots(self, count: int, length: int) -> Slots:
        """See `Engine`."""
        return model_slots(self.model, count, length, self.model.head_weight.dtype)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """See `Engine`; one product for all tokens."""
        return self.model.head(hidden_of(self.model, ids)).float()

    def logits_in_parts(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """See `Engine`."""
        return head_in_parts(self.model, hidden_of(self.model, ids))

    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """See `Engine`."""
        return model_logprobs(self.model, ids)

    def scoring_model(self) -> ScoringModel:
        """See `Engine`."""
        # Imported here, because the native engine's modules import this one.
        from castalia.inference.quick import scoring_model

        return scoring_model(self.model)


def device_of(model: Decoder) -> torch.device:
    """Device of a model whose weights are on one."""
    parameter = next(model.parameters(), None)
    # Packed layers have no parameters, nor have norms of some kinds; they lie on the CPU.
    return torch.device("cpu") if parameter is None else parameter.device


@torch.inference_mode()
def hidden_of(model: Decoder, ids: Sequence[int]) -> Tensor:
    """Hidden states (T, C) of T ids."""
    tokens = torch.tensor([list(ids)], device=device_of(model))
    hidden: Tensor = model(tokens)[0]
    return hidden


def head_in_parts(model: Decoder, hidden: Tensor, rows: int = HEAD_ROWS) -> Iterator[Tensor]:
    """Logits (rows, V) float32 of hidden states (T, C), some rows at a time."""
    for part in hidden.split(rows):
        with torch.inference_mode():
            logits = model.head(part).float()
        yield logits


def model_logprobs(model: Decoder, ids: Sequence[int], rows: int = HEAD_ROWS) -> Tensor:
    """Log-probability of each token but the first: T ids -> (T - 1,) float32, in nats.

    The head is not computed for the last token, whose successor is not in the text.
    """
    return logprobs_of(head_in_parts(model, hidden_of(model, ids)[:-1], rows), ids)


def choose_device(name: str) -> torch.device:
    """The device that `name` means.

    Raises  ConfigError if the machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}; choose one of auto, cpu, cuda") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"device {name!r} does not exist: this machine has {count} GPUs; use cpu")
    return device
