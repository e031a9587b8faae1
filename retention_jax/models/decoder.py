"""One decoder for the Llama/Qwen family, with retention gates. Layers are stacked and scanned.

`forward` reads whole sequences (training, teacher, scoring); `extend` reads new tokens on top of a cache. Both hand
back what the caller needs to decide about memory; neither knows the budget.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from retention_jax import cache
from retention_jax.cache.buffer import Buffer, Entries
from retention_jax.config import GateConfig, ModelConfig
from retention_jax.kernels import ops
from retention_jax.models import rope
from retention_jax.models.gate import FinalProjection, GateFeatures, log_retention
from retention_jax.models.inputs import Inputs, Row, Visual, add_deepstack, embed, lengths, of_rows
from retention_jax.models.layers import rms_norm, swiglu
from retention_jax.models.vision import Vision
from retention_jax.parallel import sharding
from retention_jax.runtime.arrays import AnyArray
from retention_jax.vision.prompt import Prompt


class Layer(nnx.Module):
    """One layer's weights. Names of axes in the comments; `None` where the family has no such parameter."""

    def __init__(self, cfg: ModelConfig, gate: GateConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.dtype)
        D, N, K, H, F = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_size, cfg.mlp_width

        def weight(*shape: int, fan_in: int) -> nnx.Param:
            return nnx.Param((jax.random.normal(rngs.params(), shape) * fan_in**-0.5).astype(dtype))

        ones = lambda size: nnx.Param(jnp.ones(size, dtype))
        zeros = lambda present, *shape: nnx.Param(jnp.zeros(shape, dtype)) if present else None
        self.attention_norm, self.mlp_norm = ones(D), ones(D)
        self.q, self.k, self.v = (weight(D, heads, H, fan_in=D) for heads in (N, K, K))
        self.o = weight(N, H, D, fan_in=N * H)
        self.q_bias, self.k_bias, self.v_bias = (zeros(cfg.qkv_bias, heads, H) for heads in (N, K, K))
        self.o_bias = zeros(cfg.output_bias, D)
        self.q_norm, self.k_norm = (ones(H) if cfg.qk_norm else None for _ in range(2))
        self.gate_proj, self.up_proj, self.down_proj = (
            weight(D, F, fan_in=D),
            weight(D, F, fan_in=D),
            weight(F, D, fan_in=F),
        )
        self.gate_bias, self.up_bias, self.down_bias = (zeros(cfg.mlp_bias, size) for size in (F, F, D))
        self.retention = GateFeatures(cfg, gate, rngs=rngs)
        self.norm_eps = cfg.norm_eps

    def project(
        self, x: Float[Array, "B T D"], turn: rope.Rotation
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"], Float[Array, "B T heads W"]]:
        """Rotated queries and keys, values, and gate features of the hidden state that enters attention."""
        normed = rms_norm(x, self.attention_norm[...], self.norm_eps)
        q, k, v = (jnp.einsum("btd,dnh->btnh", normed, w[...]) for w in (self.q, self.k, self.v))
        if self.q_bias is not None and self.k_bias is not None and self.v_bias is not None:
            q, k, v = (a + b[...][None, None] for a, b in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias)))
        if self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(q, self.q_norm[...], self.norm_eps)
            k = rms_norm(k, self.k_norm[...], self.norm_eps)
        return rope.apply_rope(q, turn), rope.apply_rope(k, turn), v, self.retention(normed)

    def finish(self, x: Float[Array, "B T D"], attended: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """The residual stream after attention's output projection and the MLP."""
        out = jnp.einsum("btnh,nhd->btd", attended, self.o[...])
        x = x + (out if self.o_bias is None else out + self.o_bias[...][None, None])
        biases = None
        if self.gate_bias is not None and self.up_bias is not None and self.down_bias is not None:
            biases = (self.gate_bias[...], self.up_bias[...], self.down_bias[...])
        normed = rms_norm(x, self.mlp_norm[...], self.norm_eps)
        return x + swiglu(normed, self.gate_proj[...], self.up_proj[...], self.down_proj[...], biases)


class Decoder(nnx.Module):
    """All weights: the backbone (`nnx.Param`) and its gates (`GateParam`). A pytree, so it can go through jit."""

    def __init__(self, cfg: ModelConfig, gate: GateConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.dtype)
        embedding = lambda: nnx.Param(
            (0.02 * jax.random.normal(rngs.params(), (cfg.vocab_size, cfg.width))).astype(dtype)
        )
        self.config, self.gate_config = cfg, gate
        self.embedding = embedding()
        self.lm_head = None if cfg.tie_embeddings else embedding()
        self.final_norm = nnx.Param(jnp.ones(cfg.width, dtype))
        self.final_projection = FinalProjection(cfg, gate, rngs=rngs)
        stack = nnx.vmap(lambda r: Layer(cfg, gate, rngs=r), in_axes=0, out_axes=0)
        self.layers = stack(rngs.split(cfg.num_layers))
        self.vision = None if cfg.vision is None else Vision(cfg.vision, cfg.dtype, rngs=rngs)

    def __call__(
        self, tokens: Int[AnyArray, "B T"] | Prompt | Sequence[Row]
    ) -> tuple[Float[Array, "B T V"], Float[Array, "B L K T"]]:
        """Logits and log_beta of whole sequences: full cache, ordinary attention.

        With pictures: of one prompt, or of several; then T is the longest one's, and what is behind the others' ends
        means nothing.
        """
        with sharding.enter_mesh_of(self):
            inputs = batch_of(self, tokens)
            return _score(self, inputs.tokens, inputs.visual)


def batch_of(model: Decoder, tokens: Int[AnyArray, "B T"] | Prompt | Sequence[Row]) -> Inputs:
    """What a caller gave to read, as one value: an array of whole rows, one prompt, or several."""
    if isinstance(tokens, jax.Array | np.ndarray):
        return Inputs(tokens, np.ones(tokens.shape, bool))
    rows = [tokens] if isinstance(tokens, Prompt) else tokens
    return of_rows(rows, max(lengths(rows)), model.vision)


@jax.jit
def _score(
    model: Decoder, tokens: Int[AnyArray, "B T"], visual: Visual | None
) -> tuple[Float[Array, "B T V"], Float[Array, "B L K T"]]:
    hidden, log_beta = forward(model, tokens, jnp.ones_like(tokens), visual, with_retention=False)
    return unembed(model, hidden), log_beta


def document_positions(segment_ids: Int[AnyArray, "B T"]) -> Int[Array, "B T"]:
    """0-based position of each token in its document; documents are runs of equal segment ids."""
    segment_ids, index = jnp.asarray(segment_ids), jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def document_lengths(segment_ids: Int[AnyArray, "B T"]) -> Int[Array, "B T"]:
    """Tokens of the document that each token is in."""
    from_end = document_positions(jnp.flip(jnp.asarray(segment_ids), axis=1))
    return document_positions(segment_ids) + jnp.flip(from_end, axis=1) + 1


def forward(
    model: Decoder,
    tokens: Int[AnyArray, "B T"],
    segment_ids: Int[AnyArray, "B T"],
    visual: Visual | None = None,
    *,
    with_retention: bool,
    remat: bool = False,
) -> tuple[Float[Array, "B T D"], Float[Array, "B L K T"]]:
    """Final hidden states (normed) and log_beta of packed documents.

    `with_retention` adds (t - i) log_beta_i to the attention logits (the student); without it attention is ordinary
    (the teacher, or scoring with a full cache). `remat` recomputes each layer in the backward pass. `visual` holds what
    stands in for tokens, and its `shift` is counted in each document from its start.
    """
    cfg, tokens, segment_ids = model.config, jnp.asarray(tokens), jnp.asarray(segment_ids)
    turn = rope.rotation(_shifted(document_positions(segment_ids), visual), document_lengths(segment_ids), cfg)

    def layer_step(x, scanned):
        layer, weight, offset, index, window = scanned
        layer = sharding.gathered(layer)
        q, k, v, features = layer.project(x, turn)
        log_beta = sharding.constrain(log_retention(features, weight, offset), "log_beta")
        bias = log_beta if with_retention else jnp.zeros_like(log_beta)
        attended = sharding.constrain(ops.retention_attention(q, k, v, bias, segment_ids, window), "heads")
        return add_deepstack(sharding.constrain(layer.finish(x, attended), "hidden"), index, visual), log_beta

    x = sharding.constrain(embed(model.embedding[...], tokens, visual), "hidden")
    windows = cache.window_sizes(cfg.windows)
    weight, offset = model.final_projection.per_layer(cfg.num_layers, cfg.num_kv_heads)
    index = None if visual is None else jnp.arange(cfg.num_layers)
    scanned = (model.layers, weight, offset, index, windows)
    x, log_beta = jax.lax.scan(jax.checkpoint(layer_step) if remat else layer_step, x, scanned)
    return rms_norm(x, model.final_norm[...], cfg.norm_eps), log_beta.transpose(1, 0, 2, 3)


def _shifted(positions: Int[Array, "B T"], visual: Visual | None) -> Int[Array, "B T"] | Int[Array, "3 B T"]:
    """RoPE's positions, one or three a token, of what would be at `positions` in a text."""
    return positions if visual is None else positions[None] + jnp.asarray(visual.shift)


class Extended(NamedTuple):
    """What reading new tokens gives."""

    hidden: Float[Array, "B T D"]  # final hidden states, normed; anything at padding
    entries: Entries  # [B, L, K, T, ...], for the cache to take in; `stat` is their log_beta
    queries: Float[Array, "B L Q N H"] | None  # each row's newest; where a row has fewer, its first Q; None: not asked


def extend(
    model: Decoder,
    inputs: Inputs,
    buffer: Buffer,
    *,
    queries: int,
    length: Int[Array, " B"] | None = None,
) -> Extended:
    """Reads new tokens on top of the buffer, with ordinary attention over pool, recent tokens and themselves.

    The buffer is only read; the caller lets the cache take the new entries in.

    Args:
      model: the decoder.
      inputs: the new tokens, [B, T].
      buffer: what is remembered so far.
      queries: how many of each row's newest queries to hand back.
      length: tokens that each row will have once its whole prompt is read; None: once these tokens are read. Longrope
        turns all of a long prompt by its factors for long sequences, also where it is read in chunks. Entries made
        while a sequence was short stay as they were turned, as with a cache of `transformers`.
    """
    cfg, tokens, valid, visual = model.config, jnp.asarray(inputs.tokens), jnp.asarray(inputs.valid), inputs.visual
    length = buffer.seen + valid.sum(axis=1, dtype=jnp.int32) if length is None else length
    pos = buffer.seen[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    as_text = pos if buffer.shift is None else pos + buffer.shift[:, None]
    turn = rope.rotation(_shifted(as_text, visual), length[:, None], cfg)
    first = jnp.maximum(valid.sum(axis=1, dtype=jnp.int32) - queries, 0)
    newest_of_row = jax.vmap(lambda q, at: jax.lax.dynamic_slice_in_dim(q, at, queries))
    by_token = _shares_tokens(cfg, tokens.shape)
    hidden, heads, whole = ("by_token", "by_token", ("fsdp", "tensor")) if by_token else ("hidden", "heads", ("fsdp",))

    def layer_step(x, scanned):
        layer, weight, offset, index, window = scanned
        layer = sharding.gathered(layer, table=sharding.DECODING, along=whole)
        q, k, v, features = layer.project(x, turn)
        if by_token:
            # Made where their token is, and then sent; the compiler would rather send what they are made of.
            q, k, v = (sharding.constrain(a, "by_token") for a in (q, k, v))
            q = sharding.constrain(q, "cached")  # once, for all that attend
        k, v, log_beta = (sharding.constrain(a, "cached") for a in (k, v, log_retention(features, weight, offset)))
        newest = newest_of_row(q, first) if queries else None
        attended = ops.merge([cache.attend(buffer, q, index, heads), ops.causal_attention(q, k, v, window)]).out
        attended = sharding.constrain(attended.astype(q.dtype), heads)
        x = add_deepstack(sharding.constrain(layer.finish(x, attended), hidden), index, visual)
        return x, (k.swapaxes(1, 2), v.swapaxes(1, 2), log_beta, newest)

    x = sharding.constrain(embed(model.embedding[...], tokens, visual), hidden)
    weight, offset = model.final_projection.per_layer(cfg.num_layers, cfg.num_kv_heads)
    windows = cache.window_sizes(cfg.windows)
    scanned = (model.layers, weight, offset, jnp.arange(cfg.num_layers), windows)
    x, (k, v, log_beta, newest) = jax.lax.scan(layer_step, x, scanned)
    by_row = lambda a: a.swapaxes(0, 1)
    everywhere = jnp.broadcast_to(jnp.where(valid, pos, -1)[:, None, None], by_row(log_beta).shape)
    return Extended(
        rms_norm(x, model.final_norm[...], cfg.norm_eps),
        Entries(by_row(k), by_row(v), by_row(log_beta), everywhere),
        None if newest is None else by_row(newest),
    )


def _shares_tokens(cfg: ModelConfig, chunk: tuple[int, ...]) -> bool:
    """Whether devices along `tensor` should each read some of the tokens [B, T], with a layer's whole weights, and not
    all of them with their part of the weights: "weight-gathered" in Pope et al. (arXiv 2211.05102).

    Whatever sends least. By token a device is sent a layer's weights, keys and values. Otherwise the hidden states are
    summed over the devices, behind attention and behind the MLP, and a sum travels twice.
    """
    (B, T), D, H = chunk, cfg.width, cfg.head_size
    if sharding.shards("tensor") == 1 or T % sharding.shards("context", "tensor"):
        return False
    tokens = B * T // sharding.shards(*sharding.ROWS)
    weights = 2 * D * cfg.num_heads * H + 3 * D * cfg.mlp_width
    return weights + tokens * 2 * cfg.num_kv_heads * H < tokens * 2 * 2 * D


def unembed(model: Decoder, hidden: Float[Array, "*axes D"]) -> Float[Array, "*axes V"]:
    """Vocabulary logits, at least float32."""
    return logits(sharding.gathered(output_head(model), "lm_head"), hidden)


def output_head(model: Decoder) -> Float[Array, "V D"]:
    """The matrix that makes logits; the embedding where a model ties them."""
    return (model.embedding if model.lm_head is None else model.lm_head)[...]


def logits(head: Float[Array, "V D"], hidden: Float[Array, "*axes D"]) -> Float[Array, "*axes V"]:
    """Vocabulary logits by `output_head`, at least float32."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=wide)
