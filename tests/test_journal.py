"""The journal of a sweep: units dealt out to processes, a run that is killed, models told apart."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from helpers import tiny_model, untimed

from retention_jax.config import DataConfig, EvalConfig
from retention_jax.evaluation import devices, journal, plan, sweep
from retention_jax.evaluation.journal import Unit

pytestmark = pytest.mark.one_version

ROOT = pathlib.Path(__file__).parent.parent


def test_units_are_dealt_out_and_come_together(tmp_path):
    units = [Unit("t", 1, "full", 1, seed, 0) for seed in range(5)]
    parts = [sweep.dealt(units, i, 2) for i in range(2)]
    assert sorted(parts[0] + parts[1]) == units and abs(len(parts[0]) - len(parts[1])) == 1
    for process, part in enumerate(parts):
        book = journal.Journal(tmp_path, process, {"a": 1})
        for unit in part:
            book.write(unit, {"score": float(unit.seed)})
        book.close()
    assert journal.read(tmp_path, {"a": 1}) == {unit: {"score": float(unit.seed)} for unit in units}


def test_a_models_name_is_that_of_its_values():
    name = devices.digest(tiny_model(vocab_size=300))
    assert name == devices.digest(tiny_model(vocab_size=300))
    assert name != devices.digest(tiny_model(vocab_size=301))


PROGRAM = """
import pathlib, sys
sys.path.insert(0, "tests")
import conftest, jax
jax.config.update("jax_disable_most_optimizations", True)
import test_journal, os, signal
from retention_jax.evaluation.journal import Journal
write, units = Journal.write, []

def until_killed(book, unit, result):
    if len(units) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    units.append(unit)
    write(book, unit, result)

Journal.write = until_killed
test_journal.sweep_sequences(pathlib.Path(sys.argv[1]))
"""


def sweep_sequences(output):
    config = EvalConfig(policies=("full", "oracle"), budgets=(3,), lengths=(36,), recent=6, examples=2)
    return plan.run(tiny_model(vocab_size=64), config, DataConfig(), output)


@pytest.mark.slow  # starts a sweep twice; test_sweep.py goes on in one process
def test_a_killed_sweep_goes_on(tmp_path):
    path = tmp_path / "killed" / "journal-0.jsonl"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path.parent)], cwd=ROOT, env=environment)
    assert process.wait() == -signal.SIGKILL
    before = path.read_bytes()
    assert before.count(b"\n") == 1 + 7
    again, whole = sweep_sequences(path.parent), sweep_sequences(tmp_path / "whole")
    assert [r.score for r in again] == [r.score for r in whole]
    after = path.read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 1 + 2 * 5
    header = json.loads(after.splitlines()[0])["fingerprint"]
    read = lambda folder: untimed(journal.read(folder, header))
    assert read(path.parent) == read(tmp_path / "whole")
