"""Named tensors in safetensors files, and where each one lives in a model. Nothing here knows any name."""

import contextlib
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  # registers bfloat16 with numpy, which safetensors asks for
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from retention_jax.models.decoder import Decoder
from retention_jax.parallel.sharding import on_host
from retention_jax.runtime.files import first_problems, write_atomically, write_folder_atomically

Layout = Literal["in", "out", "flat", "same"]
Shape = tuple[int, ...]
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of files, by their names in safetensors
READ_BYTES = 64 << 20  # read at a time; the rest of a tensor exists once, in its final dtype and layout


class Place(NamedTuple):
    """Where a named tensor lives: variable path, index on its first (layer) axis, and how the file lays it out."""

    path: tuple[str, ...]
    layer: int | None
    layout: Layout  # in: [outputs, first axis]; out: [last axis, inputs]; flat: [size]; same: as here
    rows: tuple[int, int] | None = None  # first row and all rows of the file's tensor, where this is but a part of it

    def axes(self, rank: int) -> list[tuple[int, ...]]:
        """Which axes here each axis in the file holds, one after the other."""
        here = tuple(range(rank))
        match self.layout:
            case "in":
                return [here[1:], here[:1]]
            case "out":
                return [here[-1:], here[:-1]]
            case "flat":
                return [here]
            case "same":
                return [(a,) for a in here]

    def file_shape(self, shape: Shape) -> Shape:
        """Shape of the file's whole tensor."""
        first, *rest = (math.prod(shape[a] for a in axes) for axes in self.axes(len(shape)))
        return (first if self.rows is None else self.rows[1], *rest)

    def from_file(self, value: np.ndarray, shape: Shape) -> np.ndarray:
        """A file's tensor, or a block of it, as one of `shape` here."""
        order = [a for axes in self.axes(len(shape)) for a in axes]
        return value.reshape([shape[a] for a in order]).transpose(np.argsort(order))

    def to_file(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `from_file`, for all that a file has of this place."""
        axes = self.axes(value.ndim)
        shape = [math.prod(value.shape[a] for a in joined) for joined in axes]
        return value.transpose([a for joined in axes for a in joined]).reshape(shape)

    def of(self, values: Mapping[tuple[str, ...], np.ndarray]) -> np.ndarray:
        return values[self.path] if self.layer is None else values[self.path][self.layer]


class Header(NamedTuple):
    """What a safetensors file says of one tensor before its data."""

    name: str
    file: pathlib.Path
    shape: Shape
    dtype: str  # as safetensors calls it


def checkpoint_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a checkpoint folder: those its index lists, or all `model*.safetensors`.

    Raises:
      ValueError: when there are none, or the index is damaged or lists files that are not there (all named).
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if files := sorted(folder.glob("model*.safetensors")):
            return files
        raise ValueError(f"{folder}: no tensors in model*.safetensors, and no {index.name}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: must have an object 'weight_map' from tensor names to files")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if pathlib.PurePath(name).name != name]:
        raise ValueError(f"{index}: files must lie in the same folder, got {', '.join(outside)}")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{index}: lists files that are not there: {', '.join(missing)}")
    return [folder / name for name in names]


def read_headers(files: Iterable[pathlib.Path]) -> dict[str, Header]:
    """What is in some safetensors files, by name, without reading data.

    Raises:
      ValueError: on a damaged or cut off file, and on tensors that are in two files.
    """
    found: dict[str, Header] = {}
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():
                if name in found:
                    raise ValueError(f"{file}: {name} is also in {found[name].file.name}")
                part = tensors.get_slice(name)
                found[name] = Header(name, file, tuple(part.get_shape()), part.get_dtype())
    return found


@contextlib.contextmanager
def _opened(file: pathlib.Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a complete safetensors file: {error}") from error


def equal(first: Header, second: Header) -> bool:
    """Whether two stored tensors have the same values, whatever their dtypes; read block by block."""
    if first.shape != second.shape:
        return False
    rows = max(1, READ_BYTES // max(math.prod(first.shape[1:]) * 4, 1))
    for start in range(0, first.shape[0], rows):
        blocks = []
        for header in (first, second):
            with _opened(header.file) as tensors:
                blocks.append(
                    tensors.get_slice(header.name)[start : min(start + rows, first.shape[0])].astype(np.float32)
                )
        if not np.array_equal(*blocks):
            return False
    return True


def read_tensors(files: Iterable[pathlib.Path], *, where: str | os.PathLike) -> dict[str, np.ndarray]:
    """All tensors of some safetensors files by name; raises ValueError on no, missing or damaged files."""
    found: dict[str, np.ndarray] = {}
    for file in files:
        with _opened(file) as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}
    if not found:
        raise ValueError(f"{where}: no tensors in *.safetensors")
    return found


def stream(
    model: Decoder,
    kind: type[nnx.Variable],
    places: Sequence[tuple[str, Place]],
    found: Mapping[str, Header],
    sharding_of: Callable[[tuple[str, ...], Shape], NamedSharding | None],
    *,
    where: Any,
) -> None:
    """Reads tensors from their files straight into the shards of the model's variables of one kind, in place.

    A variable is made on its devices and its layers are written into it one by one; a process reads only what its own
    devices hold. On the host nothing else exists but the tensor being read, in the model's dtype, and one block of it.

    Args:
      sharding_of: of a variable, by path and shape; None for the default device.

    Raises:
      ValueError: before any data is read; names missing, extra and misshapen tensors, ten of each
        kind and a count of the others.
    """
    variables = _flat(model, kind)
    whole = lambda place: place.file_shape(variables[place.path].shape[0 if place.layer is None else 1 :])
    problems = _misfits({n: whole(place) for n, place in places}, {n: header.shape for n, header in found.items()})
    problems += _first(
        [
            f"{n} has dtype {found[n].dtype} (known: {', '.join(DTYPES)})"
            for n in dict(places)
            if n in found and found[n].dtype not in DTYPES
        ]
    )
    if problems:
        raise ValueError(f"{where}: does not fit the model: " + "; ".join(problems))
    filled = []
    for path, variable in variables.items():
        shape, dtype, sharding = variable.shape, np.dtype(variable.dtype), sharding_of(path, variable.shape)
        one_layer = sharding and NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        value = None
        for header, place in ((found[name], place) for name, place in places if place.path == path):
            if place.layer is None:
                value = _from_file(header, place, shape, dtype, sharding)
            else:
                value = jnp.zeros(shape, dtype, device=sharding) if value is None else value
                piece = _from_file(header, place, shape[1:], dtype, one_layer)
                value = _put_layer(value, piece, np.int32(place.layer), sharding)
            value.block_until_ready()  # or several tensors would wait on the host
        filled.append((path, variable.replace(value)))
    nnx.update(model, nnx.from_flat_state(filled))


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put_layer(stack, piece, layer, sharding):
    stack = jax.lax.dynamic_update_index_in_dim(stack, piece, layer, axis=0)
    return stack if sharding is None else jax.lax.with_sharding_constraint(stack, sharding)


def _from_file(
    header: Header, place: Place, shape: Shape, dtype: np.dtype, sharding: NamedSharding | None
) -> jax.Array:
    """One tensor on its devices, each of which reads its own part."""
    if sharding is None:
        return jnp.asarray(_read_part(header, place, shape, dtype, ((0, n) for n in shape)))
    # Devices that hold the same part share what is read.
    read = functools.cache(lambda *part: _read_part(header, place, shape, dtype, part))
    bounds = lambda index: (s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
    return jax.make_array_from_callback(shape, sharding, lambda index: read(*bounds(index)))


def _read_part(
    header: Header, place: Place, shape: Shape, dtype: np.dtype, part: Iterable[tuple[int, int]]
) -> np.ndarray:
    """The box `part`, (begin, end) of every axis, of a tensor that has `shape` here.

    Of the axes that share an axis in the file, only the first may be cut.
    """
    part = tuple(part)
    (outer, *inner), *others = place.axes(len(shape))
    size = lambda axes: math.prod(shape[a] for a in axes)
    bounds = lambda axes: slice(*(edge * size(axes[1:]) for edge in part[axes[0]]))
    columns, first = tuple(bounds(axes) for axes in others), place.rows[0] if place.rows else 0
    value = np.empty([end - begin for begin, end in part], dtype)
    row_bytes = size(inner) * math.prod(c.stop - c.start for c in columns) * 4
    step = max(1, READ_BYTES // max(row_bytes, 1))
    begin, end = part[outer]
    for start in range(begin, end, step):
        stop = min(start + step, end)
        rows = slice(first + start * size(inner), first + stop * size(inner))
        at = (slice(None),) * outer + (slice(start - begin, stop - begin),)
        # Opened anew for every block, since the pages read of a mapped file count as memory until it is closed.
        with _opened(header.file) as tensors:
            value[at] = place.from_file(tensors.get_slice(header.name)[(rows, *columns)], value[at].shape)
    return value


def _misfits(wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> list[str]:
    """The tensors that are missing, extra, or of another shape; the first ten of each kind, and how many more."""
    missing = [f"missing {name}" for name in wanted if name not in found]
    unexpected = [f"unexpected {name}" for name in found if name not in wanted]
    misshapen = [
        f"{name} has shape {found[name]}, needed {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    return [line for kind in (missing, unexpected, misshapen) for line in _first(kind)]


def _first(problems: list[str]) -> list[str]:
    """The first ten problems of one kind and a count of the others: a wrong prefix makes hundreds."""
    return first_problems(problems).split("\n") if problems else []


def fill(
    model: Decoder,
    kind: type[nnx.Variable],
    names: Mapping[str, Place],
    found: Mapping[str, np.ndarray],
    *,
    where: Any,
) -> None:
    """Puts named tensors into the model's variables of one kind, in place, in those variables' dtypes.

    Raises:
      ValueError: names missing, extra and misshapen tensors, ten of each kind and a count of the rest, and copies of a
        a shared one that differ.
    """
    variables = _flat(model, kind)
    values = {path: np.zeros(v.shape, v.dtype) for path, v in variables.items()}
    written: set[tuple[tuple[str, ...], int | None]] = set()
    wanted = {name: place.file_shape(place.of(values).shape) for name, place in names.items()}
    problems = _misfits(wanted, {name: value.shape for name, value in found.items()})
    for name, place in names.items():
        if name not in found or found[name].shape != wanted[name]:
            continue
        target = place.of(values)
        value = place.from_file(found[name], target.shape).astype(target.dtype)
        if place[:2] in written and not np.array_equal(target, value):
            problems.append(f"{name} differs from an earlier layer's copy, but the gate config shares it")
        target[...] = value
        written.add(place[:2])
    if problems:
        raise ValueError(f"{where}: does not fit the model: " + "; ".join(problems))
    nnx.update(model, nnx.from_flat_state([(p, v.replace(jnp.asarray(values[p]))) for p, v in variables.items()]))


def _flat(model: Decoder, kind: type[nnx.Variable]) -> dict[tuple[str, ...], nnx.Variable]:
    return {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model, kind))}


def save(
    model: Decoder,
    kind: type[nnx.Variable],
    places: Sequence[tuple[str, Place]],
    folder: str | os.PathLike,
    file: str,
    config: dict[str, Any],
    matrices: str | None = None,
) -> None:
    """Writes a model's variables of one kind under their names, and `config` as config.json.

    `matrices` is the dtype in which tensors of two axes or more are stored; None: all as they are.
    However it ends, the folder holds the old tensors or the new ones; or, if its config changes, none that can be read.
    Every process must call it, since each may hold parts; process 0 writes, and all return when it has.
    """
    values = {path: on_host(v[...]) for path, v in _flat(model, kind).items()}
    if jax.process_index() == 0:
        stored = lambda a: a.astype(np.dtype(matrices)) if matrices and a.ndim > 1 else a
        tensors = {}
        for name, p in sorted(places, key=lambda item: item[1].rows or (0, 0)):  # rows of one tensor, in their order
            part = np.ascontiguousarray(stored(p.to_file(p.of(values))))
            tensors[name] = np.concatenate([tensors[name], part]) if name in tensors else part
        _write(tensors, pathlib.Path(folder), file, config)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"written {folder}")


def _write(tensors: dict[str, np.ndarray], folder: pathlib.Path, file: str, config: dict[str, Any]) -> None:
    text = json.dumps(config, indent=2)

    def write(into: pathlib.Path) -> None:
        write_atomically(into / file, lambda path: save_file(tensors, path))
        write_atomically(into / "config.json", lambda path: path.write_text(text))

    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_folder_atomically(folder, write)
        return
    if (folder / "config.json").exists() and (folder / "config.json").read_text() != text:
        (folder / "config.json").unlink()  # never one model's tensors under another one's config
    write(folder)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError when it is missing or holds anything else."""
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a checkpoint folder needs one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {raw!r}")
    return raw
