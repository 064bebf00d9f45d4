"""Rotary frequencies, plain and scaled for rows longer than those of the first training.

R is the rotary width of a head; theta has a frequency for each pair of dimensions.
"""

import math

import torch
from torch import Tensor

from castalia.models.config import TransformerConfig
from castalia.models.scaling import RopeScaling


def frequencies(
    config: TransformerConfig, length: int | Tensor, device: torch.device
) -> tuple[Tensor, float]:
    """Frequencies float32 (R / 2,), and the factor of cosines and sines.

    length  tokens of the row, which dynamic scaling follows. Of a tensor (1 or B, T) each token
            gets frequencies of its own, (1 or B, 1, T, R / 2).
    """
    scaling = config.rope_scaling
    base = config.rotary_emb_base
    R = config.rotary_dim
    if scaling is None:
        return inverse_frequencies(base, R, device), 1.0
    trained = scaling.original_max_position_embeddings or config.max_position_embeddings
    if scaling.kind == "linear":
        return inverse_frequencies(base, R, device) / scaling.factor, 1.0
    if scaling.kind == "ntk":
        return inverse_frequencies(stretched(base, R, scaling.factor), R, device), 1.0
    if scaling.kind == "dynamic":
        return dynamic(base, R, scaling, trained, torch.as_tensor(length, device=device)), 1.0
    theta = inverse_frequencies(base, R, device)
    if scaling.kind == "llama3":
        return llama3(theta, scaling, trained), 1.0
    return yarn(theta, base, scaling, trained), yarn_factor(scaling)


def inverse_frequencies(base: float, R: int, device: torch.device) -> Tensor:
    """theta_j = base^(-2j/R) for j = 0..R/2-1, float32 (R/2,).

    Source  Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    exponents = torch.arange(0, R, 2, dtype=torch.float32, device=device) / R
    return 1.0 / (base**exponents)


def stretched(base: float, R: int, factor: float) -> float:
    """The base whose lowest frequency is `factor` times lower; the highest stays.

    Source  bloc97 2023, "NTK-aware scaled RoPE".
    """
    return float(base * factor ** (R / (R - 2)))


def dynamic(base: float, R: int, scaling: RopeScaling, trained: int, length: Tensor) -> Tensor:
    """As ntk, with a factor that grows with the length; rows up to the trained length keep theta.

    Shapes  length () -> (R / 2,); length (1 or B, T) -> (1 or B, 1, T, R / 2).
    """
    longest = length.clamp(min=trained).double()
    ratio = scaling.factor * longest / trained - (scaling.factor - 1)
    stretch = (base * ratio ** (R / (R - 2))).float()
    exponents = torch.arange(0, R, 2, dtype=torch.float32, device=length.device) / R
    if stretch.ndim:
        stretch = stretch[:, None, :, None]
    return 1.0 / (stretch**exponents)


def llama3(theta: Tensor, scaling: RopeScaling, trained: int) -> Tensor:
    """Long waves are divided by the factor, short ones kept, those between are blended.

    Source  the model code of Llama 3.1, `apply_scaling`.
    """
    turns = trained * theta / (2 * math.pi)
    low = scaling.low_freq_factor
    share = ((turns - low) / (scaling.high_freq_factor - low)).clamp(0, 1)
    return (1 - share) * theta / scaling.factor + share * theta


def yarn(theta: Tensor, base: float, scaling: RopeScaling, trained: int) -> Tensor:
    """Between two dimensions, found by their turns in the trained length, a linear blend.

    Source  Peng et al. 2023, arXiv:2309.00071, section 3.2; bounds as in its code.
    """
    R = 2 * len(theta)

    def dimension(turns: float) -> float:
        return R * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = dimension(scaling.beta_fast)
    high = dimension(scaling.beta_slow)
    if scaling.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, R - 1)
    # Equal bounds would divide by zero.
    width = high - low or 0.001
    place = torch.arange(len(theta), dtype=torch.float32, device=theta.device)
    scaled = ((place - low) / width).clamp(0, 1)
    return theta / scaling.factor * scaled + theta * (1 - scaled)


def yarn_factor(scaling: RopeScaling) -> float:
    """The factor of cosines and sines, which sharpens attention over long rows."""

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return growth(scaling.mscale) / growth(scaling.mscale_all_dim)
    return growth(1.0)
