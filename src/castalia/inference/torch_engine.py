"""The PyTorch model itself as an engine: every family of Castalia, on any device and dtype of
torch."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from castalia.adapters.prompt_vectors import PromptVectors
from castalia.checkpoint.hf import DTYPES
from castalia.core.errors import CheckpointError, ConfigError
from castalia.formats.adapted import PROMPT
from castalia.formats.saved_model import SavedModel
from castalia.inference.engine import HEAD_ROWS, Engine, ScoringModel, Slots, logprobs_of
from castalia.inference.torch_slots import device_of, model_slots
from castalia.models import Decoder

NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
