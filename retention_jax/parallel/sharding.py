"""Meshes, and one table of how everything is laid out on them.

data      sequences
fsdp      sequences too; and the model width of every weight, which is gathered layer by layer where it is used
context   tokens of a sequence, heads while they attend; slots of the cache
tensor    heads, the MLP and the vocabulary, or tokens of a long chunk that is read into the cache; slots of the cache

The mesh is ambient: entry points enter `jax.set_mesh(mesh)`, and code asks for it. Attention and retention mass need
whole sequences but not all heads: there tokens go from `context` to heads and back in all-to-alls, as in Ulysses
(arXiv 2309.14509), and the kernels see what they see on one device.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from jax.core import Tracer
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

AXES = ("data", "fsdp", "context", "tensor")
ROWS = ("data", "fsdp")
HEADS = ("tensor", "context")
# Heads own as many slots as the ranking gives them, so a pool cannot be cut by head. Along `tensor` as along `context`
# devices hold the same sequences and would otherwise hold the same pool, so both cut it.
SLOTS = ("context", "tensor")
T = TypeVar("T")

# Axes of one layer's weight, by the variable's name, and of what the optimiser keeps of it; whatever is not listed is
# on every device.
WEIGHTS = {
    "embedding": P("tensor", "fsdp"),  # V D
    "lm_head": P("tensor", "fsdp"),  # V D
    "q": P("fsdp", "tensor", None),  # D N H
    "k": P("fsdp", "tensor", None),  # D K H
    "v": P("fsdp", "tensor", None),  # D K H
    "o": P("tensor", None, "fsdp"),  # N H D
    "q_bias": P("tensor", None),  # N H
    "k_bias": P("tensor", None),  # K H
    "v_bias": P("tensor", None),  # K H
    "gate_proj": P("fsdp", "tensor"),  # D F
    "up_proj": P("fsdp", "tensor"),  # D F
    "down_proj": P("tensor", "fsdp"),  # F D
    "gate_bias": P("tensor"),  # F
    "up_bias": P("tensor"),  # F
    # Of the gates: float32 with two moments, so that on every device they would weigh as much as a shard of bfloat16.
    "w1": P("fsdp", None),  # D W
    "w2": P("fsdp", None, None),  # W heads W
}

# Axes of weights where keys and values are cached: in decoding every device makes the new entries of its sequences
# itself, so that no key or value travels. k and v are the smallest matrices of a layer.
DECODING = WEIGHTS | {"k": P("fsdp", None, None), "v": P("fsdp", None, None), "k_bias": P(), "v_bias": P()}

# Axes of what a step computes.
ACTIVATIONS = {
    "batch": P(
        ROWS, None
    ),  # B T: token ids, segment ids, label mask; a few bytes a token, so every device has whole rows
    "embedded": P("data", "context", "fsdp"),  # B T D: straight from the embedding, each device with its columns
    "hidden": P(ROWS, "context", None),  # B T D
    "heads": P(ROWS, "context", "tensor", None),  # B T N H
    "attending": P(ROWS, None, HEADS, None),  # B T N H
    "log_beta": P(ROWS, "tensor", "context"),  # B K T
    "patches": P(ROWS, None, None),  # B P D: of a tower; along `context` every device sees all
    "looking": P(ROWS, None, "tensor", None),  # B P N H: of a tower
    "cached": P(ROWS),  # B T K H: new entries; every device that has their sequence gets all of them
    "by_token": P(ROWS, ("context", "tensor")),  # B T D, B T N H: long chunks, read with whole weights
    "scoring": P(ROWS, HEADS, None),  # B K T, B L*K T: beside attention, and for the retention mass
    "scores": P(None, None),  # B T: numbers about tokens, for the host to read
    "blocked": P(
        None, ROWS, "context", None
    ),  # blocks rows shards positions ...: those whose vocabulary logits are made
}

# First axes of the parts of a cache's buffer. A window is small beside a pool, and every device has it whole.
POOL = P(ROWS, SLOTS)  # B slots ...
WINDOW = P(ROWS)  # B ...


def make_mesh(
    devices: Sequence[Any] | None = None, /, *, data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1
) -> Mesh:
    """A mesh over the first data * fsdp * context * tensor devices.

    On TPUs of several slices `data` goes over the slices, whose network is slow, and all else stays within one.

    Raises:
      ValueError: if there are fewer devices, or `data` does not divide among the slices.
    """
    sizes, found = (data, fsdp, context, tensor), jax.devices() if devices is None else list(devices)
    if len(found) < math.prod(sizes):
        raise ValueError(f"a mesh of {' x '.join(map(str, sizes))} devices was asked for, there are {len(found)}")
    found = found[: math.prod(sizes)]
    slices = len({getattr(device, "slice_index", 0) for device in found}) if found[0].platform == "tpu" else 1
    if data % slices:
        raise ValueError(f"the devices are in {slices} slices: mesh data must be a multiple of that, got {data}")
    # An axis may be part of one of the torus's: 8 of a 4 x 4 x 4 is one row and half of another direction.
    if slices == 1:
        placed = mesh_utils.create_device_mesh(sizes, found, allow_split_physical_axes=True)
    else:
        within, over = (data // slices, fsdp, context, tensor), (slices, 1, 1, 1)
        placed = mesh_utils.create_hybrid_device_mesh(within, over, found, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def automatic(mesh: Mesh) -> Mesh:
    """The same mesh with axes whose use the compiler works out, as everything here expects.

    Raises:
      ValueError: if the mesh has an axis that no layout names.
    """
    if unknown := set(mesh.axis_names) - set(AXES):
        raise ValueError(f"a mesh may have the axes {', '.join(AXES)}; got {', '.join(map(str, sorted(unknown)))} too")
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def ambient() -> AbstractMesh | None:
    """The mesh that was entered, also while tracing; None without one, or with one of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def entered() -> Mesh | None:
    """The devices of `ambient()`; not while tracing."""
    return None if ambient() is None else jax.sharding.get_mesh()


