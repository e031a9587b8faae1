"""A byte-level backbone and its gates on any text file, then bits per byte under streaming evaluation.

    python -m retention_jax.train --config=configs/text.py --workdir=runs/text --config.data.path=some_text_file.txt

The last tenth of the file is held out for the evaluation, which reads it at the trained length and at four times that.

Hardware and time: 2 CPU cores, 20 minutes for a file of 1 MB.
Expected on WikiText-2 (its validation file): see the table in README.md.
"""

from ml_collections import ConfigDict

from retention_jax import config
from retention_jax.config import conversion
from retention_jax.data import builders


def get_config() -> ConfigDict:
    return conversion.to_config_dict(
        config.TrainConfig(
            stage="gates",
            model=config.ModelConfig(
                vocab_size=builders.TEXT_VOCAB_SIZE,
                num_layers=2,
                width=128,
                num_heads=4,
                num_kv_heads=4,
                head_size=32,
                mlp_width=256,
                rope_theta=10_000.0,
                tie_embeddings=True,
            ),
            backbone_steps=1500,
            backbone_optimizer=config.OptimizerConfig(
                learning_rate=3e-3, final_learning_rate=1e-4, warmup_steps=100, weight_decay=0.1, b2=0.98
            ),
            gate=config.GateConfig(width=64, offset_init=6.0),
            data=config.DataConfig(task="text", path="PATH", length=256, batch_size=8),
            loss=config.LossConfig(budget=32),
            optimizer=config.OptimizerConfig(
                learning_rate=2e-3, final_learning_rate=5e-5, warmup_steps=50, weight_decay=0.0
            ),
            steps=400,
            eval=config.EvalConfig(
                tasks=("text",),
                policies=("full", "retention", "retention_local", "streaming", "random"),
                budgets=(16, 32, 64, 128),
                lengths=(256, 1024),
                seeds=5,
                examples=8,
            ),
        )
    )
