"""Rotary position embeddings and the ways checkpoints stretch them over longer contexts.

Component pair i of R rotated components turns by position * f_i, with f_i = theta^(-2i / R) (arXiv 2104.09864), and

    linear      f_i / factor                                                           arXiv 2306.15595
    llama3      wavelengths above original / low_freq_factor tokens are stretched by factor, those below
                original / high_freq_factor are not, in between by interpolation        Llama 3.1
    yarn        pairs that turn less than beta_slow times in the original context are stretched by factor, those
                that turn more than beta_fast times are not, in between a linear ramp   arXiv 2309.00071
    longrope    f_i / short_factor_i in sequences up to the original context, f_i / long_factor_i in longer ones
                                                                                       arXiv 2402.13753

yarn and longrope also multiply rotated queries and keys by an attention factor.

Where tokens have three positions (M-RoPE, arXiv 2409.12191) each pair turns by one of them. In blocks, the first pairs
turn by time, then some by height, the rest by width. Interleaved, pair i turns by height where i mod 3 is 1, by width
where it is 2, as long as i is below 3 times that axis's section, and by time elsewhere.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from retention_jax.config import ModelConfig, RopeScaling


class Rotation(NamedTuple):
    """Cosine and sine of each rotated pair's angle, times the attention factor."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


def rotation(
    positions: Int[Array, "B T"] | Int[Array, "3 B T"], length: Int[Array, "B T_or_1"], cfg: ModelConfig
) -> Rotation:
    """How far to turn the tokens at `positions` of sequences of `length` tokens; only longrope looks at lengths.

    Positions are one number a token, or three: time, height, width.
    """
    scaling = cfg.rope_scaling
    plain = np.float32(cfg.rope_theta) ** (-np.arange(0, cfg.rotary_size, 2, dtype=np.float32) / cfg.rotary_size)
    if scaling is not None and scaling.kind == "longrope":
        short, long = (plain / np.asarray(factor, np.float32) for factor in (scaling.short_factor, scaling.long_factor))
        is_long = (length > scaling.original_length)[..., None]
        frequency = jnp.where(is_long, long[None, None], short[None, None])
    else:
        frequency = jnp.asarray(plain if scaling is None else _stretched(plain, cfg.rope_theta, scaling))[None, None]
    if positions.ndim == 3:
        of_pair = jnp.moveaxis(positions[_axis_of_pairs(cfg)], 0, -1)
    else:
        of_pair = positions[..., None]
    angles = of_pair.astype(jnp.float32) * frequency
    factor = 1.0 if scaling is None else scaling.attention_factor
    return Rotation(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def _axis_of_pairs(cfg: ModelConfig) -> np.ndarray:
    """Which of a token's three positions turns each pair."""
    if cfg.mrope is None:
        raise ValueError("the model has no M-RoPE, so its tokens have one position each")
    time, height, width = cfg.mrope.sections
    if not cfg.mrope.interleaved:
        return np.repeat(np.arange(3), (time, height, width))
    pair = np.arange(time + height + width)
    axis = pair % 3
    return np.where((axis > 0) & (pair < 3 * np.array([0, height, width])[axis]), axis, 0)


def _stretched(plain: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Frequencies in radians per token of the kinds that do not depend on a sequence's length."""
    slow = plain / np.float32(scaling.factor)
    match scaling.kind:
        case "llama3":
            turns = scaling.original_length * plain / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            share = np.clip((turns - low) / (high - low), 0, 1)  # of the unstretched frequency
        case "yarn":
            half = len(plain)

            def pair_that_turns(times: float) -> float:
                return half * math.log(scaling.original_length / (times * 2 * math.pi)) / math.log(theta)

            first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
            if scaling.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, 2 * half - 1)
            ramp = (np.arange(half) - first) / (last - first if last != first else 0.001)
            share = 1 - np.clip(ramp, 0, 1)
        case _:
            share = np.float32(0)
    return (slow * (1 - share) + plain * share).astype(np.float32)


def apply_rope(x: Float[Array, "B T heads H"], turn: Rotation) -> Float[Array, "B T heads H"]:
    """Rotates the pair (component i, component i + R/2) by angle i, the layout of Hugging Face checkpoints.

    Components behind the R rotated ones stay as they are.
    """
    cos, sin = turn.cos[:, :, None], turn.sin[:, :, None]
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)
