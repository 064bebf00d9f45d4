"""`KVCache`: keys and values of the tokens that a model has read, for generation.

Slot j of a row holds the token at position j of that row, always. So a query at position p may see exactly the slots
j <= p, and rows of different lengths need no other mask: padding on the right of a short prompt sits in slots that the
row's next tokens overwrite before anyone looks at them.

    cache = KVCache(config, batch=2, max_length=512)
    hidden = model(prompts, cache=cache)          # (2, T), right-padded
    cache.rewind(lengths)                         # (2,) real tokens of each prompt; not needed when all are T
    hidden = model(next_tokens, cache=cache)      # (2, 1), each row continues at its own length
"""

import torch
from torch import Tensor

from castalia.models.config import ModelConfig


class LayerCache:
    """One layer's slots: k and v (B, H, max_length, head_dim), and where the running forward pass writes."""

    def __init__(
        self,
        owner: "KVCache",
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.owner = owner
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write T new keys and values (B, H, T, head_dim); return all slots that some row may see, new included."""
        owner, T = self.owner, k.shape[2]
        end = owner.longest + T
        if owner.ragged:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            slots = owner.positions(T)
            self.k[rows, :, slots] = k.transpose(1, 2).to(self.k.dtype)
            self.v[rows, :, slots] = v.transpose(1, 2).to(self.v.dtype)
        else:
            self.k[:, :, owner.longest : end] = k
            self.v[:, :, owner.longest : end] = v
        return self.k[:, :, :end], self.v[:, :, :end]


class KVCache:
    """Preallocated keys and values of all layers for `batch` rows of at most `max_length` tokens.

    `lengths` (B,) int64 is the number of tokens in each row, `longest` the largest of them, `ragged` whether they
    differ. Bytes: 2 * num_layers * batch * hidden_size * max_length * size of dtype, which must be the dtype of the
    model's activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.max_length = max_length
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.longest = 0
        self.ragged = False
        shape = (batch, config.num_attention_heads, max_length, config.head_dim)
        self.layers = [LayerCache(self, shape, dtype, device) for _ in range(config.num_layers)]

    def positions(self, T: int) -> Tensor:
        """Positions of the next T tokens: (B, T) int64, or (1, T) when all rows are equally long."""
        steps = torch.arange(T, device=self.lengths.device)
        return self.lengths[:, None] + steps if self.ragged else steps[None] + self.longest

    def mask(self, T: int) -> Tensor | None:
        """What the next T tokens may see, bool (1 or B, 1, T, longest + T), or None where causal attention says it all.

        None when one token follows rows of equal length, and when the cache is empty.
        """
        if self.longest == 0 or (T == 1 and not self.ragged):
            return None
        slots = torch.arange(self.longest + T, device=self.lengths.device)
        return (slots <= self.positions(T)[..., None])[:, None]

    def require_room(self, T: int) -> None:
        """Raises  ValueError if T more tokens do not fit."""
        if self.longest + T > self.max_length:
            raise ValueError(
                f"the KV cache holds {self.max_length} tokens a row; {self.longest} are there and {T} more do not fit"
            )

    def advance(self, T: int) -> None:
        """Count T tokens more in each row. Decoder.forward calls this once all layers have appended."""
        self.lengths += T
        self.longest += T

    def rewind(self, lengths: Tensor) -> None:
        """Keep the first lengths[b] tokens of row b, (B,) int64, and forget the rest.

        Raises  ValueError if a length is negative or beyond what the row has.
        """
        if bool(((lengths < 0) | (lengths.to(self.lengths.device) > self.lengths)).any()):
            raise ValueError(
                f"cannot rewind rows of {self.lengths.tolist()} tokens to {lengths.tolist()}"
            )
        self.lengths = lengths.to(self.lengths)
        self.longest = int(lengths.max())
        self.ragged = bool((lengths != lengths[0]).any())
