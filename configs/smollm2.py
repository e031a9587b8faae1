"""Gates for SmolLM2-135M-Instruct on conversations about any text, in half an hour on two CPU cores.

First the data, from text files of your own (BOOKS), questions (QUESTIONS.jsonl, such as GSM8K) and the model itself:

    python -m retention_jax.corpus --kind=facts --texts=BOOKS --tokenizer=HuggingFaceTB/SmolLM2-135M-Instruct \\
        --shortest=300 --longest=1000 --documents=2000 --output=runs/smollm2/facts.jsonl
    python -m retention_jax.corpus --kind=answers --model=HuggingFaceTB/SmolLM2-135M-Instruct \\
        --prompts=QUESTIONS.jsonl --answers=500 --output=runs/smollm2/answers.jsonl
    python -m retention_jax.corpus --kind=text --texts=BOOKS --tokenizer=HuggingFaceTB/SmolLM2-135M-Instruct \\
        --shortest=300 --longest=1000 --documents=300 --output=runs/smollm2/text.jsonl

Then the gates, and RULER's niah_single_2, whose wordings are in none of the data:

    python -m retention_jax.train --config=configs/smollm2.py --workdir=runs/smollm2/gates \\
        "--config.eval.sources=('ruler/niah_single_2=BOOK_UNSEEN.txt',)"

With `--config.eval_every=20` the evaluation is also scored while training, and `curves/curves.png` shows it beside the
losses. A second phase at longer rows starts from the gates of the first: `--config.gates=runs/smollm2/gates/gates
--config.data.length=4096 --workdir=runs/smollm2/longer`. `--config.backbone=FOLDER` takes a checkpoint of this machine
in place of the hub's.

Hardware and time: 2 CPU cores, 11 minutes of training (6.5 seconds a step) and the evaluation.
The shipped gates, `builtin:smollm2`, are from 360 steps of it on slightly other data; their card says which. README has
the command that measures them.
Expected, from the shipped gates, with the model's weights rounded to 4 bits: niah_single_2 at 1,024 tokens, evicted
before the question, 12 prompts, 64 entries kept per layer and head: 92 %; the full cache 100 %; with a budget of 64 for
each head 8 %; StreamingLLM and SnapKV 0 %. With four needles of one kind (niah_multikey_1): 8 %, the full cache 100 %.
"""

from ml_collections import ConfigDict

from retention_jax import config
from retention_jax.config import conversion


def get_config() -> ConfigDict:
    return conversion.to_config_dict(
        config.TrainConfig(
            stage="gates",
            backbone="HuggingFaceTB/SmolLM2-135M-Instruct",
            data=config.DataConfig(
                task="chat",
                files=("runs/smollm2/facts.jsonl", "runs/smollm2/answers.jsonl", "runs/smollm2/text.jsonl"),
                weights=(0.6, 0.3, 0.1),
                length=1024,
                batch_size=1,
            ),
            gate=config.GateConfig(width=128, offset_init=6.0),
            loss=config.LossConfig(budget=48),
            optimizer=config.OptimizerConfig(learning_rate=2e-3, warmup_steps=15),
            steps=100,
            checkpoint_every=20,
            eval=config.EvalConfig(
                tasks=("ruler/niah_single_2",),
                policies=("full", "retention", "retention_local", "streaming", "snapkv"),
                budgets=(64, 128),
                lengths=(1024,),
                recent=32,
                limit=10,
            ),
        )
    )
