"""The Triton kernel of `evict_pack_triton.py`."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def pack(
    pool, window, source, out, S: tl.constexpr, W: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr
):
    """Row `s` of `out [B, S, H]` is row `source[s]` of `pool [B, S, H]` and `window [B, W, H]` joined, 0 for -1."""
    b = tl.program_id(1).to(tl.int64)
    row, h = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HEAD)
    origin = tl.load(source + b * S + row, mask=row < S, other=-1)
    inside = (h < H)[None, :]
    old, new = ((origin >= 0) & (origin < S))[:, None] & inside, (origin >= S)[:, None] & inside
    origin = origin.to(tl.int64)
    # A row is read from one of them only.
    rows = tl.load(pool + (b * S + origin)[:, None] * H + h[None, :], mask=old, other=0)
    rows = tl.where(new, tl.load(window + (b * W + origin - S)[:, None] * H + h[None, :], mask=new, other=0), rows)
    tl.store(out + (b * S + row).to(tl.int64)[:, None] * H + h[None, :], rows, mask=(row < S)[:, None] & inside)
