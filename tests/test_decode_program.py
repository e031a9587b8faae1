"""The compiled decoding programs: nothing of the pool's size is written but by an eviction, a run of tokens is one
dispatch, and prompts of any length run one program."""

import json
import pathlib
import subprocess
import sys

import decode_program
import jax
import pytest
from decode_program import large_writes, lower_run, lower_step
from helpers import environment_for_tpu_compiler, tiny_config, tiny_model, tokens_of

import retention_jax as rj
from retention_jax import cache
from retention_jax.config import CacheConfig
from retention_jax.generation import decoding, runs
from retention_jax.serving import programs

BUDGET = 2048
MODEL = tiny_config(qk_norm=True)


@pytest.fixture(scope="module")
def shapes():
    return decode_program.arguments(MODEL, BUDGET, batch=2)


@pytest.mark.parametrize("windows", (False, True))
def test_a_step_writes_nothing_of_the_pools_size(shapes, windows):
    if windows:
        sliding = tiny_config(sliding_window=300, sliding_layers=(1,))
        shapes = decode_program.arguments(sliding, BUDGET, batch=2)
    compiled = lower_step(*shapes).compile()
    pool = shapes[3].pool
    assert large_writes(compiled, pool.pos.size) == []  # one number an entry would be too much already
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < pool.k.size * 4 / 8
    assert memory.alias_size_in_bytes >= 2 * pool.k.size * 4  # keys and values stay where they are


def test_temporaries_do_not_grow_with_what_is_kept(shapes):
    def temporary(args):
        memory = lower_step(*args).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    more = temporary(decode_program.arguments(MODEL, 8 * BUDGET, batch=2))
    assert more <= temporary(shapes) + 4096


def test_a_run_writes_a_pool_only_when_it_evicts(shapes):
    compiled, pool = lower_run(*shapes).compile(), shapes[3].pool
    assert large_writes(compiled, pool.pos.size, inside="tokens") == []
    assert large_writes(compiled, pool.k.size) == []
    assert large_writes(compiled, pool.k.size, evictions=True) != []


@pytest.mark.slow  # compiles the engine's program, at the size of a run's
def test_the_engines_run_writes_a_pool_only_where_a_row_evicts(shapes):
    """In its loop over tokens nothing is written, though it tells log-probabilities; elsewhere rows go into pools."""
    model, buffer = shapes[0], shapes[3]
    settings, standing = programs.blank(2)
    compiled = programs.decode.lower(model, buffer, standing, settings, run=8).compile()
    assert large_writes(compiled, buffer.pool.pos.size // 2, inside="tokens") == []
    assert large_writes(compiled, buffer.pool.k.size) == []
    whole = large_writes(compiled, buffer.pool.k.size, evictions=True)
    assert whole and all("update" in write for write in whole)  # in place


def test_an_eviction_needs_no_second_pool():
    buffer = cache.shapes(tiny_config(head_size=64), CacheConfig(budget=4096, recent=16), batch=2)
    memory = jax.jit(cache.evict_full, donate_argnums=0).lower(buffer).compile().memory_analysis()
    pool = 2 * buffer.pool.k.size * 4
    assert memory is not None and memory.temp_size_in_bytes < pool / 4
    assert memory.alias_size_in_bytes >= pool


@pytest.mark.parametrize(
    "planted",
    (
        lambda pool: pool._replace(k=pool.k[:, ::-1]),
        lambda pool: pool._replace(v=pool.v + 1),
        lambda pool: jax.lax.cond(pool.pos[0, 0] < 0, lambda p: p, lambda p: p._replace(k=p.v, v=p.k), pool),
    ),
    ids=("reversed", "changed", "conditional"),
)
def test_the_check_finds_a_planted_write(shapes, planted):
    @jax.jit
    def step(model, token, active, buffer):
        logits, buffer = decoding.decode_step(model, token, active, buffer)
        return logits, buffer._replace(pool=planted(buffer.pool))

    assert large_writes(step.lower(*shapes).compile(), shapes[3].pool.k.size) != []


@pytest.mark.slow  # compiles for TPU in a process of its own
def test_the_same_on_tpu_with_its_kernels():
    pytest.importorskip("libtpu")
    script = pathlib.Path(decode_program.__file__)
    run = subprocess.run(
        [sys.executable, script, "v5e:2x2"], capture_output=True, text=True, env=environment_for_tpu_compiler()
    )
    assert run.returncode == 0, run.stderr[-4000:]
    reports = {(r := json.loads(line))["program"]: r for line in run.stdout.splitlines() if line.startswith("{")}
    print(reports)
    assert set(reports) == {"step", "sliding step", "step with room", "run", "chunk"}
    assert not any(
        report["windows_on_chip"] for report in reports.values()
    )  # each layer reads its own, from where it is
    for name in ("step", "sliding step", "step with room"):
        # A new token's key and value are written into the recent windows where they are: no window is copied.
        assert [write.split()[0] for write in reports[name]["writes"]] == ["dynamic-update-slice"] * 2
        assert reports[name]["temporaries"] < 2**20
        assert reports[name]["kernels"] == ["buffer_attention"]
    assert reports["run"]["writes"] == reports["chunk"]["writes"] == []
    assert reports["run"]["temporaries"] < reports["run"]["pool_bytes"] / 4  # its evictions need no second pool
    assert reports["chunk"]["kernels"] == ["buffer_attention", "retention_attention_forward"]


def test_the_run_does_not_grow_with_depth():
    def lines(depth):
        args = decode_program.arguments(tiny_config(num_layers=depth), BUDGET, batch=1)
        return len(lower_run(*args).as_text().splitlines())

    assert lines(5) == lines(2)


def test_a_run_of_tokens_is_one_dispatch(monkeypatch):
    calls = []
    run = runs.decode_run
    monkeypatch.setattr(runs, "decode_run", lambda *args: calls.append(args[-1]) or run(*args))
    monkeypatch.setattr(runs, "_AT_ONCE", 16)
    # Windows of 4 tokens: evictions are part of the run.
    out = rj.generate(tiny_model(), [[1, 2, 3]], CacheConfig(budget=3, recent=4), max_new_tokens=33)
    assert len(out.tokens[0]) == 33 and calls == [16, 16]  # the first token comes out of the prompt


def test_prompts_of_any_length_run_one_program():
    compiled = []

    def listen(event, duration_secs, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        model, cfg = tiny_model(), CacheConfig(budget=3, recent=4, prefill_chunk=7)
        rj.prefill(model, tokens_of(0, 2, 8), cfg)
        assert compiled
        compiled.clear()
        for length in (9, 14, 50):
            rj.prefill(model, tokens_of(1, 2, length), cfg)
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
