"""The eviction policies of the literature against NumPy written from their papers, and under the one buffer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, tiny_config, tiny_model, tokens_of

import retention_jax as rj
from retention_jax import cache
from retention_jax.cache import selection
from retention_jax.cache.buffer import Entries
from retention_jax.config import CacheConfig, EvalConfig
from retention_jax.evaluation import buffers
from retention_jax.generation.scoring import _outlook
from retention_jax.kernels import key_products
from retention_jax.policies import scores, table
from retention_jax.policies.table import POLICIES

pytestmark = pytest.mark.one_version

B, K, G, E, Q, H = 2, 2, 2, 9, 5, 4


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.fixture(scope="module")
def layer():
    """Queries, keys, values and positions with dead entries among them, as float32."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=s).astype(np.float32) for s in ((B, Q, K * G, H), (B, K, E, H), (B, K, E, H)))
    k[:, :, 4], k[:, :, 6] = k[:, :, 1] * 2, k[:, :, 1] * 0.5  # alike
    pos = np.array([0, 2, 3, 5, -1, 6, 7, -1, 9], np.int32) + np.zeros((B, K, 1), np.int32)
    pos[1, 1, 4], pos[0, 0, 0] = 5, -1
    query_pos = np.array([[5, 6, 7, 9, -1], [-1, 6, 7, -1, 9]], np.int32)
    dead = pos < 0
    k[dead], v[dead] = 77.0, 77.0
    return q, k, v, pos, query_pos


