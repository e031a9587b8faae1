"""Traces against plain loops over the buffer; the report's page: whole, harmless, and with the numbers it was given."""

import jax
import numpy as np
import pytest
from helpers import tiny_model, tokens_of

from retention_jax import cache as cache_lib
from retention_jax import decoding
from retention_jax.config import CacheConfig
from retention_jax.models import decoder
from retention_jax.report import trace as trace_lib
from retention_jax.report.trace import NEVER

pytestmark = pytest.mark.usefixtures("compile_quickly")

T = 26
NAMES = [f"t{i}" for i in range(T)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def record(model, tokens, cache, **changes):
    given = {"names": NAMES, "title": "tiny", "policy": cache.policy}
    return trace_lib.record(model, tokens, cache, **(given | changes))


@pytest.fixture(scope="module")
def traced(model):
    return record(model, tokens_of(1, T), CacheConfig(budget=3, recent=4))


# Traces.


@jax.jit
def read(model, tokens, valid, buffer):
    return decoder.extend(model, tokens, valid, buffer)[1], decoding.read_chunk(model, tokens, valid, buffer)[1]


@pytest.mark.parametrize(
    "cache", [CacheConfig(budget=3, recent=4), CacheConfig(budget=2, recent=5, policy="streaming", protect_last=1)]
)
def test_trace_is_what_a_loop_over_kept_positions_sees(model, cache):
    tokens, R = tokens_of(1, T), cache.recent
    got = record(model, tokens, cache)
    evicted = np.full((2, 2, T), -1)
    buffer = cache_lib.empty(model.config, cache, 1)
    for start in range(0, T, R):
        valid = np.arange(start, start + R)[None] < T
        new, buffer = read(model, np.resize(tokens[start:], R)[None], valid, buffer)
        if got.log_beta is not None:
            scores = np.asarray(new.log_beta)[0, ..., : T - start]
            np.testing.assert_allclose(got.log_beta[..., start : start + R], scores, rtol=1e-5)
        seen = min(start + R, T)
        for layer, heads in enumerate(buffer.positions(0)):
            for head, kept in enumerate(heads):
                for pos in range(seen):
                    gone = pos not in kept
                    if gone and evicted[layer, head, pos] == -1:
                        evicted[layer, head, pos] = seen
                    assert gone == (not trace_lib.kept_at(got, seen)[layer, head, pos])
    evicted[evicted == -1] = NEVER
    np.testing.assert_array_equal(got.evicted, evicted)
    assert (got.log_beta is None) == (cache.policy == "streaming")
    assert 0 < (got.evicted == NEVER).sum() <= 4 * cache.budget


def test_nothing_is_kept_before_it_arrives(traced):
    assert not trace_lib.kept_at(traced, 8)[..., 8:].any()
    assert trace_lib.kept_at(traced, 2)[..., :2].all()


def test_half_life_by_hand():
    log_beta = np.log(np.array([0.5, 0.25, 2.0**-0.01], np.float32))
    np.testing.assert_allclose(trace_lib.half_life(log_beta), [1, 0.5, 100], rtol=1e-5)
    assert trace_lib.half_life(np.zeros(1, np.float32)) == np.inf


def test_trace_file_round_trips(traced, tmp_path):
    odd = traced._replace(names=["", "é", "</script>", "日本", *NAMES[4:]], title="ti 'tle")
    trace_lib.save(odd, tmp_path / "a.npz")
    same_trace(trace_lib.load(tmp_path / "a.npz"), odd)
    trace_lib.save(odd._replace(log_beta=None), tmp_path / "b.npz")
    assert trace_lib.load(tmp_path / "b.npz").log_beta is None


def same_trace(got, want):
    for name, a, b in zip(want._fields, got, want, strict=True):
        if isinstance(b, np.ndarray):
            np.testing.assert_array_equal(a, b, err_msg=name)
        else:
            assert a == b, name


def test_bad_traces_are_refused(model, traced, tmp_path):
    with pytest.raises(ValueError, match="token 32 is outside the model's vocabulary.*; 1 names for 2 tokens"):
        record(model, np.array([1, 32]), CacheConfig(budget=1), names=["a"])
    (path := tmp_path / "a.npz").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(ValueError, match="a.npz: not a trace"):
        trace_lib.load(path)
    np.savez(path, title=np.array("x"), evicted=np.zeros((1, 1, 2), np.int32))
    with pytest.raises(ValueError, match="lacks policy, budget, recent, text, ends"):
        trace_lib.load(path)
    np.savez(path, a=np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not a trace"):
        trace_lib.load(path)
    trace_lib.save(traced._replace(evicted=traced.evicted[..., 1:]), path)
    with pytest.raises(
        ValueError, match=r"evicted has shape \(2, 2, 25\), but there are 26 tokens; log_beta has shape"
    ):
        trace_lib.load(path)
