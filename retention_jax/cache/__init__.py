"""The buffer and what it keeps. `buffer` holds the state, `selection` says which entries survive."""

from retention_jax.cache.buffer import Buffer, Entries, Windows, append, attend, empty, evict_full, layout, take_in

__all__ = ["Buffer", "Entries", "Windows", "append", "attend", "empty", "evict_full", "layout", "take_in"]
