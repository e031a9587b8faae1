"""Long-context gates of arXiv 2512.03324 (TRIM-KV) for Phi-3-mini-128k-instruct: M 2048, 131,072 tokens, LongAlpaca.

    python -m retention_jax.train --config=configs/phi3_mini_long.py --workdir=runs/phi3_mini_long

TRIM-KV has one hidden layer, shares nothing between layers, and a capacity loss for every head by itself. Gates of
arXiv 2605.09649 instead: `--config.gate.share=layers --config.loss.capacity=global`. The published run has one document
a row; here rows are full, and `--config.steps=700` already reads about as many documents.

Hardware and time: 4 GPUs of 80 GB, as published; 158 hours, or 11 with 700 steps. An estimate, never run: 8 FLOP a
weight and token (student, teacher, recomputation, gradient of the activations) and attention over whole rows, at 40 %
of four H100s' bf16 peak, which takes fused kernels; kernels that skip other documents need a quarter of it.
Expected on LongBench v2, average accuracy in %: 34.09 with 6,000 kept entries, full cache 28.79 (arXiv 2512.03324);
31.44 for the gates of arXiv 2605.09649, as wizwand.com lists it.
"""

from ml_collections import ConfigDict

from retention_jax import config
from retention_jax.config import conversion


def get_config() -> ConfigDict:
    return conversion.to_config_dict(
        config.TrainConfig(
            stage="gates",
            backbone="microsoft/Phi-3-mini-128k-instruct",
            dtype="bfloat16",
            gate=config.GateConfig(share="none"),
            data=config.DataConfig(
                task="chat",
                files=("hf://datasets/Yukang/LongAlpaca-12k/LongAlpaca-12k.json",),
                length=131_072,
                too_long="drop",
                batch_size=4,
            ),
            loss=config.LossConfig(budget=2048, capacity="local"),
            optimizer=config.OptimizerConfig(learning_rate=2e-4, warmup_steps=100, weight_decay=1e-6),
            steps=10_000,
            seed=42,
            remat=True,
            eval=config.EvalConfig(tasks=()),
        )
    )
