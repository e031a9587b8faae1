"""Many processes: when a program joins others, what they must agree on, and how the end of one ends all.

A program joins others
- by `--coordinator_address`, `--num_processes` and `--process_id`, where they are given;
- in a SLURM step of several tasks (`srun`; a batch script or an interactive shell alone joins nothing);
- where jax runs on Cloud TPU and the slice has several workers, by the environment on GKE and the VM's metadata else;
and nowhere else. jax finds the addresses on SLURM and TPU itself.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import secrets
import socket
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from retention_jax.runtime import command
from retention_jax.runtime.nested import differing

# Seconds without a sign of life after which a process counts as dead and all others end. jax waits 100, too long for a
# restart. The signs come from a thread of their own, so compiling or loading does not delay them.
_HEARTBEAT = 20
_FLAGS = ("coordinator_address", "num_processes", "process_id")
T = TypeVar("T")


def define_flags(values: flags.FlagValues) -> None:
    """The flags by which a program is told of the others."""
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, of several.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "How many processes there are.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", flag_values=values)


@contextlib.contextmanager
def joined(values: flags.FlagValues) -> Iterator[None]:
    """Joins the other processes if there are any. An error in the block ends this process at once, and so the others.

    At once, because the ordinary end waits for processes that wait for this one. It is told as `command.run` does.

    Raises:
      ValueError: when only some of the three flags are given, or they do not fit together.
    """
    arguments = _from_flags(values)
    if not arguments and not _in_slurm_step() and not _on_tpu_workers():
        yield
        return
    # SIGTERM is the train loop's; jax's own service would take it over, and swallow it outside the loop.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=_HEARTBEAT)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        status = 1
        if isinstance(error, (KeyboardInterrupt, *command.EXPECTED)):
            status = command.report(error, debug="debug" in values and values.debug)
        else:
            traceback.print_exc()
        with contextlib.suppress(OSError):  # a closed pipe
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _from_flags(values: flags.FlagValues) -> dict[str, Any]:
    given: dict[str, Any] = {name: values[name].value for name in _FLAGS if values[name].value is not None}
    if not given:
        return {}
    if missing := [name for name in _FLAGS if name not in given]:
        raise ValueError(f"several processes need --{', --'.join(_FLAGS)}; missing: --{', --'.join(missing)}")
    if not 0 <= given["process_id"] < given["num_processes"]:
        raise ValueError(
            f"--process_id must be in [0, --num_processes), got {given['process_id']} and {given['num_processes']}"
        )
    if not re.fullmatch(r".+:\d+", given["coordinator_address"]):
        raise ValueError(f"--coordinator_address must be HOST:PORT, got {given['coordinator_address']!r}")
    return {**given, "cluster_detection_method": "deactivate"}


def _in_slurm_step() -> bool:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def _on_tpu_workers() -> bool:
    # jax names it there where it finds TPU chips.
    if "tpu" not in (jax.config.jax_platforms or ""):  # pyright: ignore[reportAttributeAccessIssue]
        return False
    if int(os.environ.get("MEGASCALE_NUM_SLICES", 1)) > 1:
        return True
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        return "," in hosts
    if "TPU_SKIP_MDS_QUERY" in os.environ:  # what keeps libtpu and jax from asking
        return False
    slices = re.search(r"MEGASCALE_NUM_SLICES: '(\d+)'", _metadata("tpu-env"))
    return "," in _metadata("worker-network-endpoints") or (slices is not None and int(slices[1]) > 1)


def _metadata(name: str) -> str:
    """An attribute of a Google Cloud VM; "" where there is none, or where this is no such VM."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
    try:
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return ""
        raise
    except urllib.error.URLError as error:
        if isinstance(error.reason, socket.gaierror):
            return ""
        raise


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order, on each. All must call it."""
    if jax.process_count() == 1:
        return [text]
    raw = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([raw.size], np.int32))).reshape(-1)
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: raw.size] = raw
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(jax.process_count(), -1)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def together(do: Callable[[], T]) -> T:
    """What `do` returns here. All must call it, and where it fails in one, it fails in all.

    Without it only the process whose disk is full would tell, and the others wait for it until it counts as dead.

    Raises:
      command.ElsewhereError: in a process where `do` went well and in others did not, with what they say; where it did
        not, what `do` itself raised.
    """
    result, failed = None, None
    try:
        result = do()
    except Exception as error:
        failed = error
    problems = gather("" if failed is None else f"{type(failed).__name__}: {failed}")
    if failed is not None:
        raise failed
    if told := [f"process {i}: {problem}" for i, problem in enumerate(problems) if problem]:
        raise command.ElsewhereError("; ".join(told))
    return result  # pyright: ignore[reportReturnType]  # set, since nothing failed


def agree_on(what: str, values: dict[str, Any]) -> None:
    """Raises ValueError, on every process alike, where processes have different values; says which, and whose."""
    first, *others = map(json.loads, gather(json.dumps(values)))
    problems = [
        f"{name} is {mine!r} in process 0 and {other!r} in process {i}"
        for i, theirs in enumerate(others, start=1)
        for name, mine, other in differing(first, theirs)
    ]
    if problems:
        raise ValueError(f"processes see different {what}: " + "; ".join(problems))


def largest(value: int) -> int:
    """The largest of all processes' values, on each. All must call it."""
    if jax.process_count() == 1:
        return value
    mesh = _all_devices()
    mine = np.full(jax.local_device_count(), value, np.int32)
    values = jax.make_array_from_process_local_data(NamedSharding(mesh, P("device")), mine, (jax.device_count(),))
    with jax.set_mesh(mesh):
        return int(_largest(mesh)(values))


@functools.cache
def _all_devices() -> Mesh:
    return jax.make_mesh((jax.device_count(),), ("device",), axis_types=(jax.sharding.AxisType.Auto,))


@functools.cache
def _largest(mesh: Mesh):
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))


# Seconds in which a file that one process wrote must be seen by the others: network file systems remember for a while
# what was not there.
_SEEN_WITHIN = 10.0


def share_folder(workdir: pathlib.Path) -> None:
    """Makes the workdir, and finds out whether all processes see what process 0 writes there.

    Raises:
      ValueError: on every process alike, when some do not.
      OSError: in process 0 when it cannot be written; RuntimeError in the others.
    """
    token = workdir / f".shared-{gather(secrets.token_hex(8))[0]}"

    def write() -> None:
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            token.touch()

    together(write)
    until = time.monotonic() + _SEEN_WITHIN
    while not (seen := token.exists()) and time.monotonic() < until:
        time.sleep(0.2)
    answers = gather("" if seen else str(workdir.absolute()))
    if jax.process_index() == 0:
        token.unlink()
    if blind := {i: where for i, where in enumerate(answers) if where}:
        raise ValueError(
            "the run's folder must be one that all processes share; what process 0 wrote is not in "
            + ", ".join(f"{where} of process {i}" for i, where in blind.items())
        )
