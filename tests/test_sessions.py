"""Snapshots by the tokens they have read: found by whole prefixes, moved to disk and out, never of anything else."""

import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import environment, same, tiny_model
from serving_helpers import CACHE, Client, alone, request_of

import retention_jax as rj
from retention_jax.cache import empty, snapshot
from retention_jax.config import RopeScaling
from retention_jax.serving.engine import Engine
from retention_jax.serving.sessions import Sessions

HEAD = 1400  # bytes of a file beside its arrays, or a few less


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def blank(model):
    return jax.tree.map(np.asarray, empty(model.config, CACHE, 1))


def row(blank, number: int):
    """A row that is unlike others."""
    return blank._replace(seen=np.full(1, number, np.int32), pool=blank.pool._replace(k=blank.pool.k + number))


@pytest.fixture
def make(model):
    """Sessions of the model, closed at the end."""
    made = []

    def make(rows_in_memory: float = 100, folder: pathlib.Path | None = None, rows_on_disk: float = 100, **cache):
        size = sum(a.nbytes for a in jax.tree.leaves(empty(model.config, CACHE, 1)))
        config = rj.CacheConfig(**{"budget": 4, "recent": 6, "prefill_chunk": 8, **cache})
        limits = dict(host_bytes=int(size * rows_in_memory), disk_bytes=int((size + HEAD) * rows_on_disk))
        made.append(Sessions(model, config, folder=folder, **limits))
        return made[-1]

    yield make
    for sessions in made:
        sessions.close()


def found(sessions, *tokens: int) -> int:
    """How many tokens a snapshot for this prompt holds."""
    held = sessions.find(tokens).result()
    assert held is None or held.buffer.seen[0] == sum(tokens[: held.length])  # as the tests below mark them
    return 0 if held is None else held.length


def keep(sessions, blank, *tokens: int) -> None:
    sessions.keep_answer(tokens, row(blank, sum(tokens)))


def cached(client: Client) -> int:
    """How many tokens of its prompt were not read."""
    assert client.last.usage is not None
    return client.last.usage.cached_tokens


def until(sessions, condition) -> None:
    by = time.monotonic() + 30
    while not condition(sessions.stats()):
        assert time.monotonic() < by, sessions.stats()
        time.sleep(0.01)


def bytes_in(folder) -> int:
    """Of all files, or -1 when one goes while they are counted."""
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except FileNotFoundError:
        return -1


def test_the_longest_whole_prefix_is_found(make, blank):
    sessions = make()
    for tokens in ((1, 2, 3), (1, 2, 3, 4, 5), (1, 2, 3, 4, 6), (2,)):
        keep(sessions, blank, *tokens)
    assert found(sessions, 1, 2, 3, 4, 5, 6) == 5
    assert found(sessions, 1, 2, 3, 4, 5) == 3  # one token at least must be left to read
    assert found(sessions, 1, 2, 3, 4, 6, 6, 6) == 5
    assert found(sessions, 1, 2, 3, 4, 7, 6) == 3
    assert found(sessions, 1, 2, 4) == found(sessions, 1, 2, 3) == found(sessions, 3) == 0
    assert found(sessions, 2, 1) == 1
    stats = sessions.stats()
    assert (stats.hits_host, stats.hits_disk, stats.misses, stats.host_count) == (5, 0, 3, 4)


def test_the_least_recently_used_move_to_disk_and_then_out(make, blank, tmp_path):
    sessions = make(2, tmp_path, 3)
    for first in range(1, 4):
        keep(sessions, blank, first, 9)
        until(sessions, lambda s, n=first: s.host_count + s.disk_count == n)
    assert found(sessions, 1, 9, 9) == 2  # from disk; it is in memory again, and 2 moves
    until(sessions, lambda s: s.disk_count == 2)
    assert sessions.stats()[:3] == (0, 1, 0) and sessions.stats().host_count == 2
    for first in range(4, 7):
        keep(sessions, blank, first, 9)
        until(sessions, lambda s, n=first - 1: s.host_count == 2 and s.disk_count == min(n, 3))
    # A file comes before its place in the count, and goes after it.
    until(sessions, lambda s: s.disk_count == 3 and s.disk_bytes == bytes_in(tmp_path))
    stats = sessions.stats()
    assert stats.host_bytes <= 2 * 3000 and stats.dropped == 0
    assert {first for first in range(1, 7) if found(sessions, first, 9, 9)} >= {5, 6}
    nowhere = make(1)
    keep(nowhere, blank, 1)
    keep(nowhere, blank, 2)
    assert (found(nowhere, 1, 9), found(nowhere, 2, 9), nowhere.stats().dropped) == (0, 1, 1)


