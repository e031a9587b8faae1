"""Trains the same gates on one device and on every mesh of all devices, and prints how far they end up apart.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python launch/compare_meshes.py

On 8 devices these are 20 meshes. The model is small and random, with 8 query heads on 2
key/value heads; rows hold several documents. Exits with an error where a loss differs by more than 1e-5 of itself or a
gate by more than 1e-4 of the largest.
"""

import itertools
import json
import math
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
from absl import app, flags, logging
from flax import nnx

from retention_jax import config, train
from retention_jax.models import gate_files, weights
from retention_jax.models.decoder import Decoder
from retention_jax.parallel import sharding

_STEPS = flags.DEFINE_integer("steps", 20, "Training steps on each mesh.")
_MESHES = flags.DEFINE_list("meshes", [], "Meshes to try, sizes as in 2x1x4x1; all that have every device by default.")


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every way to cut the devices into the four axes."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for sizes in itertools.product(divisors, repeat=len(sharding.AXES)):
        if math.prod(sizes) == devices:
            yield dict(zip(sharding.AXES, sizes, strict=True))


def run(folder: pathlib.Path, name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
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
        steps=_STEPS.value,
        remat=True,
        log_every=1,
        eval=config.EvalConfig(tasks=()),
    )
    train.train(settings, folder / name)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["loss"] for line in lines]), gate_files.read_gates(
        folder / name / "gates"
    ).tensors


def save_random_backbone(folder: pathlib.Path) -> None:
    """A frozen backbone of two layers."""
    architecture = config.ModelConfig(
        vocab_size=64, num_layers=2, width=32, num_heads=8, num_kv_heads=2, head_size=8, mlp_width=48, qk_norm=True
    )
    make = jax.jit(lambda: Decoder(architecture, config.GateConfig(), rngs=nnx.Rngs(0)))
    weights.save_backbone(make(), folder)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # Orbax tells a lot at INFO
    asked = [dict(zip(sharding.AXES, map(int, text.split("x")), strict=True)) for text in _MESHES.value]
    with tempfile.TemporaryDirectory() as name:
        folder, worst = pathlib.Path(name), (0.0, 0.0)
        save_random_backbone(folder / "backbone")
        losses, gates = run(folder, "one")
        print(f"1 device: loss {losses[0]:.6f} to {losses[-1]:.6f}", flush=True)
        for number, sizes in enumerate(asked or meshes(jax.device_count())):
            with jax.set_mesh(sharding.make_mesh(**sizes)):
                got_losses, got_gates = run(folder, f"mesh{number}")
            of_loss = float(np.max(np.abs(got_losses - losses) / np.abs(losses)))
            of_gates = max(float(np.abs(got_gates[n] - a).max() / np.abs(a).max()) for n, a in gates.items())
            worst = max(worst[0], of_loss), max(worst[1], of_gates)
            mesh = " x ".join(f"{axis} {n}" for axis, n in sizes.items())
            print(f"{mesh}: losses within {of_loss:.1e}, gates within {of_gates:.1e}", flush=True)
    if not (worst[0] <= 1e-5 and worst[1] <= 1e-4):
        sys.exit("the meshes do not agree")


if __name__ == "__main__":
    app.run(main)
