"""The buffer against the simulation in `helpers.py`: after every step, every byte of the pool is what it must be.

A batch is a story of steps; in each, every row takes in some tokens of its own, or none. Entries are made up: keys and
values are noise, so that a moved or changed one is seen, and padding is nan.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Kept, Step, simulate, tiny_config

from retention_jax import cache
from retention_jax.cache import eviction
from retention_jax.cache.buffer import Buffer, Entries
from retention_jax.config import CacheConfig

B, L, K, H = 4, 2, 2, 4
HEADS = L * K
MODEL = tiny_config(num_layers=L, num_kv_heads=K, head_size=H)
# Few values, exact in binary: products with ages coincide, so that ties decide nearly every eviction.
TIED = (-np.inf, -2.0, -1.0, -0.5, -0.25, -0.0, 0.0)

ALL_AT_ONCE = dict(protect_first=2, protect_last=3, min_per_head=2, threshold=0.01, horizon=5)
RETENTION = [
    {},
    dict(protect_first=2),
    dict(protect_last=3),
    dict(min_per_head=2),
    dict(threshold=0.1),
    dict(threshold=1.0, min_per_head=1),
    dict(horizon=16),
    ALL_AT_ONCE,
]
BASELINES = [
    dict(policy=policy, **options)
    for policy in ("streaming", "random")
    for options in ({}, dict(protect_first=1, protect_last=2, min_per_head=3, seed=7))
]


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@jax.jit
def take_in(buffer, new, valid):
    return cache.take_in(buffer, new, valid, prompt=False)


@jax.jit
def take_token(buffer, new, active):
    return cache.evict_full(cache.append(buffer, new, active))


class Story:
    """Rows of made-up tokens, and how many of them arrive in each step."""

    def __init__(self, seed: int, batch: int, plan: list[tuple[str, int]], quiet: float = 0.2, dtype: str = "float32"):
        rng = np.random.default_rng(seed)
        self.steps: list[tuple[str, int, np.ndarray]] = []
        for kind, size in plan:
            counts = rng.integers(0, size + 1, batch) if kind == "read" else (rng.random(batch) > quiet).astype(int)
            self.steps.append((kind, size, counts))
        T = int(np.sum([counts for *_, counts in self.steps], axis=0).max())
        self.k, self.v = (rng.normal(size=(batch, L, K, T, H)).astype(dtype) for _ in range(2))
        spread = -np.exp(3 * rng.normal(size=(batch, L, K, T)) - 2)
        spread = np.where(rng.random((batch, L, K, T)) < 0.1, rng.choice(TIED, (batch, L, K, T)), spread)
        tied = rng.choice(TIED, (batch, L, K, T))
        # Every second row is full of ties.
        self.log_beta = np.where((np.arange(batch) % 2 == 0)[:, None, None, None], spread, tied).astype(np.float32)

    def of_row(self, row: int) -> list[Step]:
        return [("read" if kind == "read" else "token", int(counts[row])) for kind, _, counts in self.steps]

    def alone(self, row: int) -> "Story":
        one = object.__new__(Story)
        one.steps = [(kind, size, counts[row : row + 1]) for kind, size, counts in self.steps]
        one.k, one.v, one.log_beta = (a[row : row + 1] for a in (self.k, self.v, self.log_beta))
        return one

    def tell(self, cfg: CacheConfig, model=MODEL):
        """Yields the buffer after every step."""
        batch = len(self.k)
        buffer = cache.empty(model, cfg, batch)
        seen = np.zeros(batch, int)
        for kind, size, counts in self.steps:
            new, valid = self.entries(seen, counts, size)
            buffer = take_in(buffer, new, valid) if kind == "read" else take_token(buffer, new, valid[:, 0])
            seen = seen + counts
            yield buffer

    def entries(self, seen: np.ndarray, counts: np.ndarray, size: int) -> tuple[Entries, np.ndarray]:
        """The next `counts` tokens of each row in a chunk of `size`."""
        batch, heads, tokens = self.k.shape[0], (L, K), (size,)
        k, v = (np.full((batch, *heads, *tokens, H), np.nan, self.k.dtype) for _ in range(2))
        log_beta = np.full((batch, *heads, *tokens), np.nan, np.float32)
        pos = np.full((batch, *heads, *tokens), -1, np.int32)
        for row, (s, n) in enumerate(zip(seen, counts, strict=True)):
            for target, source in ((k, self.k), (v, self.v), (log_beta, self.log_beta)):
                target[row, :, :, :n] = source[row, :, :, s : s + n]
            pos[row, :, :, :n] = np.arange(s, s + n)
        return Entries(*(jnp.asarray(a) for a in (k, v, log_beta, pos))), np.arange(size)[None] < counts[:, None]

    def pool_of(self, row: int, kept: Kept, slots: int, cfg: CacheConfig) -> Entries:
        """The pool as it must be: heads one after the other, each in order of position, then nothing."""
        head = np.repeat(np.arange(HEADS), [len(p) for p in kept.pool])
        pos = np.array(sum(kept.pool, []), int)
        fill = lambda a, rest: np.concatenate([a, np.full((slots - len(pos), *a.shape[1:]), rest, a.dtype)])
        k, v, log_beta = (a[row].reshape(HEADS, -1, *a.shape[4:])[head, pos] for a in (self.k, self.v, self.log_beta))
        stat = np.asarray(cfg.row.carry(jnp.asarray(log_beta), False))
        return Entries(fill(k, 0), fill(v, 0), fill(stat, 0), fill(pos.astype(np.int32), -1))  # type: ignore[arg-type]  # numpy


def plan(recent: int, chunk: int) -> list[tuple[str, int]]:
    """Two turns: chunks, then tokens enough to evict and half fill the window again; then chunks onto that."""
    tokens = recent * 2 + 3
    return [("read", chunk)] * 3 + [("token", 1)] * tokens + [("read", chunk)] * 2 + [("token", 1)] * 2


def same_bytes(got, want) -> bool:
    return np.asarray(got).dtype == np.asarray(want).dtype and np.asarray(got).tobytes() == np.asarray(want).tobytes()


def check(story: Story, cfg: CacheConfig, model=MODEL) -> None:
    """Tells a story and compares all of the buffer after every eviction, and at the end, with the simulation."""
    rows = range(len(story.k))
    wanted = [simulate(story.log_beta[row], story.of_row(row), cfg, model.windows) for row in rows]
    slots = HEADS * cfg.budget
    for step, buffer in enumerate(story.tell(cfg, model)):
        evicted = step == 0 or any(wanted[row][step].pool is not wanted[row][step - 1].pool for row in rows)
        if not evicted and step + 1 < len(story.steps):
            continue
        live = np.asarray(buffer.live)
        host = Buffer(*(jax.tree.map(np.asarray, part) for part in buffer[:-1]), config=cfg)
        for row in rows:
            kept = wanted[row][step]
            sizes = [len(p) for p in kept.pool]
            message = f"step {step}, row {row}"
            assert host.offset[row].tolist() == [0, *np.cumsum(sizes)], message
            for field, got, want in zip(Entries._fields, host.pool, story.pool_of(row, kept, slots, cfg), strict=True):
                assert same_bytes(got[row], want), f"{message}, pool.{field}"
            assert host.recent_len[row] == len(kept.recent), message
            start = host.seen[row] - len(kept.recent)
            for got, source in (
                (host.recent.k, story.k),
                (host.recent.v, story.v),
                (host.recent.stat, np.asarray(cfg.row.carry(jnp.asarray(story.log_beta), False))),
            ):
                want = source[row, :, :, start : host.seen[row]]
                assert same_bytes(got[row, :, :, : len(kept.recent)], want), f"{message}, recent"
            assert live[row] == sum(sizes) + HEADS * len(kept.recent), message
        assert_positions(buffer, [history[step] for history in wanted])


def assert_positions(buffer: Buffer, kept: list[Kept]) -> None:
    for row, want in enumerate(kept):
        got = [p.tolist() for layer in buffer.positions(row) for p in layer]
        assert got == [want.positions(head) for head in range(HEADS)]


@pytest.mark.parametrize("options", RETENTION + BASELINES)
def test_every_eviction_equals_the_simulation(options):
    cfg = CacheConfig(budget=6, recent=8, **options)
    check(Story(0, B, plan(cfg.recent, chunk=5)), cfg)


@pytest.mark.parametrize("options", (ALL_AT_ONCE, BASELINES[1]))
def test_local_evictions_equal_the_simulation(options):
    cfg = CacheConfig(budget=6, recent=8, local=True, **options)
    check(Story(8, B, plan(cfg.recent, chunk=5)), cfg)


@pytest.mark.parametrize(
    "size, layers, options", ((1, (0,), {}), (7, (1,), ALL_AT_ONCE), (12, (0, 1), dict(local=True)))
)
def test_entries_out_of_a_sliding_window_go_first(size, layers, options):
    model = tiny_config(num_layers=L, num_kv_heads=K, head_size=H, sliding_window=size, sliding_layers=layers)
    cfg = CacheConfig(budget=6, recent=4, **options)
    check(Story(9, 2, plan(cfg.recent, chunk=5)), cfg, model)


@pytest.mark.parametrize("recent, chunk", list(itertools.product((1, 128), (1, 16))))
def test_windows_and_chunks_of_every_size(recent, chunk):
    cfg = CacheConfig(budget=7, recent=recent)
    check(Story(1, 2, plan(recent, chunk)), cfg)


@pytest.mark.parametrize("seed", range(6))
def test_many_stories(seed):
    cfg = CacheConfig(budget=3, recent=2)  # compiled once
    check(Story(seed, 8, plan(recent=4, chunk=7), quiet=0.5), cfg)


def test_bfloat16_bytes():
    cfg = CacheConfig(budget=4, recent=2)
    check(Story(2, 2, plan(recent=2, chunk=5), dtype="bfloat16"), cfg, tiny_config(head_size=H, dtype="bfloat16"))


@pytest.mark.parametrize("local", (False, True))
def test_exactly_the_budget_survives(local):
    # Nobody is quiet, and every row reads whole chunks: 60 tokens for 4 heads of budget 5.
    story = Story(3, B, [("token", 1)] * 60, quiet=-1.0)
    cfg = CacheConfig(budget=5, recent=3, local=local)
    for seen, buffer in enumerate(story.tell(cfg), start=1):
        in_recent = seen % cfg.recent
        merged = seen - in_recent
        np.testing.assert_array_equal(buffer.live, HEADS * (min(merged, cfg.budget) + in_recent))


def test_bytes_never_grow():
    cfg = CacheConfig(budget=5, recent=3)
    slot = 2 * H * 4 + 4 + 4  # key, value, log_beta, pos
    story = Story(4, B, plan(recent=8, chunk=6))
    assert {b.nbytes for b in story.tell(cfg)} == {B * HEADS * (5 + 3) * slot}


@pytest.mark.parametrize("options", ({}, ALL_AT_ONCE))
def test_rows_never_influence_each_other(options):
    cfg = CacheConfig(budget=5, recent=3, **options)
    story = Story(5, B, plan(recent=3, chunk=5))
    for _, _, counts in story.steps[2:]:
        counts[1] = 0  # finished after its first chunks
    for _, _, counts in story.steps:
        counts[2] = 0  # empty throughout
    together = list(story.tell(cfg))
    for row in range(B):
        for buffer, alone in zip(together, story.alone(row).tell(cfg), strict=True):
            for got, want in zip(jax.tree.leaves(buffer), jax.tree.leaves(alone), strict=True):
                assert same_bytes(got[row : row + 1], want), row
    seen = np.asarray(together[-1].seen)
    assert seen[2] == 0 and 0 < seen[1] <= 10 < seen[0]


def test_one_head_can_own_the_pool():
    story = Story(6, 2, [("token", 1)] * 40, quiet=-1.0)
    story.log_beta[:] = -1.0
    story.log_beta[0, 0, 0] = story.log_beta[1, 1, 1] = 0.0
    cfg = CacheConfig(budget=5, recent=8)
    *_, buffer = story.tell(cfg)
    assert np.asarray(buffer.offset).tolist() == [[0, 20, 20, 20, 20], [0, 0, 0, 0, 20]]
    for row, (layer, head) in enumerate(((0, 0), (1, 1))):
        assert buffer.positions(row)[layer][head].tolist() == list(range(20, 40))
    check(story, cfg)


@pytest.mark.parametrize("options", (ALL_AT_ONCE, dict(local=True)))
def test_evicting_again_changes_nothing(options):
    cfg = CacheConfig(budget=5, recent=3, **options)
    *_, buffer = Story(7, B, [("read", 9)] * 2 + [("token", 1)] * 3, quiet=-1.0).tell(cfg)
    nothing = jnp.zeros((B, cfg.recent), bool)

    @jax.jit
    def ways(buffer):
        yet_unread = Entries(*buffer.recent)._replace(pos=-buffer.recent.pos)
        forced = eviction.merge(
            buffer, buffer.recent, nothing, rows=jnp.ones(B, bool)
        )  # the selection at the same `seen`
        return cache.evict_full(buffer), cache.take_in(buffer, yet_unread, nothing, prompt=False), forced

    for after in ways(buffer):
        for got, want in zip(jax.tree.leaves(after), jax.tree.leaves(buffer), strict=True):
            assert same_bytes(got, want)
