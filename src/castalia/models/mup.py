"""`MupConfig`: the section of the maximal update parametrization, μP. Needs no torch.

Under μP the best learning rate of a narrow model is that of a wide one. The model's width counts as
a multiple of `base_width`, at which everything is as without μP.
Source  Yang et al. 2022, arXiv:2203.03466, table 8.
"""

from pydantic import PositiveFloat, PositiveInt

from castalia.config.base import Config


class MupConfig(Config):
    """Factors, start values and learning rates by width: maximal update parametrization.

    With m = hidden_size / base_width: matrices between two widths start with a variance of 1 / m
    times that of the base, and the logits are divided by m. Under Adam and its kin the learning
    rate of those matrices is divided by m; under SGD that of all other parameters is multiplied
    with it. Scores of attention are divided by the width of a head, not by its root. The weight
    decay of a step, rate times decay, is the same at every width.
    Source  Yang et al. 2022, arXiv:2203.03466, table 8 and appendix F.4.
    """

    base_width: PositiveInt = 256
    """The hidden_size at which μP changes nothing; all widths of a model grow with hidden_size."""
    base_head_dim: PositiveInt = 64
    """Width of a head at which the scores are as without μP."""
    init_scale: PositiveFloat = 1.0
    """Factor of all start values that are drawn."""
    attention_mult: PositiveFloat = 1.0
    """Factor of the attention's scores."""
    output_mult: PositiveFloat = 1.0
    """Factor of the logits."""
    embedding_mult: PositiveFloat = 1.0
    """Factor of the embedding."""
    rp_embedding_mult: PositiveFloat = 1.0
    """Factor of the biases of pos_emb=rpe."""
    zero_readout: bool = False
    """Start with a head of zeros, so that the first logits are those of no width."""