def rows(q, k, pos, query_pos, b, n, window=99):
    """Attention of each real query of head n: a row of E shares."""
    for t, at in enumerate(query_pos[b]):
        seen = (pos[b, n // G] >= 0) & (pos[b, n // G] <= at) & (at - pos[b, n // G] < window)
        if at >= 0:
            row = np.zeros(E)
            row[seen] = softmax(k[b, n // G, seen].astype(float) @ q[b, t, n] / np.sqrt(H)) if seen.any() else 0
            yield row


@pytest.mark.parametrize("window", (None, 3))
@pytest.mark.parametrize("block", (2**24, B * K * G * E * 2))
def test_received_is_the_sum_of_attention_rows(layer, window, block, monkeypatch):
    monkeypatch.setattr(key_products, "_BLOCK", block)  # all queries at once; two at a time
    q, k, _, pos, query_pos = layer
    want = [[sum(rows(q, k, pos, query_pos, b, n, window or 99)) for n in range(K * G)] for b in range(B)]
    size = None if window is None else jnp.int32(window)
    got = key_products.received(jnp.asarray(q), jnp.asarray(query_pos), jnp.asarray(k), jnp.asarray(pos), size)
    assert_close(got, np.array(want).reshape(B, K, G, E))


def test_expected_weight_is_that_of_a_normal_distribution(layer):
    q, k, _, pos, query_pos = layer
    got = key_products.expected_weight(*map(jnp.asarray, (q, query_pos, k, pos >= 0)))
    for b in range(B):
        for n in range(K * G):
            real, live = q[b, query_pos[b] >= 0, n].astype(float), pos[b, n // G] >= 0
            keys, cov = k[b, n // G, live].astype(float), np.cov(real.T, bias=True)
            logits = keys @ real.mean(0) / np.sqrt(H) + np.einsum("eh,hj,ej->e", keys, cov, keys) / (2 * H)
            want = np.zeros(E)
            want[live] = softmax(logits)
            assert_close(got[b, n // G, n % G], want)


def test_redundancy_spares_the_newest_of_keys_alike(layer):
    _, k, _, pos, _ = layer
    got = key_products.redundancy(jnp.asarray(k), jnp.asarray(pos >= 0), 0.5)
    for b in range(B):
        for h in range(K):
            live = np.flatnonzero(pos[b, h] >= 0)
            unit = k[b, h, live].astype(float) / np.linalg.norm(k[b, h, live].astype(float), axis=1, keepdims=True)
            cosine = unit @ unit.T
            np.fill_diagonal(cosine, 0)
            for row in cosine:
                if (row > 0.5).any():
                    row[np.flatnonzero(row > 0.5)[-1]] = 0
            assert_close(np.asarray(got)[b, h, live], cosine.mean(axis=0))


def test_short_functions_against_numpy(layer):
    _, k, v, pos, _ = layer
    votes = np.random.default_rng(1).random((B, K, G, E)).astype(np.float32)
    weight, redundant = votes, votes[:, :, 0]
    alike = np.asarray(scores.key_diff(jnp.asarray(k), jnp.asarray(pos >= 0)))
    got = {
        "pooled": scores.pooled(jnp.asarray(redundant), jnp.asarray(pos >= 0), 3),
        "rkv": scores.rkv(jnp.asarray(votes[:, :, 1]), jnp.asarray(redundant), jnp.asarray(pos >= 0)),
        "norm": scores.key_norm(jnp.asarray(k)),
        "expected": scores.expected_attention(jnp.asarray(weight), jnp.asarray(v)),
        "tova": scores.tova(jnp.asarray(votes)),
    }
    for b in range(B):
        np.testing.assert_allclose(got["tova"][b, 0], votes[b].mean(axis=(0, 1)), rtol=1e-6)
        np.testing.assert_array_equal(got["tova"][b, 0], got["tova"][b, 1])
        for h in range(K):
            live = np.flatnonzero(pos[b, h] >= 0)
            keys = k[b, h, live].astype(float)
            unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
            anchor = unit.mean(axis=0)
            assert_close(alike[b, h, live], -(unit @ anchor) / np.linalg.norm(anchor))
            best = [max(redundant[b, h, live][max(i - 1, 0) : i + 2]) for i in range(len(live))]
            np.testing.assert_array_equal(np.asarray(got["pooled"])[b, h, live], best)
            joint = 0.1 * votes[b, h, 1, live] - 0.9 * softmax(redundant[b, h, live].astype(float))
            assert_close(np.asarray(got["rkv"])[b, h, live], joint)
            assert_close(np.asarray(got["norm"])[b, h, live], -np.linalg.norm(keys, axis=1))
            length = np.linalg.norm(v[b, h, live].astype(float), axis=1)
            assert_close(np.asarray(got["expected"])[b, h, live], votes[b, h, :, live].mean(axis=1) * length)


def test_the_prompt_outlives_every_random_draw():
    cfg = CacheConfig(budget=1, policy="random_keep_prompt", seed=2)
    pos, head = jnp.arange(40, dtype=jnp.int32)[None], jnp.zeros((1, 40), jnp.int32)
    entries = table.Everything((pos < 20).astype(jnp.float32), pos, head, jnp.array([40]), None)
    score = np.asarray(cfg.row.score(cfg.options, entries)[0])[0]
    assert score[:20].min() >= 1 > score[20:].max() and len(set(score)) == 40
    log_beta = jnp.full((1, 2), -3.0)
    assert np.asarray(cfg.row.carry(log_beta, True)).tolist() == [[1.0, 1.0]]
    assert np.asarray(cfg.row.carry(log_beta, False)).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("layers, budget", ((1, 8), (2, 8), (5, 100), (36, 512)))
def test_a_pyramid_gives_exactly_the_budget_in_even_steps(layers, budget):
    cfg = CacheConfig(budget=budget, policy="pyramidkv")
    seen = jnp.array([1, budget, budget + 3, 100 * budget])
    each = np.asarray(scores.pyramid(cfg.budget, cfg.newest, layers, seen))
    assert (each.sum(axis=1) == layers * budget).all() and (each[:2] == budget).all()
    rest = budget - cfg.newest
    if layers > 1:
        assert each[3, 0] > budget > each[3, -1] == cfg.newest + rest // 20
        assert each.max() <= cfg.row.most_in_a_head(cfg.budget, 2)
        for row, count in zip(each, np.asarray(seen), strict=True):
            # Section 4: from the first layer's share down to the last one's, which is a twentieth of the mean; no more
            # for the first than there is, and the rest of it for the last.
            first = np.clip(count - cfg.newest, rest, 2 * rest - rest // 20)
            assert np.abs(row - cfg.newest - np.linspace(first, 2 * rest - first, layers)).max() < 1


def test_adakv_shares_a_layers_budget_by_votes():
    """A fifth of the budget is safe for each head; the heads of a layer compete for the rest of it."""
    M, E, layers, heads = 10, 40, 3, 4
    score = np.random.default_rng(7).random((layers, heads, E)) ** [[[1.0], [2.0], [4.0], [40.0]]]
    want = np.zeros(score.shape, bool)
    for of_layer, kept in zip(score, want, strict=True):
        for of_head, safe in zip(of_layer, kept, strict=True):
            safe[np.argsort(-of_head)[: M // 5]] = True
        rest = np.where(kept, -1, of_layer).ravel()
        kept.ravel()[np.argsort(-rest)[: heads * M - kept.sum()]] = True
    flat = lambda a: jnp.asarray(a.reshape(1, -1))
    pos, head = np.indices((layers * heads, E), np.int32)[::-1]
    got = selection.choose(
        CacheConfig(budget=M, policy="adakv"),
        flat(score.astype(np.float32)),
        flat(pos),
        flat(head),
        jnp.ones((1, score.size), bool),
        jnp.array([E]),
        layers * heads,
        layers,
        shared=0,
    )
    np.testing.assert_array_equal(np.asarray(got).reshape(score.shape), want)
    counts = want.sum(axis=2)
    assert (counts.sum(axis=1) == heads * M).all() and counts.min() == M // 5 and counts.max() > 1.5 * M


MODEL = tiny_model()
NAMES = tuple(POLICIES)


def stream(cfg, tokens, lengths):
    return rj.score_stream(MODEL, tokens, cfg, jnp.asarray(lengths))


@pytest.mark.parametrize("policy", ("key_norm", "h2o", "snapkv", "oracle"))  # one of each kind of score
def test_a_budget_of_all_tokens_is_the_full_cache(policy):
    tokens = tokens_of(0, 2, 10)
    scores, _ = stream(CacheConfig(budget=12, recent=4, policy=policy), tokens, [10, 10])
    log_probs = np.asarray(jax.nn.log_softmax(MODEL(tokens)[0], axis=-1))
    want = np.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    assert_close(scores.log_prob, want, 1e-4)


ALL_OPTIONS = dict(protect_first=1, protect_last=1, min_per_head=1)


@pytest.mark.parametrize(
    "policy, options",
    [(p, {}) for p in ("key_norm", "key_diff", "rkv", "expected_attention")]
    + [(p, ALL_OPTIONS) for p in ("h2o", "tova", "snapkv", "pyramidkv", "adakv", "oracle", "random_keep_prompt")],
)
def test_every_policy_keeps_what_it_may_and_what_is_protected(policy, options):
    M = 8
    cfg = dataclasses.replace(CacheConfig(budget=M, recent=4, policy=policy), **options)
    _, buffer = stream(cfg, tokens_of(1, 2, 24), [24, 9])
    kept = [[[len(head) for head in layer] for layer in buffer.positions(row)] for row in range(2)]
    assert np.asarray(buffer.live).tolist() == [np.sum(kept[0]), np.sum(kept[1])] == [4 * M, 4 * M]
    by_head = cfg.row.scope == "head"
    if by_head:
        want = scores.pyramid(M, cfg.newest, 2, jnp.array([24])) if policy == "pyramidkv" else np.full((1, 2), M)
        assert kept[0] == [[int(n), int(n)] for n in np.asarray(want)[0]]
    if policy == "adakv":
        assert [sum(layer) for layer in kept[0]] == [2 * M, 2 * M] and np.min(kept[0]) >= M // 5
    for layer in buffer.positions(0):
        for head in layer:
            assert not options or (0 in head and 23 in head)
            assert set(head) >= set(
                range(24 - cfg.newest + cfg.protect_first, 24)
            )  # the first token may take the place of one
    if policy == "tova":
        assert all(layer[0].tolist() == layer[1].tolist() for layer in buffer.positions(0))


@pytest.mark.parametrize("policy", ("h2o", "snapkv"))
def test_decoding_keeps_what_streaming_keeps(policy):
    # Tokens one by one go through the ring of queries, chunks do not.
    observe = 3 if policy == "snapkv" else 32
    cfg, tokens = CacheConfig(budget=4, recent=4, policy=policy, observe=observe), tokens_of(2, 2, 16)
    _, want = stream(cfg, tokens, [16, 16])
    _, buffer = rj.prefill(MODEL, tokens[:, :4], cfg)
    for t in range(4, 16):
        _, buffer = rj.decode(MODEL, tokens[:, t], buffer)
    for row in range(2):
        for got, expected in zip(sum(buffer.positions(row), []), sum(want.positions(row), []), strict=True):
            assert got.tolist() == expected.tolist()
    votes = cache.queries_wanted(cfg, 4)
    assert buffer.nbytes == 2 * 4 * (4 + 4) * (2 * 8 + 2) * 4 + 2 * 2 * votes * 4 * 8 * 4


def test_h2o_carries_the_sum_of_attention_rows():
    """Made-up keys and queries through several evictions, rows ragged, beside a float64 simulation."""
    L, T, M, R = 2, 22, 4, 3
    rng = np.random.default_rng(3)
    k, v = (rng.normal(size=(B, L, K, T, H)) for _ in range(2))
    q = rng.normal(size=(B, L, T, K * G, H))
    model = tiny_config(num_layers=L, num_heads=K * G, num_kv_heads=K, head_size=H)
    cfg = CacheConfig(budget=M, recent=R, policy="h2o")
    buffer, seen = cache.empty(model, cfg, B), np.zeros(B, int)
    pool = [[[{} for _ in range(K)] for _ in range(L)] for _ in range(B)]  # position -> attention received
    recent: list[list[int]] = [[] for _ in range(B)]
    take_in, append = (
        jax.jit(functools.partial(cache.take_in, prompt=False)),
        jax.jit(lambda *a: cache.evict_full(cache.append(*a))),
    )
    for size, counts in ((5, (5, 2)), (5, (4, 0)), *[(1, (1, 1))] * 4, (1, (0, 1)), (5, (5, 3)), *[(1, (1, 1))] * 3):
        at = seen[:, None] + np.arange(size)
        take = lambda a, axis, at=at: np.stack(
            [np.take(of_row, here, axis) for of_row, here in zip(a, at, strict=True)]
        )
        valid = np.arange(size)[None] < np.array(counts)[:, None]
        pos = np.broadcast_to(np.where(valid, at, -1)[:, None, None], (B, L, K, size)).astype(np.int32)
        keys, values = (jnp.asarray(take(a, 2), jnp.float32) for a in (k, v))
        new = Entries(keys, values, jnp.zeros((B, L, K, size)), jnp.asarray(pos))
        queries = jnp.asarray(take(q, 1), jnp.float32)
        if size == 1:
            buffer = append(buffer, new, jnp.asarray(valid[:, 0]), queries)
        else:
            buffer = take_in(buffer, new, jnp.asarray(valid), queries)
        for b, count in enumerate(counts):
            recent[b] += range(seen[b], seen[b] + count)
            seen[b] += count
            if count and (size > 1 or len(recent[b]) == R):
                for l in range(L):
                    for h in range(K):
                        got = pool[b][l][h] | dict.fromkeys(recent[b], 0.0)
                        for t in recent[b]:
                            visible = [p for p in got if p <= t]
                            for n in range(h * G, h * G + G):
                                for p, a in zip(
                                    visible, softmax(k[b, l, h, visible] @ q[b, l, t, n] / np.sqrt(H)), strict=True
                                ):
                                    got[p] += a
                        order = sorted(got, key=lambda p, got=got, old=seen[b] - M // 2: (p < old, -got[p]))
                        pool[b][l][h] = {p: got[p] for p in sorted(order[:M])}
                recent[b] = []
        for b in range(B):
            want = [held for layer in pool[b] for held in layer]
            offset = np.asarray(buffer.offset[b])
            for h, held in enumerate(want):
                mine = slice(offset[h], offset[h + 1])
                assert np.asarray(buffer.pool.pos[b])[mine].tolist() == list(held)
                assert_close(np.asarray(buffer.pool.stat[b])[mine], list(held.values()), 1e-5)
    assert seen.min() > 2 * M


def test_the_oracle_knows_the_rest_of_the_sequence():
    model, R, M = tiny_model(num_layers=1, num_heads=1, num_kv_heads=1), 8, 3
    tokens = tokens_of(4, 1, 16)
    cfg = CacheConfig(budget=M, recent=R, policy="oracle")
    worth = np.asarray(_outlook(model, jnp.asarray(tokens), jnp.ones((1, 16), bool), cfg))
    assert worth.shape == (2, 1, 1, 1, 16)
    # Each of the 8 later queries gives out one unit of attention over all keys; none comes after the second chunk.
    np.testing.assert_allclose(worth.sum(axis=-1).ravel(), [8, 0], rtol=1e-5, atol=1e-5)
    _, buffer = rj.score_stream(model, np.concatenate([tokens, tokens[:, :1]], axis=1), cfg, jnp.array([16]))
    assert len(buffer.positions(0)[0][0]) == M


def test_what_cannot_be_is_refused():
    oracle = CacheConfig(budget=4, recent=4, policy="oracle")
    with pytest.raises(ValueError, match="needs to know the future"):
        rj.prefill(MODEL, tokens_of(0, 1, 4), oracle)
    with pytest.raises(ValueError, match="needs to know the future"):
        rj.generate(MODEL, [[1, 2]], oracle, max_new_tokens=2)
    with pytest.raises(ValueError, match="needs to know the future"):
        rj.decode(MODEL, jnp.array([1]), cache.empty(MODEL.config, oracle, 1))
    with jax.set_mesh(rj.sharding.make_mesh(context=2)), pytest.raises(ValueError, match="'tova' needs whole heads"):
        cache.empty(MODEL.config, CacheConfig(budget=4, policy="tova"), 1)
    for wrong in (
        dict(policy="h2o", local=True),
        dict(policy="tova", observe=8),
        dict(policy="snapkv", pool_width=4),
        dict(policy="pyramidkv", min_per_head=30),
    ):
        with pytest.raises(ValueError):
            CacheConfig(**{"budget": 32, **wrong})


def test_every_name_of_the_evaluation_is_a_policy():
    for name in buffers.names():
        made = buffers.buffer_of(EvalConfig(recent=4, seed=5), name, 8, 99)
        assert made.budget == (99 if name == "full" else 8) and made.local == name.endswith("_local")
        assert name in ("full", made.policy, f"{made.policy}_local")
    assert dataclasses.replace(CacheConfig(budget=8), policy="h2o").newest == 4
