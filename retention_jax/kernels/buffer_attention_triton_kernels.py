"""The two Triton kernels of `buffer_attention_triton.py`: partial softmaxes over shares of the keys, and their merge.

The keys of a sequence in one layer are a list of items: for each key/value head the blocks of its pool segment, then
those of its recent window. Program p of P takes the items from p * total // P on, whatever heads they belong to, and
leaves one partial softmax for each head it meets. Going through the list, p and the head never fall and one of them
rises, so place p + head is nobody else's.
"""

from typing import no_type_check

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
@no_type_check
def weighted(weights, values, acc):
    """acc + weights @ values. Float32 weights of bfloat16 values enter as two bfloat16 numbers, what rounding leaves
    and what it takes away."""
    rounded = weights.to(values.dtype)
    acc = tl.dot(rounded, values, acc, input_precision="tf32x3")
    if values.dtype != tl.float32:
        acc = tl.dot((weights - rounded.to(tl.float32)).to(values.dtype), values, acc, input_precision="tf32x3")
    return acc


@triton.jit
@no_type_check
def _fold(m, l, acc, queries, keys, values, visible, SCALE: tl.constexpr):
    """Adds some keys to a running softmax in powers of 2."""
    logits = tl.dot(queries, tl.trans(keys), input_precision="tf32x3") * (SCALE * LOG2E)
    logits = tl.where(visible, logits, float("-inf"))
    highest = tl.maximum(m, tl.max(logits, 1))
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    p = tl.exp2(logits - finite[:, None])
    shrink = tl.exp2(m - finite)
    return highest, l * shrink + tl.sum(p, 1), weighted(p, values, acc * shrink[:, None])


@triton.jit
@no_type_check
def _items(offset, recent_blocks, head, KEYS: tl.constexpr):
    """Blocks of a head's pool segment, and all of the head's items."""
    pool_blocks = tl.cdiv(tl.load(offset + head + 1) - tl.load(offset + head), KEYS)
    return pool_blocks, pool_blocks + recent_blocks


@triton.jit
@no_type_check
def attend(
    q, pool_k, pool_v, offset, recent_k, recent_v, recent_range, layer, size, seen, recent_pos, pool_pos, out, lse,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr, S: tl.constexpr,
    L: tl.constexpr, R: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SCALE: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """Partial softmaxes `out [B, P + K - 1, Q, H]` and `lse [B, P + K - 1, Q]` of Q = T G queries of a head."""
    G: tl.constexpr = N // K
    Q: tl.constexpr = T * G
    program, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h, key = tl.arange(0, HEAD), tl.arange(0, KEYS)
    in_q = (row < Q)[:, None] & (h < H)[None, :]
    q_place = (row // G * N + row % G)[:, None] * H + h[None, :]
    kv_place = key[:, None] * H + h[None, :]

    offset += b * (K + 1)
    recent_begin, recent_end = tl.load(recent_range + 2 * b), tl.load(recent_range + 2 * b + 1)
    recent_blocks = tl.cdiv(recent_end - recent_begin, KEYS)
    of_layer = (b * L + tl.load(layer)) * K
    total = 0
    for head in range(K):
        total += _items(offset, recent_blocks, head, KEYS)[1]
    begin, end = program * total // P, (program + 1) * total // P
    oldest, first_pos = row, recent_begin
    if WINDOWED:
        first_pos = tl.load(recent_pos + b)
        oldest = tl.load(seen + b) + row // G - tl.load(size) + 1

    before = 0
    for head in range(K):
        pool_blocks, items = _items(offset, recent_blocks, head, KEYS)
        low, high = tl.maximum(begin - before, 0), tl.minimum(end - before, items)
        before += items
        if low < high:
            queries = tl.load(q + b * T * N * H + head * G * H + q_place, mask=in_q, other=0.0)
            m = tl.full([ROWS], float("-inf"), tl.float32)
            l = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, HEAD], tl.float32)
            first, last = tl.load(offset + head), tl.load(offset + head + 1)
            for item in range(low, tl.minimum(high, pool_blocks)):
                start = first + item * KEYS
                live = start + key < last
                in_kv = live[:, None] & (h < H)[None, :]
                keys = tl.load(pool_k + (b * S + start) * H + kv_place, mask=in_kv, other=0.0)
                values = tl.load(pool_v + (b * S + start) * H + kv_place, mask=in_kv, other=0.0)
                visible = live[None, :]
                if WINDOWED:
                    pos = tl.load(pool_pos + b * S + start + key, mask=live, other=-1)
                    visible = visible & (pos[None, :] >= oldest[:, None])
                m, l, acc = _fold(m, l, acc, queries, keys, values, visible, SCALE)
            for item in range(tl.maximum(low, pool_blocks), high):
                start = recent_begin + (item - pool_blocks) * KEYS
                live = start + key < recent_end
                in_kv = live[:, None] & (h < H)[None, :]
                keys = tl.load(recent_k + ((of_layer + head) * R + start) * H + kv_place, mask=in_kv, other=0.0)
                values = tl.load(recent_v + ((of_layer + head) * R + start) * H + kv_place, mask=in_kv, other=0.0)
                visible = live[None, :]
                if WINDOWED:
                    visible = visible & ((first_pos + start + key)[None, :] >= oldest[:, None])
                m, l, acc = _fold(m, l, acc, queries, keys, values, visible, SCALE)
            part = (b * (P + K - 1) + program + head) * Q
            tl.store(out + part * H + row[:, None] * H + h[None, :], acc / tl.maximum(l, 1e-30)[:, None], mask=in_q)
            tl.store(lse + part + row, tl.where(l > 0, m / LOG2E + tl.log(l), float("-inf")), mask=row < Q)


