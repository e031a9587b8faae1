"""Gate folders: the released format as it is, what comes back bit for bit, and what is refused."""

import builtins
import dataclasses
import json
import pathlib
import re

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_model
from safetensors.numpy import load_file, save_file

import retention_jax as rj
from retention_jax.config import GateConfig, LossConfig
from retention_jax.models import gate_files
from retention_jax.models.gate import GateParam

KINDS = {
    "rg": GateConfig(width=8, hidden_layers=1, share="none"),
    "rg10": GateConfig(width=8),
    "offsets apart": GateConfig(width=8, tie_offset=False),
    "all apart": GateConfig(width=8, share="none"),
}
OURS_ONLY = GateConfig(width=8, share="layers_and_heads")
PREFIX = "model.layers.{}.self_attn.retention_gate.{}"


def gates_of(model: rj.Decoder) -> list[tuple[tuple, bytes]]:
    """Every gate variable's name, shape and bits."""
    flat = nnx.to_flat_state(nnx.state(model, GateParam))
    return [((*path, v.shape, str(v.dtype)), np.asarray(v[...]).tobytes()) for path, v in flat]


def released(folder: pathlib.Path, tensors: dict[str, np.ndarray] | None = None, **fields) -> pathlib.Path:
    """Makes one of our folders a released one: no section of ours; other fields (`...` removes one) and tensors."""
    config = json.loads((folder / "config.json").read_text()) | {"gate": ..., **fields}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    if tensors is not None:
        save_file(tensors, folder / "gates.safetensors")
    return folder


def load_into(model: rj.Decoder, folder: pathlib.Path) -> rj.Decoder:
    """Another model of the same backbone with the gates of a folder, as `rj.load` makes it."""
    gates = gate_files.read_gates(folder)
    loaded = tiny_model(gates.config, seed=5)
    gate_files.load_gates(loaded, gates)
    assert loaded.config == model.config
    return loaded


@pytest.fixture
def saved(tmp_path):
    """A model with `rg10` gates, its folder, and the tensors there."""
    model = tiny_model(KINDS["rg10"])
    rj.save_gates(model, tmp_path / "gates")
    return model, tmp_path / "gates", load_file(tmp_path / "gates" / "gates.safetensors")


# Released folders.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("torch_only", (False, True))
def test_what_is_exported_comes_back_bitwise(tmp_path, kind, torch_only):
    """With our section of the config and without it, from safetensors and from what torch saved."""
    torch = pytest.importorskip("torch")
    model = tiny_model(KINDS[kind])
    rj.save_gates(model, tmp_path, with_pth=True)
    theirs = torch.load(tmp_path / "trimkv_weights.pth", weights_only=True)
    ours = load_file(tmp_path / "gates.safetensors")
    assert {n: (t.dtype, t.numpy().tobytes()) for n, t in theirs.items()} == {
        n: (torch.float32, a.tobytes()) for n, a in ours.items()
    }
    if torch_only:
        (tmp_path / "gates.safetensors").unlink()
    for folder in (tmp_path, released(tmp_path)):
        loaded = load_into(model, folder)
        assert loaded.gate_config == model.gate_config and gates_of(loaded) == gates_of(model)


def test_the_config_speaks_the_official_language(tmp_path):
    loss = LossConfig(budget=32, capacity="local", capacity_weight=2.0)
    for kind, gate in KINDS.items():
        rj.save_gates(tiny_model(gate, qk_norm=True), tmp_path, base_model="Qwen/Qwen3-4B", loss=loss)
        config = json.loads((tmp_path / "config.json").read_text())
        want = dict(
            architectures=["TrimKVQwen3ForCausalLM"],
            model_type="qwen3",
            hidden_size=16,
            base_model="Qwen/Qwen3-4B",
            retention_gate="rg" if kind == "rg" else "rg10",
            retention_gate_intermediate_size=8,
            retention_gate_bias_init=18.0,
            tie_retention_gate_layers=gate.share == "layers",
            memory_size=32,
            retention_weight=2.0,
            global_capacity=False,
        )
        assert {name: config[name] for name in want} == want


