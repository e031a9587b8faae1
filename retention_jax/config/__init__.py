"""What can be configured: frozen dataclasses, checked when they are made.

Files in `configs/` build a `TrainConfig` and hand it to absl as an ml-collections `ConfigDict`, so that every field can
be overridden by a flag (`--config.optimizer.learning_rate=1e-3`). The library itself only ever sees the dataclasses;
`conversion.py` goes from one to the other.

Axis letters used in every signature of the package:

    B batch                T query tokens in this call    S keys, slots
    L layers               N query heads                  K key/value heads      G = N / K
    H head size            D model width                  F MLP width            V vocabulary
    M budget: average kept entries per layer and key/value head
    W gate width           R recent window                C prefill chunk
"""

from retention_jax.config.cache import CacheConfig
from retention_jax.config.evaluation import EvalConfig
from retention_jax.config.model import GateConfig, ModelConfig, RopeScaling, Share
from retention_jax.config.run import DataConfig, LossConfig, MeshConfig, OptimizerConfig, TrainConfig
from retention_jax.config.vision import MRope, VisionConfig

__all__ = [
    "CacheConfig",
    "DataConfig",
    "EvalConfig",
    "GateConfig",
    "LossConfig",
    "MRope",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RopeScaling",
    "Share",
    "TrainConfig",
    "VisionConfig",
]
