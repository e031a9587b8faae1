"""A row of a buffer as a value on the host and as a file: a conversation that is parked, and taken up again bitwise.

A file is safetensors: one tensor for each array of the row, and metadata with the format's version, the cache's
configuration, the layers' windows, what the writer adds, and a checksum of all that and of every byte. So a file that
is torn, or has a flipped bit, is found out. No code is ever run from one.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  # registers bfloat16 with numpy, which safetensors asks for
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from retention_jax.cache.buffer import Buffer, shapes
from retention_jax.cache.rows import take_row
from retention_jax.config import CacheConfig, ModelConfig, conversion
from retention_jax.parallel import sharding
from retention_jax.runtime import files

FORMAT = 1


@runtime_checkable
class HasConfig(Protocol):
    """A model: what stands on higher floors."""

    config: ModelConfig


def save_buffer(buffer: Buffer, row: int, path: str | pathlib.Path) -> None:
    """Writes what one row remembers to a file, whole or not at all.

    The file does not tell which weights the row was made with: note them beside it. On several processes all must call
    it, and the first one writes.

    Raises:
      ValueError: if there is no such row.
      OSError: where the file cannot be written.
    """
    held = to_host(take_row(buffer, row))
    if jax.process_index() == 0:
        write(pathlib.Path(path), held, {})


def load_buffer(model: HasConfig, path: str | pathlib.Path) -> Buffer:
    """The row of a file as a buffer of batch 1, laid out as the model is.

    `decode`, `prefill` and `generate` go on from it with its own configuration, `buffer.config`, and `insert_row` puts
    it beside other rows.

    Args:
      model: the decoder that the row was made with.
      path: of a file that `save_buffer` wrote.

    Raises:
      ValueError: if the file is damaged or of another format, or the row does not fit the model, its dtype, or the
        number of slot shards of its mesh (all listed).
      OSError: where the file cannot be read.
    """
    found = read(pathlib.Path(path))
    with sharding.enter_mesh_of(model):
        wanted = shapes(model.config, found.config, 1)
        return to_device(assemble(found, wanted), wanted)


def to_host(one: Buffer) -> Buffer:
    """The same buffer in NumPy arrays. Nothing changes them any more."""
    for array in jax.tree.leaves(one):
        array.copy_to_host_async()
    return jax.tree.map(sharding.on_host, one)


def to_device(held: Buffer, like: Buffer) -> Buffer:
    """A buffer of NumPy arrays on the devices, laid out as `like`, which may be `buffer.shapes`."""

    def place(array: np.ndarray, wanted: Any) -> jax.Array:
        # A copy: what the device holds is donated later, and CPUs would share the memory of `held`.
        return jnp.array(array) if wanted.sharding is None else jax.device_put(array.copy(), wanted.sharding)

    return jax.tree.map(place, held, like)


def named(buffer: Buffer) -> dict[str, Any]:
    """All arrays of a buffer by name: "pool.k"."""
    leaves = jax.tree_util.tree_leaves_with_path(buffer)
    return {jax.tree_util.keystr(path, simple=True, separator="."): array for path, array in leaves}


def write(path: pathlib.Path, held: Buffer, told: Mapping[str, Any]) -> None:
    """Writes a buffer of NumPy arrays, with what else is to be told of it; raises OSError."""
    arrays = {name: np.ascontiguousarray(a) for name, a in named(held).items()}
    about = {
        "format": FORMAT,
        "cache": dataclasses.asdict(held.config),
        "windows": None if held.windows is None else list(held.windows),
        "told": dict(told),
    }
    text = json.dumps(about, sort_keys=True)
    metadata = {"retention_jax": text, "sha256": _checksum(text, arrays)}
    try:
        files.write_atomically(path, lambda file: save_file(arrays, file, metadata))
    except SafetensorError as error:  # a full disk is one too
        raise OSError(f"{path}: {error}") from error


class Found(NamedTuple):
    """What is in a file, its checksum right."""

    path: pathlib.Path
    arrays: dict[str, np.ndarray]
    config: CacheConfig
    windows: tuple[int, ...] | None
    told: dict[str, Any]


def read(path: pathlib.Path) -> Found:
    """What `write` wrote.

    Raises:
      ValueError: if the file is damaged, of another format, or no snapshot.
      OSError: where the file cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file: {error}") from error
    text = metadata.get("retention_jax", "")
    if metadata.get("sha256") != _checksum(text, arrays):
        raise ValueError(f"{path}: damaged, or no snapshot of a row: its bytes do not have the checksum that it names")
    about = json.loads(text)
    if about["format"] != FORMAT:
        raise ValueError(f"{path}: a snapshot of format {about['format']}, but this version reads format {FORMAT}")
    config = conversion.from_dict(CacheConfig, about["cache"], f"{path}: cache")
    windows = None if about["windows"] is None else tuple(about["windows"])
    return Found(path, arrays, config, windows, about["told"])


def assemble(found: Found, wanted: Buffer) -> Buffer:
    """The buffer of a file, in NumPy arrays.

    Raises:
      ValueError: if it cannot stand in for `wanted`, which may be `buffer.shapes` (all that differs is listed).
    """
    problems = []
    for name, ours, theirs in (
        ("cache", wanted.config, found.config),
        ("layers' windows", wanted.windows and tuple(wanted.windows), found.windows),
    ):
        problems += [f"its {name} must be {ours}, got {theirs}"] * (ours != theirs)
    described = lambda arrays: {name: f"{a.dtype}{list(a.shape)}" for name, a in arrays.items()}
    got, needed = described(found.arrays), described(named(wanted))
    for name in sorted(got.keys() | needed.keys()):
        pair = needed.get(name, "nothing"), got.get(name, "nothing")
        problems += [f"its {name} must be {pair[0]}, got {pair[1]}"] * (pair[0] != pair[1])
    if problems:
        raise ValueError(f"{found.path}: the row does not fit the model: {'; '.join(problems)}")
    return jax.tree.unflatten(jax.tree.structure(wanted), [found.arrays[name] for name in named(wanted)])


def _checksum(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape};".encode())
        found.update(arrays[name].reshape(-1).view(np.uint8).data)
    return found.hexdigest()