def test_gates_that_only_we_have(tmp_path):
    model = tiny_model(OURS_ONLY)
    rj.save_gates(model, tmp_path)
    assert gates_of(load_into(model, tmp_path)) == gates_of(model)
    with pytest.raises(ValueError, match="no gates with share='layers_and_heads'"):
        rj.save_gates(model, tmp_path / "new", with_pth=True)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="retention_gate 'layers_and_heads' .known: rg, rg10"):
        gate_files.read_gates(released(tmp_path))


@pytest.mark.parametrize("dtype", (np.float64, np.float16, ml_dtypes.bfloat16))
def test_other_writers(saved, dtype, caplog):
    """A vision-language model's names and config, an older set of fields, another dtype, another file name."""
    model, folder, tensors = saved
    (folder / "gates.safetensors").unlink()
    renamed = {name.replace("model.", "model.language_model."): a.astype(dtype) for name, a in tensors.items()}
    save_file(renamed, folder / "gates-00001-of-00001.safetensors")
    fields = dict(retention_gate="rg10", retention_gate_bias_init=8, compress_strategy="alpha", skip_layers=[])
    (folder / "config.json").write_text(json.dumps({"text_config": fields, "memory_size": 256}))
    gates = gate_files.read_gates(folder)
    assert gates.config == dataclasses.replace(model.gate_config, offset_init=8.0) and not caplog.records
    assert gates.tensors.keys() == tensors.keys()
    for name, value in gates.tensors.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, tensors[name].astype(dtype).astype(np.float32))


def test_safetensors_need_no_torch(saved, monkeypatch):
    _, folder, _ = saved
    real = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    (folder / "trimkv_weights.pth").write_bytes(b"never read beside gates.safetensors")
    gate_files.read_gates(folder)
    with pytest.raises(ImportError, match=r"needs torch, of the extra retention_jax\[torch\]"):
        rj.save_gates(tiny_model(), folder / "new", with_pth=True)
    assert not (folder / "new").exists()
    (folder / "gates.safetensors").unlink()
    with pytest.raises(ImportError, match=r"trimkv_weights.pth: needs torch, of the extra retention_jax\[torch\]"):
        gate_files.read_gates(folder)


def test_a_write_that_fails_leaves_the_old_gates_or_none(saved, tmp_path, monkeypatch):
    model, folder, _ = saved

    def disk_full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("retention_jax.models.tensors.save_file", disk_full)
    for where in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            rj.save_gates(tiny_model(KINDS["rg10"], seed=1), where)
    assert gates_of(load_into(model, folder)) == gates_of(model)
    assert {path.name for path in tmp_path.iterdir()} == {"gates"}
    with pytest.raises(OSError, match="No space left"):
        rj.save_gates(tiny_model(OURS_ONLY), folder)
    with pytest.raises(ValueError, match="config.json: no such file"):
        gate_files.read_gates(folder)


def test_an_older_pth_does_not_outlive_its_gates(saved):
    model, folder, _ = saved
    (folder / "trimkv_weights.pth").write_bytes(b"old")
    rj.save_gates(model, folder)
    assert not (folder / "trimkv_weights.pth").exists()


# Copies of what layers share.


