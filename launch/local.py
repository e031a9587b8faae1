"""Runs a command as several processes of this machine's CPU, and starts all again when one dies.

    python launch/local.py --processes=2 --devices_per_process=4 -- \\
        python -m retention_jax.train --config=configs/recall.py --workdir=runs/recall

The command gets `--coordinator_address`, `--num_processes` and `--process_id`; its output is told apart by `[process]`.
When a process dies the others may wait for it for ever, so they are killed: checkpoints are whole at any time. SIGTERM
and SIGINT are passed on, so that the run saves and ends.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from absl import app, flags

_PROCESSES = flags.DEFINE_integer("processes", 2, "How many processes.", lower_bound=1)
_DEVICES = flags.DEFINE_integer("devices_per_process", 1, "CPU devices of each.", lower_bound=1)
_RESTARTS = flags.DEFINE_integer("max_restarts", 3, "How often all are started again.", lower_bound=0)
_GRACE = flags.DEFINE_integer("grace", 60, "Seconds from a signal to the kill.", lower_bound=0)

_POLL = 0.1  # seconds


def start(command: Sequence[str], processes: int, devices: int) -> list[subprocess.Popen]:
    """All processes of the command, each writing its lines to our output."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    xla_flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags, "PYTHONUNBUFFERED": "1"}
    running = []
    for i in range(processes):
        told = (f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={i}")
        process = subprocess.Popen(
            [*command, *told],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C reaches us alone, and we pass it on once
        )
        threading.Thread(target=_forward, args=(i, process), daemon=True).start()
        running.append(process)
        say(f"process {i} is {process.pid}")
    return running


def _forward(i: int, process: subprocess.Popen) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.write(f"[{i}] {line}")
        sys.stdout.flush()


def kill(running: Sequence[subprocess.Popen]) -> None:
    """Ends what still runs, with everything it started, and waits for it."""
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def supervise(running: Sequence[subprocess.Popen], asked: list[int]) -> int:
    """Waits for the end of all. 0, or the exit status of the first that failed; none runs any more.

    Args:
      running: the processes.
      asked: signals that we were sent, filled while this waits.
    """
    deadline = None
    while True:
        states = [process.poll() for process in running]
        if asked and deadline is None:
            deadline = time.monotonic() + _GRACE.value
            for process in running:
                if process.poll() is None:
                    process.send_signal(asked[0])
        failed = [(i, status) for i, status in enumerate(states) if status]
        over = deadline is not None and time.monotonic() > deadline
        if all(status is not None for status in states) or over or (failed and deadline is None):
            kill(running)
            if failed:
                say(f"process {failed[0][0]} ended with status {failed[0][1]}")
            return failed[0][1] or 1 if failed else int(over)
        time.sleep(_POLL)


def say(text: str) -> None:
    print(f"[launcher] {text}", flush=True)


def main(argv: list[str]) -> int:
    command, asked = argv[1:], []
    if not command:
        raise app.UsageError("give the command after --")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    for attempt in range(_RESTARTS.value + 1):
        if attempt:
            say(f"starting all {_PROCESSES.value} again, {attempt} of {_RESTARTS.value}")
        status = supervise(start(command, _PROCESSES.value, _DEVICES.value), asked)
        if asked:
            return 128 + asked[0]
        if status == 0:
            return 0
    return 1


if __name__ == "__main__":
    app.run(main)
