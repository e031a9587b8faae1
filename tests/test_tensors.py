"""Reading safetensors: shards, dtypes, fused tensors, damage, and how much memory it takes."""

import json
import tracemalloc

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_model
from safetensors.numpy import load_file, save_file

from retention_jax.models import gate_files, tensors, weights

SPLIT = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.fixture(scope="module", autouse=True)
def no_gates():
    """Fresh gates take longer to compile than all else here, and are not looked at."""
    patch = pytest.MonkeyPatch()
    patch.setattr(weights, "init_gates", lambda model, *, seed, mesh=None: None)
    yield
    patch.undo()


@pytest.fixture
def saved(tmp_path):
    """A model, and the folder it is saved in."""
    model = tiny_model(qkv_bias=True)
    weights.save_backbone(model, tmp_path / "backbone")
    return model, tmp_path / "backbone"


def load(folder, dtype="float32"):
    return weights.load(folder, dtype=dtype)


def assert_same(got, want):
    for (path, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (got, want)), strict=True):
        assert a.dtype == b.dtype and np.asarray(a[...]).tobytes() == np.asarray(b[...]).tobytes(), path


def split_in_two(folder):
    """Two shards with an index, as `transformers` writes them."""
    found = load_file(folder / "model.safetensors")
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, file in enumerate(files):
        save_file({n: found[n] for n in sorted(found)[i::2]}, folder / file)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: files[i % 2] for i, n in enumerate(sorted(found))}}))
    return index, files


def test_shards_are_one_checkpoint(saved):
    model, folder = saved
    index, files = split_in_two(folder)
    # The original authors' own file, which their repositories hold as well, is another copy of everything.
    save_file({"tok_embeddings.weight": np.zeros((3, 3), np.float32)}, folder / "consolidated.safetensors")
    assert_same(load(folder), model)
    index.unlink()
    assert_same(load(folder), model)
    save_file({"lm_head.weight": np.zeros((32, 16), np.float32)}, folder / "model-3.safetensors")
    with pytest.raises(ValueError, match="model-3.safetensors: lm_head.weight is also in model-0000"):
        load(folder)


def test_an_index_is_checked(saved):
    _, folder = saved
    index, files = split_in_two(folder)
    good = json.loads(index.read_text())["weight_map"]
    for text, message in (
        ('{"weight_map": ', "not valid JSON"),
        ("{}", "must have an object 'weight_map'"),
        (json.dumps({"weight_map": {"a": 1}}), "must have an object 'weight_map'"),
        (json.dumps({"weight_map": {"a": "../x.safetensors"}}), "files must lie in the same folder, got ../x"),
        (
            json.dumps({"weight_map": good | {"a": "model-8.safetensors", "b": "model-9.safetensors"}}),
            "lists files that are not there: model-8.safetensors, model-9.safetensors",
        ),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            load(folder)
        assert str(index) in str(error.value)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32"))
def test_files_of_every_dtype(saved, dtype):
    model, folder = saved
    rounded = {n: a.astype(jax.numpy.dtype(dtype)) for n, a in load_file(folder / "model.safetensors").items()}
    save_file(rounded, folder / "model.safetensors")
    for target in ("float32", "bfloat16"):
        want = rounded["model.layers.1.mlp.up_proj.weight"].T.astype(target)
        got = load(folder, target).layers.up_proj[...][1]
        assert got.dtype == target and np.asarray(got).tobytes() == np.ascontiguousarray(want).tobytes()


def test_other_dtypes_are_refused(saved):
    _, folder = saved
    found = load_file(folder / "model.safetensors")
    found["model.norm.weight"] = found["model.norm.weight"].astype(np.int8)
    save_file(found, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight has dtype I8 \(known: F32, F16, BF16\)"):
        load(folder)


def test_fused_tensors_are_taken_apart(tmp_path):
    model = tiny_model()
    weights.save_backbone(model, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        for whole, parts in SPLIT.items():
            module = f"model.layers.{layer}." + ("self_attn" if whole == "qkv_proj" else "mlp")
            found[f"{module}.{whole}.weight"] = np.concatenate([found.pop(f"{module}.{p}.weight") for p in parts])
    save_file(found, tmp_path / "model.safetensors")
    assert_same(load(tmp_path), model)
    del found["model.layers.1.mlp.gate_up_proj.weight"]
    found["model.layers.1.self_attn.qkv_proj.weight"] = np.zeros((63, 16), np.float32)
    save_file(found, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert str(error.value).endswith(
        ": does not fit the model: missing model.layers.1.mlp.gate_up_proj.weight; "
        "model.layers.1.self_attn.qkv_proj.weight has shape (63, 16), needed (64, 16)"
    )


def test_buffers_that_old_files_hold_are_ignored(saved):
    model, folder = saved
    found = load_file(folder / "model.safetensors")
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(found, folder / "model.safetensors")
    assert_same(load(folder), model)


def test_what_does_not_fit_is_found_before_any_data_is_read(saved, monkeypatch):
    _, folder = saved
    found = load_file(folder / "model.safetensors")
    del found["lm_head.weight"]
    save_file(found, folder / "model.safetensors")
    monkeypatch.setattr(tensors, "_read_part", lambda *args: pytest.fail("data was read"))
    with pytest.raises(ValueError, match="missing lm_head.weight"):
        load(folder)


@pytest.mark.parametrize("read_bytes", (1, 100, 1000))
def test_blocks_of_any_size_make_one_tensor(saved, monkeypatch, read_bytes):
    monkeypatch.setattr(tensors, "READ_BYTES", read_bytes)
    assert_same(load(saved[1]), saved[0])


def test_memory_is_one_tensor_and_one_block(tmp_path, monkeypatch):
    # 12 MB in float32, the largest tensor 1 MB; read as float32, kept in bfloat16.
    model = tiny_model(width=256, mlp_width=1024, num_layers=4)
    weights.save_backbone(model, tmp_path)
    load(tmp_path, "bfloat16")  # everything is compiled
    monkeypatch.setattr(tensors, "READ_BYTES", 1 << 16)
    tracemalloc.start()
    try:
        load(tmp_path, "bfloat16")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest = 2 * 1024 * 256
    assert largest < peak < largest + (1 << 20), peak


def test_gates_are_read_whole(tmp_path):
    model = tiny_model()
    gate_files.save_gates(model, tmp_path)
    found = tensors.read_tensors([tmp_path / "gates.safetensors"], where=tmp_path)
    assert found["model.layers.0.self_attn.retention_gate.linear1.weight"].shape == (16, 16)
