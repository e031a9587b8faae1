"""The engine: what a request is answered is what it would be answered alone, whoever else is there."""

import gc
import pathlib
import threading
import time
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_model
from serving_helpers import CACHE, HEADS, Client, alone, request_of, settled

import retention_jax as rj
from retention_jax.evaluation import devices
from retention_jax.models import weights
from retention_jax.parallel import sharding
from retention_jax.serving import programs
from retention_jax.serving.engine import Draining, Engine, QueueFull
from retention_jax.serving.requests import Piece, Request
from retention_jax.serving.sessions import Sessions


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(model, CACHE, rows=3, queue=16, sessions=None, run=4)
    with pytest.raises(Draining, match="it is new"):
        engine.submit(request_of(0, 3, 1), print)
    engine.start()
    assert engine.ready
    yield engine
    engine.drain(10.0)
    assert not engine.ready


MIXED = [
    request_of(1, 21, 17),
    request_of(2, 3, 9, temperature=1.3, seed=5, row_id=2),
    request_of(3, 8, 12, temperature=0.8, top_k=7, top_p=0.9, seed=2**40),
    request_of(4, 30, 1),
    request_of(5, 16, 25, temperature=1.0, min_p=0.05, seed=-1),
    request_of(1, 21, 30, stop_tokens=(9, 4, 17)),
    request_of(6, 1, 14),
]


def test_each_is_answered_as_alone_whoever_else_is_there(model, engine):
    want = [alone(model, request) for request in MIXED]
    clients = [Client(engine, request).all() for request in MIXED]  # one after the other
    assert [client.tokens for client in clients] == want
    for order in (MIXED, MIXED[::-1]):
        together = [Client(engine, request) for request in order]
        assert {c.request: c.all().tokens for c in together} == dict(zip(MIXED, want, strict=True))
    for client in together:
        stopped = client.tokens[-1] in client.request.stop_tokens
        assert client.last.finish == ("stop" if stopped else "length")
        seen = len(client.request.prompt) + len(client.tokens) - 1
        pool = min(HEADS * CACHE.budget, HEADS * seen)
        assert client.last.usage is not None and client.last.usage[:3] == (
            len(client.request.prompt),
            0,
            len(client.tokens),
        )
        assert client.last.usage.kept <= HEADS * (CACHE.budget + CACHE.recent) and client.last.usage.kept >= pool
        assert client.last.usage.budget_bytes == engine.row_bytes
    stats = settled(engine)
    assert (stats.rows, stats.rows_in_use, stats.queued, stats.requests) == (3, 0, 0, 21)
    assert stats.new_tokens == 3 * sum(map(len, want)) and stats.tokens_per_second > 0 and stats.evicted_entries > 0


def _joined(client: Client) -> tuple[list[Any], ...]:
    return (
        client.tokens,
        [x for p in client.pieces for x in p.logprobs],
        [x for p in client.pieces for x in p.top],
        [p.prompt for p in client.pieces if p.prompt is not None],
    )


def test_log_probabilities_are_the_models_own_to_the_last_bit_in_any_company(model, engine):
    asked = [request._replace(top_logprobs=i % 4, prompt_logprobs=i % 2 == 0) for i, request in enumerate(MIXED)]
    apart = [_joined(Client(engine, request).all()) for request in asked]
    together = [_joined(client.all()) for client in [Client(engine, request) for request in asked[::-1]]]
    assert together[::-1] == apart
    for request, (tokens, logprobs, top, prompt) in zip(asked, apart, strict=True):
        assert len(logprobs) == len(tokens) and len(top) == (len(tokens) if request.top_logprobs else 0)
        assert all(len(pairs) == request.top_logprobs for pairs in top)
        assert [len(told) for told in prompt] == ([len(request.prompt) - 1] if request.prompt_logprobs else [])
    request, (tokens, logprobs, top, [prompt]) = asked[2], apart[2]  # 8 tokens, one chunk: nothing was evicted
    assert asked[2].top_logprobs == 2
    logits, _ = model(np.array([request.prompt], np.int32))
    want = np.asarray(jax.nn.log_softmax(logits[0], axis=-1))
    np.testing.assert_allclose([p for p, _ in prompt], want[np.arange(7), request.prompt[1:]], rtol=1e-5)
    np.testing.assert_allclose(logprobs[0], want[7, tokens[0]], rtol=1e-5)
    best = np.argsort(-want, axis=-1)[:, :2].tolist()
    assert [[t for t, _ in pairs] for _, pairs in prompt] == best[:7] and [t for t, _ in top[0]] == best[7]


