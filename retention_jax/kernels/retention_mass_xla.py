"""`reference.retention_mass` in plain jnp, a block of tokens at a time: O(T) memory, forward and backward.

    S_t = sum_{i <= t, same document} e^((t - i) log_beta_i)
    dlog_beta_i = sum_t dS_t (t - i) e^((t - i) log_beta_i)

Tokens are cut into blocks of R. They are taken one after the other, all sequences and heads at once: each
adds up the blocks of entries from the first one that counts up to its own. A block of entries does not count where it
shares no segment, or where even its slowest entry over its shortest age has decayed to exactly 0 in the arithmetic at
hand: leaving it out changes no bit. Exponentials go into sums at once and are stored nowhere.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from retention_jax.kernels.retention_attention_xla import block_size, over_query_blocks


class Blocks(NamedTuple):
    """The inputs cut into n blocks of R tokens."""

    log_beta: Float[Array, "B heads n R"]
    segment: Int[Array, "B n R"]


def _counts(log_beta: Float[Array, "n R"], segment: Int[Array, "n R"], i: Array, j: Array) -> Array:
    """Whether entries of block j can still weigh anything in block i."""
    shortest = jnp.maximum((i - j - 1) * log_beta.shape[1] + 1, 0).astype(log_beta.dtype)
    # Half of the smallest number above 0 rounds to 0; the 1 is a margin for how exp is computed.
    vanished = float(np.log(jnp.finfo(log_beta.dtype).smallest_subnormal)) - 1
    a, b = segment[i], segment[j]
    return (shortest * log_beta[j].max() > vanished) & (a.min() <= b.max()) & (b.min() <= a.max())


def _seen(x: Blocks) -> Bool[Array, "n_tokens n_entries"]:
    """Whether a block of entries still weighs anything in a block of tokens, in some sequence and head."""
    index = jnp.arange(x.log_beta.shape[2], dtype=jnp.int32)
    pair = lambda i, j: jnp.any(
        jax.vmap(lambda rows, segment: jax.vmap(lambda row: _counts(row, segment, i, j))(rows))(x.log_beta, x.segment)
    )
    return jax.vmap(lambda i: jax.vmap(lambda j: (j <= i) & pair(i, j))(index))(index)


def _exponents(
    x: Blocks, size: int, i: Array, first: Array
) -> tuple[Float[Array, "entries tokens"], Float[Array, "B heads entries tokens"]]:
    """Ages `t - i` and exponents `age log_beta` of block i of tokens and `size` blocks of entries."""
    (B, heads, _, R), dtype = x.log_beta.shape, x.log_beta.dtype
    entries = lambda a, axis: lax.dynamic_slice_in_dim(a, first, size, axis)
    age = (i - first) * R + jnp.arange(R, dtype=jnp.int32)[None] - jnp.arange(size * R, dtype=jnp.int32)[:, None]
    same = entries(x.segment, 1).reshape(B, -1, 1) == x.segment[:, i][:, None]
    exponent = age.astype(dtype)[None, None] * entries(x.log_beta, 2).reshape(B, heads, -1, 1)
    return age.astype(dtype), jnp.where(((age >= 0)[None] & same)[:, None], exponent, -jnp.inf)


def _forward(x: Blocks) -> Float[Array, "B heads n R"]:
    def step(size: int, i: Array, first: Array, mass: Array) -> Array:
        exponent = _exponents(x, size, i, first)[1]
        # Entries lie along the slow axis: a sum over them adds whole vectors, which a CPU does eight lanes at a time.
        # By block first: of one long sum the last terms would round more.
        by_block = jnp.exp(exponent).reshape(*exponent.shape[:2], size, -1, exponent.shape[-1]).sum(axis=3)
        return mass.at[:, :, i].set(by_block.sum(axis=2))

    return over_query_blocks(step, jnp.zeros_like(x.log_beta), _seen(x))


def _backward(x: Blocks, dmass: Float[Array, "B heads n R"]) -> Float[Array, "B heads n R"]:
    def step(size: int, i: Array, first: Array, grad: Array) -> Array:
        age, exponent = _exponents(x, size, i, first)
        # The sum is over tokens: now they lie along the slow axis.
        age, exponent = age.T, exponent.swapaxes(2, 3)
        part = (jnp.exp(exponent) * age[None, None] * dmass[:, :, i][..., None]).sum(axis=2)
        old = lax.dynamic_slice_in_dim(grad, first, size, 2)
        return lax.dynamic_update_slice_in_dim(grad, old + part.reshape(old.shape), first, 2)

    return over_query_blocks(step, jnp.zeros_like(x.log_beta), _seen(x))


def _split(x: Num[Array, "*rows T"], block: int) -> Num[Array, "*rows n R"]:
    # Padding comes last: no real token sees it, and its own row has no cotangent.
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)])
    return x.reshape(*x.shape[:-1], -1, block)


def _blocks(log_beta: Float[Array, "B heads T"], segment_ids: Int[Array, "B T"], block: int) -> Blocks:
    dtype = np.promote_types(log_beta.dtype, np.float32)
    # Finite, so that age 0 times it is 0 and not nan; from age 1 on its weight is exactly 0, as that of -inf.
    log_beta = jnp.maximum(log_beta.astype(dtype), float(jnp.finfo(dtype).min) / (2 * log_beta.shape[-1]))
    return Blocks(_split(log_beta, block), _split(segment_ids, block))


def _join(x: Float[Array, "B heads n R"], like: Float[Array, "B heads T"]) -> Float[Array, "B heads T"]:
    return x.reshape(*x.shape[:2], -1)[..., : like.shape[-1]].astype(like.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mass(log_beta: Array, segment_ids: Array, block: int) -> Array:
    return _join(_forward(_blocks(log_beta, segment_ids, block)), log_beta)


def _mass_fwd(log_beta: Array, segment_ids: Array, block: int) -> tuple[Array, tuple[Array, Array]]:
    return _mass(log_beta, segment_ids, block), (log_beta, segment_ids)


def _mass_bwd(block: int, residuals: tuple[Array, Array], dmass: Array) -> tuple[Array, None]:
    x = _blocks(*residuals, block)
    return _join(_backward(x, _split(dmass.astype(x.log_beta.dtype), block)), residuals[0]), None


_mass.defvjp(_mass_fwd, _mass_bwd)


def retention_mass(log_beta: Float[Array, "B heads T"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B heads T"]:
    """How many entries a head still keeps at each token: `reference.retention_mass`.

    Memory grows with T, not T^2, forward and backward; time with what has not yet decayed. Sums are in float32 or
    wider; the result has log_beta's dtype.
    """
    return _mass(log_beta, segment_ids, block_size(log_beta.shape[-1]))