@pytest.mark.parametrize(
    "moved, want",
    (
        ({"bias": 0.5}, dict(tie_offset=False)),
        ({"linear3.weight": 0.25}, dict(share="none")),
        ({"linear3.weight": 0.25, "bias": 0.5}, dict(share="none")),
    ),
)
def test_copies_that_differ_are_reported_and_kept(saved, moved, want, caplog):
    model, folder, tensors = saved
    for suffix, by in moved.items():
        tensors[PREFIX.format(1, suffix)] = tensors[PREFIX.format(1, suffix)] + np.float32(by)
    loaded = load_into(model, released(folder, tensors))
    assert loaded.gate_config == dataclasses.replace(model.gate_config, **want)
    (record,) = caplog.records
    for suffix in ("linear3.weight", "bias"):
        said = re.search(rf"{suffix} should be shared, but layers differ by up to ([\d.]+)", record.getMessage())
        assert bool(said) == (suffix in moved)
        assert not said or float(said[1]) == pytest.approx(moved[suffix], rel=1e-2)
    rj.save_gates(loaded, folder)
    again = load_file(folder / "gates.safetensors")
    assert {n: a.tobytes() for n, a in again.items()} == {n: a.tobytes() for n, a in tensors.items()}


def test_what_was_never_tied_is_not_reported(saved, caplog):
    model, folder, tensors = saved
    assert load_into(model, released(folder, tie_retention_gate_layers=False)).gate_config.share == "none"
    tensors[PREFIX.format(1, "linear3.weight")] += 1
    loaded = load_into(model, released(folder, tensors, tie_retention_gate_layers=False))
    assert loaded.gate_config.share == "none" and not caplog.records


@pytest.mark.parametrize("suffix", ("linear3.weight", "bias"))
def test_our_own_config_says_what_is_shared(saved, suffix):
    model, folder, tensors = saved
    name = PREFIX.format(1, suffix)
    save_file(tensors | {name: tensors[name] + 1}, folder / "gates.safetensors")
    with pytest.raises(ValueError, match=f"{name} differs from an earlier layer's copy"):
        load_into(model, folder)


def test_tensors_decide_where_the_config_says_something_else(saved, caplog):
    model, folder, _ = saved
    released(folder, retention_gate="rg", retention_gate_intermediate_size=512, skip_layers=[0])
    assert load_into(model, folder).gate_config == model.gate_config
    assert "retention_gate is 'rg10' by the tensors, 'rg' in config.json" in caplog.text
    assert "skip_layers [0] is not followed" in caplog.text
    assert "retention_gate_intermediate_size is 8 by the tensors, 512 in config.json" in caplog.text


# Bad folders.


@pytest.mark.parametrize("kind", (*KINDS, "ours only"))
def test_gates_of_another_model_are_named_by_all_that_differs(tmp_path, kind):
    gate = KINDS.get(kind, OURS_ONLY)
    rj.save_gates(tiny_model(gate, num_layers=3, width=12, num_heads=8, num_kv_heads=4), tmp_path)
    for want, sizes in (
        ("layers 3, the model's 2; hidden size 12, the model's 16; key/value heads 4, the model's 2", {}),
        ("layers 3, the model's 1", dict(num_layers=1, width=12, num_kv_heads=4)),
        ("hidden size 12, the model's 16", dict(num_layers=3, num_kv_heads=4)),
        ("key/value heads 4, the model's 2", dict(num_layers=3, width=12)),
    ):
        with pytest.raises(ValueError, match=f"{tmp_path}: gates of another model: {want}$"):
            gate_files.load_gates(tiny_model(gate, **sizes), gate_files.read_gates(tmp_path))


def test_every_tensor_that_does_not_fit_is_listed(saved):
    model, folder, tensors = saved
    tensors[PREFIX.format(0, "linear2.bias")] = np.zeros(5, np.float32)
    tensors[PREFIX.format(1, "linear4.weight")] = np.zeros((2, 2), np.float32)
    del tensors[PREFIX.format(1, "linear1.weight")]
    with pytest.raises(ValueError) as error:
        load_into(model, released(folder, tensors))
    for part in (
        f"{PREFIX.format(0, 'linear2.bias')} has shape (5,), needed (8,)",
        f"unexpected {PREFIX.format(1, 'linear4.weight')}",
        f"missing {PREFIX.format(1, 'linear1.weight')}",
    ):
        assert part in str(error.value)


