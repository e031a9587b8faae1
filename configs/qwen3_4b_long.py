"""Long-context gates of arXiv 2605.09649 (DBTrimKV) for Qwen3-4B-Instruct-2507: M 512, 131,072 tokens, 10,000 steps.

    hf download cerebras/Synth-Long-SFT32K --repo-type=dataset --exclude="*_zh*" --local-dir=data/Synth-Long-SFT32K
    python -m retention_jax.train --config=configs/qwen3_4b_long.py --workdir=runs/qwen3_4b_long

The first command is for the one of the three data sets that is not read from the hub as it lies there. As published,
documents of up to 4,096 tokens and those that do not fit a row are left out. The published run has one document a row;
here rows are full and a step reads several times as much, so `--config.steps=1250` already reads about as many
documents.

Hardware and time: 4 GPUs of 80 GB, as published; 225 hours, or 28 with 1,250 steps. An estimate, never run: 8 FLOP a
weight and token (student, teacher, recomputation, gradient of the activations) and attention over whole rows, at 40 %
of four H100s' bf16 peak, which takes fused kernels; kernels that skip other documents need a quarter of it.
Expected on RULER at 4K, in % over four tasks at 128, 256, 512, 1024 kept entries: 47.5, 61.7, 75.8, 77.5, full cache
85.0; measured with the released gates by github.com/pankajkumar6002/PAGE, 30 examples a task. On LongMemEval-S, TRIM-KV
(arXiv 2512.03324, M 4096) has 44.8 with 32,768 entries, full cache 49.4.
"""

from ml_collections import ConfigDict

from retention_jax import config
from retention_jax.config import conversion


def get_config() -> ConfigDict:
    return conversion.to_config_dict(
        config.TrainConfig(
            stage="gates",
            backbone="Qwen/Qwen3-4B-Instruct-2507",
            dtype="bfloat16",
            data=config.DataConfig(
                task="chat",
                files=(
                    "data/Synth-Long-SFT32K/**/*.json*",
                    "hf://datasets/ubaada/booksum-complete-cleaned/books/train.jsonl",
                    "hf://datasets/aiplanet/buddhi-dataset/gpt4/train-*.parquet",
                ),
                length=131_072,
                min_length=4_097,
                too_long="drop",
                batch_size=4,
            ),
            loss=config.LossConfig(budget=512),
            optimizer=config.OptimizerConfig(learning_rate=2e-4, warmup_steps=100, weight_decay=1e-6),
            steps=10_000,
            seed=42,
            remat=True,
            eval=config.EvalConfig(tasks=()),
        )
    )
