"""Gates that come with the package: small, with a card, and for one model only; and how they are made small."""

import json
import re

import numpy as np
import pytest
from helpers import tiny_model
from safetensors.numpy import load_file

import retention_jax as rj
from retention_jax.config import GateConfig
from retention_jax.models import gate_files, weights
from retention_jax.runtime import hub


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("share", ("layers", "none"))
def test_matrices_in_16_bits(tmp_path, share, dtype):
    """Half the bytes; biases and offsets as they were; what comes back is float32, and what was stored."""
    model = tiny_model(GateConfig(width=64, share=share))
    rj.save_gates(model, tmp_path / "wide")
    rj.save_gates(model, tmp_path / "narrow", dtype=dtype, with_pth=True)
    wide, narrow = (gate_files.read_gates(tmp_path / name).tensors for name in ("wide", "narrow"))
    stored = load_file(tmp_path / "narrow" / "gates.safetensors")
    assert wide.keys() == narrow.keys()
    for name, value in wide.items():
        assert narrow[name].dtype == np.float32
        if value.ndim == 1:
            assert stored[name].dtype == np.float32 and np.array_equal(narrow[name], value)
        else:
            assert stored[name].dtype == np.dtype(dtype)
            assert np.array_equal(narrow[name], value.astype(dtype).astype(np.float32))
            assert not np.array_equal(narrow[name], value)
    sizes = [(tmp_path / name / "gates.safetensors").stat().st_size for name in ("wide", "narrow")]
    assert sizes[1] < 0.65 * sizes[0]
    loaded, tokens = tiny_model(model.gate_config), np.arange(24)[None] % 32
    gate_files.load_gates(loaded, gate_files.read_gates(tmp_path / "narrow"))
    apart = np.abs(loaded(tokens)[1] - model(tokens)[1]).max()
    assert 0 < apart < {"float16": 0.03, "bfloat16": 0.3}[dtype]
    (tmp_path / "narrow" / "gates.safetensors").unlink()
    from_pth = gate_files.read_gates(tmp_path / "narrow").tensors
    assert all(np.array_equal(from_pth[name], value) for name, value in narrow.items())


CARDS = ("## Data", "## Training", "| tokens |", "| steps |", "| hardware |", "| hours |", "| dtype |", "## Results")
CARDS += ("## Limits", "## License")
SHIPPED = [path.parent for path in sorted(hub.BUILTIN.glob("*/gates.safetensors"))]


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_shipped_gates_are_small_and_have_a_card(folder):
    gates = weights.read_gates(f"builtin:{folder.name}")
    assert gates.tensors and (folder / "gates.safetensors").stat().st_size < 8_000_000
    base = json.loads((folder / "config.json").read_text())["base_model"]
    assert base and not base.startswith(("/", ".", "~")), "a name that everybody has"
    card = (folder / "README.md").read_text()
    assert [part for part in (*CARDS, f"builtin:{folder.name}", f"base_model: {base}") if part not in card] == []
    empty = [line for line in card.splitlines() if re.fullmatch(r"\| [^|]+ \| *\|", line)]
    assert not empty and not re.search("TODO|TBD|XX", card)


def test_shipped_gates_refuse_another_model(tmp_path):
    weights.save_backbone(tiny_model(), tmp_path)
    told = "recall_gates: gates of another model: hidden size 96, the model's 16; key/value heads 3, the model's 2$"
    with pytest.raises(ValueError, match=told):
        rj.load(tmp_path, gates="builtin:recall_gates")
    with pytest.raises(ValueError, match="builtin:smollm: not shipped with the package, which has builtin:recall, "):
        rj.load(tmp_path, gates="builtin:smollm")