@triton.jit
@no_type_check
def merge(
    part_out, part_lse, offset, recent_range, out, lse,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr, P: tl.constexpr,
    KEYS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`out [B, T, N, H]` and `lse [B, T, N]`: one query's partial softmaxes, merged in the order of the programs."""
    G: tl.constexpr = N // K
    Q: tl.constexpr = T * G
    row, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    h, part = tl.arange(0, HEAD), tl.arange(0, PARTS)
    offset += b * (K + 1)
    recent_blocks = tl.cdiv(tl.load(recent_range + 2 * b + 1) - tl.load(recent_range + 2 * b), KEYS)
    total, before = 0, 0
    for other in range(K):
        items = _items(offset, recent_blocks, other, KEYS)[1]
        before += tl.where(other < head, items, 0)
        total += items
    after = before + _items(offset, recent_blocks, head, KEYS)[1]
    # Programs that may hold some of the head's items; which of them do is asked of each.
    first = tl.maximum(before * P // tl.maximum(total, 1) - 1, 0)
    last = tl.minimum(after * P // tl.maximum(total, 1) + 1, P)
    base = b * (P + K - 1) + head

    m = tl.full([PARTS], float("-inf"), tl.float32)
    for start in range(first, last, PARTS):
        p = start + part
        holds = (p < P) & (tl.maximum(p * total // P, before) < tl.minimum((p + 1) * total // P, after))
        m = tl.maximum(m, tl.load(part_lse + (base + p) * Q + row, mask=holds, other=float("-inf")))
    highest = tl.max(m, 0)
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    mass = tl.zeros([PARTS], tl.float32)
    acc = tl.zeros([HEAD], tl.float32)
    for start in range(first, last, PARTS):
        p = start + part
        holds = (p < P) & (tl.maximum(p * total // P, before) < tl.minimum((p + 1) * total // P, after))
        share = tl.exp(tl.load(part_lse + (base + p) * Q + row, mask=holds, other=float("-inf")) - finite)
        place = ((base + p) * Q + row)[:, None] * H + h[None, :]
        values = tl.load(part_out + place, mask=holds[:, None] & (h < H)[None, :], other=0.0)
        acc += tl.sum(share[:, None] * values, 0)
        mass += share
    mass = tl.sum(mass, 0)
    place = (b * T + row // G) * N + head * G + row % G
    tl.store(out + place * H + h, acc / tl.maximum(mass, 1e-30), mask=h < H)
    tl.store(lse + place, tl.where(mass > 0, finite + tl.log(mass), float("-inf")))
