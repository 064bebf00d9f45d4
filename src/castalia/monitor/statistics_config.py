"""Which statistics of the training a run measures, and how often."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from castalia.config.base import Config

Every = PositiveInt | None


class StatisticsConfig(Config):
    """Statistics of the steps whose number is a multiple of `*_every`; null measures nothing.

    None of them changes a weight. castalia.telemetry reads these fields.
    """

    norm_groups: Literal["kinds", "layers", "parts"] = "layers"
    """What norms and statistics of weights are taken of: kinds, all embeddings, attentions, MLPs,
    norms and heads of the model; layers; or parts, the attention, MLP and norms of each layer."""
    gradient_norms_every: Every = None
    """Steps between L2 norms of the gradient, before clipping, by group."""
    weight_norms_every: Every = None
    """Steps between L2 norms of the weights after the update, by group."""
    update_norms_every: Every = None
    """Steps between L2 norms of the update, by group; takes a copy of the weights during it."""
    state_norms_every: Every = None
    """Steps between L2 norms of each state of the optimizer, by group."""
    zero_gradients_every: Every = None
    """Steps between shares of gradient numbers that are exactly 0, by group."""
    weight_statistics_every: Every = None
    """Steps between rms, largest magnitude and share of zeros of the weights, by group."""
    activations_every: Every = None
    """Steps between rms, largest magnitude and share of zeros of the activations of each layer."""
    attention_logits_every: Every = None
    """Steps between maxima of the attention logits of each layer."""
    noise_scale_every: Every = None
    """Steps between estimates of the gradient noise scale."""
    noise_scale_decay: float = Field(0.9, ge=0, lt=1)
    """Decay of its averages, for each estimate."""
    times_every: Every = None
    """Steps between times by part of a step: data, forward, backward, collectives, update."""
    collectives_every: Every = None
    """Steps between calls, numbers and times of the collectives of the passes, by kind; such a step
    runs in torch's profiler."""
    peak_tflops: PositiveFloat | None = None
    """Peak TFLOP/s of one device, for the MFU; null is that of a known GPU, and no MFU on
    others."""
