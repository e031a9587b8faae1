"""Learned, globally calibrated KV-cache eviction for JAX (arXiv 2605.09649).

import retention_jax as rj
model = rj.load(hf_folder, gates=gate_folder, dtype="bfloat16")
cache = rj.CacheConfig(budget=512, recent=128, policy="retention", prefill_chunk=1024)
out = rj.generate(model, prompts, cache, max_new_tokens=256)
"""

from retention_jax.cache import Buffer, insert_row, load_buffer, reset_row, save_buffer, take_row
from retention_jax.config import CacheConfig, GateConfig, LossConfig, ModelConfig, TrainConfig
from retention_jax.generation.decoding import decode, prefill
from retention_jax.generation.pictures import inputs, read_messages
from retention_jax.generation.runs import Output, generate
from retention_jax.generation.scoring import score_stream
from retention_jax.models.decoder import Decoder
from retention_jax.models.gate_files import save_gates
from retention_jax.models.weights import load, save_backbone
from retention_jax.parallel import sharding
from retention_jax.training import losses

__all__ = [
    "Buffer",
    "CacheConfig",
    "Decoder",
    "GateConfig",
    "LossConfig",
    "ModelConfig",
    "Output",
    "TrainConfig",
    "decode",
    "generate",
    "inputs",
    "insert_row",
    "load",
    "load_buffer",
    "losses",
    "prefill",
    "read_messages",
    "reset_row",
    "save_backbone",
    "save_buffer",
    "save_gates",
    "score_stream",
    "sharding",
    "take_row",
]
