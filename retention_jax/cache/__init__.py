"""The buffer and what it keeps.

`buffer.py` holds the state and attends to it, `eviction.py` changes it, `selection.py` says which entries survive,
`rows.py` puts rows in and takes them out, `snapshot.py` keeps them on the host and on disk.
"""

from retention_jax.cache.buffer import (
    Buffer,
    Entries,
    Windows,
    attend,
    empty,
    full_nbytes,
    layout,
    queries_wanted,
    shapes,
    window_sizes,
)
from retention_jax.cache.eviction import append, evict_full, take_in
from retention_jax.cache.rows import evict_first_full, insert_row, reset_row, take_row
from retention_jax.cache.snapshot import load_buffer, save_buffer

__all__ = [
    "Buffer",
    "Entries",
    "Windows",
    "append",
    "attend",
    "empty",
    "evict_first_full",
    "evict_full",
    "full_nbytes",
    "insert_row",
    "layout",
    "load_buffer",
    "queries_wanted",
    "reset_row",
    "save_buffer",
    "shapes",
    "take_in",
    "take_row",
    "window_sizes",
]
