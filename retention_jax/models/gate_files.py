"""Gate folders, in the format in which gates of TRIM-KV and DBTrimKV were released for PyTorch.

config.json           fields of the base model and of the gates; from us also `gate`, a `GateConfig`
gates.safetensors     model.layers.{i}.self_attn.retention_gate.{linear1.weight, ...}, what layers share repeated; with
                      model.language_model in place of model where the base model sees
trimkv_weights.pth    the same tensors by `torch.save`: what the PyTorch implementation reads and writes
"""

import hashlib
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from retention_jax.config import GateConfig, LossConfig, ModelConfig
from retention_jax.config.conversion import from_dict, to_dict
from retention_jax.models import huggingface, huggingface_vision, tensors
from retention_jax.models.decoder import Decoder
from retention_jax.models.gate import GateParam
from retention_jax.models.tensors import Place
from retention_jax.runtime.files import write_atomically

OURS, OFFICIAL = "gates.safetensors", "trimkv_weights.pth"
_NAME = re.compile(r"layers\.(\d+)\.self_attn\.retention_gate\.(.+)$")  # the prefix differs from model to model


class Gates(NamedTuple):
    """What a gate folder holds, float32 and under the names that text models have."""

    config: GateConfig
    tensors: dict[str, np.ndarray]
    folder: pathlib.Path


def tensor_name(layer: int, suffix: str) -> str:
    return f"model.layers.{layer}.self_attn.retention_gate.{suffix}"


def gate_names(cfg: ModelConfig, gate: GateConfig) -> dict[str, Place]:
    """Name in the file -> place in the model, for every gate tensor."""
    places: dict[str, Place] = {}
    for i in range(cfg.num_layers):
        shared = 0 if gate.share != "none" else i
        of_layer = {
            "linear1.weight": Place(("layers", "retention", "w1"), i, "in"),
            "linear1.bias": Place(("layers", "retention", "b1"), i, "same"),
            f"linear{gate.hidden_layers + 1}.weight": Place(("final_projection", "weight"), shared, "same"),
            "bias": Place(("final_projection", "offset"), shared if gate.tie_offset else i, "same"),
        }
        if gate.hidden_layers == 2:
            of_layer["linear2.weight"] = Place(("layers", "retention", "w2"), i, "in")
            of_layer["linear2.bias"] = Place(("layers", "retention", "b2"), i, "flat")
        places |= {tensor_name(i, suffix): place for suffix, place in of_layer.items()}
    return places


def weight_files(folder: str | os.PathLike) -> list[pathlib.Path]:
    """What a folder's gates are read from: safetensors where there are any, else the .pth; [] if there is neither."""
    folder = pathlib.Path(folder)
    if (folder / OURS).is_file():
        return [folder / OURS]
    return sorted(folder.glob("*.safetensors")) or [f for f in (folder / OFFICIAL,) if f.is_file()]


def read_gates(folder: str | os.PathLike) -> Gates:
    """The gates in a folder, released or ours.

    Released folders say little about themselves, so the tensors decide: one or two hidden layers, the width, and what
    layers share. Copies of a shared tensor that differ from layer to layer are kept, with a warning.

    Raises:
      ValueError: when a file is missing, damaged, foreign, of an unknown kind, or a .pth that holds anything but
        tensors (nothing in it is executed).
      ImportError: when there is only a .pth and torch is not installed.
    """
    folder = pathlib.Path(folder)
    raw = tensors.read_json(folder / "config.json")
    files = weight_files(folder)
    if not files:
        raise ValueError(f"{folder}: no {OURS} and no {OFFICIAL}; a gate folder needs one")
    named = _read_torch(files[0]) if files[0].suffix == ".pth" else tensors.read_tensors(files, where=folder)
    found, problems = {}, []
    for name, value in named.items():
        if not (match := _NAME.search(name)):
            problems.append(f"{name} is no tensor of a retention gate")
            continue
        if not jnp.issubdtype(value.dtype, jnp.floating):
            problems.append(f"{name} must be floating point, got {value.dtype}")
        elif not np.isfinite(value.astype(np.float32)).all():
            problems.append(f"{name} has values that are not finite")
        found[tensor_name(int(match[1]), match[2])] = value.astype(np.float32)
    if not problems and len(found) < len(named):
        problems.append("several tensors under one layer's name")
    if not isinstance(raw.get("gate", {}), dict):
        problems.append(f"the config's 'gate' must be an object, got {raw['gate']!r}")
    if problems:
        raise ValueError(f"{folder}: not a folder of gates: " + "; ".join(problems))
    if "gate" in raw:
        config = from_dict(GateConfig, raw["gate"], where=f"{folder / 'config.json'}: gate")
    else:
        config = _released_config(raw, found, folder)
    return Gates(config, found, folder)


