"""Gates for Qwen2.5-7B-Instruct and Llama-3.1-8B-Instruct on chats and long documents: M 512, 32,768 tokens.

    python -m retention_jax.train --config=configs/instruct.py:llama3.1-8b --workdir=runs/llama3.1_8b

The model is qwen2.5-7b or llama3.1-8b. No gates of arXiv 2605.09649 are published for the two: gate, losses and
optimiser are those of its other long-context gates, and data, length and steps are our choice: three documents of
LongAlpaca to seven of UltraChat, which is far more tokens of LongAlpaca.

Hardware and time: 4 GPUs of 80 GB; 5 hours. An estimate, never run: 8 FLOP a weight and token (student, teacher,
recomputation, gradient of the activations) and attention over whole rows, at 40 % of four H100s' bf16 peak, which takes
fused kernels.
Expected: not known; nothing is published for this method. Of another learned eviction, arXiv 2602.10238 evaluates
Qwen2.5-7B on RULER at 4K, and arXiv 2601.07891 Llama-3.1-8B.
"""

from ml_collections import ConfigDict

from retention_jax import config
from retention_jax.config import conversion

MODELS = {"qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct", "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct"}


def get_config(model: str = "llama3.1-8b") -> ConfigDict:
    if model not in MODELS:
        raise ValueError(f"configs/instruct.py:MODEL must have one of {', '.join(MODELS)}, got {model!r}")
    return conversion.to_config_dict(
        config.TrainConfig(
            stage="gates",
            backbone=MODELS[model],
            dtype="bfloat16",
            data=config.DataConfig(
                task="chat",
                files=(
                    "hf://datasets/HuggingFaceH4/ultrachat_200k/data/train_sft-*.parquet",
                    "hf://datasets/Yukang/LongAlpaca-12k/LongAlpaca-12k.json",
                ),
                weights=(0.7, 0.3),
                length=32_768,
                batch_size=4,
            ),
            loss=config.LossConfig(budget=512),
            optimizer=config.OptimizerConfig(learning_rate=2e-4, warmup_steps=100, weight_decay=1e-6),
            steps=2_000,
            seed=42,
            remat=True,
            eval=config.EvalConfig(tasks=()),
        )
    )