def enter_mesh_of(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Enters the mesh that a model's weights are laid out on; the ambient one stays where they are on none.

    Under jit, where weights do not tell, the ambient mesh stays as well.
    """
    array = jax.tree.leaves(model)[0]
    layout = None if isinstance(array, Tracer) else getattr(array, "sharding", None)
    mesh = layout.mesh if isinstance(layout, NamedSharding) else None
    return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext()


def row_parts(model: Any) -> int:
    """Into how many parts the mesh that a model is on cuts a batch: a batch must be a multiple of it."""
    with enter_mesh_of(model):
        return shards(*ROWS)


def mapped_axes(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `axes` that the function being traced is mapped over."""
    return tuple(axis for axis in axes if axis in jax.sharding.get_abstract_mesh().manual_axes)


def mapped(function: Callable[..., T], in_specs: Any, out_specs: Any) -> Callable[..., T]:
    """`function` run by every device of the ambient mesh on its part of the arguments; without a mesh, as it is.

    Specs are rows of the table whose axes, as far as the mesh has them, must divide the arguments.
    """
    mesh = ambient()
    if mesh is None:
        return function
    specs = jax.tree.map(lambda spec: present(mesh, spec), (in_specs, out_specs), is_leaf=lambda x: isinstance(x, P))
    return jax.shard_map(function, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)


def present(mesh: Mesh | AbstractMesh, spec: P) -> P:
    """A row of the table without the axes that the mesh lacks."""
    axes = lambda entry: (entry,) if isinstance(entry, str) else entry or ()
    return P(*(tuple(axis for axis in axes(entry) if axis in mesh.shape) or None for entry in spec))


def shards(*axes: str) -> int:
    """Into how many parts the ambient mesh cuts what is laid out over `axes`."""
    mesh = ambient()
    return 1 if mesh is None else parts(mesh, axes)


def parts(mesh: Mesh | AbstractMesh, entry: str | tuple[str, ...] | None) -> int:
    """Into how many parts an entry of a table's row cuts an axis."""
    return math.prod(mesh.shape.get(axis, 1) for axis in ((entry,) if isinstance(entry, str) else entry or ()))


def fitting(mesh: Mesh | AbstractMesh, spec: P, shape: tuple[int, ...]) -> P:
    """A row of the table for an array of `shape`. If it has more axes than the row, the first ones are not cut.

    Mesh axes that the mesh lacks, or that do not divide the array's axis (8 devices, 2 key/value heads), are left out:
    along them every device holds all.
    """
    fitted: list[str | tuple[str, ...] | None] = [None] * (len(shape) - len(spec))
    for entry, size in zip(spec, shape[len(fitted) :], strict=True):
        kept: tuple[str, ...] = ()
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            if axis in mesh.shape and size % parts(mesh, (*kept, axis)) == 0:
                kept += (axis,)
        fitted.append(kept if len(kept) > 1 else kept[0] if kept else None)
    return P(*fitted)


def warn_of_uncut(mesh: Mesh | AbstractMesh, tree: Any, table: dict[str, P] = WEIGHTS) -> None:
    """Logs, from process 0, one line of the weights that are whole along a mesh axis since it does not divide them."""
    told: dict[str, None] = {}  # in order, once each
    for path, a in jax.tree_util.tree_leaves_with_path(tree):
        name = _name_in(path, table)
        row, shape = table.get(name, P()), a.shape
        for entry, kept, size in zip(reversed(row), reversed(fitting(mesh, row, shape)), reversed(shape), strict=False):
            if parts(mesh, kept) != parts(mesh, entry):
                told[f"{name} ({entry} = {parts(mesh, entry)} does not divide {size})"] = None
    if told and jax.process_index() == 0:
        logging.warning(
            "weights that the mesh does not cut, so that every device holds them whole: %s", ", ".join(told)
        )


def leading(mesh: Mesh | AbstractMesh, spec: P, shape: tuple[int, ...]) -> P:
    """A row of the table for the first axes of an array of `shape`, as `fitting` has it; axes behind are not cut."""
    return fitting(mesh, P(*spec, *(None,) * (len(shape) - len(spec))), shape)


def of_activation(mesh: Mesh | AbstractMesh, row: str, shape: tuple[int, ...]) -> P:
    """A row of ACTIVATIONS for an array of `shape`, as `leading` has it."""
    return leading(mesh, ACTIVATIONS[row], shape)


def constrain(x: Array, row: str) -> Array:
    """Lays an activation out on the ambient mesh as ACTIVATIONS says; without a mesh, `x` as it is."""
    mesh = ambient()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, of_activation(mesh, row, x.shape)))  # pyright: ignore


