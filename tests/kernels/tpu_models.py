"""The models whose sizes the TPU kernels are compiled at."""

from typing import NamedTuple


class Model(NamedTuple):
    """Its layers, and what its kernels are compiled for."""

    layers: int
    heads: int  # query heads
    kv_heads: int
    head_size: int
    budget: int = 4096  # of an eviction
    sliding: bool = False  # layers attend within a sliding window
    local: bool = False  # every head has a budget of its own


MODELS = {
    "qwen3_14b": Model(40, 40, 8, 128),
    "phi3_mini": Model(32, 32, 32, 96, budget=1024, sliding=True, local=True),
    "llama_1b": Model(16, 32, 8, 64),
    "gemma2_9b": Model(42, 16, 8, 256, sliding=True),  # its shape alone
}
TOKENS, CHUNK, WINDOW = 131072, 1024, 128
