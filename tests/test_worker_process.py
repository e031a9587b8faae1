"""A process that is killed when it takes too long: what comes back, what raises, and that a fresh one takes over."""

import os
import signal
import time

import pytest

from retention_jax.runtime import worker_process
from retention_jax.runtime.worker_process import Worker

PROGRAM = """
import os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    word = line.strip()
    if word == "sleep":
        time.sleep(60)
    if word == "end":
        os._exit(1)
    print(os.getpid() if word == "who" else word, flush=True)
"""


@pytest.fixture
def worker(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    worker = Worker(path, "repeats words")
    yield worker
    worker.close()


def test_one_process_answers_until_it_must_be_replaced(worker):
    who = lambda: int(worker.ask("who", 60.0))
    first = who()
    assert worker.ask("grüße", 60.0) == "grüße\n" and who() == first
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="the process that repeats words took more than 0.1 seconds"):
        worker.ask("sleep", 0.1)
    assert time.monotonic() - started < 30
    second = who()
    with pytest.raises(ChildProcessError, match="repeats words ended by itself"):
        worker.ask("end", 60.0)
    third = who()
    os.kill(third, signal.SIGKILL)  # as the kernel does when memory is short
    fourth = who()
    worker.close()
    for pid in (first, second, third, fourth):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert worker.ask("again", 60.0) == "again\n"


def test_only_a_fresh_process_may_fail_a_request(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(
        "import sys\nprint('ready', flush=True)\n"
        "for count, line in enumerate(sys.stdin):\n    assert count < 2\n    print(count, flush=True)\n"
    )
    worker = Worker(path, "counts")
    assert [worker.ask("again", 60.0) for _ in range(5)] == ["0\n", "1\n", "0\n", "1\n", "0\n"]
    worker.close()


@pytest.mark.parametrize("program", ("print('not so')", "import time; time.sleep(60)"))
def test_a_program_that_does_not_start(tmp_path, monkeypatch, program):
    path = tmp_path / "program.py"
    path.write_text(program)
    monkeypatch.setattr(worker_process, "START_LIMIT", 0.5)
    with pytest.raises(RuntimeError, match="repeats words did not start within 0.5 seconds: .*program.py"):
        Worker(path, "repeats words").ask("hello", 60.0)
