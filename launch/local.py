"""Runs a command as several processes of this machine's CPU, and starts all again when one dies.

    python launch/local.py --processes=2 --devices_per_process=4 -- \\
        python -m retention_jax.train --config=configs/recall.py --workdir=runs/recall

The command gets `--coordinator_address`, `--num_processes` and `--process_id`; its output is told apart by `[process]`.
When a process dies the others may wait for it for ever, so they are killed: checkpoints are whole at any time. A second
error in a row within a minute of the start is the last, since a wrong set-up would only fail again; a killed process is
no error. SIGTERM and SIGINT are passed on, so that the run saves and ends.

The exit status is 0 where all ended well, 128 + signal where one that we passed on stopped them, otherwise that of the
process that failed, or 137 where one still ran at the end of the grace period.
"""

import collections
import contextlib
import ctypes
import importlib.util
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from absl import app, flags

_PROCESSES = flags.DEFINE_integer("processes", 2, "How many processes.", lower_bound=1)
_DEVICES = flags.DEFINE_integer("devices_per_process", 1, "CPU devices of each.", lower_bound=1)
_RESTARTS = flags.DEFINE_integer("max_restarts", 3, "How often all are started again.", lower_bound=0)
_GRACE = flags.DEFINE_integer("grace", 60, "Seconds from a signal to the kill.", lower_bound=0)

_POLL = 0.1  # seconds
_SOON = 60  # seconds; an error within them is one at the start
_LIBC = ctypes.CDLL(None)
_writing = threading.Lock()


class Running(NamedTuple):
    """A process, and what reads its output."""

    process: subprocess.Popen[bytes]
    reader: threading.Thread
    last: collections.deque[str]  # the last line it wrote, if any


def start(command: Sequence[str], processes: int, devices: int) -> list[Running]:
    """All processes of the command, each writing its lines to our output."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    xla_flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags, "PYTHONUNBUFFERED": "1"}
    started = []
    for i in range(processes):
        told = (f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={i}")
        process = subprocess.Popen(
            [*command, *told],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches us alone, and we pass it on once
            preexec_fn=_die_with_launcher if sys.platform == "linux" else None,
        )
        started.append(process)
        say(f"process {i} is {process.pid}")
    running = []
    for i, process in enumerate(started):  # after the forks, which do not go well with threads
        last = collections.deque[str](maxlen=1)
        reader = threading.Thread(target=_forward, args=(i, process, last), daemon=True)
        reader.start()
        running.append(Running(process, reader, last))
    return running


def _die_with_launcher() -> None:
    """Has the kernel kill this process when ours is gone, even by SIGKILL."""
    _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _forward(i: int, process: subprocess.Popen[bytes], last: collections.deque[str]) -> None:
    assert process.stdout is not None
    chunk, rest = b"start", b""
    while chunk:
        select.select([process.stdout], [], [])
        time.sleep(_POLL)  # so that what belongs together, as a traceback, comes in one piece
        chunk = os.read(process.stdout.fileno(), 1 << 16)
        *whole, rest = (rest + chunk).split(b"\n")
        lines = [line.decode(errors="replace") for line in whole + [rest] * bool(rest and not chunk)]
        _write("".join(f"[{i}] {line}\n" for line in lines))
        last.extend(line for line in lines if line.strip())


def kill(running: Sequence[Running]) -> None:
    """Ends what still runs, with everything it started, and waits for it and for its last lines."""
    for process, reader, _ in running:
        with contextlib.suppress(ProcessLookupError):  # nothing is left of it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(timeout=5)  # a process that left the group may keep the pipe open


def supervise(running: Sequence[Running], asked: list[int]) -> int:
    """Waits for the end of all; none runs any more. The exit status, as above.

    Args:
      running: the processes.
      asked: signals that we were sent, filled while this waits.
    """
    deadline = None
    while True:
        states = [process.poll() for process, _, _ in running]
        if asked and deadline is None:
            deadline = time.monotonic() + _GRACE.value
            for process, _, _ in running:
                if process.poll() is None:
                    process.send_signal(asked[0])
        stopped = {128 + asked[0], -asked[0]} if asked else set()
        failed = {i: status for i, status in enumerate(states) if status and status not in stopped}
        late = [i for i, status in enumerate(states) if status is None]
        if not late or (failed if deadline is None else time.monotonic() > deadline):
            break
        time.sleep(_POLL)
    kill(running)
    for i, status in failed.items():
        error = f": {running[i].last[0]}" if status > 0 and running[i].last else ""
        say(f"process {i} ended with status {status}{error}")
    if deadline is not None and late:
        say(f"{_GRACE.value} s after the signal processes {late} still ran, and were killed")
    if failed:
        return _as_shell(min(failed.values()))  # of a signal if any is: then that is why the others failed
    if late:
        return 128 + signal.SIGKILL
    return max(_as_shell(status) for status in states if status is not None)


def _as_shell(status: int) -> int:
    """An exit status as shells count it: 128 + n for signal n."""
    return 128 - status if status < 0 else status


def say(text: str) -> None:
    _write(f"[launcher] {text}\n")


def _write(text: str) -> None:
    with _writing:
        sys.stdout.write(text)
        sys.stdout.flush()


def main(argv: list[str]) -> int:
    command, asked = argv[1:], []
    if not command:
        raise app.UsageError("give the command after --")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    failed_soon = 0  # in a row
    for attempt in range(_RESTARTS.value + 1):
        if attempt:
            say(f"starting all {_PROCESSES.value} again, {attempt} of {_RESTARTS.value}")
        began = time.monotonic()
        status = supervise(start(command, _PROCESSES.value, _DEVICES.value), asked)
        if asked or status == 0:
            return status
        failed_soon = failed_soon + 1 if status < 128 and time.monotonic() - began < _SOON else 0
        if failed_soon == 2 and attempt < _RESTARTS.value:
            say(f"failed twice within {_SOON} s of the start: not started again")
            break
    return status


def _command():
    """`retention_jax/runtime/command.py` by itself: with the package around it, it would wait for jax."""
    path = pathlib.Path(__file__).parents[1] / "retention_jax" / "runtime" / "command.py"
    spec = importlib.util.spec_from_file_location("command", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    _command().run_without_jax(main)
