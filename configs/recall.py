"""The main job: gates for the shipped recall backbone, then full cache against every policy and budget.

    python -m retention_jax.train --config=configs/recall.py --workdir=runs/recall
    cp runs/recall/gates/* retention_jax/checkpoints/recall_gates/

The second line is how `builtin:recall_gates` came into the package.

Hardware and time: 2 CPU cores, 3 to 8 minutes, half of them training.
Expected at 768 tokens, four times the trained length: see the table in README.md.
"""

from ml_collections import ConfigDict

from retention_jax import config
from retention_jax.config import conversion


def get_config() -> ConfigDict:
    return conversion.to_config_dict(
        config.TrainConfig(
            stage="gates",
            backbone="builtin:recall",
            gate=config.GateConfig(width=64, offset_init=8.0),
            data=config.DataConfig(task="recall", length=192, batch_size=32, documents=16_384, decoys=0.3),
            loss=config.LossConfig(budget=16, capacity_weight=3.0),
            optimizer=config.OptimizerConfig(
                learning_rate=3e-3, final_learning_rate=6e-5, warmup_steps=50, weight_decay=0.0
            ),
            steps=500,
            eval=config.EvalConfig(
                tasks=("recall",),
                policies=("full", "retention", "retention_local", "streaming", "random"),
                budgets=(16, 32, 48),
                lengths=(192, 768),
            ),
        )
    )
