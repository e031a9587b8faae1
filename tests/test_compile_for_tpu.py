"""The costs that are read from a compiled program, against programs whose costs are known; the command itself."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers import environment_for_tpu_compiler

from retention_jax import sharding

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
sys.path.insert(0, str(LAUNCH))
import hlo  # noqa: E402  # pyright: ignore[reportMissingImports]  # found by the line above

pytestmark = pytest.mark.slow

LAYERS, N = 5, 64


def layers(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_a_loop_counts_as_often_as_it_runs():
    shapes = jax.ShapeDtypeStruct((N, N), jnp.float32), jax.ShapeDtypeStruct((LAYERS, N, N), jnp.float32)
    cost = hlo.cost(jax.jit(layers).lower(*shapes).compile().as_text() or "")
    assert cost.flops == LAYERS * 2 * N**3
    assert cost.unknown_loops == 0 and cost.collectives == []
    # Each step reads a layer's weights, not all layers', and x, which it writes; the compiler may copy some of these.
    least = LAYERS * 3 * 4 * N**2
    assert least <= cost.bytes <= 4 * least


def test_loops_of_unknown_length_are_told():
    halve = lambda x: jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x / 2, x)
    text = jax.jit(halve).lower(jax.ShapeDtypeStruct((N,), jnp.float32)).compile().as_text()
    assert hlo.cost(text or "").unknown_loops == 1


def test_collectives_are_counted_with_their_bytes():
    mesh = sharding.make_mesh(fsdp=8)
    place = lambda *spec: jax.sharding.NamedSharding(mesh, sharding.P(*spec))
    x = jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=place())
    w = jax.ShapeDtypeStruct((LAYERS, N, N), jnp.float32, sharding=place(None, "fsdp", None))

    def gathering(x, weights):
        whole = lambda w: jax.lax.with_sharding_constraint(w, place())
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ whole(w)), None), x, weights)[0]

    (found,) = hlo.cost(jax.jit(gathering).lower(x, w).compile().as_text() or "").collectives
    # On a ring each device passes on 7 of the 8 parts.
    assert found == hlo.Collective("all-gather", 8, LAYERS, LAYERS * 4 * N**2 * 7 / 8)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train", "decode"])
def test_the_command(tmp_path, program):
    pytest.importorskip("libtpu")
    output = tmp_path / "report.json"
    command = [
        sys.executable,
        LAUNCH / "compile_for_tpu.py",
        "--config=configs/recall_backbone.py",
        f"--output={output}",
    ]
    command += ["--topology=v5e:2x2", "--mesh=data:2,fsdp:2", "--batch=8", "--length=256", f"--program={program}"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment_for_tpu_compiler(), cwd=LAUNCH.parent)
    assert run.returncode == 0, run.stderr[-4000:]
    (report,) = json.loads(output.read_text())
    assert report["fits"] and report["tokens"] == (8 * 256 if program == "train" else 8)
    assert "tokens/s" in run.stdout and "fits" in run.stdout
    assert report["bytes"]["weights"] > 0 and report["flops"] > 0 and report["hbm_bytes"] > 0


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--mesh=data:3", "must multiply to the 4 devices"),
        ("--mesh=rows:4", "--mesh must be as in data:2,fsdp:4 with axes data, fsdp, context, tensor; got 'rows'"),
        ("--model=gpt5", "no architecture is known for 'gpt5'"),
    ],
)
def test_refusals(flag, message):
    pytest.importorskip("libtpu")
    command = [sys.executable, LAUNCH / "compile_for_tpu.py", "--config=configs/recall_backbone.py", flag]
    run = subprocess.run(
        [*command, "--topology=v5e:2x2"],
        capture_output=True,
        text=True,
        env=environment_for_tpu_compiler(),
        cwd=LAUNCH.parent,
    )
    assert run.returncode != 0 and message in run.stderr, run.stderr[-2000:]
