"""What every implementation of an eviction must do: the survivors that a sort finds, packed byte for byte."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from evict_cases import Entries, any_bytes, make, pack, packed, select, survivors
from hypothesis import given, settings
from hypothesis import strategies as st

from retention_jax.kernels import evict_pack_tpu, evict_pack_triton, evict_select_tpu, evict_xla
from retention_jax.kernels.blocks import LANES

SELECT: dict[str, Any] = {"xla": evict_xla.select_top, "tpu": evict_select_tpu.select_top}
PACK: dict[str, Any] = {
    "xla": evict_xla,
    "tpu": evict_pack_tpu,
    "triton": types.SimpleNamespace(pack_order=evict_xla.pack_order, pack_rows=evict_pack_triton.pack_rows),
}

jit = functools.partial(jax.jit, static_argnames=("capacity", "groups", "shared"))
every_select = pytest.mark.parametrize("op", [*map(jit, SELECT.values())], ids=SELECT)
every_pack = pytest.mark.parametrize("module", [*PACK.values()], ids=PACK)
WINDOW = 70


def sizes(slots: int) -> list[list[int]]:
    """Ragged; empty heads and an empty row; one head that owns all; a pool that is full."""
    return [[5, 3 * slots // 4, 41, 0], [0, 0, 0, 0], [0, 0, slots, 0], [slots // 4] * 4]


@pytest.mark.parametrize("capacity, groups, stay, lie", [(4, 1, [1, 2, 7, 8], [3, 1]), (2, 2, [1, 4, 7, 8], [2, 2])])
def test_by_hand(capacity, groups, stay, lie):
    # Head 0 owns slots 0, 1, 2 of the pool, head 1 slots 3 and 4, nobody slot 5; then two new tokens of each.
    # Three scores are -1. One more of the -2 fits: those of token 3 are newer than 1's, and head 0 comes before head 1.
    # With two for each head, head 0 keeps its -1, head 1 its -1 and the newer -2.
    x = Entries(
        score=np.array([[-5, -1, -2, -2, -2, 0, -3, -1, -1, -4]], np.float32),
        pos=np.array([[0, 2, 3, 1, 3, -1, 4, 5, 4, 5]], np.int32),
        head=np.array([[0, 0, 0, 1, 1, 1, 0, 0, 1, 1]], np.int32),
        live=np.array([[True] * 5 + [False] + [True] * 4]),
        offset=np.array([[0, 3, 5]], np.int32),
        window=2,
    )
    rows = np.arange(10, 20, dtype=np.float32)[None]
    pool, window = rows[:, :6], rows[:, 6:]
    want = [10 + e for e in sorted(stay, key=lambda e: (x.head[0, e], x.pos[0, e]))] + [0, 0]
    for keep in (survivors(x, capacity, groups), select(jit(evict_xla.select_top), x, capacity, groups)):
        assert np.flatnonzero(keep).tolist() == stay
        for result, offset in (packed(x, keep, pool, window), pack(evict_xla, x, keep, pool, window)):
            assert result[0].tolist() == want and np.diff(offset[0]).tolist() == lie


@every_select
@pytest.mark.parametrize(
    "capacity, groups, scores",
    [*((1100, 1, scores) for scores in ("spread", "tied", "equal", "by token")), (60, 1, "tied"), (60, 4, "spread")]
    + [(60, 4, "tied"), (2000, 1, "spread")],
)
def test_who_survives(op, capacity, groups, scores, monkeypatch):
    monkeypatch.setattr(evict_select_tpu, "SELECT_ROWS", 8)  # so that a search takes two steps, and heads lie in both
    x = make(0, sizes(1100), 1100, WINDOW, scores)
    got = select(op, x, capacity, groups)
    np.testing.assert_array_equal(got, survivors(x, capacity, groups))
    np.testing.assert_array_equal(select(op, x, capacity, groups), got)


@every_pack
@pytest.mark.parametrize(
    "slots, shape, dtype", [(300, (128,), ml_dtypes.bfloat16), (300, (96,), np.float32), (700, (), np.float32)]
)
def test_what_survives_keeps_its_bytes(module, slots, shape, dtype: Any):
    new = 4 * WINDOW  # on TPU pool and windows are three blocks each, those of 700 slots of two tiles
    x = make(1, sizes(slots), slots, WINDOW, scores="spread")
    pool, window = any_bytes(2, dtype, 4, slots, *shape), any_bytes(3, dtype, 4, new, *shape)
    for capacity, groups in ((slots, 1), (20, 4)):
        keep = survivors(x, capacity, groups)
        got, offset = pack(module, x, keep, pool, window)
        want, want_offset = packed(x, keep, pool, window)
        np.testing.assert_array_equal(offset, want_offset)
        assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("module", (evict_xla, evict_pack_tpu), ids=("xla", "tpu"))
@pytest.mark.parametrize("in_order", (True, False))
def test_no_part_is_written_over_what_is_still_to_be_read(module, in_order, monkeypatch, capsys):
    # Parts of 128 slots. The first head gains more than a part, the second loses several.
    monkeypatch.setattr(evict_xla, "part_size", lambda slots: LANES)
    monkeypatch.setattr(evict_pack_tpu, "pack_rows_at_once", lambda rows: LANES)
    slots, window = 8 * LANES, 3 * LANES
    x = make(4, [[10, 900, 50, 64]], slots, window, scores="spread")
    shape = 1, slots + 4 * window, LANES
    pool, new = np.split(any_bytes(5, ml_dtypes.bfloat16, *shape), [slots], axis=1)
    keep = survivors(x, slots, 1)
    if not in_order:
        from_the_end = lambda first, size: jnp.arange(first.shape[1], dtype=jnp.int32)[None, ::-1]
        monkeypatch.setattr(module, "order_of_parts", from_the_end)
    try:
        got, _ = pack(module, x, keep, pool, new)
    except jax.errors.JaxRuntimeError as error:  # the interpreter of later JAX does not go on after a race
        assert not in_order and "RACE DETECTED" in str(error)
        return
    assert (got.tobytes() == packed(x, keep, pool, new)[0].tobytes()) == in_order
    if module is evict_pack_tpu:
        assert ("RACE" in capsys.readouterr().out) == (not in_order)


scores = st.floats(width=32, allow_nan=False, allow_subnormal=False) | st.sampled_from(
    [np.inf, -np.inf, 0.0, -0.0, 1.0]
)
E = 18


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    score=st.lists(scores, min_size=E, max_size=E) | st.builds(lambda x: [x] * E, scores),
    head=st.lists(st.integers(0, 2), min_size=E, max_size=E),
    live=st.lists(st.booleans(), min_size=E, max_size=E),
    capacity=st.sampled_from([1, 4, E]),
    groups=st.sampled_from([1, 3]),
)
def test_select_top_equals_a_sort(score, head, live, capacity, groups):
    # Two rows, the second one turned around, so that every search runs beside another.
    score, head, live = (np.asarray(a, t) for a, t in ((score, np.float32), (head, np.int32), (live, bool)))
    pos = np.zeros(E, np.int32)
    for h in range(3):
        pos[head == h] = np.arange((head == h).sum())  # a token is in several heads, in each once
    rows = [(a, a[::-1]) for a in (score, pos, head, live)]
    got = jit(evict_xla.select_top)(*(jnp.stack(r) for r in rows), capacity=capacity, groups=groups)
    for row in range(2):
        score, pos, head, live = (r[row] for r in rows)
        order = np.lexsort((head, -pos, -score))
        of = (order, order, order) if groups == 1 else tuple(order[head[order] == h] for h in range(3))
        want = sorted({int(e) for group in of for e in group[live[group]][:capacity]})
        assert np.flatnonzero(got[row]).tolist() == want


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(scores, min_size=E, max_size=E))
def test_order_key_keeps_order(score):
    score = np.asarray(score, np.float32)
    key = np.asarray(evict_xla.order_key(jnp.asarray(score)[None]))[0]
    np.testing.assert_array_equal(key[:, None] < key[None], score[:, None] < score[None])
    np.testing.assert_array_equal(key[:, None] == key[None], score[:, None] == score[None])
