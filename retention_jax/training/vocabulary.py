"""Sums of losses over the vocabulary, made only where a position counts: logits are most of what such a loss costs.

Each device moves its positions with weight to the front, in their order, and cuts all of them into blocks of equal
size. A loop runs over the blocks that have a position with weight on some device, forward and again backward; the rest
is never touched. So the cost grows with the number of labels, and [T, V] never exists at once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from retention_jax.parallel import sharding

SMALLEST_BLOCK = 128  # positions: fewer leave a matrix unit idle
PARTS = 16  # blocks of a device at least, above the smallest: half a block is wasted on average

# From the head and a block's next tokens and hidden states, each term of each of its positions.
Terms = Callable[..., Float[Array, "terms rows shards block"]]


class Blocks(NamedTuple):
    """Positions in blocks, those with weight first: `rows` and `shards` are what devices hold apart from each other."""

    weights: Float[Array, "blocks rows shards block terms"]
    targets: Int[Array, "blocks rows shards block"]
    hidden: tuple[Float[Array, "blocks rows shards block D"], ...]
    occupied: Int[Array, ""]  # blocks that have a position with weight on some device


def weighted_sum(
    terms: Terms,
    head: Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    weights: Float[Array, "terms B T"],
    hidden: tuple[Float[Array, "B T D"], ...],
    most: int,
) -> Float[Array, " terms"]:
    """Sum over positions of `terms(head, next token, *hidden) * weights`.

    Gradients reach `head` and `hidden`, each at a cost only where it is asked for; weights have none.

    Args:
      terms: a function that closes over no array.
      head: makes logits, whole along `fsdp`.
      tokens: ids; a position's target is the token behind it.
      weights: 0 where a position does not count in a term.
      hidden: final hidden states, of which `terms` makes logits.
      most: positions of a block on each device, at most.
    """
    following = jnp.roll(tokens, -1, axis=1)  # behind a row's last token there is nothing, and no weight
    blocks = _compact(jax.lax.stop_gradient(jnp.moveaxis(weights, 0, -1)), following, hidden, most)
    return _sum(terms, head, blocks.hidden, blocks._replace(hidden=()))


def block_size(positions: int, most: int) -> int:
    """Positions of a block, of those that a device has."""
    return min(most, max(SMALLEST_BLOCK, -(-positions // PARTS)), positions)


def _compact(
    weights: Float[Array, "B T terms"],
    targets: Int[Array, "B T"],
    hidden: tuple[Float[Array, "B T D"], ...],
    most: int,
) -> Blocks:
    mesh = sharding.ambient()
    layout = P(None, None) if mesh is None else P(*sharding.of_activation(mesh, "hidden", hidden[0].shape)[:2])
    rows, shards = (1, 1) if mesh is None else (sharding.parts(mesh, entry) for entry in layout)
    block = block_size(targets.size // (rows * shards), most)

    def on_device(weights: Array, targets: Array, hidden: tuple[Array, ...]) -> Any:
        counted = jnp.any(weights != 0, axis=-1).reshape(-1)
        order = jnp.argsort(~counted, stable=True)

        def cut(a: Array) -> Array:
            a = a.reshape(order.size, *a.shape[2:]).at[order].get(unique_indices=True, mode="promise_in_bounds")
            a = jnp.pad(a, [(0, -order.size % block)] + [(0, 0)] * (a.ndim - 1))
            return a.reshape(-1, 1, 1, block, *a.shape[1:])

        return cut(weights), cut(targets), tuple(map(cut, hidden)), counted.sum(dtype=jnp.int32)[None, None]

    if mesh is not None:
        by_block = P(None, *layout)
        on_device = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(layout, layout, layout),
            out_specs=(by_block, by_block, by_block, layout),
            check_vma=False,
        )
    weights, targets, hidden, counted = on_device(weights, targets, hidden)
    return Blocks(weights, targets, hidden, -(-jnp.max(counted) // block))


def _one_block(terms: Terms, head: Array, hidden: tuple[Array, ...], targets: Array, weights: Array) -> Array:
    return jnp.sum(terms(head, targets, *hidden) * jnp.moveaxis(weights, -1, 0), axis=(1, 2, 3))


def _at(i: Array, tree: Any) -> Any:
    """Block i of every array."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(terms: Terms, head: Array, hidden: tuple[Array, ...], blocks: Blocks) -> Array:
    """The loop over occupied blocks. The hidden states are an argument of their own: they have a gradient."""

    def add(i: Array, total: Array) -> Array:
        return total + _one_block(terms, head, _at(i, hidden), *_at(i, (blocks.targets, blocks.weights)))

    return jax.lax.fori_loop(0, blocks.occupied, add, jnp.zeros(blocks.weights.shape[-1], jnp.float32))


def _sum_fwd(terms: Terms, head: CustomVJPPrimal, hidden: Any, blocks: Any) -> tuple[Array, Any]:
    is_primal = lambda x: isinstance(x, CustomVJPPrimal)
    value = lambda tree: jax.tree.map(lambda x: x.value, tree, is_leaf=is_primal)
    perturbed = (head.perturbed, tuple(h.perturbed for h in hidden))
    given = (value(head), value(hidden), value(blocks))
    # What is asked for is known while tracing, and goes along as the structure of the residuals.
    return _sum(terms, *given), (given, jax.tree.map(lambda asked: () if asked else None, perturbed))


def _sum_bwd(terms: Terms, residuals: Any, cotangent: Array) -> tuple[Any, ...]:
    (head, hidden, blocks), (ask_head, ask_hidden) = residuals
    asked = [i for i, ask in enumerate(ask_hidden) if ask is not None]

    def add(i: Array, grads: tuple[Array | None, list[Array]]) -> tuple[Array | None, list[Array]]:
        here, rest = _at(i, hidden), _at(i, (blocks.targets, blocks.weights))

        def of_asked(head_or_none: Array | None, some: list[Array]) -> Array:
            states = list(here)
            for at, state in zip(asked, some, strict=True):
                states[at] = state
            return _one_block(terms, head if head_or_none is None else head_or_none, tuple(states), *rest)

        pull = jax.vjp(of_asked, None if ask_head is None else head, [here[at] for at in asked])[1]
        of_head, of_hidden = pull(cotangent)
        total = None if grads[0] is None else grads[0] + of_head.astype(grads[0].dtype)
        place = lambda a, g: sharding.constrain(jax.lax.dynamic_update_index_in_dim(a, g, i, 0), "blocked")
        return total, list(map(place, grads[1], of_hidden))

    wide = jnp.promote_types(head.dtype, jnp.float32)
    zeros = (None if ask_head is None else jnp.zeros(head.shape, wide), [jnp.zeros_like(hidden[at]) for at in asked])
    of_head, of_hidden = jax.lax.fori_loop(0, blocks.occupied, add, zeros)
    found = dict(zip(asked, of_hidden, strict=True))
    return (
        None if of_head is None else of_head.astype(head.dtype),
        tuple(found.get(at) for at in range(len(hidden))),
        None,
    )


_sum.defvjp(_sum_fwd, _sum_bwd, symbolic_zeros=True)
