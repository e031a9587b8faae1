"""What the devices that hold parts of one pool tell each other: counts, and parts of a softmax.

Never keys, values or scores. All of this is for functions that are mapped over the mesh; elsewhere there is one shard.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from retention_jax.kernels.partial_softmax import Partial
from retention_jax.parallel import sharding


def count() -> int:
    """How many shards a pool has here."""
    return jax.lax.axis_size(names) if (names := sharding.mapped_axes(sharding.SLOTS)) else 1


def index() -> Int[Array, ""]:
    """Which of them this is."""
    return jax.lax.axis_index(names) if (names := sharding.mapped_axes(sharding.SLOTS)) else jnp.int32(0)


def total(number: Int[Array, "*axes"]) -> Int[Array, "*axes"]:
    """Sum over the shards."""
    return jax.lax.psum(number, sharding.mapped_axes(sharding.SLOTS))


def of_each(number: Int[Array, " B"]) -> Int[Array, "B shards"]:
    """Every shard's number."""
    names = sharding.mapped_axes(sharding.SLOTS)
    return jax.lax.all_gather(number, names, axis=1) if names else number[:, None]


def anywhere(condition: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether it holds on any device: what loops depend on that wait for other devices inside."""
    return jax.lax.pmax(condition.astype(jnp.int32), sharding.mapped_axes(sharding.AXES)) > 0


def merge(part: Partial, layout: sharding.P) -> Partial:
    """The softmax over all shards' keys, which must be disjoint: the part of it that `layout` gives this device.

    `layout` is that of the result [B, T, N, ...] on the mesh. Every shard comes with all tokens and heads. Along mesh
    axes that cut neither here every shard leaves with all of them too.
    """
    names = tuple(name for name in sharding.mapped_axes(sharding.SLOTS) if jax.lax.axis_size(name) > 1)
    if not names:
        return part
    # A query without any key: every lse is -inf, and the shares must be 0, not exp(-inf + inf).
    lse = jax.nn.logsumexp(jax.lax.all_gather(part.lse, names, axis=1), axis=1)
    out = part.out * jnp.exp(part.lse - jnp.where(lse == -jnp.inf, 0.0, lse))[..., None]
    for axis, entry in enumerate(layout):
        along = tuple(name for name in names if name in ((entry,) if isinstance(entry, str) else entry or ()))
        if along:
            out = jax.lax.psum_scatter(out, along, scatter_dimension=axis, tiled=True)
            size = out.shape[axis]
            lse = jax.lax.dynamic_slice_in_dim(lse, jax.lax.axis_index(along) * size, size, axis)
            names = tuple(name for name in names if name not in along)
    return Partial(jax.lax.psum(out, names), lse)
