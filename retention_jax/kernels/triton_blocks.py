"""Block sizes of the Triton kernels, as data. None has been measured on a GPU yet; all fit its shared memory."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionBlocks:
    """`retention_attention`: blocks of `tokens` are visited or left out as a whole; a program keeps one of them, and
    folds in `forward` keys (`backward` keys or queries) at a time."""

    tokens: int
    forward: int
    backward: int
    num_warps: int

    def __post_init__(self) -> None:
        if min(self.forward, self.backward) < 16 or self.tokens % self.forward or self.tokens % self.backward:
            raise ValueError(
                f"AttentionBlocks: tokens must be a multiple of forward and backward, each at least 16, got {self}"
            )


@dataclasses.dataclass(frozen=True)
class BufferBlocks:
    """`buffer_attention`: about `programs` programs share the keys of a layer, `keys` at a time, for `rows` queries."""

    programs: int
    keys: int
    rows: int
    num_warps: int


@dataclasses.dataclass(frozen=True)
class MassBlocks:
    """`retention_mass`: tiles of `tokens` tokens by as many entries."""

    tokens: int
    num_warps: int


def attention_blocks(head_size: int, itemsize: int) -> AttentionBlocks:
    """A program's own block and what streams past it, in one multiprocessor's shared memory (163 KB on sm_80)."""
    if head_size > 128 or itemsize > 2:
        return AttentionBlocks(tokens=64, forward=32, backward=32 if head_size * itemsize <= 512 else 16, num_warps=4)
    return AttentionBlocks(tokens=128, forward=64, backward=32, num_warps=8)


def buffer_blocks(queries: int, head_size: int, itemsize: int) -> BufferBlocks:
    """Two programs for each of the 132 multiprocessors of an H100; small steps where keys are wide."""
    wide = head_size * itemsize > 256
    rows = min(32 if wide else 64, max(16, 1 << (queries - 1).bit_length()))
    return BufferBlocks(programs=264, keys=32 if wide or rows == 16 else 64, rows=rows, num_warps=4)


MASS_BLOCKS = MassBlocks(tokens=64, num_warps=4)
PACK_BYTES = 16384  # of rows that a program of `pack_rows` copies
