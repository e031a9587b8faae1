"""Prefill, decode, generation and streaming scores, on tiny random models whose gates forget in a few steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY_GATE, assert_close, simulate, tiny_model, tokens_of

import retention_jax as rj
from retention_jax import cache
from retention_jax.config import CacheConfig
from retention_jax.generation import decoding, runs
from retention_jax.models import decoder
from retention_jax.models.inputs import Inputs

T = 20
ROOMY = CacheConfig(budget=T, recent=4)
TIGHT = CacheConfig(budget=3, recent=4, prefill_chunk=5)
HEADS = 4  # of the tiny model: 2 layers of 2


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def prompts():
    return [tokens_of(1, 11).tolist(), tokens_of(2, 3).tolist(), tokens_of(3, 7).tolist()]


def greedy_buffer(model, logits, buffer, count):
    """`rj.decode` again and again: the tokens, and the buffer that holds them all."""
    tokens = []
    for _ in range(count):
        tokens.append(np.argmax(np.asarray(logits), axis=-1))
        logits, buffer = rj.decode(model, jnp.asarray(tokens[-1], jnp.int32), buffer)
    return np.stack(tokens, axis=1), buffer


def greedy(model, logits, buffer, count):
    return greedy_buffer(model, logits, buffer, count)[0]


def padded(prompts):
    lengths = [len(p) for p in prompts]
    return np.array([p + [0] * (max(lengths) - len(p)) for p in prompts], np.int32), lengths


@pytest.mark.parametrize("chunk", (None, 6))
def test_a_budget_for_everything_is_the_full_cache(model, chunk):
    tokens = tokens_of(0, 2, T)
    want, _ = model(tokens)
    cfg = CacheConfig(budget=T, recent=4, prefill_chunk=chunk)
    logits, buffer = rj.prefill(model, tokens[:, :13], cfg)
    assert_close(logits, want[:, 12])
    for t in range(13, T):
        logits, buffer = rj.decode(model, tokens[:, t], buffer)
        assert_close(logits, want[:, t])
    np.testing.assert_array_equal(buffer.live, HEADS * T)
    for layer in buffer.positions(1):
        for kept in layer:
            assert kept.tolist() == list(range(T))


def test_a_budget_for_everything_scores_as_the_full_cache(model):
    tokens = tokens_of(0, 2, T)
    logits, _ = model(tokens)
    scores, buffer = rj.score_stream(model, tokens, ROOMY, jnp.full(2, T))
    log_probs = jax.nn.log_softmax(logits, axis=-1)[:, :-1]
    assert_close(scores.log_prob, jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0])
    np.testing.assert_array_equal(scores.best, jnp.argmax(log_probs, axis=-1))
    np.testing.assert_array_equal(buffer.live, HEADS * T)


def test_nothing_is_evicted_below_the_budget(model):
    # 3 per head on average, 12 slots; the fourth token of a chunk is the first that must go.
    tokens = tokens_of(4, 1, 4)
    cfg = CacheConfig(budget=3, recent=1)
    _, buffer = rj.prefill(model, tokens[:, :3], cfg)
    assert [p.tolist() for layer in buffer.positions(0) for p in layer] == [[0, 1, 2]] * HEADS
    _, buffer = rj.decode(model, tokens[:, 3], buffer)
    assert int(buffer.live[0]) == 3 * HEADS


def test_the_compiled_loop_is_repeated_decode(model, prompts):
    out = rj.generate(model, prompts, TIGHT, max_new_tokens=12)
    tokens, lengths = padded(prompts)
    logits, buffer = rj.prefill(model, tokens, TIGHT, lengths=lengths)
    assert out.tokens == greedy(model, logits, buffer, 12).tolist()
    assert np.asarray(out.buffer.seen).tolist() == [n + 11 for n in lengths]
    assert np.asarray(out.buffer.live).max() <= HEADS * (TIGHT.budget + TIGHT.recent)


def test_prompts_together_equal_each_alone(model, prompts):
    together = rj.generate(model, prompts, TIGHT, max_new_tokens=12)
    tokens, lengths = padded(prompts)
    logits, _ = rj.prefill(model, tokens, TIGHT, lengths=lengths)
    for row, prompt in enumerate(prompts):
        alone = rj.generate(model, [prompt], TIGHT, max_new_tokens=12)
        assert together.tokens[row] == alone.tokens[0]
        for got, want in zip(together.buffer.positions(row), alone.buffer.positions(0), strict=True):
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a, b)
        assert_close(logits[row], rj.prefill(model, np.array([prompt], np.int32), TIGHT)[0][0])


def test_stop_tokens_end_a_row_and_no_other(model, prompts):
    free = rj.generate(model, prompts, TIGHT, max_new_tokens=12)
    stop = free.tokens[0][4]
    out = rj.generate(model, prompts, TIGHT, max_new_tokens=12, stop_tokens=[stop, 31])
    until = lambda tokens: next((i + 1 for i, t in enumerate(tokens) if t in (stop, 31)), 12)
    assert out.tokens == [tokens[: until(tokens)] for tokens in free.tokens]
    assert len(out.tokens[0]) <= 5
    # The buffer holds every token but the last of each row.
    want = [len(p) + len(t) - 1 for p, t in zip(prompts, out.tokens, strict=True)]
    assert np.asarray(out.buffer.seen).tolist() == want
    assert out.stats["new_tokens"] == sum(map(len, out.tokens)) and out.stats["prompt_tokens"] == 21
    assert out.stats["live"] == np.asarray(out.buffer.live).sum() and out.stats["kv_bytes"] == out.buffer.nbytes
    assert out.stats["full_kv_bytes"] == sum(want) * HEADS * 8 * 2 * 4  # keys and values of 8 float32
    assert out.stats["tokens_per_second"] > 0


def test_samples_repeat_with_the_seed(model, prompts):
    draw = lambda seed, temperature=1.5: (
        rj.generate(model, prompts, TIGHT, max_new_tokens=12, temperature=temperature, seed=seed).tokens
    )
    assert draw(0) == draw(0) != draw(1)
    assert draw(0, 1e-4) == rj.generate(model, prompts, TIGHT, max_new_tokens=12).tokens


def test_turns_continue_the_buffer_as_it_is(model):
    # Two turns with tokens between them; log_beta is what the model itself made on the way.
    cfg, tokens = TIGHT, tokens_of(5, 1, 24)
    steps, log_beta = [], []
    _, buffer = rj.prefill(model, tokens[:, :12], cfg)
    _, buffer = rj.decode(model, tokens[:, 12], buffer)
    _, buffer = rj.decode(model, tokens[:, 13], buffer)
    assert int(buffer.recent_len[0]) == 2
    _, buffer = rj.prefill(model, tokens[:, 14:22], cfg, buffer=buffer)
    for t in (22, 23):
        _, buffer = rj.decode(model, tokens[:, t], buffer)

    shadow = cache.empty(model.config, cfg, 1)
    extend = jax.jit(functools.partial(decoder.extend, queries=0))
    append, take_in = jax.jit(cache.append), jax.jit(functools.partial(cache.take_in, prompt=False))
    for size in (5, 5, 2, 1, 1, 5, 3, 1, 1):
        part, valid = tokens[:, len(log_beta) : len(log_beta) + size], jnp.ones((1, size), bool)
        new = extend(model, Inputs(part, valid), shadow).entries
        shadow = append(shadow, new, valid[:, 0]) if size == 1 else take_in(shadow, new, valid)
        steps.append(("token" if size == 1 else "read", size))
        log_beta += [np.asarray(new.stat[0, :, :, t]) for t in range(size)]
    want = simulate(np.stack(log_beta, axis=-1), steps, cfg)[-1]
    got = [p.tolist() for layer in buffer.positions(0) for p in layer]
    assert got == [want.positions(head) for head in range(HEADS)]
    assert sum(len(p) for p in want.pool) == 3 * HEADS and max(len(p) for p in want.pool) > 3


def test_generating_goes_on_where_the_last_turn_ended(model, prompts):
    # The second turn starts with the last token of the first, which is not in the buffer.
    first = rj.generate(model, prompts, TIGHT, max_new_tokens=6)
    tokens, lengths = padded(prompts)
    logits, buffer = rj.prefill(model, tokens, TIGHT, lengths=lengths)
    _, buffer = greedy_buffer(model, logits, buffer, 5)
    feed = [[tokens[-1], 9, 8] for tokens in first.tokens]
    logits, buffer = rj.prefill(model, np.array(feed, np.int32), TIGHT, buffer=buffer)
    want, buffer = greedy_buffer(model, logits, buffer, 6)
    second = rj.generate(model, feed, TIGHT, max_new_tokens=7, buffer=first.buffer)
    assert [row[:6] for row in second.tokens] == want.tolist()
    for got, kept in zip(second.buffer.positions(0), buffer.positions(0), strict=True):
        for a, b in zip(got, kept, strict=True):
            np.testing.assert_array_equal(a, b)


def test_tokens_come_as_they_are_made(model, prompts, monkeypatch):
    monkeypatch.setattr(runs, "_STREAMED", 3)
    calls = []
    stop = rj.generate(model, prompts, TIGHT, max_new_tokens=12).tokens[1][3]
    again = functools.partial(rj.generate, model, prompts, TIGHT, max_new_tokens=12, stop_tokens=[stop, 31])
    out = again(on_tokens=calls.append)
    assert out.tokens == again().tokens
    assert [sum((call[row] for call in calls), []) for row in range(3)] == out.tokens
    assert len(calls) > 2 and max(len(piece) for call in calls for piece in call) <= 3
    assert len(out.tokens[1]) <= 4 and {len(call[1]) for call in calls[2:]} == {0}
    ended = again(on_tokens=lambda pieces: len(pieces[0]) == 3)  # in the second call
    assert ended.tokens == [row[:4] for row in out.tokens]
    want = [len(p) + len(t) - 1 for p, t in zip(prompts, ended.tokens, strict=True)]
    assert np.asarray(ended.buffer.seen).tolist() == want


def test_nothing_but_shapes_compiles_anew(model, prompts):
    def draw(tokens, **options):
        rj.generate(model, prompts, TIGHT, max_new_tokens=tokens, stop_tokens=[31, 30], **options)

    sizes = lambda: [f._cache_size() for f in (runs.decode_run, decoding._prefill_chunk)]  # pyright: ignore
    draw(4)
    compiled = sizes()
    draw(9, temperature=0.5, seed=3)
    draw(6, temperature=1.5, top_k=4, top_p=0.5, min_p=0.1, row_ids=[5, 6, 7])
    draw([6, 2, 1], temperature=[0.0, 1.5, 1.0], top_k=[4, 0, 1], top_p=0.5, seed=[1, 2, 3])
    assert sizes() == compiled


def test_a_prompts_sample_is_its_own(model, prompts):
    draw = lambda rows: (
        rj.generate(
            model, [prompts[r] for r in rows], TIGHT, max_new_tokens=9, temperature=1.0, top_p=0.9, row_ids=rows
        ).tokens
    )
    together = draw([0, 1, 2])
    assert draw([2, 0]) == [together[2], together[0]] and draw([1]) == [together[1]]
    twice = rj.generate(model, [prompts[0]] * 2, TIGHT, max_new_tokens=9, temperature=1.0).tokens
    assert twice[0] != twice[1]


def test_a_row_can_sit_out_a_turn(model, prompts):
    tokens, lengths = padded(prompts)
    _, before = rj.prefill(model, tokens, TIGHT, lengths=lengths)
    kept = before.positions(1)
    _, after = rj.prefill(model, tokens[:, :4], TIGHT, lengths=[4, 0, 2], buffer=before)
    assert np.asarray(after.seen).tolist() == [15, 3, 9]
    for got, want in zip(after.positions(1), kept, strict=True):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


def test_streaming_scores_equal_decoding(model):
    tokens, cfg = tokens_of(6, 2, T), CacheConfig(budget=3, recent=4)
    scores, end = rj.score_stream(model, tokens, cfg, jnp.array([T, 13]))
    logits, buffer = rj.prefill(model, tokens[:, :4], cfg)
    for t in range(4, T):
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        rows = 2 if t < 13 else 1
        assert_close(scores.log_prob[:rows, t - 1], log_probs[np.arange(2), tokens[:, t]][:rows])
        np.testing.assert_array_equal(scores.best[:rows, t - 1], jnp.argmax(log_probs, axis=-1)[:rows])
        logits, buffer = rj.decode(model, tokens[:, t], buffer)
    assert np.asarray(end.seen).tolist() == [T, 13]
    for got, want in zip(end.positions(0), buffer.positions(0), strict=True):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


def test_bytes_do_not_depend_on_the_length(model):
    sizes = {rj.prefill(model, tokens_of(0, 1, n), TIGHT)[1].nbytes for n in (1, 5, 40)}
    assert sizes == {HEADS * (3 + 4) * (2 * 8 * 4 + 4 + 4)}


@pytest.mark.parametrize(
    "prompts, options, message",
    (
        ([], {}, "at least one prompt"),
        ([[1], [], [2], []], {}, "prompt 1 is empty; prompt 3 is empty"),
        ([[1, 32, 2]], {}, "prompt 0 has token 32, outside \\[0, 32\\)"),
        ([[1], [-1]], {}, "prompt 1 has token -1"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        ([[1]], dict(temperature=-0.5), "temperature must be at least 0, got -0.5"),
        (
            [[1]],
            dict(top_k=-1, top_p=0.0, min_p=2.0),
            "top_k must be .* got -1; top_p must be .*; min_p must be .* 2.0",
        ),
        ([[1]], dict(row_ids=[0, 1]), "row_ids must be 1 numbers, got 2"),
        ([[]], dict(max_new_tokens=0), "prompt 0 is empty; max_new_tokens"),
    ),
)
def test_generate_refuses(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        rj.generate(model, prompts, TIGHT, **{"max_new_tokens": 1, **options})


@pytest.mark.parametrize("lengths", ([0, 3], [4, 3], [3], [-1, 3], [3, 3, 3]))
def test_prefill_refuses_lengths(model, lengths):
    with pytest.raises(ValueError, match="lengths must be 2 numbers from 1 to T=3"):
        rj.prefill(model, tokens_of(0, 2, 3), TIGHT, lengths=lengths)


def test_prefill_refuses_no_tokens(model):
    with pytest.raises(ValueError, match="T at least 1"):
        rj.prefill(model, tokens_of(0, 2, 0), TIGHT)


@pytest.mark.parametrize("batch, cfg", ((3, TIGHT), (2, ROOMY)))
def test_prefill_refuses_another_buffer(model, batch, cfg):
    buffer = cache.empty(model.config, cfg, batch)
    with pytest.raises(ValueError, match="must have the batch size and configuration of this call, 2 and CacheConfig"):
        rj.prefill(model, tokens_of(0, 2, 3), TIGHT, buffer=buffer)


def test_gates_decide_what_is_kept():
    # The same model with other gates keeps other tokens, so the tests above do not compare one trivial kept set.
    kept = []
    for seed in (0, 1):
        model = tiny_model(TINY_GATE, seed=seed)
        _, buffer = rj.prefill(model, tokens_of(7, 1, T), TIGHT)
        kept.append([p.tolist() for layer in buffer.positions(0) for p in layer])
    assert kept[0] != kept[1] and len({len(p) for p in kept[0] + kept[1]}) > 1