def test_what_is_parked_is_there_after_a_restart(make, blank, tmp_path):
    sessions = make(100, tmp_path)
    for tokens in ((1, 2), (1, 2, 3), (7,)):
        keep(sessions, blank, *tokens)
    with pytest.raises(ValueError, match="in use by another process"):
        make(100, tmp_path)
    sessions.close()
    again = make(100, tmp_path)
    assert again.stats().disk_count == 3 and again.stats().host_count == 0
    held = again.find((1, 2, 3, 4)).result()
    assert held.length == 3 and same(held.buffer, row(blank, 6))
    assert found(again, 1, 2, 3, 4) == 3 and again.stats()[:2] == (1, 1)


def test_nothing_of_another_model_or_configuration_is_taken_up(make, model, blank, tmp_path):
    sessions = make(0, tmp_path)
    keep(sessions, blank, 1, 2)
    sessions.close()
    names = [path.name for path in tmp_path.glob("*.safetensors")]
    for other in (dict(budget=5), dict(seed=1), dict(prefill_chunk=16)):
        sessions = make(100, tmp_path, **other)
        assert found(sessions, 1, 2, 3) == 0 and sessions.stats().disk_count == 0 and sessions.stats().disk_bytes > 0
        sessions.close()
    weights = tiny_model(seed=1)
    sessions = Sessions(weights, CACHE, host_bytes=10**6, folder=tmp_path, disk_bytes=10**6)
    assert sessions.find((1, 2, 3)).result() is None
    # Not even under its name.
    theirs = sessions._names((1, 2), [2], b"answer")[0]
    (tmp_path / names[0]).rename(tmp_path / theirs)
    sessions.close()
    sessions = Sessions(weights, CACHE, host_bytes=10**6, folder=tmp_path, disk_bytes=10**6)
    assert sessions.stats().disk_count == 1 and sessions.find((1, 2, 3)).result() is None
    assert sessions.stats().damaged == 1 and not (tmp_path / theirs).exists()
    sessions.close()


