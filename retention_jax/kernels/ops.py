"""The operations the model and the cache call, each under one name.

Which implementation stands behind a name is decided here and nowhere else, once for the process: Pallas kernels on TPU,
plain XLA everywhere else, or what the environment variable RETENTION_JAX_KERNELS says ("tpu", "triton" or "xla"). It is
logged, and nothing falls back: kernels that are asked for where they cannot run fail. The Triton kernels become the
default on GPU once they are measured there. On several devices `on_mesh.py` maps the training operations over the
ambient mesh; what is laid out over devices without one cannot go through a kernel. `reference.py` defines what each
operation of training must compute, the plain XLA version what the others must.
"""

import functools
import os
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float, Int, Shaped

from retention_jax.kernels import (
    blocks,
    buffer_attention_tpu,
    buffer_attention_triton,
    buffer_attention_xla,
    evict_pack_tpu,
    evict_pack_triton,
    evict_select_tpu,
    evict_xla,
    on_mesh,
    retention_attention_tpu,
    retention_attention_triton,
    retention_attention_xla,
    retention_mass_tpu,
    retention_mass_triton,
    retention_mass_xla,
    slot_shards,
    triton_call,
)
from retention_jax.kernels.buffer_attention_xla import Window
from retention_jax.kernels.evict_xla import slot_heads
from retention_jax.kernels.key_products import expected_weight, redundancy
from retention_jax.kernels.key_products import received as attention_received
from retention_jax.kernels.partial_softmax import Partial, merge

__all__ = [
    "Partial",
    "Window",
    "attention_received",
    "buffer_attention",
    "causal_attention",
    "expected_weight",
    "implementation",
    "merge",
    "pack_order",
    "pack_rows",
    "redundancy",
    "retention_attention",
    "retention_mass",
    "select_top",
    "slot_heads",
]

VARIABLE = "RETENTION_JAX_KERNELS"
Implementation = Literal["tpu", "triton", "xla"]


@functools.cache
def implementation() -> Implementation:
    """Which implementation this process uses.

    Raises:
      ValueError: if the environment variable names none, or Triton where it cannot run.
    """
    asked = os.environ.get(VARIABLE)
    known = get_args(Implementation)
    if asked is not None and asked not in known:
        raise ValueError(f"environment variable {VARIABLE} must be one of {', '.join(known)} or absent, got {asked!r}")
    backend = jax.default_backend()
    chosen = asked or ("tpu" if backend == "tpu" else "xla")
    if chosen == "triton":
        triton_call.check_available()
    logging.info("kernels: %s (backend %s, %s=%s)", chosen, backend, VARIABLE, asked)
    return cast(Implementation, chosen)


