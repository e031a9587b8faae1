"""The towers of Qwen3-VL and Qwen2.5-VL: patches of pictures to features that stand in for tokens.

A patch is projected to the tower's width, goes through blocks that attend within its frame or window, and four
neighbours are merged into one feature of the decoder's width. Blocks are stacked and scanned. Some blocks' outputs are
merged too, for the decoder's first layers (DeepStack, arXiv 2406.04334).

Rows and columns turn queries and keys: the first quarter of a head's pairs by row, the second by column, with
frequencies of theta 10,000.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from retention_jax.config import VisionConfig
from retention_jax.models import rope
from retention_jax.models.layers import layer_norm, rms_norm
from retention_jax.parallel import sharding
from retention_jax.vision.sight import BLOCK, Segments, Sight, Spans

_EPS, _THETA = 1e-6, 10_000.0
_KEYS = 2**14  # that blocks of queries read at one time, if one block needs fewer


class _Weights:
    """Makes the variables of a tower's parts."""

    def __init__(self, dtype: str, rngs: nnx.Rngs):
        self.dtype, self.rngs = jnp.dtype(dtype), rngs

    def weight(self, *shape: int, fan_in: int) -> nnx.Param:
        return nnx.Param((jax.random.normal(self.rngs.params(), shape) * fan_in**-0.5).astype(self.dtype))

    def ones(self, *shape: int) -> nnx.Param:
        return nnx.Param(jnp.ones(shape, self.dtype))

    def zeros(self, *shape: int) -> nnx.Param:
        return nnx.Param(jnp.zeros(shape, self.dtype))


class Block(nnx.Module):
    """One block's weights; `None` where the family has no such parameter."""

    def __init__(self, cfg: VisionConfig, dtype: str, *, rngs: nnx.Rngs):
        make, plain = _Weights(dtype, rngs), cfg.kind == "qwen3_vl"
        D, N, F = cfg.width, cfg.num_heads, cfg.mlp_width
        H = D // N
        self.attention_norm, self.mlp_norm = make.ones(D), make.ones(D)
        self.attention_norm_bias, self.mlp_norm_bias = (make.zeros(D) if plain else None for _ in range(2))
        self.q, self.k, self.v = (make.weight(D, N, H, fan_in=D) for _ in range(3))
        self.q_bias, self.k_bias, self.v_bias = (make.zeros(N, H) for _ in range(3))
        self.o, self.o_bias = make.weight(N, H, D, fan_in=D), make.zeros(D)
        self.gate_proj, self.gate_bias = (None, None) if plain else (make.weight(D, F, fan_in=D), make.zeros(F))
        self.up_proj, self.up_bias = make.weight(D, F, fan_in=D), make.zeros(F)
        self.down_proj, self.down_bias = make.weight(F, D, fan_in=F), make.zeros(D)

    def project(self, x: Float[Array, "B P D"], turn: rope.Rotation) -> tuple[Float[Array, "B P N H"], ...]:
        """Rotated queries and keys, and values."""
        normed = _norm(x, self.attention_norm, self.attention_norm_bias)
        pairs = ((self.q, self.q_bias), (self.k, self.k_bias), (self.v, self.v_bias))
        q, k, v = (jnp.einsum("bpd,dnh->bpnh", normed, w[...]) + b[...][None, None] for w, b in pairs)
        return rope.apply_rope(q, turn), rope.apply_rope(k, turn), v

    def finish(self, x: Float[Array, "B P D"], attended: Float[Array, "B P N H"]) -> Float[Array, "B P D"]:
        """The residual stream after attention's output projection and the MLP."""
        x = x + jnp.einsum("bpnh,nhd->bpd", attended, self.o[...]) + self.o_bias[...][None, None]
        normed = _norm(x, self.mlp_norm, self.mlp_norm_bias)
        lifted = normed @ self.up_proj[...] + self.up_bias[...][None, None]
        if self.gate_proj is None or self.gate_bias is None:
            lifted = jax.nn.gelu(lifted, approximate=True)
        else:
            lifted = jax.nn.silu(normed @ self.gate_proj[...] + self.gate_bias[...][None, None]) * lifted
        return x + lifted @ self.down_proj[...] + self.down_bias[...][None, None]