def test_a_damaged_file_is_removed_and_the_next_longest_taken(make, blank, tmp_path):
    sessions = make(0, tmp_path)
    for tokens in ((1,), (1, 2), (1, 2, 3)):
        keep(sessions, blank, *tokens)
    until(sessions, lambda s: s.disk_count == 3)
    for length, spoil in ((2, lambda data: data[:-1]), (3, lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])):
        [path] = tmp_path.glob(f"*-{length}-*")
        path.write_bytes(spoil(path.read_bytes()))
    assert found(sessions, 1, 2, 3, 4) == 1
    assert sessions.stats().damaged == 2 and len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_full_disk_loses_snapshots_and_nothing_else(make, blank, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    sessions = make(1, tmp_path)
    monkeypatch.setattr(snapshot, "save_file", full)
    keep(sessions, blank, 1)
    keep(sessions, blank, 2)
    until(sessions, lambda s: s.dropped == 1)
    assert (found(sessions, 1, 9), found(sessions, 2, 9)) == (0, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]


def test_where_prompts_part_a_snapshot_is_worth_it(make):
    sessions = make()
    system, chunk = list(range(20)), 8
    assert sessions.worth_keeping([*system, 1, 2, 3, 4, 5], 0, chunk) == {24}
    assert sessions.worth_keeping([*system, *range(9, 0, -1)], 0, chunk) == {16, 24}  # two share the first 16
    assert sessions.worth_keeping([*system, *range(9, 0, -1)], 0, chunk) == {24}
    assert sessions.worth_keeping(system[:8], 0, chunk) == set()
    assert sessions.worth_keeping(system[:9], 0, chunk) == {8}
    assert sessions.worth_keeping(system, 3, chunk) == {19 - 8 + 8} - {19} | {19}


def test_longrope_turns_long_prompts_otherwise(blank):
    """What a short prompt has read is nothing to a long one, but an answer is continued all the same."""
    scaling = RopeScaling("longrope", original_length=4, short_factor=(1.0,) * 4, long_factor=(2.0,) * 4)
    sessions = Sessions(tiny_model(rope_scaling=scaling), CACHE, host_bytes=10**6)
    sessions.keep_prompt((1, 2, 3, 4), 2, row(blank, 3))
    assert found(sessions, 1, 2, 3, 4) == 2 and found(sessions, 1, 2, 3, 4, 5) == 0
    sessions.keep_prompt((1, 2, 3, 4, 5), 2, row(blank, 3))
    sessions.keep_answer((1,), row(blank, 1))
    assert found(sessions, 1, 2, 3, 4) == found(sessions, 1, 2, 3, 4, 5) == 2
    assert found(sessions, 1, 3, 3) == found(sessions, 1, 3, 3, 4, 5) == 1
    sessions.close()


@pytest.fixture(scope="module")
def serve(model):
    def serve(sessions: Sessions | None) -> Engine:
        engine = Engine(model, CACHE, rows=3, queue=200, sessions=sessions, run=4)
        engine.start()
        return engine

    return serve


def test_a_prefix_is_read_once_and_changes_no_token(model, make, serve):
    """By the third request that shares a prefix, only what is its own is read; the answers are those without."""
    engine = serve(make())
    system = request_of(1, 27, 1).prompt
    asked = [request_of(i, 9, 8)._replace(prompt=system + request_of(i, 9, 1).prompt) for i in range(2, 6)]
    clients = [Client(engine, request).all() for request in asked]
    assert [cached(client) for client in clients] == [0, 0, 24, 24]
    assert [client.tokens for client in clients] == [alone(model, request) for request in asked]
    again = Client(engine, asked[0]).all()
    assert cached(again) == 32 and again.tokens == clients[0].tokens  # its last whole chunk
    without = Client(engine, asked[0]._replace(reuse=False)).all()
    assert cached(without) == 0 and without.tokens == clients[0].tokens
    told = Client(engine, asked[0]._replace(prompt_logprobs=True, top_logprobs=0)).all()
    assert cached(told) == 0 and len(told.pieces[0].prompt) == 35 and told.tokens == clients[0].tokens
    engine.drain(5.0)


def test_a_conversation_goes_on_where_it_stopped_and_forks(model, make, serve):
    """Each turn reads only its new text, and is answered as `generate` continues a buffer."""
    engine = serve(make())
    tokens, buffer = (), None
    for turn in range(4):
        text = request_of(turn, 7, 6).prompt
        request = request_of(0, 1, 6)._replace(prompt=tokens + text)
        client = Client(engine, request).all()
        fresh = request.prompt[
            len(request.prompt) - len(text) - bool(turn) :
        ]  # its last token is not in the buffer yet
        out = rj.generate(model, [fresh], CACHE, max_new_tokens=6, buffer=buffer)
        assert client.tokens == out.tokens[0]
        assert cached(client) == (len(tokens) - 1 if turn else 0)
        tokens, buffer = request.prompt + tuple(client.tokens), out.buffer
        branch = rj.take_row(buffer, 0) if turn == 2 else None
        if branch is not None:
            forks = [request_of(0, 1, 6)._replace(prompt=(*tokens, first)) for first in (3, 5)]
            told = [c.all() for c in [Client(engine, fork) for fork in forks]]
            for fork, client in zip(forks, told, strict=True):
                copy = jax.tree.map(lambda a: a + 0, branch)
                want = rj.generate(model, [fork.prompt[-2:]], CACHE, max_new_tokens=6, buffer=copy).tokens[0]
                assert client.tokens == want and cached(client) == len(tokens) - 1
    # A template that writes the last answer anew falls back to what is still a prefix.
    changed = Client(engine, request_of(0, 1, 6)._replace(prompt=(*tokens[:-6], 1, 2, 3))).all()
    assert 0 < cached(changed) <= len(tokens) - 6
    engine.drain(5.0)


def test_taken_up_after_a_restart_it_is_as_if_never_parked(make, serve, tmp_path):
    first = request_of(1, 19, 9, seed=3, temperature=1.0)
    turn = lambda client: first._replace(prompt=first.prompt + tuple(client.tokens) + (1, 2, 3))
    engine = serve(make())
    never_parked = Client(engine, turn(Client(engine, first).all())).all()
    engine.drain(5.0)
    engine = serve(make(1, tmp_path))
    answer = Client(engine, first).all()
    engine.drain(5.0)
    sessions = make(1, tmp_path)
    engine = serve(sessions)
    parked = Client(engine, turn(answer)).all()
    assert parked.tokens == never_parked.tokens
    assert parked.last.usage == never_parked.last.usage and cached(parked) == 27
    assert sessions.stats().hits_disk == 1
    engine.drain(5.0)


PARKING = """
import sys, pathlib, jax, numpy as np
sys.path[:0] = sys.argv[2:]
from test_sessions import CACHE, Sessions, empty, row, tiny_model
model = tiny_model()
blank = jax.tree.map(np.asarray, empty(model.config, CACHE, 1))
sessions = Sessions(model, CACHE, host_bytes=0, folder=pathlib.Path(sys.argv[1]), disk_bytes=10**6)
print("ready", flush=True)
for number in range(10**6):
    sessions.keep_answer([number % 30, 7], row(blank, number % 30))
    while sessions._moving:
        pass
"""


@pytest.mark.slow  # a dozen processes that are killed
def test_killed_at_random_moments_of_parking_nothing_is_half_taken(make, blank, tmp_path):
    rng = np.random.default_rng(0)
    paths = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]
    for _ in range(12):
        command = [sys.executable, "-c", PARKING, str(tmp_path), *paths]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(float(rng.uniform(0, 0.5)))
            process.kill()
        sessions = make(100, tmp_path)
        assert not list(tmp_path.glob(".*")) and sessions.stats().disk_count > 0
        for number in range(30):
            held = sessions.find((number, 7, 1)).result()
            assert held is None or same(held.buffer, row(blank, number))
        assert sessions.stats().damaged == 0
        sessions.close()


