"""Measures attention dilution on the recall task, for the full cache and for what policies keep.

    python -m retention_jax.dilution --config=configs/recall.py --checkpoint=runs/recall --output=runs/recall/dilution

The flags are those of `python -m retention_jax.evaluate`, without those that only tasks with answers need.
"""

import pathlib
from collections.abc import Sequence

from absl import app, flags, logging

from retention_jax.config import conversion
from retention_jax.dilution import sweep
from retention_jax.evaluation import command_flags, plan
from retention_jax.models import weights
from retention_jax.parallel import distributed
from retention_jax.runtime import command

SHORT = ("tasks", "policies", "budgets", "lengths", "seed")


def define_flags(values: flags.FlagValues) -> None:
    """Not at import, so that tests can have flags of their own."""
    command_flags.define(values, SHORT)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if not values["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    config = command_flags.read(values, SHORT)
    sweep.check(config.eval, config.data)
    output = pathlib.Path(values.output).expanduser() if values.output else None
    with distributed.joined(values):
        distributed.agree_on("configurations", conversion.to_dict(config))
        backbone, gates = command_flags.checkpoint_folders(values.checkpoint, config.backbone, config.eval.policies)
        model = weights.load(backbone, gates, config.dtype, mesh=plan.mesh_of(config.mesh))
        sweep.run(model, config.eval, config.data, output)


if __name__ == "__main__":
    command.run(main, define_flags)
