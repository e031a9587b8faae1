"""Trains the same gates on one device and on every mesh of all devices, and prints how far they end up apart.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python launch/compare_meshes.py

On 8 devices these are 20 meshes. The model is small and random, with 8 query heads on 2
key/value heads; rows hold several documents. Exits with an error where a loss differs by more than 1e-5 of itself or a
gate by more than 1e-4 of the largest.
"""

import itertools
import math
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import app, flags, logging
from flax import nnx

from retention_jax import config, train
from retention_jax.models import gate_files, weights
from retention_jax.models.decoder import Decoder
from retention_jax.parallel import sharding
from retention_jax.runtime import command, files


def define_flags(values: flags.FlagValues) -> None:
    """Not at import, so that tests can have flags of their own."""
    flags.DEFINE_integer("steps", 20, "Training steps on each mesh.", lower_bound=1, flag_values=values)
    what = "Meshes to try, sizes as in 2x1x4x1; all that have every device by default."
    flags.DEFINE_list("meshes", [], what, flag_values=values)


def given_meshes(texts: Sequence[str], devices: int) -> list[dict[str, int]]:
    """The meshes of --meshes; raises ValueError, naming all that are none, or not of all devices."""
    found, problems = [], []
    for text in texts:
        sizes = text.split("x")
        if len(sizes) != len(sharding.AXES) or not all(size.isdecimal() and int(size) for size in sizes):
            problems.append(f"{text!r} is not {len(sharding.AXES)} sizes as in 2x1x4x1 ({', '.join(sharding.AXES)})")
        elif (asked := math.prod(map(int, sizes))) != devices:
            problems.append(f"{text!r} is {asked} devices, and there are {devices}")
        else:
            found.append(dict(zip(sharding.AXES, map(int, sizes), strict=True)))
    if problems:
        raise ValueError("--meshes: " + "; ".join(problems))
    return found


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every way to cut the devices into the four axes."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for sizes in itertools.product(divisors, repeat=len(sharding.AXES)):
        if math.prod(sizes) == devices:
            yield dict(zip(sharding.AXES, sizes, strict=True))


def run(folder: pathlib.Path, name: str, steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Losses of all steps, and the gates at the end, of a run on the mesh that was entered."""
    settings = config.TrainConfig(
        stage="gates",
        backbone=str(folder / "backbone"),
        gate=config.GateConfig(width=16, offset_init=2.0),
        data=config.DataConfig(
            length=64, batch_size=8, documents=512, document_lengths=(20, 40), cache_dir=str(folder / "cache")
        ),
        loss=config.LossConfig(budget=8, vocab_block=32),
        optimizer=config.OptimizerConfig(learning_rate=3e-3, warmup_steps=1),
        steps=steps,
        remat=True,
        log_every=1,
        eval=config.EvalConfig(tasks=()),
    )
    train.train(settings, folder / name)
    losses = [row["loss"] for row in files.read_json_lines(folder / name / "metrics.jsonl").values]
    return np.array(losses), gate_files.read_gates(folder / name / "gates").tensors


def save_random_backbone(folder: pathlib.Path) -> None:
    """A frozen backbone of two layers."""
    architecture = config.ModelConfig(
        vocab_size=64, num_layers=2, width=32, num_heads=8, num_kv_heads=2, head_size=8, mlp_width=48, qk_norm=True
    )
    make = jax.jit(lambda: Decoder(architecture, config.GateConfig(), rngs=nnx.Rngs(0)))
    weights.save_backbone(make(), folder)


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    given = given_meshes(values.meshes, jax.device_count())
    logging.set_verbosity(logging.WARNING)  # Orbax writes a lot at INFO
    with tempfile.TemporaryDirectory() as name:
        folder, worst = pathlib.Path(name), (0.0, 0.0)
        save_random_backbone(folder / "backbone")
        losses, gates = run(folder, "one", values.steps)
        print(f"1 device: loss {losses[0]:.6f} to {losses[-1]:.6f}", flush=True)
        for number, sizes in enumerate(given or meshes(jax.device_count())):
            with jax.set_mesh(sharding.make_mesh(**sizes)):
                got_losses, got_gates = run(folder, f"mesh{number}", values.steps)
            of_loss = float(np.max(np.abs(got_losses - losses) / np.abs(losses)))
            of_gates = max(float(np.abs(got_gates[n] - a).max() / np.abs(a).max()) for n, a in gates.items())
            worst = max(worst[0], of_loss), max(worst[1], of_gates)
            mesh = " x ".join(f"{axis} {n}" for axis, n in sizes.items())
            print(f"{mesh}: losses within {of_loss:.1e}, gates within {of_gates:.1e}", flush=True)
    if not (worst[0] <= 1e-5 and worst[1] <= 1e-4):
        sys.exit("the meshes do not agree")


if __name__ == "__main__":
    command.run(main, define_flags)