def gathered(weights: T, name: str = "", table: dict[str, P] = WEIGHTS, along: tuple[str, ...] = ("fsdp",)) -> T:
    """Weights laid out by `table`, whole along the axes `along`: what stands in front of their use.

    Called with one layer's, inside the loop over layers, so that one layer is whole at a time; or with one weight and
    its name.
    """
    mesh = ambient()
    if mesh is None or parts(mesh, along) == 1:
        return weights

    def whole(path: tuple[Any, ...], a: Array) -> Array:
        row = table[name] if name else _row_of(path, table)
        spec = P(*(None if axis in along else axis for axis in fitting(mesh, row, a.shape)))
        return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, spec))  # pyright: ignore[reportArgumentType]

    return jax.tree_util.tree_map_with_path(whole, weights)


def of_weight(mesh: Mesh | AbstractMesh, name: str, shape: tuple[int, ...], table: dict[str, P]) -> NamedSharding:
    """The layout of a variable, stacked over layers or not, as `fitting` has it."""
    return NamedSharding(mesh, fitting(mesh, table.get(name, P()), shape))  # pyright: ignore[reportArgumentType]


def of_tree(mesh: Mesh | AbstractMesh, tree: Any, table: dict[str, P] = WEIGHTS) -> Any:
    """The layout of every array in a model, a state, or what an optimiser keeps of one: by the variable's name."""
    layout = lambda path, a: NamedSharding(mesh, fitting(mesh, _row_of(path, table), a.shape))  # pyright: ignore
    return jax.tree_util.tree_map_with_path(layout, tree)


def constrain_weights(tree: T) -> T:
    """Lays what is named as weights are out on the ambient mesh, and everything else on every device."""
    mesh = ambient()
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, of_tree(mesh, tree))


def _row_of(path: tuple[Any, ...], table: dict[str, P] = WEIGHTS) -> P:
    return table.get(_name_in(path, table), P())


def _name_in(path: tuple[Any, ...], table: dict[str, P]) -> str:
    """The last name on a variable's path that the table has; "" for none."""
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    return next((name for name in reversed(names) if name in table), "")


def on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """All of an array, of whose parts every process may hold some; every process must call it."""
    if isinstance(array, np.ndarray):
        return array
    here = array.is_fully_addressable or array.is_fully_replicated
    return np.asarray(array if here else multihost_utils.process_allgather(array, tiled=True))
