"""Scores a model under every task, length, policy and budget against the full cache, over several seeds.

    python -m retention_jax.evaluate --config=configs/recall.py --checkpoint=runs/recall --output=runs/recall/eval

`--checkpoint` is a training workdir or a gate folder. Sequences go through the buffer as in decoding, so every score
is of a prediction made from what was kept until then; only the full cache is read in one forward pass. Any field of the
evaluation is set by `--config.eval.NAME`, such as `--config.eval.horizon=8`.
"""

import pathlib
from collections.abc import Sequence

from absl import app, flags

from retention_jax.config import conversion
from retention_jax.evaluation import command_flags, plan
from retention_jax.models import weights
from retention_jax.parallel import distributed
from retention_jax.runtime import command, hub
from retention_jax.text import tokenizer

define_flags = command_flags.define


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    config = command_flags.read(values)
    plan.check(config.eval, config.data)
    output = pathlib.Path(values.output).expanduser() if values.output else None
    with distributed.joined(values):
        distributed.agree_on("configurations", conversion.to_dict(config))
        backbone, gates = command_flags.checkpoint_folders(values.checkpoint, config.backbone, config.eval.policies)
        # Before the weights: what is wrong with it shows at once.
        has_text = any(map(plan.needs_tokenizer, config.eval.tasks))
        found = tokenizer.load(hub.resolve(backbone)) if has_text else None
        model = weights.load(backbone, gates, config.dtype, mesh=plan.mesh_of(config.mesh))
        plan.run(model, config.eval, config.data, output, found)


if __name__ == "__main__":
    command.run(main, define_flags)
