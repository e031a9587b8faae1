"""Architectures of published checkpoints by name, for programs that are compiled or timed where no checkpoint is."""

import pathlib
from typing import Any

from retention_jax.config import ModelConfig, RopeScaling
from retention_jax.models import huggingface

# As in each checkpoint's config.json.
_QWEN3 = dict(vocab_size=151_936, num_kv_heads=8, head_size=128, qk_norm=True)
_LLAMA3 = RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_0_6b": _QWEN3 | dict(num_layers=28, width=1024, num_heads=16, mlp_width=3072, tie_embeddings=True),
    "qwen3_1_7b": _QWEN3 | dict(num_layers=28, width=2048, num_heads=16, mlp_width=6144, tie_embeddings=True),
    "qwen3_4b": _QWEN3 | dict(num_layers=36, width=2560, num_heads=32, mlp_width=9728, tie_embeddings=True),
    "qwen3_8b": _QWEN3 | dict(num_layers=36, width=4096, num_heads=32, mlp_width=12288),
    "qwen3_14b": _QWEN3 | dict(num_layers=40, width=5120, num_heads=40, mlp_width=17408),
    "llama3_1_8b": dict(vocab_size=128_256, num_layers=32, width=4096, num_heads=32, num_kv_heads=8, head_size=128)
    | dict(mlp_width=14336, rope_theta=5e5, rope_scaling=_LLAMA3, norm_eps=1e-5),
}
# Names on the Hugging Face hub, as configs have them.
HUB = {
    "Qwen/Qwen3-1.7B": "qwen3_1_7b",
    "Qwen/Qwen3-4B": "qwen3_4b",
    "Qwen/Qwen3-4B-Instruct-2507": "qwen3_4b",
    "Qwen/Qwen3-8B": "qwen3_8b",
    "Qwen/Qwen3-14B": "qwen3_14b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama3_1_8b",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": "llama3_1_8b",
}


def of(name: str, dtype: str) -> ModelConfig:
    """The architecture of a name in the table or on the hub, or of a folder with a config.json.

    Raises:
      ValueError: if it is none of these, and as `huggingface.read_model_config` does.
    """
    if pathlib.Path(name).is_dir():
        return huggingface.read_model_config(name, dtype)
    shape = HUB.get(name, name)
    if shape not in SHAPES:
        raise ValueError(
            f"no architecture is known for {name!r}: give a folder with its config.json, or one of "
            f"{', '.join([*SHAPES, *HUB])}"
        )
    return ModelConfig(**{**SHAPES[shape], "dtype": dtype})
