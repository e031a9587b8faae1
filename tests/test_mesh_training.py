"""Training on meshes: the numbers of one device, the layouts of the table, one clear error for what does not fit."""

import dataclasses
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retention_jax import train
from retention_jax.config import (
    DataConfig,
    EvalConfig,
    GateConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from retention_jax.kernels import ops
from retention_jax.models import weights
from retention_jax.models.gate import GateParam
from retention_jax.parallel import sharding

pytestmark = pytest.mark.slow  # 20 steps on each of many meshes; test_sharding.py has a step of each


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Documents of two lengths packed into rows, and a frozen backbone with 8 query heads on 2 key/value heads."""
    root = tmp_path_factory.mktemp("mesh")
    weights.save_backbone(helpers.tiny_model(vocab_size=64, num_heads=8), root / "backbone")
    return TrainConfig(
        stage="gates",
        backbone=str(root / "backbone"),
        data=DataConfig(
            length=48, batch_size=8, documents=64, document_lengths=(10, 24), cache_dir=str(root / "cache"), decoys=0.2
        ),
        eval=EvalConfig(tasks=()),
        gate=GateConfig(width=8, offset_init=3.0),
        loss=LossConfig(budget=4, vocab_block=20),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        steps=3,
        log_every=1,
        remat=True,
    )


@pytest.fixture(scope="module")
def on_one_device(config, tmp_path_factory):
    return run(config, tmp_path_factory.mktemp("one"))


def run(config, workdir):
    gates = nnx.to_flat_state(nnx.state(train.train(config, workdir), GateParam))
    losses = [line.split('"loss": ')[1].split(",")[0] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array(losses, float), {"/".join(map(str, path)): np.asarray(v[...]) for path, v in gates}


# `launch/compare_meshes.py` tries all of them.
@pytest.mark.parametrize("sizes, accumulation", [((2, 2, 2, 1), 2), ((1, 1, 4, 2), 1), ((1, 8, 1, 1), 1)], ids=str)
def test_training_ends_as_on_one_device(config, on_one_device, tmp_path, sizes, accumulation):
    if accumulation > 1:
        optimizer = dataclasses.replace(config.optimizer, accumulation=accumulation)
        config = dataclasses.replace(config, optimizer=optimizer)
        on_one_device = run(config, tmp_path / "one")
    with jax.set_mesh(sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))):
        losses, gates = run(config, tmp_path / "mesh")
    np.testing.assert_allclose(losses, on_one_device[0], rtol=1e-5)
    for name, want in on_one_device[1].items():
        helpers.assert_close(gates[name], want, 1e-4)


def test_a_backbone_trains_on_a_mesh(config, tmp_path):
    config = dataclasses.replace(
        config,
        stage="backbone",
        backbone="",
        model=helpers.tiny_config(vocab_size=64, num_heads=8),
        gate=GateConfig(width=8),
    )
    losses = []
    for name, mesh in (("one", None), ("mesh", sharding.make_mesh(fsdp=2, context=2, tensor=2))):
        if mesh is None:
            train.train(config, tmp_path / name)
        else:
            with jax.set_mesh(mesh):
                train.train(config, tmp_path / name)
        saved = weights.load_backbone(tmp_path / name / "backbone", config.gate, "float32", seed=0)
        losses.append([np.asarray(a) for a in jax.tree.leaves(nnx.state(saved, nnx.Param))])
    for got, want in zip(*losses, strict=True):
        helpers.assert_close(got, want, 1e-3)


@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (8, 8), (3, 3)])
def test_attention_and_mass_over_a_mesh(heads, kv_heads):
    """Packed documents across the cut, a window, key/value heads that several devices need, indivisible heads."""
    rng, (B, T, H) = np.random.default_rng(0), (2, 24, 8)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.float32) for n in (heads, kv_heads, kv_heads))
    log_beta = -jnp.asarray(rng.uniform(0, 0.3, (B, kv_heads, T)), jnp.float32)
    segment_ids = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 1, 2]], 6, axis=1), jnp.int32)

    def loss(q, k, v, log_beta):
        out = ops.retention_attention(q, k, v, log_beta, segment_ids, jnp.int32(7))
        return jnp.sum(out**2) + jnp.sum(ops.retention_mass(log_beta, segment_ids) ** 2), out

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
    want = step(q, k, v, log_beta)
    with jax.set_mesh(sharding.make_mesh(data=2, context=2, tensor=2)):
        got = step(q, k, v, log_beta)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        helpers.assert_close(a, b)


def test_one_layer_is_whole_at_a_time(config):
    """Layers are gathered inside the loop over them, in every pass: no gathered array has an axis of layers."""
    layers = 3
    model = helpers.tiny_config(vocab_size=64, num_heads=8, num_layers=layers, dtype="bfloat16")
    with jax.set_mesh(sharding.make_mesh(fsdp=8)):
        text = train.lower_step(config, model).compile().as_text() or ""
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", text)
    assert len(shapes) > 10 and not [shape for shape in shapes if shape.startswith(f"{layers},")]


def test_each_device_gets_its_rows():
    rows = np.arange(8 * 6).reshape(8, 6).astype(np.int32)
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, context=2)):
        batch = train.put_batch({"tokens": rows})["tokens"]
    np.testing.assert_array_equal(batch, rows)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 6)}


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(data=3), r"multiply to the 8 devices there are, got data 3 \* fsdp 1 \* context 1 \* tensor 1"),
        (dict(fsdp=16), "multiply to the 8 devices"),
        (dict(data=-1, fsdp=-1), "only one axis may be -1"),
        (dict(tensor=0), "tensor must be at least 1, or -1, got 0"),
    ],
)
def test_meshes_that_do_not_multiply_to_the_devices(sizes, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**sizes).over(8)


def test_what_the_other_axes_leave():
    assert MeshConfig().over(8) == dict(data=8, fsdp=1, context=1, tensor=1)
    assert MeshConfig(data=2, fsdp=-1, tensor=2).over(8) == dict(data=2, fsdp=2, context=1, tensor=2)


def test_what_does_not_fit_the_mesh_is_told_before_anything_is_written(config, tmp_path):
    data = dataclasses.replace(config.data, length=49, batch_size=6)
    bad = dataclasses.replace(config, data=data, optimizer=OptimizerConfig(warmup_steps=1, accumulation=2))
    told = (
        r"multiple of mesh data \* fsdp \* optimizer.accumulation = 4, got 6; data.length must be a "
        r"multiple of mesh context = 4, got 49"
    )
    with jax.set_mesh(sharding.make_mesh(data=2, context=4)), pytest.raises(ValueError, match=told):
        train.train(bad, tmp_path / "run")
    bad = dataclasses.replace(config, backbone=str(tmp_path / "three"))
    weights.save_backbone(helpers.tiny_model(vocab_size=64, num_heads=6), tmp_path / "three")
    with (
        jax.set_mesh(sharding.make_mesh(context=4, tensor=2)),
        pytest.raises(ValueError, match=r"query heads must be a multiple of mesh context \* tensor = 8, got 6"),
    ):
        train.train(bad, tmp_path / "run")
    assert not (tmp_path / "run").exists()
