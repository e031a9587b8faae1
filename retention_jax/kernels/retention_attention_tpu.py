"""`reference.retention_attention` on TPU: layout, choice of blocks and differentiation around the Pallas kernels.

Forward and backward take O(T) memory: nothing of size T x T leaves the chip. What is kept for the backward pass is the
output in float32 and the log-sum-exp.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from retention_jax.kernels import retention_attention_tpu_kernels as kernels
from retention_jax.kernels.block_pairs import check_attention_inputs, last_reached, visible_pairs
from retention_jax.kernels.blocks import LANES, AttentionBlocks, attention_blocks, check_attention_smem


def _by_head(x: Float[Array, "B T heads H"], heads: int, block: int) -> Float[Array, "BK share T_padded H_padded"]:
    """Heads before tokens, those of a key/value head together. Zeros fill the last block and the lanes of a register:
    HBM holds an H that is no multiple of 128 in as many bytes anyway."""
    B, T, N, H = x.shape
    x = jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, -T % block), (0, -H % LANES)))
    return x.reshape(B * heads, N // heads, *x.shape[2:])


def _from_head(x: Float[Array, "BK share T_padded H_padded"], like: Float[Array, "B T heads H"]) -> Array:
    B, T, N, H = like.shape
    return x.reshape(B, N, *x.shape[2:])[:, :, :T, :H].transpose(0, 2, 1, 3)


def _inputs(q: Array, k: Array, v: Array, log_beta: Array, segment_ids: Array, block: int) -> kernels.Inputs:
    (B, T, K, _), pad = k.shape, -q.shape[1] % block
    # Finite, so that age 0 times it is 0 and not nan; from age 1 on it is as good as -inf: e^logit is exactly 0.
    log_beta = jnp.maximum(log_beta.astype(jnp.float32), float(jnp.finfo(jnp.float32).min) / (2 * (T + pad)))
    return kernels.Inputs(
        _by_head(q, K, block),
        _by_head(k, K, block)[:, 0],
        _by_head(v, K, block)[:, 0],
        jnp.pad(log_beta, ((0, 0), (0, 0), (0, pad))).reshape(B * K, 1, T + pad),
        # A padded token sees itself, so its softmax is finite, and real tokens come before it, so they never see it.
        jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, pad)))[:, None],
    )


def _sizes(x: kernels.Inputs, head_size: int, blocks: AttentionBlocks) -> kernels.Sizes:
    (BK, G, T, _), B, R = x.q.shape, x.segment_ids.shape[0], blocks.tokens
    return kernels.Sizes(BK // B, groups=G, blocks=T // R, block=R, stripe=blocks.stripe, scale=head_size**-0.5)


def _forward(
    q: Array,
    k: Array,
    v: Array,
    log_beta: Array,
    segment_ids: Array,
    window: Array | None,
    blocks: AttentionBlocks,
    dtype: Any,
) -> tuple[Array, Array, Array]:
    """Output and log-sum-exp in the kernels' layout, and the last query block that each key block reaches."""
    x = _inputs(q, k, v, log_beta, segment_ids, blocks.tokens)
    sizes, limit = _sizes(x, q.shape[-1], blocks), _window(window, x)
    reach = last_reached(x.q, x.k, x.log_beta[:, 0], limit, blocks.tokens, sizes.scale)
    pairs = visible_pairs(x.segment_ids[:, 0], reach, limit, blocks.tokens, by_key=False)
    return *kernels.forward(x, pairs, sizes, dtype), reach


def _window(window: Array | None, x: kernels.Inputs) -> Array:
    return jnp.int32(x.q.shape[2]) if window is None else window.astype(jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(
    q: Array, k: Array, v: Array, log_beta: Array, segment_ids: Array, window: Array | None, blocks: AttentionBlocks
) -> Array:
    return _from_head(_forward(q, k, v, log_beta, segment_ids, window, blocks, q.dtype)[0], q)


def _attention_fwd(
    q: Array, k: Array, v: Array, log_beta: Array, segment_ids: Array, window: Array | None, blocks: AttentionBlocks
) -> Any:
    # The residual `out` stays wide: rounded to bfloat16 it would cost log_beta's float32 gradient its last 16 bits.
    out, lse, reach = _forward(q, k, v, log_beta, segment_ids, window, blocks, jnp.float32)
    return _from_head(out, q).astype(q.dtype), (q, k, v, log_beta, segment_ids, window, out, lse, reach)


def _attention_bwd(blocks: AttentionBlocks, residuals: Any, cotangent: Array) -> tuple[Any, ...]:
    q, k, v, log_beta, segment_ids, window, out, lse, reach = residuals
    x = _inputs(q, k, v, log_beta, segment_ids, blocks.tokens)
    sizes, limit = _sizes(x, q.shape[-1], blocks), _window(window, x)
    do = _by_head(cotangent, k.shape[2], blocks.tokens)
    delta = jnp.sum(do.astype(jnp.float32) * out, axis=-1)[:, :, None]
    by_query, by_key = (
        visible_pairs(x.segment_ids[:, 0], reach, limit, blocks.tokens, by_key=by_key) for by_key in (False, True)
    )
    dq = kernels.gradient_of_queries(x, do, lse, delta, by_query, sizes)
    dk, dv, dlog_beta = kernels.gradients_of_keys(x, do, lse, delta, by_key, sizes)
    dlog_beta = dlog_beta.reshape(*log_beta.shape[:2], -1)[..., : log_beta.shape[2]].astype(log_beta.dtype)
    return _from_head(dq, q), _from_head(dk[:, None], k), _from_head(dv[:, None], v), dlog_beta, None, None


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
      ValueError: if N is not a multiple of K, if q, k and v are not all float32 or all bfloat16, or if sequences are
        too long or too many for the list of pairs.
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
    blocks, (B, T, N, _) = _checked(q, k, v, blocks), q.shape
    out, lse, _ = _forward(q, k, v, log_beta, segment_ids, window, blocks, jnp.float32)
    return _from_head(out, q), lse.reshape(B, N, -1)[..., :T]


def _checked(q: Array, k: Array, v: Array, blocks: AttentionBlocks | None) -> AttentionBlocks:
    """The blocks to use, once the inputs are known to be what the kernels take."""
    check_attention_inputs(q, k, v, "on TPU")
    (B, T, N, H), K = q.shape, k.shape[2]
    if blocks is None:
        blocks = attention_blocks(T, N // K, H, q.dtype)
    check_attention_smem(blocks, B, K, T)
    return blocks
