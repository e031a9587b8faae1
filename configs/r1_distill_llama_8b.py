"""Reasoning gates of arXiv 2512.03324 (TRIM-KV) for DeepSeek-R1-Distill-Llama-8B: M 512, 32,768 tokens.

    python -m retention_jax.train --config=configs/r1_distill_llama_8b.py --workdir=runs/r1_distill_llama_8b

Length and M are those of the released gates. What data they were trained on is not published: this is the maths data of
the others, and their optimiser settings. TRIM-KV has one hidden layer, shares nothing between layers, and a capacity
loss for every head by itself. Gates of arXiv 2605.09649 instead: `--config.gate.share=layers
--config.loss.capacity=global`.

Hardware and time: 4 GPUs of 80 GB; 11 hours. An estimate, never run: 8 FLOP a weight and token (student, teacher,
recomputation, gradient of the activations) and attention over whole rows, at 40 % of four H100s' bf16 peak, which takes
fused kernels.
Expected: gates of this form for Qwen3-8B have 41.5, 62.5, 72, 73.5, 79 % on AIME24 with 256, 512, 1024, 2048, 4096 kept
entries (arXiv 2512.03324, read off a figure); nothing is published for this model.
"""

from ml_collections import ConfigDict

from retention_jax import config
from retention_jax.config import conversion


def get_config() -> ConfigDict:
    return conversion.to_config_dict(
        config.TrainConfig(
            stage="gates",
            backbone="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
            dtype="bfloat16",
            gate=config.GateConfig(share="none"),
            data=config.DataConfig(
                task="chat",
                files=("hf://datasets/open-r1/OpenR1-Math-220k/data/train-*.parquet",),
                length=32_768,
                batch_size=4,
            ),
            loss=config.LossConfig(budget=512, capacity="local"),
            optimizer=config.OptimizerConfig(learning_rate=2e-4, warmup_steps=100, weight_decay=1e-5),
            steps=4_300,
            seed=42,
            remat=True,
            eval=config.EvalConfig(tasks=()),
        )
    )
