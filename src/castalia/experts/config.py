"""The section `model.moe`. Needs no torch."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from castalia.config.base import Config
from castalia.config.changes import AT_RESUME


class MoeConfig(Config):
    """MLPs of which a router chooses a few for each token, in place of one."""

    experts: Annotated[int, Field(ge=2)]
    """MLPs of a layer."""
    top_k: PositiveInt = 1
    """Experts that each token uses."""
    interval: PositiveInt = 1
    """Layers from one with experts to the next, from the first on; the others have one MLP."""
    expert_size: PositiveInt | None = None
    """Width inside an expert; null means that of the MLP."""
    bias: bool = False
    """Biases in the experts."""
    router: Literal["topk", "sinkhorn"] = "topk"
    """topk takes the experts of the greatest scores. sinkhorn makes the assignment balanced before,
    in training; its choice has no gradient, the weights have."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """What makes weights of the router's outputs."""
    normalize: bool = False
    """Divide the weights of the chosen experts by their sum (Mixtral)."""
    scale: PositiveFloat = 1.0
    """Factor of the weights."""
    bias_rate: NonNegativeFloat = 0.0
    """Above 0 a bias of each expert, which decides the choice and not the weights, moves by so much
    after each step against the load (loss-free balancing). Source  Wang et al. 2024,
    arXiv:2408.15664."""
    balance_loss: NonNegativeFloat = 0.01
    """Coefficient of the load-balancing loss. Source  Fedus et al. 2021, arXiv:2101.03961,
    equation 4."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of the squared log of the router's partition function. Source  Zoph et al. 2022,
    arXiv:2202.08906, equation 5."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """In training the router's inputs are multiplied with draws from 1 - jitter to 1 + jitter."""
    group: Literal["row", "pass"] = "row"
    """Tokens that are balanced together, by losses, capacities and Sinkhorn: row, those of a row,
    which is the same on any layout; pass, all of a rank's micro-batch, as in GPT-NeoX and
    DeepSpeed."""
    capacity_factor: PositiveFloat | None = None
    """Factor of an equal share: an expert takes at most so many tokens in training, and tokens
    beyond them are dropped. null drops nothing. With top_k 1 the tokens that stay are drawn, with
    2 the second expert is drawn by its score and the first tokens stay, with more the greatest
    scores, as in DeepSpeed."""
    eval_capacity_factor: PositiveFloat | None = None
    """Factor of an equal share without gradients, and without draws; null drops nothing. What a
    token gets then depends on later ones of its row."""
    min_capacity: NonNegativeInt = 4
    """Tokens that an expert takes in any case."""
    shared_size: NonNegativeInt = 0
    """Width of an MLP that all tokens use beside the experts; 0 is none."""
    shared_gate: bool = False
    """Multiply the output of that MLP with a sigmoid of the token (Qwen 2 MoE)."""
    residual: bool = False
    """Mix the experts with one MLP for all tokens, by a softmax over two weights of the token
    (Residual MoE). Source  Rajbhandari et al. 2022, arXiv:2201.05596."""
    split_over_tp: Annotated[bool, AT_RESUME] = False
    """Split each expert over parallel.tp; false lets the ranks of tp work on different tokens with
    whole experts."""

    @property
    def samples_second(self) -> bool:
        """Whether training draws the second of two experts, where a capacity drops tokens."""
        return self.top_k == 2 and self.router == "topk" and self.bias_rate == 0

    @property
    def chooses_by_chance(self) -> bool:
        """Whether training draws which expert a token uses, or which tokens stay."""
        if self.capacity_factor is None:
            return False
        return self.top_k == 1 or self.samples_second

    @property
    def draws(self) -> bool:
        """Whether training draws anything for the routing."""
        return self.jitter > 0 or self.chooses_by_chance