def test_tensors_that_are_no_gates_are_listed(saved):
    _, folder, tensors = saved
    odd = tensors | {"lm_head.weight": np.zeros(2, np.float32), PREFIX.format(0, "bias"): np.zeros(2, np.int32)}
    odd[PREFIX.format(1, "bias")] = np.array([np.nan, 0], np.float32)
    with pytest.raises(ValueError) as error:
        gate_files.read_gates(released(folder, odd))
    for part in (
        f"{folder}: not a folder of gates",
        "lm_head.weight is no tensor of a retention gate",
        f"{PREFIX.format(0, 'bias')} must be floating point, got int32",
        f"{PREFIX.format(1, 'bias')} has values that are not finite",
    ):
        assert part in str(error.value)
    twice = tensors | {"other." + PREFIX.format(0, "bias"): np.zeros(2, np.float32)}
    with pytest.raises(ValueError, match="several tensors under one layer's name"):
        gate_files.read_gates(released(folder, twice))


def test_missing_files_and_odd_configs(saved):
    _, folder, tensors = saved
    config = folder / "config.json"
    for gate, message in (
        ({"widht": 8}, "gate.widht is not a field of GateConfig; the nearest is 'width'"),
        ([1], "the config's 'gate' must be an object, got .1."),
    ):
        config.write_text(json.dumps({"gate": gate}))
        with pytest.raises(ValueError, match=message):
            gate_files.read_gates(folder)
    config.write_text(json.dumps({"retention_gate": "rg2", "hidden_act": "gelu"}))
    with pytest.raises(ValueError, match="retention_gate 'rg2' .known: rg, rg10.; hidden_act 'gelu' .known: silu"):
        gate_files.read_gates(folder)
    (folder / "gates.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{folder}: no gates.safetensors and no trimkv_weights.pth"):
        gate_files.read_gates(folder)
    config.unlink()
    with pytest.raises(ValueError, match="config.json: no such file"):
        gate_files.read_gates(folder)


class Payload:
    """Unpickled without care, it creates a file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("beside_tensors", (False, True))
def test_a_pth_with_code_is_refused_and_never_executed(saved, tmp_path, beside_tensors):
    torch = pytest.importorskip("torch")
    _, folder, tensors = saved
    (folder / "gates.safetensors").unlink()
    trap = Payload(tmp_path / "executed")
    state = {n: torch.from_numpy(a) for n, a in tensors.items()} if beside_tensors else {}
    torch.save(state | {PREFIX.format(0, "bias"): trap}, folder / "trimkv_weights.pth")
    with pytest.raises(ValueError, match="trimkv_weights.pth: not complete, or it holds more than tensors"):
        gate_files.read_gates(folder)
    assert not trap.path.exists()
    torch.load(folder / "trimkv_weights.pth", weights_only=False)  # the trap works
    assert trap.path.exists()


@pytest.mark.parametrize("share", (0.0, 0.01, 0.5, 0.99))
def test_a_truncated_pth_is_refused(saved, share):
    model, folder, _ = saved
    pytest.importorskip("torch")
    rj.save_gates(model, folder, with_pth=True)
    (folder / "gates.safetensors").unlink()
    whole = (folder / "trimkv_weights.pth").read_bytes()
    (folder / "trimkv_weights.pth").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="trimkv_weights.pth: not complete"):
        gate_files.read_gates(folder)


def test_a_pth_must_hold_tensors_by_name(saved):
    torch = pytest.importorskip("torch")
    _, folder, _ = saved
    (folder / "gates.safetensors").unlink()
    for state, message in (
        ([torch.zeros(2)], "must hold tensors by name, got list"),
        ({}, "must hold tensors by name, got dict"),
        ({"state_dict": {}, "epoch": 3}, "'state_dict' must be a dense tensor, got dict; 'epoch' must be .* got int"),
        ({"lm_head.weight": torch.zeros(2)}, "lm_head.weight is no tensor of a retention gate"),
    ):
        torch.save(state, folder / "trimkv_weights.pth")
        with pytest.raises(ValueError, match=message):
            gate_files.read_gates(folder)