@pytest.mark.slow  # 150 requests, twice
def test_in_any_company_a_shared_prefix_changes_no_bit(serve, make, tmp_path):
    """Tokens and log-probabilities are those of an engine without snapshots, wherever the snapshots lie."""
    rng = np.random.default_rng(0)
    sessions = make(8, tmp_path, 20)
    engine, without = serve(sessions), serve(None)
    systems = [request_of(i, int(rng.integers(5, 50)), 1).prompt for i in range(4)]
    clients = []
    for number in range(150):
        own = request_of(number, int(rng.integers(1, 20)), int(rng.integers(1, 20)), seed=number, top_logprobs=1)
        system = systems[int(rng.integers(4))][: int(rng.integers(1, 99))]
        request = own._replace(prompt=system + own.prompt, temperature=float(rng.integers(2)))
        clients.append(Client(engine, request))
        if rng.random() < 0.1:
            engine.cancel(clients[-1].ticket)
        time.sleep(float(rng.exponential(0.01)))
    told = lambda client: (client.tokens, [p for piece in client.pieces for p in piece.logprobs])
    whole = [client for client in clients if client.all().last.finish in ("stop", "length")]
    assert len(whole) > 100
    for client in whole:
        assert told(client) == told(Client(without, client.request).all())
    stats = sessions.stats()
    assert min(stats.hits_host, stats.hits_disk, stats.misses) > 3 and stats.damaged == 0
    engine.drain(10.0)
    without.drain(10.0)