class Merger(nnx.Module):
    """Neighbouring patches to one feature. DeepStack's norm the patches together, the last one each by itself."""

    def __init__(self, cfg: VisionConfig, dtype: str, *, together: bool, rngs: nnx.Rngs):
        make, joined = _Weights(dtype, rngs), cfg.merge**2 * cfg.width
        normed = joined if together else cfg.width
        self.norm = make.ones(normed)
        self.norm_bias = make.zeros(normed) if cfg.kind == "qwen3_vl" else None
        self.up_proj, self.up_bias = make.weight(joined, joined, fan_in=joined), make.zeros(joined)
        self.down_proj, self.down_bias = make.weight(joined, cfg.out_width, fan_in=joined), make.zeros(cfg.out_width)
        self.patches = cfg.merge**2

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B F out"]:
        width = self.norm[...].shape[0]
        normed = _norm(x.reshape(*x.shape[:1], -1, width), self.norm, self.norm_bias)
        joined = normed.reshape(x.shape[0], x.shape[1] // self.patches, -1)
        lifted = jax.nn.gelu(joined @ self.up_proj[...] + self.up_bias[...][None, None], approximate=False)
        return lifted @ self.down_proj[...] + self.down_bias[...][None, None]


class Vision(nnx.Module):
    """All weights of a tower. They are read only: gates alone are trained."""

    def __init__(self, cfg: VisionConfig, dtype: str, *, rngs: nnx.Rngs):
        make, D, plain = _Weights(dtype, rngs), cfg.width, cfg.kind == "qwen3_vl"
        self.config = cfg
        self.patch = make.weight(D, 3, cfg.temporal, cfg.patch, cfg.patch, fan_in=cfg.patch_size)
        self.patch_bias = make.zeros(D) if plain else None
        self.positions = make.weight(cfg.position_side**2, D, fan_in=D) if plain else None
        stack = nnx.vmap(lambda r: Block(cfg, dtype, rngs=r), in_axes=0, out_axes=0)
        self.blocks = stack(rngs.split(cfg.depth))
        self.merger = Merger(cfg, dtype, together=False, rngs=rngs)
        mergers = nnx.vmap(lambda r: Merger(cfg, dtype, together=True, rngs=r), in_axes=0, out_axes=0)
        self.deepstack = mergers(rngs.split(len(cfg.deepstack))) if cfg.deepstack else None


@functools.partial(jax.jit, static_argnames="spans")
def see(tower: Vision, sight: Sight, spans: Spans) -> tuple[Float[Array, "B F out"], Float[Array, "stacked B F out"]]:
    """Features of patches, and those for the decoder's first layers; anything at padding."""
    last, kept = run_blocks(tower, embed(tower, sight), sight, spans)
    features = tower.merger(last)
    if tower.deepstack is None:
        return features, jnp.zeros((0, *features.shape), features.dtype)
    return features, jax.vmap(lambda merger, x: merger(x))(tower.deepstack, kept)


def embed(tower: Vision, sight: Sight) -> Float[Array, "B P D"]:
    """Projected patches, with learned positions where the family has them."""
    weight = tower.patch[...]
    x = jnp.einsum("bpc,dc->bpd", jnp.asarray(sight.pixels).astype(weight.dtype), weight.reshape(weight.shape[0], -1))
    if tower.patch_bias is not None:
        x = x + tower.patch_bias[...][None, None]
    if tower.positions is not None:
        x = x + positions(tower.positions[...], sight)
    return x


def positions(table: Float[Array, "rows D"], sight: Sight) -> Float[Array, "B P D"]:
    """The table's rows around each patch, by their weights."""
    corners, weights = jnp.asarray(sight.corners), jnp.asarray(sight.weights).astype(table.dtype)
    return sum(table[corners[..., i]] * weights[..., i, None] for i in range(4))  # pyright: ignore


def run_blocks(
    tower: Vision, x: Float[Array, "B P D"], sight: Sight, spans: Spans
) -> tuple[Float[Array, "B P D"], Float[Array, "stacked B P D"]]:
    """The last block's output, and those that `deepstack` names."""
    cfg, turn = tower.config, _rotation(sight, tower.config.width // tower.config.num_heads)
    x = sharding.constrain(x, "patches")
    full = np.isin(np.arange(cfg.depth), cfg.full_blocks) | (cfg.kind == "qwen3_vl")
    place = np.full(cfg.depth, -1, np.int32)
    place[list(cfg.deepstack)] = np.arange(len(cfg.deepstack))

    def one_block(carried, scanned):
        (x, kept), (block, is_full, at) = carried, scanned
        block = sharding.gathered(block)
        q, k, v = (sharding.constrain(a, "looking") for a in block.project(x, turn))
        if full.all():
            attended = _attend(q, k, v, sight.frames, spans.frames)
        else:
            attended = jax.lax.cond(
                is_full,
                lambda: _attend(q, k, v, sight.frames, spans.frames),
                lambda: _attend(q, k, v, sight.windows, spans.windows),
            )
        x = sharding.constrain(block.finish(x, attended), "patches")
        if cfg.deepstack:
            keep = lambda kept: jax.lax.dynamic_update_index_in_dim(kept, x, at, axis=0)
            kept = jax.lax.cond(at >= 0, keep, lambda kept: kept, kept)
        return (x, kept), None

    kept = jnp.zeros((len(cfg.deepstack), *x.shape), x.dtype)
    (x, kept), _ = jax.lax.scan(one_block, (x, kept), (tower.blocks, full, place))
    return x, kept


def _rotation(sight: Sight, head_size: int) -> rope.Rotation:
    """How far to turn the queries and keys of each patch."""
    frequency = np.float32(_THETA) ** (-np.arange(0, head_size // 2, 2, dtype=np.float32) / (head_size // 2))
    place = jnp.asarray(sight.place)
    angles = place[..., None].astype(jnp.float32) * jnp.asarray(frequency)[None, None, None]
    angles = angles.reshape(*place.shape[:2], -1)
    return rope.Rotation(jnp.cos(angles), jnp.sin(angles))


def _attend(
    q: Float[Array, "B P N H"],
    k: Float[Array, "B P N H"],
    v: Float[Array, "B P N H"],
    segments: Segments,
    span: int,
) -> Float[Array, "B P N H"]:
    """Attention within segments, some blocks of queries at a time, each over `span` keys."""
    B, P = q.shape[:2]
    ids, first = jnp.asarray(segments.ids), jnp.asarray(segments.first)

    def one_block(block):
        q, wanted, begin = block
        cut = lambda a: jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, span))(a, begin)
        # The range may begin earlier than asked for, so that it ends within the row.
        mask = wanted[:, None, :, None] == cut(ids)[:, None, None, :]
        return jax.nn.dot_product_attention(q, cut(k), cut(v), mask=mask)

    by_block = lambda a: a.reshape(B, P // BLOCK, BLOCK, *a.shape[2:]).swapaxes(0, 1)
    together = min(max(_KEYS // (B * span), 1), P // BLOCK)  # where ranges are short, as in clips and windows
    out = jax.lax.map(one_block, (by_block(q), by_block(ids), first.T), batch_size=together)
    return out.swapaxes(0, 1).reshape(q.shape)


def _norm(x: Float[Array, "B P D"], gain: nnx.Param, bias: nnx.Param | None) -> Float[Array, "B P D"]:
    return rms_norm(x, gain[...], _EPS) if bias is None else layer_norm(x, gain[...], bias[...], _EPS)
