"""`buffer_attention_xla.buffer_attention` as Triton kernels: split over the keys, whoever owns them, then merged.

All of a layer's live keys are shared out evenly, so a batch of one fills the chip, and one head that owns most of the
pool holds nobody up. A chunk's queries are cut into blocks of rows, each with fewer programs. Where a sliding window
hides keys they are masked, not skipped: eviction leaves few of them in the pool.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from retention_jax.kernels.buffer_attention_xla import Window
from retention_jax.kernels.partial_softmax import Partial
from retention_jax.kernels.triton_blocks import BufferBlocks, buffer_blocks
from retention_jax.kernels.triton_call import Launch, call, padded_head

PARTS = 32  # partial softmaxes that are merged at a time


def buffer_attention(
    q: Float[Array, "B T N H"],
    *,
    pool_k: Float[Array, "B S H"],
    pool_v: Float[Array, "B S H"],
    offset: Int[Array, "B K_and_1"],
    recent_k: Float[Array, "B L K R H"],
    recent_v: Float[Array, "B L K R H"],
    recent_range: Int[Array, "B 2"],
    layer: Int[Array, ""],
    window: Window | None = None,
    blocks: BufferBlocks | None = None,
) -> Partial:
    """Ordinary attention of T new tokens over everything their key/value head holds, the new tokens not included.

    Sums are in float32. `blocks` are chosen by size where not given.
    """
    (B, T, N, H), (L, K, R), S = q.shape, recent_k.shape[1:4], pool_k.shape[1]
    queries = T * (N // K)
    if blocks is None:
        blocks = buffer_blocks(queries, H, q.dtype.itemsize)
    row_blocks = -(-queries // blocks.rows)
    P = max(1, -(-blocks.programs // (B * row_blocks)))
    sizes = dict(T=T, N=N, K=K, H=H, HEAD=padded_head(H), P=P, KEYS=blocks.keys)
    # Without a window its arrays are any that are there: the kernel is compiled to read none of them.
    ages = (offset,) * 4 if window is None else (window.size.reshape(1), *window[1:])
    wide = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    parts = call(
        Launch(
            kernel="buffer_attention_triton_kernels.attend",
            grid=(row_blocks, P, B),
            outputs=(wide(B, P + K - 1, queries, H), wide(B, P + K - 1, queries)),
            constants=sizes | dict(S=S, L=L, R=R, ROWS=blocks.rows, SCALE=H**-0.5, WINDOWED=window is not None),
            num_warps=blocks.num_warps,
            num_stages=2,
        ),
        *(q, pool_k, pool_v, offset, recent_k, recent_v, recent_range, layer.reshape(1), *ages),
    )
    merged = call(
        Launch(
            kernel="buffer_attention_triton_kernels.merge",
            grid=(queries, K, B),
            outputs=(wide(B, T, N, H), wide(B, T, N)),
            constants=sizes | dict(PARTS=PARTS),
            num_warps=4,
            num_stages=2,
        ),
        *(*parts, offset, recent_range),
    )
    return Partial(*merged)
