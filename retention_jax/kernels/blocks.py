"""Block sizes of the TPU kernels, as data, and what a block size costs in on-chip memory, as formulas.

A TPU core has 64 MiB (v5p, tpu7x) or 128 MiB (v5e, v6e) of vector memory (VMEM), and 1 MiB of scalar memory (SMEM).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

LANES = 128  # of a vector register: the fast axis of a block is a multiple of it
SUBLANES = 8  # of a vector register: the slow axis is a multiple of it
VMEM_BUDGET = 36 * 2**20  # bytes: what blocks are chosen for
VMEM_LIMIT = 48 * 2**20  # bytes: what the compiler may use, for temporaries that no formula knows; 3/4 of the smallest
SMEM_BUDGET = 3 * 2**18  # bytes of scalars a kernel may prefetch


@dataclasses.dataclass(frozen=True)
class AttentionBlocks:
    """`retention_attention`: a program sees `tokens` queries of all query heads of a key/value head and as many keys; a
    tile of logits is all of its keys by `stripe` queries of one head."""

    tokens: int
    stripe: int

    def __post_init__(self) -> None:
        if self.stripe < LANES or self.stripe % LANES or self.tokens < LANES or self.tokens % self.stripe:
            raise ValueError(
                f"AttentionBlocks: stripe must be a multiple of {LANES} and tokens a multiple of stripe, "
                f"got tokens={self.tokens}, stripe={self.stripe}"
            )


@dataclasses.dataclass(frozen=True)
class MassBlocks:
    """`retention_mass`: tokens lie in rows of 128; a matrix product weighs one row of entries at `rows` later rows."""

    rows: int

    def __post_init__(self) -> None:
        if self.rows < SUBLANES or self.rows % SUBLANES:
            raise ValueError(f"MassBlocks: rows must be a multiple of {SUBLANES}, got {self.rows}")


@dataclasses.dataclass(frozen=True)
class BufferBlocks:
    """`buffer_attention`: a program sees `tokens` new tokens; it reads `pool` slots at a time, or `recent` tokens of a
    head's window, in copies of `piece` slots and `recent_piece` tokens, of which it makes those that it needs."""

    tokens: int
    pool: int
    piece: int
    recent: int
    recent_piece: int

    def __post_init__(self) -> None:
        if self.piece % LANES or self.pool % self.piece or self.recent % self.recent_piece or self.recent_piece % 16:
            raise ValueError(
                f"BufferBlocks: piece must be a multiple of {LANES} and pool of piece, recent_piece of 16 and recent "
                f"of recent_piece, got {self}"
            )


SELECT_ROWS = 64  # of 128 keys, which a step of an eviction's search looks at

# The preferred ones first. A tile is at most 256 registers: the compiler unrolls it.
ATTENTION_BLOCKS = tuple(AttentionBlocks(tokens, min(tokens, 256)) for tokens in (1024, 512, 256, 128))


