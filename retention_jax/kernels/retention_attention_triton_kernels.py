"""The three Triton kernels of `retention_attention_triton.py`: forward, dq, and dk, dv, dlog_beta.

The arithmetic is that of `retention_attention_xla.py`, with powers of 2. The bias (t - i) log_beta_i and the mask are
made in registers. A program keeps one block of R tokens and visits the blocks on its list, first those where some
logits are hidden, then the whole ones, which need no mask; its own block is the first of all, so that the running
maximum of every query is finite from then on. Nothing is added up across programs: results repeat bitwise.
"""

from typing import no_type_check

import triton
import triton.language as tl

from retention_jax.kernels.buffer_attention_triton_kernels import LOG2E, weighted


@triton.jit
@no_type_check
def _logits(product, t, i, gate, t_segment, i_segment, window, SCALE: tl.constexpr, MASKED: tl.constexpr):
    """Logits of a tile in powers of 2, -inf where token t does not see token i."""
    age = t - i
    logits = product * (SCALE * LOG2E) + age.to(tl.float32) * gate
    if MASKED:
        visible = (age >= 0) & (age < window) & (t_segment == i_segment)
        logits = tl.where(visible, logits, float("-inf"))
    return logits


@triton.jit
@no_type_check
def _gate(log_beta, i, T: tl.constexpr):
    """log_beta in powers of 2. Finite, so that age 0 times it is 0 and not nan; from age 1 on it is as good as -inf."""
    lowest: tl.constexpr = -1.5e38 / T
    return tl.maximum(tl.load(log_beta + i, mask=i < T, other=0.0), lowest) * LOG2E


@triton.jit
@no_type_check
def _rows(x, first, token, h, T: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr):
    """Tokens `first + token` of one head of x [T, HEADS, H], zeros behind the end."""
    place = token[:, None] * (HEADS * H) + h[None, :]
    return tl.load(
        x + first.to(tl.int64) * (HEADS * H) + place, mask=(first + token < T)[:, None] & (h < H)[None, :], other=0.0
    )


@triton.jit
@no_type_check
def _store_rows(x, values, first, token, h, T: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr):
    place = token[:, None] * (HEADS * H) + h[None, :]
    tl.store(x + first.to(tl.int64) * (HEADS * H) + place, values, mask=(first + token < T)[:, None] & (h < H)[None, :])


