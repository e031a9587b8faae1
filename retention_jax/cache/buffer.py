"""The global key/value buffer: the only place that enforces the budget.

    pool     for each sequence one flat array of L*K*M slots; head (l, h) owns slots offset[lh] : offset[lh + 1],
             lh = l*K + h, in order of position. Layers and heads own as many slots as the ranking gives them.
    recent   a dense array of the newest tokens: every head gets every new one.

An eviction (`eviction.py`) merges recent tokens into the pool: it scores every live entry of a sequence, keeps the best
L*K*M over all layers and heads together, and packs them. Between two evictions the pool never changes, so reads are
contiguous. All shapes are static; memory is L*K*(M + R) slots at any context length.

Ties: the newer token stays; for the same token, the lower (l, h).

A layer with a sliding window never again sees an entry that has fallen out of it. Attention masks such an entry by its
position; the next eviction drops it before anything is ranked, whatever protects it, so that layers which see further
get its slot.

On a mesh, devices share the sequences out, and those that have the same sequences share their pool: n slot shards of
L*K*M / n slots, each with an `offset` of its own. Recent tokens are whole on all of them. Attention over a shard's
slots is a part of a softmax, and parts are merged; `selection.deal` tells how evictions stay exact. The functions run
on each device as if its shard were all there is; where they must know of the others they ask `slot_shards`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from retention_jax.config import CacheConfig, ModelConfig
from retention_jax.kernels import ops, slot_shards
from retention_jax.kernels.partial_softmax import Partial
from retention_jax.parallel import sharding
from retention_jax.runtime.arrays import AnyArray

jax.tree_util.register_static(CacheConfig)


class Windows(tuple[int, ...]):
    """Tokens that each layer sees, the newest included. Static."""


jax.tree_util.register_static(Windows)


def window_sizes(windows: tuple[int, ...] | None) -> Int[Array, " L"] | None:
    """Tokens that each layer sees, as an array to index by the layer; None where all layers see everything."""
    return None if windows is None else jnp.asarray(windows, jnp.int32)


class Entries(NamedTuple):
    """Cached tokens: `axes` is [B, slots] in the pool and [B, L, K, tokens] in `recent`. Unused slots have pos -1."""

    k: Float[Array, "*axes H"]
    v: Float[Array, "*axes H"]
    stat: Float[Array, "*axes"]  # what an entry carries for the policy: its log_beta, or what the table says
    pos: Int[Array, "*axes"]


class Buffer(NamedTuple):
    """What is remembered of B sequences."""

    pool: Entries
    offset: Int[Array, "B shards_of_heads_and_1"]
    recent: Entries
    recent_len: Int[Array, " B"]  # live tokens in `recent`; always the newest ones of the sequence
    seen: Int[Array, " B"]  # tokens processed so far
    queries: Float[Array, "B L Q N H"] | None  # the newest, in a ring, for policies that ask for them
    # What RoPE's position of the next text token is more than `seen`, after pictures; None for models without M-RoPE.
    shift: Int[Array, " B"] | None
    windows: Windows | None  # static; None where all layers see everything
    config: CacheConfig  # static

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, used or not: L*K*(M + R) times the size of a key, a value, a statistic and a position.

        Queries are counted too, for policies that ask for them.
        On a mesh, beside this, every slot shard but one has a copy of the recent tokens.
        """
        return sum(a.nbytes for a in jax.tree.leaves((self.pool, self.recent, self.queries)))

    @property
    def shards(self) -> int:
        """Into how many slot shards the pool is cut."""
        L, K = self.recent.pos.shape[1:3]
        return self.offset.shape[1] // (L * K + 1)

    @property
    def live(self) -> Int[AnyArray, " B"]:
        """Live entries of each row, pool and recent tokens together."""
        L, K = self.recent.pos.shape[1:3]
        in_pool = self.offset[:, L * K :: L * K + 1].sum(axis=1, dtype=jnp.int32)
        return in_pool + L * K * self.recent_len

    def positions(self, row: int) -> list[list[np.ndarray]]:
        """Kept positions of one row: a list over layers of a list over key/value heads of sorted integers."""
        L, K = self.recent.pos.shape[1:3]
        arrays = (self.offset, self.pool.pos, self.recent.pos, self.recent_len)
        offset, pool, recent, recent_len = (sharding.on_host(a)[row] for a in arrays)
        shards = list(zip(offset.reshape(self.shards, -1), pool.reshape(self.shards, -1), strict=True))
        of_head = lambda i: [pos[begin[i] : begin[i + 1]] for begin, pos in shards] + [recent[0, 0, :recent_len]]
        kept = [np.sort(np.concatenate(of_head(i))) for i in range(L * K)]
        return [kept[l * K : (l + 1) * K] for l in range(L)]


def empty(model: ModelConfig, cache: CacheConfig, batch: int) -> Buffer:
    """A buffer that has seen nothing, laid out on the ambient mesh if there is one.

    Raises:
      ValueError: where the mesh does not divide the batch or the pool.
    """
    slots = model.num_layers * model.num_kv_heads * cache.budget
    row_parts, slot_parts = sharding.shards(*sharding.ROWS), sharding.shards(*sharding.SLOTS)
    problems = []
    if batch % row_parts:
        problems.append(f"the batch must be a multiple of mesh data * fsdp = {row_parts}, got {batch}")
    if slots % slot_parts:
        problems.append(
            f"layers * key/value heads * budget must be a multiple of mesh context * tensor = {slot_parts}, got "
            f"{model.num_layers} * {model.num_kv_heads} * {cache.budget} = {slots}"
        )
    if slot_parts > 1 and cache.row.scope != "all":
        problems.append(f"policy {cache.policy!r} needs whole heads: mesh context * tensor must be 1, got {slot_parts}")
    if problems:
        raise ValueError("buffer: " + "; ".join(problems))
    return _empty(model, cache, batch)


