"""The decoder: embedding, the blocks of any family, final norm and output head.

Shapes: B batch, T time, C width, V padded vocabulary.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.core.errors import ConfigError
from castalia.models.block import Block
from castalia.models.config import TransformerConfig
from castalia.models.context import Context, HeadShare, RowShare, VocabShare
from castalia.models.families import family_of
from castalia.models.model_config import ModelConfig
from castalia.models.parts.dropout import EMBEDDING, Draws, drop_hidden
from castalia.models.parts.flex import block_masks
from castalia.models.parts.masks import row_positions
from castalia.models.parts.mixture import make_ledger
from castalia.models.score import scores_of
from castalia.models.stages import LayerSpan, split
from castalia.models.state import ModelState
from castalia.models.tiles import kind_of


class Decoder(nn.Module):
    """Tokens to hidden states, and hidden states to logits.

    The family named in `config` makes the blocks and the final norm; see castalia.models.families.
    `recompute` chooses what the blocks store for the backward; see castalia.models.recompute.
    Parameters are empty until start weights or a checkpoint fill them. Blocks have no buffers, so
    a model that is built on the meta device and then given memory by `to_empty` lacks nothing.

    With a `span` of castalia.models.stages.split the model is one stage of a pipeline. It holds
    the layers of the span, under the names that the whole model has. A stage without the embedding
    reads hidden states, a stage without the norm returns them, both with what the
    family `carries` behind their channels. With tied embeddings the last stage
    has a copy of the embedding for its head.
    With `head: score` a Linear of one output, `score`, replaces the head over the vocabulary.
    Raises  ConfigError if a block has a buffer, or a parameter without a declared start value.
    """

    tp_plan = {
        "embed": "vocab",
        "prompt": "whole",
        "positions": "whole",
        "position_bias": "whole",
        "norm": "gather",
        "unembed": "head",
        "score": "whole",
    }

    def __init__(self, config: ModelConfig, span: LayerSpan | None = None) -> None:
        super().__init__()
        self.config = config
        self.family = family_of(config)
        self.carries = self.family.carries(config)
        self.span = span or split(config.num_layers, 1)[0]
        # Set by castalia.distributed where ranks share the vocabulary, rows or heads. They lie here
        # and not on the blocks: the context takes them to every block, whatever its family.
        self.vocab_part: VocabShare | None = None
        self.row_share: RowShare | None = None
        self.head_share: tuple[Any, ...] = ()
        # Set by castalia.train, which knows that nothing but documents and windows hides a key.
        self.flex = False
        if self.span.first or (self.span.last and config.tied_head):
            self.embed = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        # Set by castalia.adapters: vectors in place of those of the first tokens of a row.
        self.prompt: nn.Module | None = None
        self.positions = self.family.positions(config) if self.span.first else None
        self.position_bias = self.family.position_bias(config)
        self.layers = nn.ModuleList()
        for place in self.span.layers:
            # Named by its place in the whole model: a checkpoint loads into any number of stages.
            self.layers.add_module(str(place), self.family.block(config, place))
        self.ledger = make_ledger(config, self.layers)
        self.recompute = False
        # Whether oneDNN computes the head's products in fp32; see castalia.products.
        self.onednn = False
        if self.span.last:
            self.norm = self.family.norm(config)
        if self.span.last and config.head == "score":
            self.score = nn.Linear(config.hidden_size, 1, bias=False)
        elif self.span.last and not config.tied_head:
            self.unembed = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.require_starts()

    def require_starts(self) -> None:
        """Check what would otherwise train from garbage.

        Raises  ConfigError if a block has a buffer, or a parameter without a declared start value.
        """
        for name, _ in self.named_parameters():
            self.family.start_of(self.config, name)
        for name, _ in self.named_buffers():
            # `to_empty` would leave it with garbage, and checkpoints hold parameters only. A frozen
            # parameter serves as well: it is sharded and saved, and has no optimizer state.
            raise ConfigError(
                f"model family {self.family.name!r} has a buffer, {name}; make it a parameter with"
                " requires_grad=False, which has a start value and is saved, or compute it in the"
                " pass"
            )

    @property
    def tied(self) -> tuple[str, ...]:
        """Names of parameters that the first and the last stage of a pipeline both hold."""
        if self.config.tied_head and self.span.first != self.span.last:
            return ("embed.weight",)
        return ()

    @property
    def copies(self) -> tuple[str, ...]:
        """Those of `tied` that belong to another stage: the first one counts and saves them."""
        return () if self.span.first else self.tied

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        state: ModelState | None = None,
        draws: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Shapes  tokens (B, T) int64, in a later stage the hidden states (B, T, C) of the one before;
                positions (B, T) int64, the place of each token, default 0..T-1 or, with a state,
                after what the row has; segments (B, T) int64: a token sees only earlier tokens of
                its own segment; draws (B, 2) int64, what dropout is drawn from
                (castalia.models.parts.dropout.row_draws), default no dropout -> (B, T, C).
        With a state the tokens are appended to it; see castalia.models.state for rows of different
        lengths. Under context parallelism T, positions and segments are those of this rank's
        tokens.
        Raises  ValueError if the state is too small, or comes with segments or shared rows.
        """
        T = tokens.shape[1]
        if state is not None:
            self.require_usable(state, segments, T)
        context = self.context(tokens, positions, segments, state)
        if draws is not None:
            context = self.drawing(context, draws)
        if self.span.first:
            x_BTC = self.embedded(tokens, context)
        else:
            x_BTC, carried = self.parted(tokens)
            context = context._replace(carried=carried)
        for i, block in enumerate(self.layers):
            # Everything else in the context is the same for all blocks.
            own = context
            if state is not None:
                own = own._replace(state=state.layers[i])
            if context.draws is not None:
                # By the number in the whole model: stages of a pipeline draw alike.
                own = own._replace(draws=context.draws.at(self.span.layers[i]))
            x_BTC = block(x_BTC, own)
            if block.hands_on:
                x_BTC, carried = self.parted(x_BTC)
                context = context._replace(carried=carried)
        if state is not None:
            # Only now: every block wrote its tokens behind the same length.
            state.advance(T)
        if not self.span.last:
            return self.joined(x_BTC, context.carried)
        normed_BTC: Tensor = self.norm(x_BTC)
        factor = self.config.output_factor
        # On the hidden states: the loss takes the head's weight itself.
        return normed_BTC if factor == 1.0 else normed_BTC * factor

    def parted(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The residual stream and what is carried beside it, of one tensor."""
        if not self.carries:
            return x, None
        x_BTC, carried = x.split((self.config.hidden_size, self.carries), -1)
        return x_BTC, carried

    def joined(self, x_BTC: Tensor, carried: Tensor | None) -> Tensor:
        """One tensor for the next stage of a pipeline."""
        if not self.carries:
            return x_BTC
        if carried is None:
            # The block that hands it on is in a later stage.
            return F.pad(x_BTC, (0, self.carries))
        return torch.cat([x_BTC, carried], -1)

    def embedded(self, tokens: Tensor, context: Context) -> Tensor:
        """The residual stream before the first block, (B, T) int64 -> (B, T, C)."""
        x_BTC: Tensor = self.embed(tokens)
        # On the meta device, where shapes and operations are counted, there is no autocast.
        if not x_BTC.is_meta and torch.is_autocast_enabled(x_BTC.device.type):
            # In fp32 whatever the weights are: many small additions to a bf16 stream get lost.
            x_BTC = x_BTC.float()
        # Under tensor parallelism the embedding gives this rank's part of the tokens.
        T = x_BTC.shape[1]
        first = context.heads.rank * T if tokens.shape[1] > T else 0
        places = context.positions[:, first : first + T]
        if self.prompt is not None:
            x_BTC = self.prompt(x_BTC, places)
        if self.config.embedding_factor != 1.0:
            x_BTC = x_BTC * self.config.embedding_factor
        if self.positions is not None:
            x_BTC = x_BTC + self.positions(places).to(x_BTC.dtype)
        if context.draws is not None:
            # The number of no layer.
            x_BTC = drop_hidden(x_BTC, context.draws.at(-1), EMBEDDING)
        return x_BTC

    def drawing(self, context: Context, draws: Tensor) -> Context:
        """The context with what dropout draws from; see `forward`."""
        config = self.config
        assert isinstance(config, TransformerConfig), "only transformers have rates of dropout"
        places, keys = row_positions(context, None)
        return context._replace(
            draws=Draws(
                low=draws[:, 0],
                high=draws[:, 1],
                tokens=places,
                keys=keys,
                part=(context.heads.rank, context.heads.size),
                head=context.heads.of(config.num_attention_heads).start,
                hidden=config.hidden_dropout,
                attention=config.attention_dropout,
            )
        )

    def require_usable(self, state: ModelState, segments: Tensor | None, T: int) -> None:
        """Raises  ValueError if the state cannot take T more tokens of such rows."""
        if segments is not None:
            raise ValueError("segments pack documents for training; a state reads one row each")
        if self.row_share is not None:
            raise ValueError(
                "a state holds whole rows; load the model without context parallelism to generate"
            )
        state.require_room(T)

    def context(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        segments: Tensor | None,
        state: ModelState | None,
    ) -> Context:
        """What all blocks share in this pass; see `forward` for the arguments."""
        # In a later pipeline stage under tensor parallelism the tokens are hidden states of T / tp
        # positions; the caller then gives all T positions, and rotary tables are made for all.
        T = tokens.shape[1]
        if positions is None and state is not None:
            positions = state.positions(T)
        if positions is None and self.row_share is not None:
            positions = self.row_share.positions(T).to(tokens.device)
        if positions is None:
            positions = torch.arange(T, device=tokens.device)[None]
        context = Context(
            positions=positions,
            segments=segments,
            share=self.row_share,
            heads=HeadShare(*self.head_share),
        )
        # FlexAttention has no backward pass on a CPU, where our own kernel skips hidden blocks.
        if self.flex and segments is not None and segments.is_cuda:
            assert isinstance(self.config, TransformerConfig)
            context = context._replace(block_masks=block_masks(self.config, segments))
        context = self.family.complete(self.config, context, state)
        if self.position_bias is not None:
            context = context._replace(bias=self.position_bias(context, state))
        return context

    def new_state(
        self,
        batch: int,
        length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ModelState:
        """An empty state for `batch` rows of at most `length` tokens.

        dtype   of the activations, by default that of the weights.
        """
        dtype = dtype or self.head_weight.dtype
        device = device or self.head_weight.device
        blocks = cast(Iterable[Block], self.layers)
        layers = [block.new_state(batch, length, dtype, device) for block in blocks]
        return ModelState(layers, batch, length, device)

    @property
    def recompute(self) -> bool | str | int:
        """False, True or "full", "selective", or n for every n-th block."""
        return self._recompute

    @recompute.setter
    def recompute(self, how: bool | str | int) -> None:
        self._recompute = how
        # By the layer's number in the whole model, so that every n-th is the same on any stages.
        for name, block in self.layers.named_children():
            block.recompute = kind_of(how, int(name))  # type: ignore[assignment]

    def head(self, hidden_BTC: Tensor) -> Tensor:
        """Logits (B, T, V) over the padded vocabulary; columns from vocab_size on are padding."""
        # Apart from `forward`: training never makes all logits, the loss takes the weight itself.
        return F.linear(hidden_BTC, self.head_weight)

    @property
    def head_weight(self) -> nn.Parameter:
        """The output matrix (V, C): unembed.weight, or embed.weight when they are tied.

        Raises  ConfigError for a reward model.
        """
        if self.config.head == "score":
            raise ConfigError(
                "model.head=score is a reward model, which scores texts and predicts no tokens:"
                " castalia.load(PATH).scores(texts) scores them; to write text, use a model with"
                " model.head=vocab"
            )
        weight = self.embed.weight if self.config.tied_head else self.unembed.weight
        return cast(nn.Parameter, weight)

    def scores(self, hidden_NC: Tensor) -> Tensor:
        """The score of each hidden state, (N, C) -> (N,) float32.

        Under tensor parallelism every rank computes all scores, and their gradients are this rank's
        addends.
        Raises  ConfigError if the model has no score head.
        """
        if self.config.head != "score":
            raise ConfigError(
                "model.head=vocab is a language model, which has no score head; train a reward"
                " model with the recipe reward, or set model.head=score"
            )
        return scores_of(hidden_NC, self.score.weight, HeadShare(*self.head_share).size)
