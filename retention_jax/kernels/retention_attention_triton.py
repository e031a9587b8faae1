"""`reference.retention_attention` on GPU: which blocks are visited, and differentiation around the Triton kernels.

Forward and backward take O(T) memory but for the lists of blocks: for each pair of blocks of each key/value head a
16-bit number, and about 20 bytes while a list is made (8 heads, 128K tokens in blocks of 128: 160 MiB). What is kept
for the backward pass is the output in float32, the log-sum-exp, and a byte for each pair of blocks of each head. Which
pairs are left out, and why that changes no bit of the result, `block_pairs.py` says.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from retention_jax.kernels.block_pairs import check_attention_inputs, last_reached
from retention_jax.kernels.triton_blocks import AttentionBlocks, attention_blocks
from retention_jax.kernels.triton_call import Launch, call, padded_head


class Visits(NamedTuple):
    """The blocks that each block is paired with: its own, others that need a mask, those that need none."""

    blocks: Int[Array, "B K n n"]
    counts: Int[Array, "B K n 2"]  # with a mask, and all


def visible_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    log_beta: Float[Array, "B K T"],
    segment_ids: Int[Array, "B T"],
    window: Int[Array, ""],
    block: int,
) -> tuple[Bool[Array, "B K n n"], Bool[Array, "B n n"]]:
    """Which block of queries must visit which block of keys, and where some logits are hidden."""
    (B, T, N, H), K, pad = q.shape, k.shape[2], -q.shape[1] % block
    padded = lambda x, **how: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)], **how)
    norm = lambda x: padded(jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)).swapaxes(1, 2))
    # `last_reached` asks vectors for their norms alone.
    reach = last_reached(
        norm(q).reshape(B * K, N // K, T + pad, 1),
        norm(k).reshape(B * K, T + pad, 1),
        padded(log_beta.astype(jnp.float32), constant_values=-jnp.inf).reshape(B * K, T + pad),
        window,
        block,
        H**-0.5,
    ).reshape(B, K, 1, -1)
    n = reach.shape[-1]
    query, key = jnp.arange(n, dtype=jnp.int32)[:, None], jnp.arange(n, dtype=jnp.int32)[None]
    by_block = padded(segment_ids, mode="edge").reshape(B, n, block)
    low, high = by_block.min(axis=2), by_block.max(axis=2)
    overlap = (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None]) & (key <= query)[None]
    one_segment = (low[:, :, None] == high[:, None]) & (high[:, :, None] == low[:, None])
    oldest = (query - key + 1) * block - 1
    masked = ((query == key) | (oldest >= window))[None] | ~one_segment
    return overlap[:, None] & (reach >= query[None, None]), masked


def visits(visible: Bool[Array, "B K n n"], masked: Bool[Array, "B n n"], *, by_key: bool) -> Visits:
    """Lists for every block of queries, or of keys (`by_key`); the nearest block first."""
    if by_key:
        visible, masked = visible.swapaxes(2, 3), masked.swapaxes(1, 2)
    n = visible.shape[-1]
    parts = visible & masked[:, None], visible & ~masked[:, None]
    so_far = [jax.lax.cumsum(part.astype(jnp.int32), axis=3, reverse=not by_key) for part in parts]
    first, second = (part.sum(axis=3, dtype=jnp.int32) for part in parts)
    place = jnp.where(parts[0], so_far[0], first[..., None] + so_far[1]) - 1
    place = jnp.where(visible, place, n).reshape(-1, n)
    write = lambda at: jnp.zeros(n, jnp.int16).at[at].set(jnp.arange(n, dtype=jnp.int16), mode="drop")
    return Visits(jax.vmap(write)(place).reshape(visible.shape), jnp.stack([first, first + second], axis=-1))


def _launch(
    kernel: str,
    q: Array,
    k: Array,
    heads: int,
    outputs: list[jax.ShapeDtypeStruct],
    step: int,
    blocks: AttentionBlocks,
) -> Launch:
    (B, T, N, H), K = q.shape, k.shape[2]
    return Launch(
        kernel=f"retention_attention_triton_kernels.{kernel}",
        grid=(-(-T // blocks.tokens), heads, B),
        outputs=tuple(outputs),
        constants=dict(T=T, N=N, K=K, H=H, HEAD=padded_head(H), R=blocks.tokens, STEP=step, SCALE=H**-0.5),
        num_warps=blocks.num_warps,
        num_stages=2,
    )


def _forward(
    q: Array,
    k: Array,
    v: Array,
    log_beta: Array,
    segment_ids: Array,
    window: Array | None,
    blocks: AttentionBlocks,
    dtype: Any,
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Output, log-sum-exp, and what is visible."""
    (B, T, N, _), limit = q.shape, _window(q, window)
    pairs = visible_blocks(q, k, log_beta, segment_ids, limit, blocks.tokens)
    outputs = [jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)]
    launch = _launch("forward", q, k, N, outputs, blocks.forward, blocks)
    inputs = q, k, v, log_beta.astype(jnp.float32), segment_ids, limit.reshape(1)
    out, lse = call(launch, *inputs, *visits(*pairs, by_key=False))
    return out, lse, pairs