def shapes(model: ModelConfig, cache: CacheConfig, batch: int) -> Buffer:
    """The shapes and dtypes of `empty`, laid out on the ambient mesh: what compiles a program ahead of time.

    Raises:
      ValueError: as `empty` does.
    """
    mesh, buffer = sharding.entered(), jax.eval_shape(functools.partial(empty, model, cache, batch))
    if mesh is None:
        return buffer

    def place(spec: sharding.P, a: Any) -> jax.ShapeDtypeStruct:
        where = jax.sharding.NamedSharding(mesh, sharding.present(mesh, spec))
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)

    return by_layout(place, buffer)


def queries_wanted(cache: CacheConfig, tokens: int) -> int:
    """How many of the newest queries of so many tokens the cache's policy asks for."""
    return cache.row.queries(cache.observe, tokens)


def full_nbytes(model: ModelConfig, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens in a cache that keeps everything, all layers and heads."""
    return 2 * tokens * model.num_layers * model.num_kv_heads * model.head_size * jnp.dtype(model.dtype).itemsize


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(model: ModelConfig, cache: CacheConfig, batch: int) -> Buffer:
    """Compiled, so that no device ever holds more than its parts."""
    L, K, H = model.num_layers, model.num_kv_heads, model.head_size

    def entries(*axes: int) -> Entries:
        zeros = lambda: jnp.zeros((*axes, H), model.dtype)  # k and v must not be one buffer: both are donated
        return Entries(zeros(), zeros(), jnp.zeros(axes, jnp.float32), jnp.full(axes, -1, jnp.int32))

    queries = queries_wanted(cache, cache.recent)
    buffer = Buffer(
        pool=entries(batch, L * K * cache.budget),
        offset=jnp.zeros((batch, sharding.shards(*sharding.SLOTS) * (L * K + 1)), jnp.int32),
        recent=entries(batch, L, K, cache.recent),
        recent_len=jnp.zeros(batch, jnp.int32),
        seen=jnp.zeros(batch, jnp.int32),
        queries=jnp.zeros((batch, L, queries, model.num_heads, H), model.dtype) if queries else None,
        shift=None if model.mrope is None else jnp.zeros(batch, jnp.int32),
        windows=None if model.windows is None else Windows(model.windows),
        config=cache,
    )
    return on_every_device(lambda buffer: buffer, buffer)


def layout(buffer: Buffer) -> Buffer:
    """The rows of the table that a buffer's parts are laid out by.

    Raises:
      ValueError: if the ambient mesh has another number of slot shards than the buffer was made for.
    """
    if buffer.shards != (shards := sharding.shards(*sharding.SLOTS)):
        raise ValueError(f"the buffer was made for {buffer.shards} slot shards, but the mesh has {shards}")
    pool, window = sharding.POOL, sharding.WINDOW
    rest = {name: window for name in ("recent", "recent_len", "seen", "queries", "shift")}
    return buffer._replace(pool=pool, offset=pool, **rest)


def by_layout(place: Callable[[sharding.P, Any], Any], buffer: Buffer) -> Buffer:
    """`place(row, array)` of every array of a buffer, with the row of the table that it is laid out by."""
    of_part = lambda row, part: jax.tree.map(functools.partial(place, row), part)
    return jax.tree.map(of_part, layout(buffer), buffer, is_leaf=lambda x: isinstance(x, sharding.P))


def on_every_device(function: Callable[..., Buffer], buffer: Buffer, *by_row: Entries | Array | None) -> Buffer:
    """`function(buffer, *by_row)` over the ambient mesh: every device gets its rows, and its shard of their pools."""
    parts = layout(buffer)
    return sharding.mapped(function, (parts, *(sharding.WINDOW for _ in by_row)), parts)(buffer, *by_row)


def attend(buffer: Buffer, q: Float[Array, "B T N H"], layer: Int[Array, ""], row: str) -> Partial:
    """Attention of new tokens over all that one layer holds, laid out as the `row` of `sharding.ACTIVATIONS`."""
    mesh = sharding.ambient()
    spec = sharding.P() if mesh is None else sharding.of_activation(mesh, row, q.shape)
    parts = (layout(buffer), sharding.WINDOW, sharding.P())
    attend_here = functools.partial(_attend, spec=spec)
    return sharding.mapped(attend_here, parts, Partial._make((spec, sharding.P(*spec[:3]))))(buffer, q, layer)


def _attend(buffer: Buffer, q: Float[Array, "B T N H"], layer: Int[Array, ""], spec: sharding.P) -> Partial:
    """The shards share the recent tokens out, so that all have the same to read."""
    K, R = buffer.recent.pos.shape[2:]
    here = -(-R // slot_shards.count())
    end = jnp.minimum(buffer.recent_len, (slot_shards.index() + 1) * here)
    begin = jnp.minimum(slot_shards.index() * here, end)
    window, sizes = None, window_sizes(buffer.windows)
    if sizes is not None:
        window = ops.Window(sizes[layer], buffer.seen, buffer.seen - buffer.recent_len, buffer.pool.pos)
    return slot_shards.merge(
        ops.buffer_attention(
            q,
            pool_k=buffer.pool.k,
            pool_v=buffer.pool.v,
            offset=jax.lax.dynamic_slice_in_dim(buffer.offset, layer * K, K + 1, axis=1),
            recent_k=buffer.recent.k,
            recent_v=buffer.recent.v,
            recent_range=jnp.stack([begin, end], axis=1),
            layer=layer,
            window=window,
        ),
        spec,
    )
