"""What the TPU kernels leave out, the block sizes they choose, and what they refuse."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import make, value_and_grads
from mass_cases import value_and_grad

from retention_jax.kernels import block_pairs, blocks, retention_attention_tpu, retention_mass_tpu
from retention_jax.kernels.blocks import AttentionBlocks, MassBlocks

pytestmark = pytest.mark.one_version

SMALL = AttentionBlocks(tokens=128, stripe=128)


def pairs_of(pairs, row, heads, n):
    """The (query, key, masked) that a program of this row counts, step by step."""
    at = (block_pairs.pair_at(pairs.codes, row, step, heads=heads, blocks=n) for step in range(int(pairs.steps)))
    reach = np.asarray(pairs.reach).reshape(-1, n)[row]
    return [(int(p.query), int(p.key), bool(p.masked)) for p in at if p.live and p.query <= reach[p.key]]


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("window", [1, 9, 17, 64])
def test_pairs_hold_all_that_is_visible_and_little_else(by_key, window):
    B, K, n, block = 2, 2, 8, 8
    rng = np.random.default_rng(window)
    segment_ids = np.stack([np.sort(rng.integers(0, 4, n * block)), rng.integers(0, 3, n).repeat(block)])
    decay = jnp.asarray(rng.choice([0.0, -5.0, -20.0], size=(B * K, n)), jnp.float32)
    reach = block_pairs.reached(decay, 0.0, jnp.int32(window), block)
    pairs = block_pairs.visible_pairs(
        jnp.asarray(segment_ids, jnp.int32), reach, jnp.int32(window), block, by_key=by_key
    )
    age = np.arange(n * block)[:, None] - np.arange(n * block)[None]
    for row in range(B * K):
        same = segment_ids[row // K][:, None] == segment_ids[row // K][None]
        visible = (age >= 0) & (age < window) & same
        alive = age * np.asarray(decay)[row].repeat(block)[None] > np.log(1e-45)
        tile = lambda x: x.reshape(n, block, n, block)
        needed = {tuple(map(int, p)) for p in np.argwhere(tile(visible & alive).any(axis=(1, 3)))}
        counted = pairs_of(pairs, row, K, n)
        got = {(i, j) for i, j, _ in counted}
        assert needed <= got and len(got) == len(counted)
        # Beyond them: blocks whose ranges of ids overlap, and one block on account of rounding.
        assert all(j <= i and (i - j - 2) * block < window for i, j in got)
        whole = tile(visible).all(axis=(1, 3))
        assert all(masked or whole[i, j] for i, j, masked in counted)
        # The owner's pairs are together, its own block first.
        owner = [j if by_key else i for i, j, _ in counted]
        assert owner == sorted(owner)
        firsts = [c for c, before in zip(counted, [None, *owner], strict=False) if (c[1] if by_key else c[0]) != before]
        assert all(i == j for i, j, _ in firsts) and len(firsts) == n


def test_leaving_out_what_decayed_changes_no_bit_of_attention(monkeypatch):
    (q, k, v, log_beta, segment_ids), cotangent = make(1, B=1, T=512, groups=1, dtype=np.float32, K=1, H=8)
    inputs = q, k, v, np.minimum(log_beta, -0.7), np.zeros_like(segment_ids)
    op = lambda *x: retention_attention_tpu.retention_attention(*x, blocks=SMALL)
    left_out = value_and_grads(op, inputs, cotangent)
    q, k, log_beta = (jnp.asarray(x) for x in (q.swapaxes(1, 2), k[:, :, 0], inputs[3][:, 0]))
    reach = block_pairs.last_reached(q, k, log_beta, jnp.int32(512), 128, 8**-0.5)
    assert reach.tolist() == [[2, 3, 3, 3]]  # (104.3 + at most 68 of the logits) / 0.7 tokens

    monkeypatch.setattr(retention_attention_tpu, "last_reached", lambda *_: jnp.full_like(reach, 3))
    everything = value_and_grads(op, inputs, cotangent)
    for a, b in zip([left_out[0], *left_out[1]], [everything[0], *everything[1]], strict=True):
        np.testing.assert_array_equal(a, b)


def test_leaving_out_what_decayed_changes_no_bit_of_mass(monkeypatch):
    rng = np.random.default_rng(0)
    gates = -(np.array([2.0, 0.6, 0.1, 1e-4], np.float32)[None, :, None] + np.zeros((1, 4, 1500), np.float32))
    inputs = gates, np.zeros((1, 1500), np.int32), rng.normal(size=gates.shape).astype(np.float32)
    op = lambda *x: retention_mass_tpu.retention_mass(*x, blocks=MassBlocks(rows=8))
    left_out = value_and_grad(op, *inputs)
    monkeypatch.setattr(retention_mass_tpu, "reached", lambda slowest, *_: jnp.full(slowest.shape, 15, jnp.int32))
    for a, b in zip(left_out, value_and_grad(op, *inputs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_reach_ends_where_nothing_is_left():
    slowest = jnp.array([[-2.0] * 6, [-0.3] * 6, [-1e-4] * 6, [-np.inf] * 6, [np.nan] * 6], jnp.float32)
    last = block_pairs.reached(slowest, 0.0, jnp.int32(768), 128)
    # 104.3 / 2 = 52 tokens, 104.3 / 0.3 = 347: the smallest age d blocks apart is 128 d - 127.
    assert last[:, 0].tolist() == [1, 3, 5, 0, 5]
    # Keys may begin with a large logit, which takes longer to decay: (104.3 + 100) / 0.3 = 681.
    assert block_pairs.reached(slowest[1:2], 100.0, jnp.int32(768), 128)[0].tolist() == [5] * 6
    assert block_pairs.reached(slowest[1:2], 100.0, jnp.int32(130), 128)[0].tolist() == [2, 3, 4, 5, 5, 5]


@pytest.mark.parametrize("length", [1, 300, 4096, 131072])
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
def test_blocks_fit(length, groups, head_size):
    for dtype in (jnp.float32, jnp.bfloat16):
        chosen = blocks.attention_blocks(length, groups, head_size, dtype)
        assert blocks.attention_vmem_bytes(chosen, groups, head_size, dtype) <= blocks.VMEM_BUDGET
        assert chosen.tokens == 128 or chosen.tokens <= length / 8
    rows = blocks.mass_blocks(length).rows
    assert rows % 8 == 0 and rows <= 128


def test_refusals():
    with pytest.raises(ValueError, match="tokens a multiple of stripe, got tokens=256, stripe=192"):
        AttentionBlocks(tokens=256, stripe=192)
    with pytest.raises(ValueError, match="rows must be a multiple of 8, got 12"):
        MassBlocks(rows=12)
    with pytest.raises(ValueError, match="128 query heads of size 512 .* bytes of VMEM even with blocks of 128"):
        blocks.attention_blocks(4096, 128, 512, jnp.float32)
    with pytest.raises(ValueError, match="64 sequences of 131072 tokens in blocks of 1024 need .* bytes of scalar"):
        blocks.check_attention_smem(AttentionBlocks(1024, 256), batch=64, kv_heads=8, length=131072)
    with pytest.raises(ValueError, match="2000000 tokens need .* bytes of VMEM"):
        blocks.mass_blocks(2_000_000)
    half = jnp.zeros((1, 4, 1, 8), jnp.float16)
    with pytest.raises(ValueError, match="all in float32 or all in bfloat16, got float16, float16 and float16"):
        retention_attention_tpu.retention_attention(
            half, half, half, jnp.zeros((1, 1, 4)), jnp.zeros((1, 4), jnp.int32)
        )
    with pytest.raises(ValueError, match="log_beta in float32 or bfloat16, got float16"):
        retention_mass_tpu.retention_mass(jnp.zeros((1, 1, 4), jnp.float16), jnp.zeros((1, 4), jnp.int32))
