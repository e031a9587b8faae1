"""The two Triton kernels of `retention_mass_triton.py`. A program keeps a block of R tokens, or entries, of one head,
and goes through the blocks of entries before, or tokens after them, past those where nothing is left to add."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _share(low, high, own_low, own_high, block):
    """Whether the ranges of segment ids overlap."""
    return (tl.load(low + block) <= own_high) & (own_low <= tl.load(high + block))


@triton.jit
@no_type_check
def _weights(t, i, gate, t_segment, i_segment):
    """Ages and what is left of entries i (first axis) at tokens t."""
    age = t[None, :] - i[:, None]
    visible = (age >= 0) & (t_segment[None, :] == i_segment[:, None])
    age = age.to(tl.float32)
    return age, tl.exp(tl.where(visible, age * gate[:, None], float("-inf")))


@triton.jit
@no_type_check
def forward(
    log_beta, segment, reach, low, high, mass,
    T: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """`mass [B, HEADS, T]`; `reach [B, HEADS, n]` is the last block of tokens that a block of entries reaches."""
    n: tl.constexpr = (T + R - 1) // R
    block = n - 1 - tl.program_id(0)  # those with most to do begin first
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = (b * HEADS + head) * T
    token = tl.arange(0, R)
    t = block * R + token
    t_segment = tl.load(segment + b * T + t, mask=t < T, other=0)
    reach += (b * HEADS + head) * n
    low += b * n
    high += b * n
    own_low, own_high = tl.load(low + block), tl.load(high + block)
    total = tl.zeros([R], tl.float32)
    for step in range(block + 1):
        entries = block - step
        if (tl.load(reach + entries) >= block) & _share(low, high, own_low, own_high, entries):
            i = entries * R + token
            gate = tl.maximum(tl.load(log_beta + row + i, mask=i < T, other=0.0), LOWEST)
            i_segment = tl.load(segment + b * T + i, mask=i < T, other=0)
            total += tl.sum(_weights(t, i, gate, t_segment, i_segment)[1], 0)
    tl.store(mass + row + t, total, mask=t < T)


@triton.jit
@no_type_check
def backward(
    log_beta, segment, reach, low, high, dmass, grad,
    T: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """`grad [B, HEADS, T]`, to log_beta."""
    n: tl.constexpr = (T + R - 1) // R
    block, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = (b * HEADS + head) * T
    token = tl.arange(0, R)
    i = block * R + token
    gate = tl.maximum(tl.load(log_beta + row + i, mask=i < T, other=0.0), LOWEST)
    i_segment = tl.load(segment + b * T + i, mask=i < T, other=0)
    low += b * n
    high += b * n
    own_low, own_high = tl.load(low + block), tl.load(high + block)
    total = tl.zeros([R], tl.float32)
    for tokens in range(block, tl.load(reach + (b * HEADS + head) * n + block) + 1):
        if _share(low, high, own_low, own_high, tokens):
            t = tokens * R + token
            t_segment = tl.load(segment + b * T + t, mask=t < T, other=0)
            cotangent = tl.load(dmass + row + t, mask=t < T, other=0.0)
            age, weight = _weights(t, i, gate, t_segment, i_segment)
            total += tl.sum(weight * age * cotangent[None, :], 1)
    tl.store(grad + row + i, total, mask=i < T)
