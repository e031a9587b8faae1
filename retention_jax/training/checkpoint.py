"""Checkpoints of a training run: what is trained, the optimiser, the step and the data position. Orbax, asynchronous.

A checkpoint is written beside its final name and renamed when it is complete, so a crash never leaves half of one.
"""

import contextlib
import functools
import json
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from jaxtyping import Array, Int

from retention_jax.config import TrainConfig, conversion
from retention_jax.parallel import checksum, distributed
from retention_jax.runtime import files
from retention_jax.runtime.nested import differing


class TrainState(NamedTuple):
    """What a training step changes."""

    params: nnx.State  # gates, or the whole backbone
    opt_state: Any  # Optax
    step: Int[Array, ""]  # steps done


def open_manager(workdir: pathlib.Path, *, keep: int) -> ocp.CheckpointManager:
    """The manager of `workdir/checkpoints`, which keeps the newest `keep`."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, cleanup_tmp_directories=True, enable_async_checkpointing=True
    )
    handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options, item_handlers=handlers)


def save(manager: ocp.CheckpointManager, state: TrainState, data_state: dict[str, Any]) -> None:
    """Starts writing a checkpoint of the current step; returns as soon as the arrays are copied."""
    data = {"state": data_state, "checksum": _checksum(state, data_state)}
    manager.save(
        int(state.step),
        args=ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), data=ocp.args.JsonSave(data)),
    )


def _checksum(state: TrainState, data_state: Any) -> str:
    """Not every file that Orbax writes has one: a wrong byte in an array would go unnoticed."""
    return checksum.of(state, json.dumps(data_state, sort_keys=True))


def restore_latest(manager: ocp.CheckpointManager, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest checkpoint that can be read, laid out like `like` on whatever mesh that is; None when there is none.

    Newer ones that are damaged are named in a warning and set aside as `STEP.damaged`, so that their steps can be saved
    again. All processes restore the same one: what one of them finds damaged is damaged for all. Any other failure,
    such as a disk that fails or memory that runs out, ends the run and sets nothing aside.

    Raises:
      ValueError: when every checkpoint is damaged, or the newest that can be read is of another model.
      Exception: what reading raises beside damage, and ElsewhereError in the other processes.
    """
    steps = json.loads(distributed.gather(json.dumps(sorted(manager.all_steps(), reverse=True)))[0])
    damaged: dict[pathlib.Path, str] = {}
    for step in steps:
        where = pathlib.Path(manager.directory) / str(step)
        read, problem = distributed.together(functools.partial(_restore, where, like))
        problem = next((p for p in distributed.gather(problem) if p), "")
        if read is not None and not problem:
            state, data = read
            if _checksum(state, data.get("state")) == data.get("checksum"):
                for path, reason in damaged.items():
                    if jax.process_index() == 0:
                        logging.warning("%s: damaged, going on from %s instead: %s", path, where.name, reason)
                        _set_aside(path)
                distributed.gather("")  # the others go on when it is done
                manager.reload()
                return state, data["state"]
            problem = "what it holds is not what was saved"
        damaged[where] = problem
    if damaged:
        raise ValueError("; ".join(f"{path}: damaged: {reason}" for path, reason in damaged.items()))
    return None


def _set_aside(path: pathlib.Path) -> None:
    aside = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def _restore(where: pathlib.Path, like: TrainState) -> tuple[tuple[TrainState, dict[str, Any]] | None, str]:
    """A checkpoint as `save` wrote it and "", or None and what this process finds damaged. Waits for no other process.

    Raises:
      ValueError: when it is of another model.
      Exception: whatever else keeps it from being read.
    """
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process{jax.process_index()}",
    )
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        try:
            saved = _shapes_of_saved(handler, where / "state")
        except Exception as error:
            return None, _damage(error)
        # Before any array is read: Orbax names one array that does not fit, and leaves its other reads running.
        ours = {"/".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(like.params)}
        if differing := [n for n in sorted(saved.keys() | ours.keys()) if saved.get(n) != ours.get(n)]:
            told = (f"{n} has shape {saved.get(n, 'none')}, needed {ours.get(n, 'none')}" for n in differing)
            raise ValueError(f"{where}: a checkpoint of another model: " + "; ".join(told))
        try:
            state = checkpointer.restore(where / "state", args=ocp.args.StandardRestore(target))
            return (TrainState(**state), json.loads((where / "data" / "metadata").read_text())), ""
        except Exception as error:
            return None, _damage(error)


