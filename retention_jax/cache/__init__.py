"""The buffer and what it keeps.

`buffer.py` holds the state and attends to it, `eviction.py` changes it, `selection.py` says which entries survive.
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

__all__ = [
    "Buffer",
    "Entries",
    "Windows",
    "append",
    "attend",
    "empty",
    "evict_full",
    "full_nbytes",
    "layout",
    "queries_wanted",
    "shapes",
    "take_in",
    "window_sizes",
]
