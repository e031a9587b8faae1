"""Rows of a buffer, put in, taken out and emptied while the others go on: what serving and parking need.

A row has a constant size, whatever its context, and rows never see each other. So each of these is one compiled program
for all rows and moves exactly one row's bytes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from retention_jax.cache.buffer import Buffer, by_layout
from retention_jax.cache.eviction import evict_full
from retention_jax.parallel import sharding

Row = int | Int[Array, ""]
_ARRAYS = ("pool", "offset", "recent", "recent_len", "seen", "queries", "shift")


def take_row(buffer: Buffer, row: Row) -> Buffer:
    """A buffer of batch 1 with everything that one row remembers; `buffer` stays as it is.

    On a mesh the row's slots stay on their shards. Along `data` and `fsdp`, which share rows out, every device gets it:
    there it can be stored and put in again, but not decoded by itself.

    Raises:
      ValueError: if there is no such row, or the buffer was made for another mesh than it lies on.
    """
    _check_row(buffer, row)
    with sharding.enter_mesh_of(buffer):
        return _take(buffer, jnp.int32(row))


def insert_row(buffer: Buffer, row: Row, one: Buffer) -> Buffer:
    """The buffer with `one`, a buffer of batch 1, in place of a row, of which nothing remains.

    `buffer` is donated: go on with the returned one. The other rows keep every byte.

    Raises:
      ValueError: if there is no such row, or `one` has another batch size, configuration, model shape or dtype (all
        listed).
    """
    _check_row(buffer, row)
    problems = [] if one.seen.shape == (1,) else [f"it must have batch 1, got {one.seen.shape[0]}"]
    if one.config != buffer.config:
        problems.append(f"its configuration must be {buffer.config}, got {one.config}")
    if one.windows != buffer.windows:
        problems.append(f"its layers' windows must be {buffer.windows}, got {one.windows}")
    of_row = lambda part: jax.tree.map(lambda a: f"{a.dtype}{list(a.shape[1:])}", part)
    for name in _ARRAYS if not problems else ():
        wanted, got = of_row(getattr(buffer, name)), of_row(getattr(one, name))
        problems += [f"its {name} must be {wanted}, got {got}"] * (wanted != got)
    if problems:
        raise ValueError("the row to insert: " + "; ".join(problems))
    with sharding.enter_mesh_of(buffer):
        return _insert(buffer, jnp.int32(row), one)


def reset_row(buffer: Buffer, row: Row) -> Buffer:
    """The buffer with a row that has seen nothing, as `cache.empty` makes it. `buffer` is donated.

    Raises:
      ValueError: if there is no such row.
    """
    _check_row(buffer, row)
    with sharding.enter_mesh_of(buffer):
        return _reset(buffer, jnp.int32(row))


def evict_first_full(buffer: Buffer) -> Buffer:
    """Evicts in the first row that has no place for more recent tokens; it must be there. For use within a program.

    Only this row's bytes are read and written. So where rows fill up at different times, each pays for its own
    eviction, and not for one of all rows.
    """
    row = jnp.argmax(buffer.recent_len == buffer.config.recent).astype(jnp.int32)
    return _written(buffer, row, evict_full(_take(buffer, row)))


def _check_row(buffer: Buffer, row: Row) -> None:
    batch = buffer.seen.shape[0]
    if not 0 <= int(row) < batch:
        raise ValueError(f"row must be from 0 to {batch - 1}, the last of the buffer, got {int(row)}")


@jax.jit
def _take(buffer: Buffer, row: Int[Array, ""]) -> Buffer:
    return _laid_out(jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, row, 1, axis=0), buffer))


@functools.partial(jax.jit, donate_argnames="buffer")
def _insert(buffer: Buffer, row: Int[Array, ""], one: Buffer) -> Buffer:
    return _written(buffer, row, one)


@functools.partial(jax.jit, donate_argnames="buffer")
def _reset(buffer: Buffer, row: Int[Array, ""]) -> Buffer:
    blank = jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), buffer)
    unused = lambda entries: entries._replace(pos=entries.pos - 1)
    return _written(buffer, row, blank._replace(pool=unused(blank.pool), recent=unused(blank.recent)))


def _written(buffer: Buffer, row: Int[Array, ""], one: Buffer) -> Buffer:
    write = lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, row, axis=0)
    return _laid_out(jax.tree.map(write, buffer, one))


def _laid_out(buffer: Buffer) -> Buffer:
    """The buffer on the ambient mesh as `layout` says; an axis that the mesh does not divide is whole everywhere."""
    mesh = sharding.ambient()
    if mesh is None:
        return buffer

    def place(spec: sharding.P, a: Array) -> Array:
        where = NamedSharding(mesh, sharding.leading(mesh, spec, a.shape))  # pyright: ignore[reportArgumentType]
        return jax.lax.with_sharding_constraint(a, where)

    return by_layout(place, buffer)