def retention_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    log_beta: Float[Array, "B K T"],
    segment_ids: Int[Array, "B T"],
    window: Int[Array, ""] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention inside documents, in which every key fades with age: `reference.retention_attention`."""
    operations = {
        "tpu": retention_attention_tpu.retention_attention,
        "triton": retention_attention_triton.retention_attention,
        "xla": retention_attention_xla.retention_attention,
    }
    return on_mesh.attention(operations[implementation()], q, k, v, log_beta, segment_ids, window)


def retention_mass(log_beta: Float[Array, "B heads T"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B heads T"]:
    """How many entries a head still keeps at each token: `reference.retention_mass`."""
    operations = {
        "tpu": retention_mass_tpu.retention_mass,
        "triton": retention_mass_triton.retention_mass,
        "xla": retention_mass_xla.retention_mass,
    }
    return on_mesh.mass(operations[implementation()], log_beta, segment_ids)


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    window: Int[Array, ""] | None = None,
) -> Partial:
    """Ordinary causal attention of new tokens among themselves, for merging with what the buffer holds: retention
    attention in which nothing fades.

    `window` as in `reference.retention_attention`. Gradients there are only in XLA.
    """
    (B, T, N, H), K = q.shape, k.shape[2]
    if T == 1:  # a token by itself, whose softmax is 1
        wide = np.promote_types(q.dtype, np.float32)  # jnp refuses under strict promotion
        logits = jnp.einsum("btkgh,btkh->btkg", q.reshape(B, T, K, N // K, H), k, preferred_element_type=wide)
        return Partial(jnp.repeat(v.astype(wide), N // K, axis=2), (logits * H**-0.5).reshape(B, T, N))
    operations = {
        "tpu": retention_attention_tpu.retention_attention_with_lse,
        "triton": retention_attention_triton.retention_attention_with_lse,
        "xla": retention_attention_xla.retention_attention_with_lse,
    }

    def attend(*inputs: Any) -> Partial:
        out, lse = operations[implementation()](*inputs)
        return Partial(out.astype(lse.dtype), lse.swapaxes(1, 2))

    no_bias, one_document = jnp.zeros((B, K, T), jnp.float32), jnp.ones((B, T), jnp.int32)
    return on_mesh.attention(attend, q, k, v, no_bias, one_document, window)


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
) -> Partial:
    """Ordinary attention of new tokens over everything their key/value head holds: `buffer_attention_xla`.

    The recent windows are those of all layers: a kernel is told which one to read, so that none is copied.
    """
    operations = {
        "tpu": buffer_attention_tpu.buffer_attention,
        "triton": buffer_attention_triton.buffer_attention,
        "xla": buffer_attention_xla.buffer_attention,
    }
    return operations[implementation()](
        q,
        pool_k=pool_k,
        pool_v=pool_v,
        offset=offset,
        recent_k=recent_k,
        recent_v=recent_v,
        recent_range=recent_range,
        layer=layer,
        window=window,
    )


def select_top(
    score: Float[Array, "B E"],
    pos: Int[Array, "B E"],
    head: Int[Array, "B E"],
    live: Bool[Array, "B E"],
    *,
    capacity: int | Int[Array, "B groups"],
    groups: int,
    heads_of_group: int,
    shared: int,
) -> Bool[Array, "B E"]:
    """The best entries of each row, or of each group of heads of each row: `evict_xla.select_top`.

    XLA does what the TPU's kernel cannot: devices that share a pool count together between the steps of the search,
    groups are of several heads or have capacities of their own, and the keys of a sequence, as of a full cache, are
    more than fit on the chip. On GPU XLA fuses every step into one read of the keys; no kernel has been measured there.
    """
    whole = groups == 1 or heads_of_group == 1  # a row's entries together, or each head's
    on_chip = blocks.select_vmem_bytes(score.shape[1]) <= blocks.VMEM_BUDGET
    if implementation() == "tpu" and isinstance(capacity, int) and whole and on_chip and slot_shards.count() == 1:
        return evict_select_tpu.select_top(score, pos, head, live, capacity=capacity, groups=groups, shared=shared)
    each = 1 if groups == 1 else heads_of_group  # of one group nobody asks which it is
    return evict_xla.select_top(
        score, pos, head, live, capacity=capacity, groups=groups, shared=shared, heads_of_group=each
    )


def pack_order(
    keep: Bool[Array, "B E"], head: Int[Array, "B E"], offset: Int[Array, "B heads_and_1"], window: int
) -> tuple[Any, Int[Array, "B heads_and_1"]]:
    """What `pack_rows` needs to know, and the new offsets: `evict_xla.pack_order`."""
    operations = {"tpu": evict_pack_tpu.pack_order, "triton": evict_xla.pack_order, "xla": evict_xla.pack_order}
    return operations[implementation()](keep, head, offset, window)


def pack_rows(
    pool: Shaped[Array, "B S *H"], window: Shaped[Array, "B heads_window *H"], order: Any
) -> Shaped[Array, "B S *H"]:
    """The pool after packing, zeros where nothing lies: `evict_xla.pack_rows`."""
    operations = {"tpu": evict_pack_tpu.pack_rows, "triton": evict_pack_triton.pack_rows, "xla": evict_xla.pack_rows}
    return operations[implementation()](pool, window, order)
