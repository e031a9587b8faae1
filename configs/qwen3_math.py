"""Maths gates of arXiv 2605.09649 (DBTrimKV) for Qwen3-1.7B, 4B, 8B and 14B: M 128, 32K tokens, OpenR1-Math.

    python -m retention_jax.train --config=configs/qwen3_math.py:4b --workdir=runs/qwen3_4b_math

The size is 1.7b, 4b, 8b or 14b. Learning rate, warm-up, schedule, weight decay, gate width and offset, losses, length
and M are the published ones; so is one epoch of the data, about 564 million tokens. The published run has one document
a row and packs nothing; here rows are full, so one epoch is fewer steps. Its prompts ask for a boxed answer in words of
its own; here they are the data set's.

Hardware and time: 4 GPUs of 80 GB, as published; 4, 9, 12 and 19 hours for the four sizes. An estimate, never run: 8
FLOP a weight and token (student, teacher, recomputation, gradient of the activations) and attention over whole rows, at
40 % of four H100s' bf16 peak, which takes fused kernels.
Expected, pass@1 in % by the budget that decoding has, of arXiv 2512.03324 (TRIM-KV, trained at 16K with M 512; read off
its figures, about 1.5 points uncertain). Released gates of this kind exist for 4B; no table of theirs is at hand.

            AIME24 at 256, 512, 1024, 2048, 4096      GSM8K at 64, 128, 512    MATH-500 at 64, 128, 512
    4B      46, 67, 75, 75, 76 (full cache 65.5)      71, 93.5, 95 (95)        54.5, 77, 91 (92.5)
    8B      41.5, 62.5, 72, 73.5, 79 (80)             76, 93, 95.5             49.5, 77, 91
    14B     41, 66, 75, 76.5, 80 (76.5)               86, 96, 96.5             50, 79.5, 93
"""

from ml_collections import ConfigDict

from retention_jax import config
from retention_jax.config import conversion

MODELS = {"1.7b": "Qwen/Qwen3-1.7B", "4b": "Qwen/Qwen3-4B", "8b": "Qwen/Qwen3-8B", "14b": "Qwen/Qwen3-14B"}


def get_config(size: str = "4b") -> ConfigDict:
    if size not in MODELS:
        raise ValueError(f"configs/qwen3_math.py:SIZE must have one of {', '.join(MODELS)}, got {size!r}")
    return conversion.to_config_dict(
        config.TrainConfig(
            stage="gates",
            backbone=MODELS[size],
            dtype="bfloat16",
            data=config.DataConfig(
                task="chat",
                files=("hf://datasets/open-r1/OpenR1-Math-220k/data/train-*.parquet",),
                length=32_768,
                batch_size=4,
            ),
            loss=config.LossConfig(budget=128),
            optimizer=config.OptimizerConfig(learning_rate=2e-4, warmup_steps=100, weight_decay=1e-5),
            steps=4_300,
            seed=42,
            remat=True,
            eval=config.EvalConfig(tasks=()),
        )
    )
