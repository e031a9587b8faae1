"""Maps the training operations over the ambient mesh: the compiler cannot partition a Pallas kernel.

Every device gets whole sequences of some of the heads, by the rows "attending" and "scoring" of `sharding.ACTIVATIONS`,
and runs the operation as if it were alone. Without a mesh it just runs.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from retention_jax.parallel import sharding

Result = TypeVar("Result")


def attention(
    operation: Callable[..., Result],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    log_beta: Float[Array, "B K T"],
    segment_ids: Int[Array, "B T"],
    window: Int[Array, ""] | None,
) -> Result:
    """`operation` is an implementation of `reference.retention_attention`, or gives several arrays [B, T, N, ...].

    Where a key/value head's queries lie on several devices, each of them gets a copy of it.
    """
    mesh, K = sharding.ambient(), k.shape[2]
    if mesh is None:
        return operation(q, k, v, log_beta, segment_ids, window)
    by_head = sharding.of_activation(mesh, "attending", q.shape)
    copies = math.lcm(K, sharding.parts(mesh, by_head[2])) // K
    if copies > 1:
        # Copied where its tokens are, so that every copy goes to one device only.
        k, v = (sharding.constrain(jnp.repeat(sharding.constrain(x, "heads"), copies, 2), "heads") for x in (k, v))
        log_beta = sharding.constrain(jnp.repeat(log_beta, copies, 1), "log_beta")
    by_key = sharding.of_activation(mesh, "scoring", log_beta.shape)
    by_row = sharding.of_activation(mesh, "batch", segment_ids.shape)
    specs = (by_head, by_head, by_head, by_key, by_row, P())  # a window of None has no layout
    mapped = jax.shard_map(operation, mesh=mesh, in_specs=specs, out_specs=P(*by_head[:3]), check_vma=False)
    return mapped(q, k, v, log_beta, segment_ids, window)


def mass(
    operation: Callable[..., Array], log_beta: Float[Array, "B heads T"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "B heads T"]:
    """`operation` is an implementation of `reference.retention_mass`."""
    mesh = sharding.ambient()
    if mesh is None:
        return operation(log_beta, segment_ids)
    by_head = sharding.of_activation(mesh, "scoring", log_beta.shape)
    by_row = sharding.of_activation(mesh, "batch", segment_ids.shape)
    mapped = jax.shard_map(operation, mesh=mesh, in_specs=(by_head, by_row), out_specs=by_head, check_vma=False)
    return mapped(log_beta, segment_ids)
