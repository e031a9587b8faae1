"""`reference.retention_mass` on GPU: O(T) memory, forward and backward, around the Triton kernels.

One exponential for each pair of token and entry, where both are in blocks that share a document and something is left:
which blocks are left out, and why that changes no bit of the result, `block_pairs.py` says.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from retention_jax.kernels.block_pairs import reached
from retention_jax.kernels.triton_blocks import MASS_BLOCKS, MassBlocks
from retention_jax.kernels.triton_call import Launch, call


def _by_head(kernel: str, blocks: MassBlocks, log_beta: Array, segment_ids: Array, *more: Array) -> Array:
    """Runs a kernel for every block of every head."""
    (B, heads, T), R = log_beta.shape, blocks.tokens
    # Finite, so that age 0 times it is 0 and not nan; from age 1 on its weight is exactly 0, as that of -inf.
    lowest = float(jnp.finfo(jnp.float32).min) / (2 * T)
    gates, *cotangents = (x.astype(jnp.float32) for x in (log_beta, *more))
    pad = [(0, 0)] * 2 + [(0, -T % R)]
    slowest = jnp.pad(gates, pad, constant_values=lowest).reshape(B, heads, -1, R).max(axis=3)
    ids = jnp.pad(segment_ids, pad[1:], mode="edge").reshape(B, -1, R)
    n = ids.shape[1]
    launch = Launch(
        kernel=f"retention_mass_triton_kernels.{kernel}",
        grid=(n, heads, B),
        outputs=(jax.ShapeDtypeStruct(log_beta.shape, jnp.float32),),
        constants=dict(T=T, HEADS=heads, R=R, LOWEST=lowest),
        num_warps=blocks.num_warps,
        num_stages=2,
    )
    reach = reached(slowest, 0.0, jnp.int32(n * R), R)
    return call(launch, gates, segment_ids, reach, ids.min(axis=2), ids.max(axis=2), *cotangents)[0].astype(
        log_beta.dtype
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mass(log_beta: Array, segment_ids: Array, blocks: MassBlocks) -> Array:
    return _by_head("forward", blocks, log_beta, segment_ids)


def _mass_fwd(log_beta: Array, segment_ids: Array, blocks: MassBlocks) -> tuple[Array, tuple[Array, Array]]:
    return _mass(log_beta, segment_ids, blocks), (log_beta, segment_ids)


def _mass_bwd(blocks: MassBlocks, residuals: tuple[Array, Array], dmass: Array) -> tuple[Array, None]:
    return _by_head("backward", blocks, *residuals, dmass), None


_mass.defvjp(_mass_fwd, _mass_bwd)


def retention_mass(
    log_beta: Float[Array, "B heads T"], segment_ids: Int[Array, "B T"], *, blocks: MassBlocks = MASS_BLOCKS
) -> Float[Array, "B heads T"]:
    """How many entries a head still keeps at each token: `reference.retention_mass`.

    Memory grows with T, not T^2, forward and backward; time with what has not yet decayed. Sums are in float32; the
    result has log_beta's dtype.

    Raises:
      ValueError: if log_beta is neither float32 nor bfloat16.
    """
    if log_beta.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"retention_mass in Triton takes log_beta in float32 or bfloat16, got {log_beta.dtype}")
    return _mass(log_beta, segment_ids, blocks)
