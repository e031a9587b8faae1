"""Weights on a mesh: which device holds what, and that it changes nothing."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, tiny_model, tokens_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import retention_jax as rj
from retention_jax.models import gate_files, weights
from retention_jax.models.gate import GateParam
from retention_jax.parallel import sharding


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("model"), tiny_model(qk_norm=True)
    weights.save_backbone(model, folder)
    gate_files.save_gates(model, folder / "gates")
    return folder


def test_every_weight_is_where_the_table_says(folder):
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    model = rj.load(folder, folder / "gates", "float32", mesh=mesh)
    whole = rj.load(folder, folder / "gates", "float32")
    specs = {
        "q": P(None, "fsdp", "tensor", None),
        "k": P(None, "fsdp", None, None),  # 2 heads do not go into 4
        "o": P(None, "tensor", None, "fsdp"),
        "up_proj": P(None, "fsdp", "tensor"),
        "down_proj": P(None, "tensor", "fsdp"),
        "q_norm": P(None, None),
        "attention_norm": P(None, None),
    }
    arrays = {name: getattr(model.layers, name)[...] for name in specs} | {"embedding": model.embedding[...]}
    specs["embedding"] = P("tensor", "fsdp")
    for name, array in arrays.items():
        assert isinstance(array.sharding, NamedSharding) and array.sharding.spec == specs[name], name
    assert model.layers.q[...].addressable_shards[0].data.shape == (2, 8, 1, 8)
    for (path, got), (_, want) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (model, whole)), strict=True):
        np.testing.assert_array_equal(got[...], want[...], err_msg=str(path))
        assert len(got[...].sharding.device_set) == 8, path
    gates = {path[-1]: v[...].sharding.spec for path, v in nnx.to_flat_state(nnx.state(model, GateParam))}
    assert gates.pop("w1") == P(None, "fsdp", None) and gates.pop("w2") == P(None, "fsdp", None, None)
    assert set(gates) == {"b1", "b2", "weight", "offset"} and not any(axis for spec in gates.values() for axis in spec)


@pytest.mark.parametrize("axes", (("tensor",), ("data", "tensor")))
def test_any_mesh_with_known_axes_will_do(folder, axes):
    mesh = jax.make_mesh((8,) if len(axes) == 1 else (4, 2), axes)  # its axes may be explicit
    model = rj.load(folder, folder / "gates", "float32", mesh=mesh)
    tokens = tokens_of(0, 2, 9)
    want, want_log_beta = rj.load(folder, folder / "gates", "float32")(tokens)
    got, log_beta = model(tokens)
    assert_close(got, want)
    assert_close(log_beta, want_log_beta)


def test_a_mesh_with_other_axes_is_refused(folder):
    with pytest.raises(ValueError, match="axes data, fsdp, context, tensor; got model too"):
        rj.load(folder, mesh=jax.make_mesh((8,), ("model",)))


def test_weights_that_a_mesh_does_not_cut_are_named(folder, caplog):
    rj.load(folder, mesh=sharding.make_mesh(fsdp=2, tensor=2), dtype="float32")
    assert not caplog.text
    mesh = sharding.make_mesh(fsdp=1, tensor=8)
    sharding.warn_of_uncut(mesh, tiny_model(mlp_width=20))
    [line] = caplog.messages
    assert line.endswith(
        ": down_proj (tensor = 8 does not divide 20), gate_proj (tensor = 8 does not divide 20), "
        "k (tensor = 8 does not divide 2), o (tensor = 8 does not divide 4), q (tensor = 8 does not divide 4), "
        "up_proj (tensor = 8 does not divide 20), v (tensor = 8 does not divide 2)"
    )


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh is made by of a TPU."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def test_data_goes_over_slices_and_the_rest_stays_within_one():
    chips = [Chip(4 * s + 2 * y + x, s, (x, y, 0)) for s in (1, 0) for y in (0, 1) for x in (0, 1)]
    mesh = sharding.make_mesh(chips, data=4, tensor=2)
    assert mesh.devices.shape == (4, 1, 1, 2)
    of = [[chip.slice_index for chip in row.flat] for row in mesh.devices]
    assert of == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(ValueError, match="in 2 slices: mesh data must be a multiple of that, got 1"):
        sharding.make_mesh(chips, fsdp=4, tensor=2)


def test_prefill_and_decode_run_on_the_shards(folder):
    tokens, cache = tokens_of(1, 2, 12), rj.CacheConfig(budget=4, recent=3)
    runs = []
    for mesh in (None, sharding.make_mesh(fsdp=2, tensor=4)):
        model = rj.load(folder, folder / "gates", "float32", mesh=mesh)
        logits, buffer = rj.prefill(model, tokens[:, :7], cache)
        steps = [logits]
        for t in range(7, 12):
            logits, buffer = rj.decode(model, tokens[:, t], buffer)
            steps.append(logits)
        runs.append((np.stack([np.asarray(s) for s in steps]), [buffer.positions(row) for row in range(2)]))
    assert_close(runs[1][0], runs[0][0])
    assert jax.tree.all(jax.tree.map(np.array_equal, runs[1][1], runs[0][1]))
