"""`reference.retention_mass` block by block in plain jnp: O(T) memory, forward and backward, on any device.

    S_t = sum_{i <= t, same document} e^((t - i) log_beta_i)
    dlog_beta_i = sum_t dS_t (t - i) e^((t - i) log_beta_i)

Tokens are cut into blocks of R; a list of all pairs (block i of tokens t, block j <= i of entries) is scanned, head by
head. A pair is left out where its blocks share no segment, or where even its slowest entry over its shortest age has
decayed to exactly 0 in the arithmetic at hand: leaving it out changes no bit.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

from retention_jax.kernels.retention_attention_xla import block_size, over_visible_pairs


def _split(x: Num[Array, "rows T"], block: int) -> Num[Array, "rows n R"]:
    # Padding comes last: no real token sees it, and its own row has no cotangent.
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block))).reshape(x.shape[0], -1, block)


def _counts(log_beta: Float[Array, "n R"], segment: Int[Array, "n R"], i: Array, j: Array) -> Array:
    """Whether entries of block j can still weigh anything in block i."""
    shortest = jnp.maximum((i - j - 1) * log_beta.shape[1] + 1, 0).astype(log_beta.dtype)
    # Half of the smallest number above 0 rounds to 0; the 1 is a margin for how exp is computed.
    vanished = float(np.log(jnp.finfo(log_beta.dtype).smallest_subnormal)) - 1
    a, b = segment[i], segment[j]
    return (shortest * log_beta[j].max() > vanished) & (a.min() <= b.max()) & (b.min() <= a.max())


def _tile(
    log_beta: Float[Array, "n R"], segment: Int[Array, "n R"], i: Array, j: Array
) -> tuple[Float[Array, "R R"], Float[Array, "R R"]]:
    """Ages `t - i` and weights `e^(age log_beta)` of one pair; rows are entries, columns tokens."""
    block = log_beta.shape[1]
    index = jnp.arange(block, dtype=jnp.int32)
    # Entries lie along the slow axis: a sum over them adds whole vectors, which a CPU does eight lanes at a time.
    age = (i - j) * block + index[None, :] - index[:, None]
    visible = (age >= 0) & (segment[i][None, :] == segment[j][:, None])
    age = age.astype(log_beta.dtype)
    return age, jnp.exp(jnp.where(visible, age * log_beta[j][:, None], -jnp.inf))


def _forward_row(log_beta: Float[Array, "n R"], segment: Int[Array, "n R"]) -> Float[Array, "n R"]:
    def step(mass: Array, pair: Array) -> Array:
        i, j = pair[0], pair[1]
        add = lambda row: row + _tile(log_beta, segment, i, j)[1].sum(0)
        row = lax.cond(_counts(log_beta, segment, i, j), add, lambda row: row, mass[i])
        return mass.at[i].set(row)

    return over_visible_pairs(step, jnp.zeros_like(log_beta), len(log_beta))


def _backward_row(
    log_beta: Float[Array, "n R"], segment: Int[Array, "n R"], dmass: Float[Array, "n R"]
) -> Float[Array, "n R"]:
    def step(grad: Array, pair: Array) -> Array:
        i, j = pair[0], pair[1]

        def add(row: Array) -> Array:
            age, weight = _tile(log_beta, segment, i, j)
            return row + (weight * age) @ dmass[i]

        row = lax.cond(_counts(log_beta, segment, i, j), add, lambda row: row, grad[j])
        return grad.at[j].set(row)

    return over_visible_pairs(step, jnp.zeros_like(log_beta), len(log_beta))


def _by_row(row: Any, block: int, log_beta: Array, segment_ids: Array, *more: Array) -> Array:
    """Runs `row` over every sequence and head, one after the other: each leaves out what has decayed in it alone."""
    B, heads, T = log_beta.shape
    dtype = np.promote_types(log_beta.dtype, np.float32)
    flat = [x.reshape(B * heads, T).astype(dtype) for x in (log_beta, *more)]
    # Finite, so that age 0 times it is 0 and not nan; from age 1 on its weight is exactly 0, as that of -inf.
    flat[0] = jnp.maximum(flat[0], float(jnp.finfo(dtype).min) / (2 * T))
    flat = [_split(x, block) for x in flat]
    segment = _split(segment_ids, block)
    out = lax.map(lambda at: row(flat[0][at], segment[at // heads], *[x[at] for x in flat[1:]]), jnp.arange(B * heads))
    return out.reshape(B, heads, -1)[..., :T].astype(log_beta.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mass(log_beta: Array, segment_ids: Array, block: int) -> Array:
    return _by_row(_forward_row, block, log_beta, segment_ids)


def _mass_fwd(log_beta: Array, segment_ids: Array, block: int) -> tuple[Array, tuple[Array, Array]]:
    return _mass(log_beta, segment_ids, block), (log_beta, segment_ids)


def _mass_bwd(block: int, residuals: tuple[Array, Array], dmass: Array) -> tuple[Array, None]:
    return _by_row(_backward_row, block, *residuals, dmass), None


_mass.defvjp(_mass_fwd, _mass_bwd)


def retention_mass(log_beta: Float[Array, "B heads T"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B heads T"]:
    """How many entries a head still keeps at each token: `reference.retention_mass`.

    Memory grows with T, not T^2, forward and backward; time with what has not yet decayed. Sums are in float32 or
    wider; the result has log_beta's dtype.
    """
    return _mass(log_beta, segment_ids, block_size(log_beta.shape[-1]))