def attention_vmem_bytes(blocks: AttentionBlocks, groups: int, head_size: int, dtype: Any) -> int:
    """VMEM of the attention kernels: of the one that makes dq, and no less than the others use."""
    R, H, size = blocks.tokens, -(-head_size // LANES) * LANES, jnp.dtype(dtype).itemsize
    streamed = (
        2 * groups * R * H * size  # q and do
        + 2 * R * H * size  # k and v
        + groups * R * H * 4  # the result: float32 where it is a residual
        + 2 * max(groups, SUBLANES) * R * 4  # lse and delta
        + 3 * SUBLANES * R * 4  # log_beta and two rows of segment ids, each padded to a register's sublanes
    )
    kept = (
        groups * R * H * 4  # the accumulator
        + 2 * max(groups, SUBLANES) * R * 4  # running maximum and sum
        + R * R * 4  # bias and mask of the pair, shared by the query heads
    )
    tile = R * blocks.stripe
    working = 3 * tile * 4 + 2 * tile * size  # logits, weights, their gradient; what of it enters a matrix product
    return 2 * streamed + kept + working  # what is streamed has two buffers: one is read while the other is filled


def check_attention_smem(blocks: AttentionBlocks, batch: int, kv_heads: int, length: int) -> None:
    """Raises ValueError if the scalars that an attention kernel prefetches do not fit."""
    n = -(-length // blocks.tokens)
    # The list of pairs of each sequence; the reach of each block of keys of each head.
    needed = 4 * batch * (n * (n + 1) // 2 + kv_heads * n)
    if needed > SMEM_BUDGET:
        raise ValueError(
            f"retention_attention on TPU: {batch} sequences of {length} tokens in blocks of {blocks.tokens} need "
            f"{needed} bytes of scalar memory, there are {SMEM_BUDGET}: give each device fewer or shorter sequences"
        )


def attention_blocks(length: int, groups: int, head_size: int, dtype: Any) -> AttentionBlocks:
    """The largest blocks that fit VMEM and waste at most an eighth of the work on the diagonal.

    Raises:
      ValueError: if not even the smallest fit.
    """
    smallest = ATTENTION_BLOCKS[-1]
    fitting = [b for b in ATTENTION_BLOCKS if attention_vmem_bytes(b, groups, head_size, dtype) <= VMEM_BUDGET]
    if not fitting:
        raise ValueError(
            f"retention_attention on TPU: {groups} query heads of size {head_size} for each key/value head need more "
            f"than {VMEM_BUDGET} bytes of VMEM even with blocks of {smallest.tokens} tokens"
        )
    return next((b for b in fitting if b.tokens <= length // 8), smallest)


def mass_vmem_bytes(length: int) -> int:
    """VMEM of the mass kernel that makes the gradient, whatever its blocks."""
    # log_beta, segment ids, cotangent and gradient of one head, each with two buffers; the tiles are small beside them.
    return 4 * 2 * 4 * length + 16 * LANES * LANES * 4


def mass_blocks(length: int) -> MassBlocks:
    """Matrix products as large as the matrix unit, smaller where that would waste much of a short sequence.

    Raises:
      ValueError: if the sequence does not fit VMEM.
    """
    if (needed := mass_vmem_bytes(length)) > VMEM_BUDGET:
        raise ValueError(
            f"retention_mass on TPU: {length} tokens need {needed} bytes of VMEM, there are {VMEM_BUDGET}: "
            "give each device shorter sequences"
        )
    quarter = -(-length // (4 * LANES * SUBLANES)) * SUBLANES
    return MassBlocks(min(LANES, quarter))


def registers(size: int, dtype: Any, least: int = SUBLANES) -> int:
    """`size` rounded up to whole registers of a dtype along their slow axis, and to a multiple of `least`."""
    step = max(least, SUBLANES * 4 // jnp.dtype(dtype).itemsize)
    return -(-size // step) * step


def buffer_vmem_bytes(blocks: BufferBlocks, heads: int, groups: int, head_size: int, dtype: Any) -> int:
    """VMEM of the kernel that attends to the buffer, with a sliding window."""
    H, size = -(-head_size // LANES) * LANES, jnp.dtype(dtype).itemsize
    Q = registers(groups * blocks.tokens, dtype)
    columns = registers(Q, dtype, LANES)
    streamed = (
        2 * (blocks.pool + blocks.recent) * H * size  # keys and values
        + SUBLANES * blocks.pool * 4  # positions
        + heads * (Q * H * (size + 4) + SUBLANES * columns * 4)  # q, the result and its lse
    )
    kept = Q * (H + 2 * LANES) * 4 + columns * LANES * 4  # output, maximum and sum of one head; a column to turn
    longest = max(blocks.pool, blocks.recent)
    working = Q * longest * (3 * 4 + 2 * size) + longest * H * size + Q * H * 4  # logits, weights and their two parts
    return 2 * streamed + kept + working


def buffer_blocks(
    length: int, slots: int, recent: int, heads: int, groups: int, head_size: int, dtype: Any
) -> BufferBlocks:
    """The most tokens that fit VMEM, so that a chunk reads the pool few times.

    Raises:
      ValueError: if not even the fewest fit.
    """
    pool = min(512, -(-slots // LANES) * LANES)
    pool -= pool % LANES
    of_recent = min(512, -(-recent // 16) * 16)
    of_recent_piece = 64 if of_recent % 64 == 0 else 16
    for tokens in (1024, 512, 256, 128, 64, 32, 16):
        if groups * tokens > 1024 and tokens > 16:
            continue
        blocks = BufferBlocks(min(tokens, length), pool, LANES, of_recent, of_recent_piece)
        if buffer_vmem_bytes(blocks, heads, groups, head_size, dtype) <= VMEM_BUDGET:
            return blocks
    raise ValueError(
        f"buffer_attention on TPU: {heads} key/value heads of {groups} query heads of size {head_size} need more than "
        f"{VMEM_BUDGET} bytes of VMEM even with 16 tokens"
    )


def select_vmem_bytes(entries: int) -> int:
    """VMEM of the kernel that searches for an eviction's threshold."""
    row = SELECT_ROWS * LANES
    return 2 * 2 * 4 * -(-entries // row) * row  # keys and result, each with two buffers


def check_select_vmem(entries: int) -> None:
    """Raises ValueError if the keys of a sequence do not fit."""
    if (needed := select_vmem_bytes(entries)) > VMEM_BUDGET:
        raise ValueError(
            f"eviction on TPU: {entries} entries of a sequence, pool and window together, need {needed} bytes of VMEM, "
            f"there are {VMEM_BUDGET}: take a smaller budget or prefill_chunk, or let devices share the pool"
        )


def pack_rows_at_once(rows: int) -> int:
    """The largest blocks that a pool or its windows can be read in without padding beyond 128 rows.

    At 4096 rows of 256 numbers of 4 bytes, two each of pool, windows and result take 24 MiB of VMEM.
    """
    padded = -(-rows // LANES) * LANES
    return next(n for n in (4096, 2048, 1024, 512, 256, LANES) if padded % n == 0)