@triton.jit
@no_type_check
def _visited(blocks, step, R: tl.constexpr, STEP: tl.constexpr):
    """The first token that a program sees at a step."""
    return tl.load(blocks + step // (R // STEP)).to(tl.int32) * R + step % (R // STEP) * STEP


@triton.jit
@no_type_check
def _forward_steps(
    m, l, acc, queries, k, v, log_beta, segment, blocks, t, t_segment, window, begin, end, h,
    T: tl.constexpr, K: tl.constexpr, H: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, SCALE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    token = tl.arange(0, STEP)
    for step in range(begin, end):
        first = _visited(blocks, step, R, STEP)
        i = first + token
        keys = _rows(k, first, token, h, T, K, H)
        values = _rows(v, first, token, h, T, K, H)
        product = tl.dot(queries, tl.trans(keys), input_precision="tf32x3")
        i_segment = tl.load(segment + i, mask=i < T, other=0)
        logits = _logits(
            product, t[:, None], i[None, :], _gate(log_beta, i, T)[None, :], t_segment[:, None], i_segment[None, :],
            window, SCALE, MASKED,
        )  # fmt: skip
        highest = tl.maximum(m, tl.max(logits, 1))
        finite = highest
        if MASKED:
            finite = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(logits - finite[:, None])
        shrink = tl.exp2(m - finite)
        l = l * shrink + tl.sum(p, 1)
        acc = weighted(p, values, acc * shrink[:, None])
        m = highest
    return m, l, acc


@triton.jit
@no_type_check
def forward(
    q, k, v, log_beta, segment, window, blocks, counts, out, lse,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr, R: tl.constexpr,
    STEP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """`out [B, T, N, H]` and `lse [B, N, T]`, natural."""
    n: tl.constexpr = (T + R - 1) // R
    block = n - 1 - tl.program_id(0)  # those with most to do begin first
    query_head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = query_head // (N // K)
    token, h = tl.arange(0, R), tl.arange(0, HEAD)
    t = block * R + token
    q += b * T * N * H + query_head * H
    k += b * T * K * H + head * H
    v += b * T * K * H + head * H
    log_beta += (b * K + head) * T
    segment += b * T
    visits = (b * K + head) * n + block
    masked, every = tl.load(counts + visits * 2) * (R // STEP), tl.load(counts + visits * 2 + 1) * (R // STEP)

    limit = tl.load(window)
    queries = _rows(q, block * R, token, h, T, N, H)
    t_segment = tl.load(segment + t, mask=t < T, other=0)
    m = tl.full([R], float("-inf"), tl.float32)
    l = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, HEAD], tl.float32)
    m, l, acc = _forward_steps(
        m, l, acc, queries, k, v, log_beta, segment, blocks + visits * n, t, t_segment, limit, 0, masked, h,
        T, K, H, R, STEP, SCALE, True,
    )  # fmt: skip
    m, l, acc = _forward_steps(
        m, l, acc, queries, k, v, log_beta, segment, blocks + visits * n, t, t_segment, limit, masked, every, h,
        T, K, H, R, STEP, SCALE, False,
    )  # fmt: skip
    _store_rows(out + b * T * N * H + query_head * H, acc / l[:, None], block * R, token, h, T, N, H)
    tl.store(lse + (b * N + query_head) * T + t, m / LOG2E + tl.log(l), mask=t < T)


@triton.jit
@no_type_check
def _dq_steps(
    dq, queries, do, k, v, log_beta, segment, blocks, t, t_segment, lse, delta, window, begin, end, h,
    T: tl.constexpr, K: tl.constexpr, H: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, SCALE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    token = tl.arange(0, STEP)
    for step in range(begin, end):
        first = _visited(blocks, step, R, STEP)
        i = first + token
        keys = _rows(k, first, token, h, T, K, H)
        values = _rows(v, first, token, h, T, K, H)
        product = tl.dot(queries, tl.trans(keys), input_precision="tf32x3")
        i_segment = tl.load(segment + i, mask=i < T, other=0)
        logits = _logits(
            product, t[:, None], i[None, :], _gate(log_beta, i, T)[None, :], t_segment[:, None], i_segment[None, :],
            window, SCALE, MASKED,
        )  # fmt: skip
        p = tl.exp2(logits - lse[:, None])
        ds = p * (tl.dot(do, tl.trans(values), input_precision="tf32x3") - delta[:, None])
        dq = weighted(ds, keys, dq)
    return dq


@triton.jit
@no_type_check
def gradient_of_queries(
    q, k, v, log_beta, segment, window, blocks, counts, do, lse, delta, dq,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr, R: tl.constexpr,
    STEP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """`dq [B, T, N, H]`; `delta [B, N, T]` is sum_h do out."""
    n: tl.constexpr = (T + R - 1) // R
    block = n - 1 - tl.program_id(0)
    query_head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = query_head // (N // K)
    token, h = tl.arange(0, R), tl.arange(0, HEAD)
    t = block * R + token
    own = b * T * N * H + query_head * H
    k += b * T * K * H + head * H
    v += b * T * K * H + head * H
    log_beta += (b * K + head) * T
    segment += b * T
    visits = (b * K + head) * n + block
    masked, every = tl.load(counts + visits * 2) * (R // STEP), tl.load(counts + visits * 2 + 1) * (R // STEP)

    limit = tl.load(window)
    queries = _rows(q + own, block * R, token, h, T, N, H)
    cotangent = _rows(do + own, block * R, token, h, T, N, H)
    t_segment = tl.load(segment + t, mask=t < T, other=0)
    row = (b * N + query_head) * T + t
    l = tl.load(lse + row, mask=t < T, other=float("inf")) * LOG2E
    d = tl.load(delta + row, mask=t < T, other=0.0)
    acc = tl.zeros([R, HEAD], tl.float32)
    acc = _dq_steps(
        acc, queries, cotangent, k, v, log_beta, segment, blocks + visits * n, t, t_segment, l, d, limit, 0, masked, h,
        T, K, H, R, STEP, SCALE, True,
    )  # fmt: skip
    acc = _dq_steps(
        acc, queries, cotangent, k, v, log_beta, segment, blocks + visits * n, t, t_segment, l, d, limit, masked, every,
        h, T, K, H, R, STEP, SCALE, False,
    )  # fmt: skip
    _store_rows(dq + own, acc * SCALE, block * R, token, h, T, N, H)


@triton.jit
@no_type_check
def _dkv_steps(
    dk, dv, dgate, keys, values, gate, q, do, lse, delta, segment, blocks, i, i_segment, window, begin, end, h,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
    SCALE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = N // K
    token = tl.arange(0, STEP)
    for step in range(begin * G, end * G):
        g = step % G
        first = _visited(blocks, step // G, R, STEP)
        t = first + token
        queries = _rows(q + g * H, first, token, h, T, N, H)
        cotangent = _rows(do + g * H, first, token, h, T, N, H)
        # Behind the end the weights are 0.
        l = tl.load(lse + g * T + t, mask=t < T, other=float("inf")) * LOG2E
        d = tl.load(delta + g * T + t, mask=t < T, other=0.0)
        t_segment = tl.load(segment + t, mask=t < T, other=0)
        product = tl.dot(keys, tl.trans(queries), input_precision="tf32x3")
        logits = _logits(
            product, t[None, :], i[:, None], gate[:, None], t_segment[None, :], i_segment[:, None], window, SCALE,
            MASKED,
        )  # fmt: skip
        p = tl.exp2(logits - l[None, :])
        dv = weighted(p, cotangent, dv)
        ds = p * (tl.dot(values, tl.trans(cotangent), input_precision="tf32x3") - d[None, :])
        dk = weighted(ds, queries, dk)
        dgate += tl.sum(ds * (t[None, :] - i[:, None]).to(tl.float32), 1)
    return dk, dv, dgate


@triton.jit
@no_type_check
def gradients_of_keys(
    q, k, v, log_beta, segment, window, blocks, counts, do, lse, delta, dk, dv, dlog_beta,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr, R: tl.constexpr,
    STEP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """`dk` and `dv [B, T, K, H]`, `dlog_beta [B, K, T]`, summed over the head's query heads in a fixed order."""
    n: tl.constexpr = (T + R - 1) // R
    block, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token, h = tl.arange(0, R), tl.arange(0, HEAD)
    i = block * R + token
    own, gate = b * T * K * H + head * H, (b * K + head) * T
    queries = head * (N // K)
    q += b * T * N * H + queries * H
    do += b * T * N * H + queries * H
    lse += (b * N + queries) * T
    delta += (b * N + queries) * T
    segment += b * T
    visits = (b * K + head) * n + block
    masked, every = tl.load(counts + visits * 2) * (R // STEP), tl.load(counts + visits * 2 + 1) * (R // STEP)

    limit = tl.load(window)
    keys = _rows(k + own, block * R, token, h, T, K, H)
    values = _rows(v + own, block * R, token, h, T, K, H)
    i_segment = tl.load(segment + i, mask=i < T, other=0)
    decay = _gate(log_beta + gate, i, T)
    dk_acc = tl.zeros([R, HEAD], tl.float32)
    dv_acc = tl.zeros([R, HEAD], tl.float32)
    dgate = tl.zeros([R], tl.float32)
    dk_acc, dv_acc, dgate = _dkv_steps(
        dk_acc, dv_acc, dgate, keys, values, decay, q, do, lse, delta, segment, blocks + visits * n, i, i_segment,
        limit, 0, masked, h, T, N, K, H, R, STEP, SCALE, True,
    )  # fmt: skip
    dk_acc, dv_acc, dgate = _dkv_steps(
        dk_acc, dv_acc, dgate, keys, values, decay, q, do, lse, delta, segment, blocks + visits * n, i, i_segment,
        limit, masked, every, h, T, N, K, H, R, STEP, SCALE, False,
    )  # fmt: skip
    _store_rows(dk + own, dk_acc * SCALE, block * R, token, h, T, K, H)
    _store_rows(dv + own, dv_acc, block * R, token, h, T, K, H)
    tl.store(dlog_beta + gate + i, dgate, mask=i < T)
