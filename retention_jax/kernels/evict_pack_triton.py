"""`evict_xla.pack_rows` as a Triton kernel: every survivor is read once, from where it lies, and written once.

XLA gathers a row from the pool and one from the window for every slot, and then chooses. Selection stays with XLA,
which fuses each of its counting passes into one read of the keys, 4 bytes an entry.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from retention_jax.kernels.evict_xla import Order
from retention_jax.kernels.triton_blocks import PACK_BYTES
from retention_jax.kernels.triton_call import Launch, call


def pack_rows(
    pool: Shaped[Array, "B S *H"], window: Shaped[Array, "B heads_window *H"], order: Order
) -> Shaped[Array, "B S *H"]:
    """The pool after packing, as `evict_xla.pack_rows` has it, but written to a new place."""
    (B, S), H = pool.shape[:2], math.prod(pool.shape[2:])
    padded = 1 << (H - 1).bit_length()
    rows = max(1, min(1024, PACK_BYTES // (padded * pool.dtype.itemsize)))
    integer = jnp.dtype(f"uint{8 * pool.dtype.itemsize}")  # bytes, whatever they mean
    launch = Launch(
        kernel="evict_pack_triton_kernels.pack",
        grid=(-(-S // rows), B),
        outputs=(jax.ShapeDtypeStruct((B, S, H), integer),),
        constants=dict(S=S, W=window.shape[1], H=H, HEAD=padded, ROWS=rows),
        num_warps=4,
        num_stages=1,
    )
    old, new = (jax.lax.bitcast_convert_type(a, integer).reshape(B, -1, H) for a in (pool, window))
    return jax.lax.bitcast_convert_type(call(launch, old, new, order.source)[0], pool.dtype).reshape(pool.shape)