def test_what_is_asked_wrongly_is_refused_with_all_that_is_wrong(engine):
    bad = Request((3, 99), 0, temperature=-1.0, top_logprobs=21, stop_tokens=tuple(range(17)))
    with pytest.raises(ValueError) as error:
        engine.submit(bad, print)
    for part in ("token 99, outside", "max_new_tokens", "temperature", "top_logprobs must be", "at most 16, got 17"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.submit(Request((), 1), print)


def test_a_full_queue_refuses_and_says_when_to_come_again(engine):
    clients = []
    with pytest.raises(QueueFull) as error:
        for _ in range(30):
            clients.append(Client(engine, request_of(1, 20, 40)))
    assert error.value.retry_after >= 1 and len(clients) >= 16
    assert len({tuple(client.all().tokens) for client in clients}) == 1


def test_cancelled_and_late_requests_make_room(model, engine):
    endless = [Client(engine, request_of(i, 9, 10**6)) for i in range(3)]
    for client in endless:
        assert client.next().finish == ""
    late = Client(engine, request_of(4, 9, 5, deadline=time.monotonic() + 0.2))
    waiting = Client(engine, request_of(5, 9, 5))
    unwanted = Client(engine, request_of(6, 9, 5))
    engine.cancel(unwanted.ticket)
    assert unwanted.all().last.finish == "cancelled" and unwanted.tokens == []
    assert unwanted.last.usage is not None and unwanted.last.usage[:4] == (9, 0, 0, 0)
    assert late.all().last.finish == "deadline"
    assert engine.stats().rows_in_use == 3
    engine.cancel(endless[1].ticket)
    assert endless[1].all().last.finish == "cancelled"
    assert waiting.all().tokens == alone(model, waiting.request)
    for client in endless[::2]:
        engine.cancel(client.ticket)
        assert client.all().last.finish == "cancelled"
    settled(engine)


def test_who_cannot_take_a_piece_is_cancelled_and_nobody_else(model, engine):
    calls = []

    def broken(piece: Piece) -> None:
        calls.append(piece)
        raise RuntimeError("gone")

    engine.submit(request_of(1, 9, 10**6), broken)
    assert Client(engine, MIXED[0]).all().tokens == alone(model, MIXED[0])
    settled(engine)
    assert calls[-1].finish == "cancelled" and len(calls) < 10


def test_a_long_prompt_lets_the_others_go_on(engine):
    """Between two chunks there is a run for the others: pieces arrive while the prompt is read."""
    talker = Client(engine, request_of(1, 5, 10**6))
    talker.next()
    long = Client(engine, request_of(2, 8 * 12, 1))
    while long._queue.empty():
        talker.next()
    assert len(talker.pieces) >= 12
    engine.cancel(talker.ticket)
    talker.all()


def test_what_is_kept_is_shown(model, engine):
    client = Client(engine, request_of(7, 19, 6, show_kept=True)).all()
    kept, usage = client.last.kept, client.last.usage
    assert kept is not None and usage is not None
    assert np.sum(kept.by_head) == np.sum(kept.by_token) == usage.kept
    assert np.shape(kept.by_head) == (2, 2) and len(kept.by_token) == 19 + 5


def test_nothing_is_compiled_once_requests_are_served(model, tmp_path):
    """With snapshots in memory and on disk, and log-probabilities."""
    sessions = Sessions(model, CACHE, host_bytes=0, folder=tmp_path, disk_bytes=10**6)
    engine = Engine(model, CACHE, rows=3, queue=16, sessions=sessions, run=4)
    engine.start()
    before = devices.compile_seconds()
    told = MIXED[0]._replace(top_logprobs=3, prompt_logprobs=True, show_kept=True)
    for request in (*MIXED, *MIXED, told):
        Client(engine, request).all()
        sessions._worker.submit(lambda: None).result()
    assert sessions.stats().hits_disk > 3
    assert devices.compile_seconds() == before
    engine.drain(5.0)


def test_logits_that_are_not_finite_end_their_request_only(model):
    """One token's embedding is NaN: who reads it is in error, and who does not is answered beside them."""
    fine = next(r for r in MIXED if r.max_new_tokens > 9 and 31 not in (*r.prompt, *alone(model, r)))
    broken = nnx.clone(model)
    broken.embedding[...] = model.embedding[...].at[31].set(np.nan)
    engine = Engine(broken, CACHE, rows=3, queue=4, sessions=None, run=4)
    engine.start()
    clients = [Client(engine, request) for request in (Request((31,), 5), fine, Request((*fine.prompt, 31), 5))]
    assert [client.all().last.finish for client in clients] == ["error", "length", "error"]
    assert clients[1].tokens == alone(model, fine)
    again = Client(engine, fine).all()  # in a row that was in error
    assert again.tokens == clients[1].tokens and engine.ready
    engine.drain(5.0)


def test_a_failing_engine_lets_nobody_wait(model, monkeypatch):
    engine = Engine(model, CACHE, rows=3, queue=8, sessions=None, run=4)
    engine.start()
    clients = [Client(engine, request_of(i, 9, 10**6)) for i in range(6)]
    for client in clients[:3]:
        client.next()

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("of the device")

    monkeypatch.setattr(programs, "decode", fail)
    assert [client.all().last.finish for client in clients] == ["error"] * 6
    assert not engine.ready
    with pytest.raises(Draining, match="it is ended"):
        engine.submit(request_of(0, 3, 1), print)
    engine.drain(1.0)


def test_draining_finishes_what_runs_and_cancels_what_takes_too_long(model):
    engine = Engine(model, CACHE, rows=3, queue=8, sessions=None, run=4)
    engine.start()
    endless, short = Client(engine, request_of(1, 9, 10**6)), Client(engine, MIXED[0])
    drained = threading.Thread(target=engine.drain, args=(2.0,))
    drained.start()
    while engine.ready:
        time.sleep(0.01)
    with pytest.raises(Draining, match="draining"):
        engine.submit(request_of(0, 3, 1), print)
    assert short.all().tokens == alone(model, MIXED[0])
    assert endless.all().last.finish == "cancelled"
    drained.join()
    engine.drain(1.0)  # again does nothing


def test_what_cannot_be_served_is_refused_with_all_reasons(model):
    with pytest.raises(ValueError, match="rows must be at least 1, got 0; queue .* got -1; prefill_chunk must say"):
        Engine(model, rj.CacheConfig(budget=4), rows=0, queue=-1, sessions=None)
    with pytest.raises(ValueError, match="needs to know the future"):
        Engine(model, rj.CacheConfig(budget=4, prefill_chunk=8, policy="oracle"), rows=1, queue=1, sessions=None)


def test_widths():
    assert programs.widths(1024) == [32, 64, 128, 256, 512, 1024]
    assert programs.widths(100) == [25, 50, 100] and programs.widths(5) == [5]


@pytest.mark.slow  # 200 requests of mixed length at random times, twice, and each by itself
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_two_hundred_requests_at_random_times(dtype):
    """Tokens are those of `generate` by itself, and log-probabilities bitwise those of an engine without company."""
    model, rng = tiny_model(dtype=dtype), np.random.default_rng(0)
    asked = []
    for number in range(200):
        how: dict[str, Any] = {"top_logprobs": 2 if number % 5 == 0 else -1}
        if rng.random() < 0.5:
            how |= dict(temperature=float(rng.uniform(0.2, 2)), seed=int(rng.integers(-(2**63), 2**63 - 1)))
            how |= dict(top_k=int(rng.integers(0, 9)), top_p=float(rng.uniform(0.5, 1)), row_id=int(rng.integers(5)))
        if rng.random() < 0.3:
            how |= dict(stop_tokens=tuple(rng.integers(0, 32, 2).tolist()))
        asked.append(request_of(number, int(rng.integers(1, 70)), int(rng.integers(1, 40)), **how))
    engine = Engine(model, CACHE, rows=5, queue=200, sessions=None, run=4)
    engine.start()
    apart = [_joined(Client(engine, request).all()) for request in asked]
    unwanted, clients = [], {}
    for place in rng.permutation(200).tolist():
        clients[place] = Client(engine, asked[place])
        time.sleep(float(rng.exponential(0.01)))
        if rng.random() < 0.2:
            unwanted.append(Client(engine, request_of(place, int(rng.integers(1, 70)), 10**6)))
        if unwanted and rng.random() < 0.3:
            engine.cancel(unwanted.pop().ticket)
    for client in unwanted:
        engine.cancel(client.ticket)
    together = [_joined(clients[place].all()) for place in range(200)]
    assert together == apart
    if dtype == "float32":  # bfloat16 rounds so coarsely that another shape is another rounding
        assert [tokens for tokens, *_ in apart] == [alone(model, request) for request in asked]
    engine.drain(5.0)


@pytest.mark.slow  # thousands of requests
def test_nothing_grows_over_thousands_of_requests(model, tmp_path):
    sessions = Sessions(model, CACHE, host_bytes=10**5, folder=tmp_path, disk_bytes=10**6)
    engine = Engine(model, CACHE, rows=4, queue=64, sessions=sessions, run=8)
    engine.start()

    def serve(count: int, start: int) -> tuple[int, int, int]:
        for at in range(start, start + count, 50):
            for client in [Client(engine, request_of(at + i, 5 + (at + i) % 40, 9)) for i in range(50)]:
                client.all()
        settled(engine)
        sessions._worker.submit(lambda: None).result()  # snapshots on their way to disk have arrived
        gc.collect()
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return len(jax.live_arrays()), threading.active_count(), pages * 4096

    arrays, threads, before = serve(200, 0)
    *same, after = serve(1800, 200)
    assert same == [arrays, threads] and after - before < 16 * 2**20
    stats = engine.stats().snapshots
    assert stats is not None and stats.host_bytes <= 10**5 and stats.disk_bytes <= 10**6 and stats.disk_count > 10
    assert len(list(tmp_path.iterdir())) == stats.disk_count + 1
    engine.drain(30.0)


@pytest.mark.slow  # a model and its rows on a mesh
def test_rows_on_a_mesh_are_served_as_on_one_device(model, tmp_path):
    weights.save_backbone(model, tmp_path / "model")
    rj.save_gates(model, tmp_path / "gates")
    load = lambda **sizes: rj.load(
        tmp_path / "model", gates=tmp_path / "gates", dtype="float32", mesh=sharding.make_mesh(**sizes)
    )
    with pytest.raises(ValueError, match=r"mesh data \* fsdp must be 1, got 2"):
        Engine(load(data=2), CACHE, rows=2, queue=1, sessions=None)
    spread = load(context=2, tensor=2)
    with jax.set_mesh(sharding.make_mesh(context=2, tensor=2)):
        want = [alone(spread, request) for request in MIXED]
    sessions = Sessions(spread, CACHE, host_bytes=0, folder=tmp_path / "parked", disk_bytes=10**6)
    engine = Engine(spread, CACHE, rows=3, queue=16, sessions=sessions, run=4)
    engine.start()
    clients = [client.all() for client in [Client(engine, request) for request in MIXED]]
    assert [client.tokens for client in clients] == want
    sessions._worker.submit(lambda: None).result()
    again = Client(engine, MIXED[0]).all()  # its last whole chunk comes from disk
    assert again.tokens == want[0] and again.last.usage is not None and again.last.usage.cached_tokens == 16
    assert sessions.stats().hits_disk >= 1
    engine.drain(10.0)
