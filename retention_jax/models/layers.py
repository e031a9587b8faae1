"""Building blocks of a decoder layer. Nothing here knows about retention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*axes D"], gain: Float[Array, " D"], eps: float) -> Float[Array, "*axes D"]:
    """`x` over its root mean square, times `gain`; in float32, returned in the dtype of `x` (arXiv 1910.07467)."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * gain.reshape((1,) * (x.ndim - 1) + (-1,))


def layer_norm(
    x: Float[Array, "*axes D"], gain: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "*axes D"]:
    """`x` less its mean over its deviation, times `gain`, plus `bias`; in float32, returned in the dtype of `x`."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    wide = (1,) * (x.ndim - 1) + (-1,)
    return (normed * gain.reshape(wide) + bias.reshape(wide)).astype(x.dtype)


def swiglu(
    x: Float[Array, "B T D"],
    gate: Float[Array, "D F"],
    up: Float[Array, "D F"],
    down: Float[Array, "F D"],
    biases: tuple[Float[Array, " F"], Float[Array, " F"], Float[Array, " D"]] | None,
) -> Float[Array, "B T D"]:
    """`(silu(x gate) * (x up)) down`, with the three biases where the model has them (arXiv 2002.05202)."""
    gated, lifted = x @ gate, x @ up
    if biases is not None:
        gated, lifted = gated + biases[0][None, None], lifted + biases[1][None, None]
    out = (jax.nn.silu(gated) * lifted) @ down
    return out if biases is None else out + biases[2][None, None]