# What reading a garbled file raises: TensorStore a ValueError, whose text begins with a code, or with none where it
# cannot decode; Orbax whatever its Python meets in a file of JSON. By other codes TensorStore tells of what is around a
# file: UNKNOWN of I/O errors, RESOURCE_EXHAUSTED, UNAVAILABLE, PERMISSION_DENIED of what they say.
_GARBLED = (ValueError, LookupError, TypeError, AttributeError, AssertionError, NotImplementedError, FileNotFoundError)
_AROUND = re.compile("(?!NOT_FOUND|OUT_OF_RANGE|DATA_LOSS|FAILED_PRECONDITION|INVALID_ARGUMENT)[A-Z_]+: ")


def _damage(error: Exception) -> str:
    """What an error while reading says if a file is missing, cut off or garbled; raises any other error as it is."""
    cause: BaseException | None = error
    while cause is not None:  # Orbax wraps what TensorStore says of an array
        if not isinstance(cause, _GARBLED) or _AROUND.match(str(cause)):
            raise error
        cause = cause.__cause__
    return f"{type(error).__name__}: {error}"


def _shapes_of_saved(handler: ocp.StandardCheckpointHandler, where: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Shape of every trained variable in a checkpoint, by path."""
    params = handler.metadata(where).tree["params"]  # pyright: ignore[reportArgumentType]  # any path will do
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: hasattr(node, "shape"))
    # Orbax keeps a variable's array under a last key of its own.
    return {"/".join(str(key.key) for key in path[:-1]): tuple(leaf.shape) for path, leaf in leaves}


# Fields, or groups of fields, that change a run's numbers by rounding at most: where and how fast it is computed, how
# often it is saved and reported. A run may go on with other values, on whatever devices there are.
_FREE = (
    "mesh",
    "remat",
    "log_every",
    "checkpoint_every",
    "checkpoint_keep",
    "eval_every",
    "profile_start",
    "profile_steps",
    "data.cache_dir",
)
_CONFIG, _INPUTS = "config.json", "inputs.json"  # what a workdir's checkpoints are of


def check_workdir(workdir: pathlib.Path, config: TrainConfig, inputs: dict[str, str]) -> None:
    """Raises ValueError where a workdir has checkpoints of another run; writes nothing. All processes must call it.

    A workdir without checkpoints belongs to nobody, so a command that failed before its first one claims none.

    Args:
      workdir: the run's folder, which need not exist.
      config: the run's; `_FREE` fields may differ from those of earlier starts.
      inputs: digests of what the run reads, by a name for messages. Only those that the workdir knows are compared, so
        that they can be checked one after the other.

    Raises:
      ValueError: naming every field and every input that differs; ElsewhereError in processes that see none.
    """
    distributed.together(lambda: _check(workdir, config, inputs))


def _check(workdir: pathlib.Path, config: TrainConfig, inputs: dict[str, str]) -> None:
    if not _has_checkpoints(workdir):
        return
    free = lambda name: any(name == field or name.startswith(f"{field}.") for field in _FREE)
    theirs = _read(workdir / _CONFIG)
    with contextlib.suppress(ValueError):  # what older code had no field for has its default
        theirs = theirs and _plain(conversion.from_dict(TrainConfig, theirs))
    if theirs is not None and (
        changes := [change for change in differing(theirs, _plain(config)) if not free(change[0])]
    ):
        raise ValueError(
            f"{workdir} belongs to another configuration; give another --workdir, or go back to: "
            + ", ".join(f"{name}={before!r} (now {now!r})" for name, before, now in changes)
        )
    known = _read(workdir / _INPUTS) or {}
    if changed := [name for name, digest in inputs.items() if known.get(name, digest) != digest]:
        raise ValueError(
            f"{workdir} holds a run of other inputs; give another --workdir, or put back what has changed since: "
            + ", ".join(changed)
        )


@contextlib.contextmanager
def claimed(workdir: pathlib.Path, config: TrainConfig, inputs: dict[str, str]) -> Iterator[None]:
    """Holds a workdir for this run alone, and writes into it what `check_workdir` compares. Makes it if need be.

    Raises:
      ValueError: when another run holds it, and as `check_workdir` does.
      OSError: when it cannot be written. ElsewhereError in processes other than the one that found out.
    """
    with contextlib.ExitStack() as stack:

        def claim() -> None:
            _check(workdir, config, inputs)
            if jax.process_index() == 0:
                workdir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(files.locked(workdir / "lock"))
                for name, values in ((_CONFIG, _plain(config)), (_INPUTS, inputs)):
                    if not (workdir / name).exists() or not _has_checkpoints(workdir):
                        text = json.dumps(values, indent=2)
                        files.write_atomically(workdir / name, lambda path, text=text: path.write_text(text))

        distributed.together(claim)
        yield


def _has_checkpoints(workdir: pathlib.Path) -> bool:
    """Whether any was written whole, damaged since or not."""
    return any(path.name.removesuffix(".damaged").isdigit() for path in (workdir / "checkpoints").glob("*"))


def _plain(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(conversion.to_dict(config)))


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    """A file of JSON; None where there is none."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
