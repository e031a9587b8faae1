"""Commands keep their compiled programs: a second start reads them from disk."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = """
import jax
from retention_jax.runtime import program_cache
program_cache.keep_programs()
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
print(jax.jit(lambda x: jax.lax.fori_loop(0, 9, lambda i, x: x * 1.5 + i, x))(2.0))
print(*(sum(event.endswith(name) for event in events) for name in ("cache_hits", "cache_misses")))
"""


def start(**environment):
    asked = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    where = {**os.environ, **asked, "PYTHONPATH": str(ROOT), **environment}
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=where)
    assert run.returncode == 0, run.stderr[-4000:]
    result, counts = run.stdout.splitlines()
    return result, *map(int, counts.split())


def test_a_second_start_compiles_nothing(tmp_path):
    cache = tmp_path / "retention_jax" / "programs"
    first, hits, misses = start(XDG_CACHE_HOME=str(tmp_path))
    assert hits == 0 and misses > 0 and any(cache.iterdir())
    assert start(XDG_CACHE_HOME=str(tmp_path)) == (first, misses, 0)


def test_jaxs_own_variables_come_first(tmp_path):
    own = tmp_path / "own"
    start(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(own))
    assert any(own.iterdir()) and not (tmp_path / "retention_jax").exists()
    off = start(XDG_CACHE_HOME=str(tmp_path), JAX_ENABLE_COMPILATION_CACHE="false")
    assert off[1] == 0 and not (tmp_path / "retention_jax").exists()


@pytest.mark.parametrize(
    "command", ("retention_jax/train", "retention_jax/evaluate", "retention_jax/generate", "launch/benchmark")
)
def test_every_command_keeps_its_programs(command):
    ends = (ROOT / f"{command}.py").read_text().splitlines()[-1].strip()
    assert ends in ("command.run(main, define_flags)", "command_line.run(main, define_flags)")
    assert "program_cache.keep_programs()" in (ROOT / "retention_jax/runtime/command.py").read_text()