def _window(q: Array, window: Array | None) -> Array:
    return jnp.int32(q.shape[1]) if window is None else window.astype(jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(
    q: Array, k: Array, v: Array, log_beta: Array, segment_ids: Array, window: Array | None, blocks: AttentionBlocks
) -> Array:
    return _forward(q, k, v, log_beta, segment_ids, window, blocks, q.dtype)[0]


def _attention_fwd(
    q: Array, k: Array, v: Array, log_beta: Array, segment_ids: Array, window: Array | None, blocks: AttentionBlocks
) -> Any:
    # The residual `out` stays wide: rounded to bfloat16 it would cost log_beta's float32 gradient its last 16 bits.
    out, lse, pairs = _forward(q, k, v, log_beta, segment_ids, window, blocks, jnp.float32)
    return out.astype(q.dtype), (q, k, v, log_beta, segment_ids, window, out, lse, pairs)


def _attention_bwd(blocks: AttentionBlocks, residuals: Any, do: Array) -> tuple[Any, ...]:
    q, k, v, log_beta, segment_ids, window, out, lse, pairs = residuals
    delta = jnp.sum(do.astype(jnp.float32) * out, axis=-1).swapaxes(1, 2)
    inputs = q, k, v, log_beta.astype(jnp.float32), segment_ids, _window(q, window).reshape(1)
    like = lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype)
    launch = _launch("gradient_of_queries", q, k, q.shape[2], [like(q, q.dtype)], blocks.backward, blocks)
    (dq,) = call(launch, *inputs, *visits(*pairs, by_key=False), do, lse, delta)
    outputs = [like(k, k.dtype), like(v, v.dtype), like(log_beta, jnp.float32)]
    launch = _launch("gradients_of_keys", q, k, k.shape[2], outputs, blocks.backward, blocks)
    dk, dv, dlog_beta = call(launch, *inputs, *visits(*pairs, by_key=True), do, lse, delta)
    return dq, dk, dv, dlog_beta.astype(log_beta.dtype), None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def retention_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    log_beta: Float[Array, "B K T"],
    segment_ids: Int[Array, "B T"],
    window: Int[Array, ""] | None = None,
    *,
    blocks: AttentionBlocks | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention inside documents, in which every key fades with age: `reference.retention_attention`.

    Time follows the pairs of blocks that can see each other: causal, in one document, within the window, not yet
    decayed to exactly 0. Sums and log_beta are float32, matrix products take the inputs' dtype. `blocks` are chosen by
    size where not given.

    Raises:
      ValueError: if N is not a multiple of K, if q, k and v are not all float32 or all bfloat16, or if there are more
        than 32,767 blocks.
    """
    return _attention(q, k, v, log_beta, segment_ids, window, _checked(q, k, v, blocks))


def retention_attention_with_lse(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    log_beta: Float[Array, "B K T"],
    segment_ids: Int[Array, "B T"],
    window: Int[Array, ""] | None = None,
    *,
    blocks: AttentionBlocks | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """`retention_attention` in float32 and each row's log-sum-exp of logits (natural log), to merge with attention over
    other keys. Without gradients.

    Raises:
      ValueError: as `retention_attention`.
    """
    blocks = _checked(q, k, v, blocks)
    return _forward(q, k, v, log_beta, segment_ids, window, blocks, jnp.float32)[:2]


def _checked(q: Array, k: Array, v: Array, blocks: AttentionBlocks | None) -> AttentionBlocks:
    """The blocks to use, once the inputs are known to be what the kernels take."""
    check_attention_inputs(q, k, v, "in Triton")
    T, H = q.shape[1], q.shape[3]
    if blocks is None:
        blocks = attention_blocks(H, q.dtype.itemsize)
    if T > (most := blocks.tokens * jnp.iinfo(jnp.int16).max):
        raise ValueError(
            f"retention_attention in Triton numbers blocks with 16 bits: of {blocks.tokens} tokens they hold {most}, "
            f"got {T} tokens"
        )
    return blocks