def load_gates(model: Decoder, gates: Gates) -> None:
    """Puts gates into a decoder built with their config, in place.

    Raises:
      ValueError: when they were made for another model, or tensors are missing, extra or of another shape (all listed).
    """
    cfg, gate, found = model.config, gates.config, gates.tensors
    layers = max(int(match[1]) for name in found if (match := _NAME.search(name))) + 1
    matrices = lambda suffix: [a for name, a in found.items() if name.endswith(suffix) and a.ndim == 2]
    inputs = {a.shape[1] for a in matrices("linear1.weight")}
    if gate.share == "layers_and_heads":
        heads = {len(a) // gate.width for a in matrices("linear2.weight")}
    else:
        heads = {len(a) for a in matrices(f"linear{gate.hidden_layers + 1}.weight")}
    theirs = {"layers": {layers}, "hidden size": inputs, "key/value heads": heads}
    problems = [
        f"{what} {', '.join(map(str, sorted(sizes)))}, the model's {ours}"
        for (what, sizes), ours in zip(theirs.items(), (cfg.num_layers, cfg.width, cfg.num_kv_heads), strict=True)
        if sizes and ours not in sizes
    ]
    if problems:
        raise ValueError(f"{gates.folder}: gates of another model: " + "; ".join(problems))
    tensors.fill(model, GateParam, gate_names(cfg, gate), found, where=gates.folder)


def digest(gates: Gates) -> str:
    """A short name of the tensors."""
    found = hashlib.sha256()
    for name, value in sorted(gates.tensors.items()):
        found.update(f"{name} {value.shape};".encode() + value.tobytes())
    return found.hexdigest()[:16]


def check_kind(gates: Gates, wanted: GateConfig) -> None:
    """Raises ValueError where gates are of another kind than `wanted`, naming every field of it that differs.

    Fields that say how fresh gates are drawn do not count.
    """
    drawn = ("offset_init", "init_std")
    theirs, ours = to_dict(gates.config), to_dict(wanted)
    if odd := [name for name in ours if theirs[name] != ours[name] and name not in drawn]:
        told = ", ".join(f"{name}={theirs[name]!r} (the configuration's gate has {ours[name]!r})" for name in odd)
        raise ValueError(f"{gates.folder}: gates of another kind: {told}")


def save_gates(
    model: Decoder,
    folder: str | os.PathLike,
    *,
    base_model: str = "",
    loss: LossConfig | None = None,
    with_pth: bool = False,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> None:
    """Writes the gates as a gate folder, config.json and gates.safetensors.

    Args:
      model: the decoder.
      folder: where to; a trimkv_weights.pth of older gates there is removed.
      base_model: name or folder of the backbone, for the config.
      loss: what the gates were trained with, for the config.
      with_pth: also write trimkv_weights.pth, which the PyTorch implementation loads; needs torch.
      dtype: in which matrices are stored. Biases and offsets stay float32: near an offset of 18 a step of bfloat16
        changes log_beta by 12 %. What is loaded is float32 again.

    Raises:
      ValueError: when a .pth is asked for and the PyTorch implementation has no such gates.
      ImportError: when a .pth is asked for and torch is not installed.
    """
    cfg, gate, folder = model.config, model.gate_config, pathlib.Path(folder)
    if with_pth and gate.share == "layers_and_heads":
        raise ValueError(f"{folder / OFFICIAL}: the PyTorch implementation has no gates with share='layers_and_heads'")
    torch = _import_torch(folder / OFFICIAL) if with_pth else None
    prefix = huggingface_vision.gate_prefix(cfg.vision)
    places = [(name.replace("model.", prefix, 1), place) for name, place in gate_names(cfg, gate).items()]
    tensors.save(model, GateParam, places, folder, OURS, _config_json(cfg, gate, base_model, loss), dtype)
    (folder / OFFICIAL).unlink(missing_ok=True)
    if torch:
        named = tensors.read_tensors([folder / OURS], where=folder)
        state = {name: torch.from_numpy(value.astype(np.float32)) for name, value in named.items()}
        write_atomically(folder / OFFICIAL, lambda path: torch.save(state, path))


def _config_json(cfg: ModelConfig, gate: GateConfig, base_model: str, loss: LossConfig | None) -> dict[str, Any]:
    """The official fields, then what they cannot say. The official kinds are `rg` and `rg10`."""
    base = huggingface.model_config_json(cfg)
    config = base | {"architectures": [f"TrimKV{name}" for name in base["architectures"]], "base_model": base_model}
    of_gates = {
        "retention_gate": gate.share if gate.share == "layers_and_heads" else ("rg", "rg10")[gate.hidden_layers - 1],
        "retention_gate_intermediate_size": gate.width,
        "retention_gate_bias_init": gate.offset_init,
        "initializer_range": gate.init_std,
        "tie_retention_gate_layers": gate.share == "layers",
        "rg_dropout": 0.0,
        "attn_impl": "rg_attn_flex",
        "trainable_params": "self_attn.retention_gate",
    }
    if cfg.vision is None:
        config |= of_gates
    else:
        config["text_config"] |= of_gates
    if loss:
        config |= {
            "memory_size": loss.budget,
            "retention_weight": loss.capacity_weight,
            "global_capacity": loss.capacity == "global",
        }
    return config | {"gate": to_dict(gate)}


def _released_config(raw: Mapping[str, Any], found: Mapping[str, np.ndarray], folder: pathlib.Path) -> GateConfig:
    """The config of gates that were not written by us: config.json (not all of it was always there) and the tensors."""
    text = raw.get("text_config")  # vision-language models
    fields = {**raw, **(text if isinstance(text, dict) else {})}
    kind, act = fields.get("retention_gate"), fields.get("hidden_act", "silu")
    problems = [f"retention_gate {kind!r} (known: rg, rg10)"] * (kind not in (None, "rg", "rg10"))
    problems += [f"hidden_act {act!r} (known: silu)"] * (act != "silu")
    if problems:
        raise ValueError(f"{folder / 'config.json'}: cannot be loaded: " + "; ".join(problems))
    copies = lambda suffix: [a for name, a in found.items() if name.endswith(f"retention_gate.{suffix}")]
    two = bool(copies("linear3.weight"))
    width = next((a.size for a in copies("linear1.bias")), fields.get("retention_gate_intermediate_size", 512))
    said = {"retention_gate": "rg10" if two else "rg", "retention_gate_intermediate_size": width}
    odd = [
        f"{name} is {value!r} by the tensors, {fields[name]!r} in config.json"
        for name, value in said.items()
        if fields.get(name, value) != value
    ]
    tied = two and fields.get("tie_retention_gate_layers", True)
    apart = {suffix: _spread(copies(suffix)) for suffix in ("linear3.weight", "bias")}
    odd += [
        f"{suffix} should be shared, but layers differ by up to {spread:.3g}; every layer keeps its own"
        for suffix, spread in apart.items()
        if tied and spread
    ]
    if fields.get("skip_layers"):
        odd.append(f"skip_layers {fields['skip_layers']} is not followed; every layer shares the budget")
    if odd and jax.process_index() == 0:
        logging.warning("%s: %s", folder, "; ".join(odd))
    share = "layers" if tied and not apart["linear3.weight"] else "none"
    values = {
        "width": width,
        "hidden_layers": 2 if two else 1,
        "share": share,
        "tie_offset": share == "none" or not apart["bias"],
        "offset_init": fields.get("retention_gate_bias_init", GateConfig.offset_init),
        "init_std": fields.get("initializer_range", GateConfig.init_std),
    }
    return from_dict(GateConfig, values, where=str(folder / "config.json"))


def _spread(copies: list[np.ndarray]) -> float:
    """How far copies of one tensor are apart at most; one of another shape is not a copy."""
    alike = [a for a in copies if a.shape == copies[0].shape]
    return float(np.ptp(np.stack(alike), axis=0).max(initial=0)) if alike else 0.0


def _read_torch(file: pathlib.Path) -> dict[str, np.ndarray]:
    torch = _import_torch(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{file}: not complete, or it holds more than tensors; nothing in it was executed") from error
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{file}: must hold tensors by name, got {type(state).__name__}")
    named, problems = {}, []
    for name, value in state.items():
        if isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided:
            # NumPy has no bfloat16, and float32 holds it.
            named[name] = (value.float() if value.is_floating_point() else value).numpy()
        else:
            problems.append(f"{name!r} must be a dense tensor, got {type(value).__name__}")
    if problems:
        raise ValueError(f"{file}: must hold tensors by name: " + "; ".join(problems))
    return named


def _import_torch(file: pathlib.Path):
    try:
        import torch
    except ImportError as error:
        message = f"{file}: needs torch, of the extra retention_jax[torch]; {OURS} does not"
        raise ImportError(message) from error
    return torch
