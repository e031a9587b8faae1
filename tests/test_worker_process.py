"""A process that is killed when it takes too long: what comes back, what raises, and that a fresh one takes over."""

import os
import time

import pytest

from retention_jax.worker_process import Worker

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
    worker.close()
    for pid in (first, second, third):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert worker.ask("again", 60.0) == "again\n"


def test_a_program_that_does_not_start(tmp_path):
    path = tmp_path / "program.py"
    path.write_text("print('not so')")
    with pytest.raises(RuntimeError, match="the process that repeats words did not start: .*program.py"):
        Worker(path, "repeats words").ask("hello", 60.0)
