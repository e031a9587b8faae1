"""Hugging Face's layout of vision-language checkpoints: the parts of config.json, and names of the tower's tensors.

config.json has `vision_config` and the decoder's fields, either in `text_config` or beside it. Tensors of the decoder
are `model.language_model.*` or `model.*`, the tower's `model.visual.*` or `visual.*`. Both layouts of both families are
read.
"""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

from retention_jax.config import ModelConfig, MRope, VisionConfig
from retention_jax.models.tensors import Layout, Place


class _Family(NamedTuple):
    architecture: str
    text: str  # the model_type that the decoder has where it stands alone
    activation: str  # of the tower


FAMILIES = {
    "qwen3_vl": _Family("Qwen3VLForConditionalGeneration", "qwen3", "gelu_pytorch_tanh"),
    "qwen2_5_vl": _Family("Qwen2_5_VLForConditionalGeneration", "qwen2", "silu"),
}
_TOKENS = {  # field here -> in the file
    "image_token": "image_token_id",
    "video_token": "video_token_id",
    "start_token": "vision_start_token_id",
    "end_token": "vision_end_token_id",
}
_SIZES = {
    "depth": "depth",
    "width": "hidden_size",
    "num_heads": "num_heads",
    "mlp_width": "intermediate_size",
    "out_width": "out_hidden_size",
    "patch": "patch_size",
}
_MERGE = {"merge": "spatial_merge_size", "temporal": "temporal_patch_size"}


class Parts(NamedTuple):
    """A config.json taken apart."""

    text: dict[str, Any]  # as of the decoder alone
    mrope: MRope
    vision: VisionConfig


def split(raw: dict[str, Any], where: object) -> Parts:
    """Takes the config.json of a vision-language model apart.

    Raises:
      ValueError: when fields are missing or ask for what is not implemented (all named).
    """
    kind, problems = str(raw["model_type"]), []
    family, tower, nested = FAMILIES[kind], raw.get("vision_config"), raw.get("text_config")
    if not isinstance(tower, dict) or not isinstance(nested, dict | None):
        raise ValueError(f"{where}: cannot be loaded: vision_config and text_config must be objects, got {tower!r:.60}")
    text = dict(nested) if nested else {name: value for name, value in raw.items() if name != "vision_config"}
    text["model_type"] = family.text
    text |= {name: raw[name] for name in ("tie_word_embeddings", "quantization_config") if name in raw}
    sections = _without_mrope(text, kind, problems)
    problems += [f"{name} is missing" for name in _TOKENS.values() if type(raw.get(name)) is not int]
    problems += [f"vision_config.{name} is missing" for name in _SIZES.values() if name not in tower]
    wanted = {"hidden_act": family.activation, "in_channels": 3, "in_chans": 3, "quantization_config": None}
    wanted["spatial_patch_size"] = tower.get("patch_size")
    problems += [
        f"vision_config.{name} {tower[name]!r} (known: {value!r})"
        for name, value in wanted.items()
        if tower.get(name, value) != value
    ]
    side = math.isqrt(tower.get("num_position_embeddings") or 0)
    if kind == "qwen3_vl" and (not side or side**2 != tower["num_position_embeddings"]):
        problems.append("vision_config.num_position_embeddings must be a square number")
    if problems:
        raise ValueError(f"{where}: cannot be loaded: " + "; ".join(problems))
    named = {ours: raw[theirs] for ours, theirs in _TOKENS.items()}
    named |= {ours: tower[theirs] for ours, theirs in _SIZES.items()}
    named |= {ours: tower.get(theirs, 2) for ours, theirs in _MERGE.items()}
    if kind == "qwen3_vl":
        named |= {"position_side": side, "deepstack": tuple(tower.get("deepstack_visual_indexes", ()))}
    else:
        named |= {
            "window": tower.get("window_size", 112),
            "full_blocks": tuple(tower.get("fullatt_block_indexes", (7, 15, 23, 31))),
            "ticks_per_second": float(tower.get("tokens_per_second", 4)),
        }
    try:
        return Parts(text, MRope(sections, interleaved=kind == "qwen3_vl"), VisionConfig(kind, **named))  # pyright: ignore
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _without_mrope(text: dict[str, Any], kind: str, problems: list[str]) -> tuple[int, ...]:
    """Takes M-RoPE out of a decoder's fields, and returns its sections; adds to `problems`."""
    where = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope = dict(text.get(where) or {})
    sections, interleaved = rope.pop("mrope_section", None), rope.pop("mrope_interleaved", kind == "qwen3_vl")
    kinds = {rope.pop(name) for name in ("rope_type", "type") if name in rope} - {"mrope", "default"}
    if kinds:
        problems.append(f"M-RoPE together with {', '.join(map(repr, sorted(kinds)))}")
    if interleaved != (kind == "qwen3_vl"):
        problems.append(f"{where}.mrope_interleaved {interleaved} ({kind} has {kind == 'qwen3_vl'})")
    if not isinstance(sections, list) or not all(type(s) is int for s in sections):
        problems.append(f"{where}.mrope_section must be a list of whole numbers, got {sections!r}")
        sections = []
    text[where] = rope
    return tuple(sections)


def joined(text: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of a model with a tower; `text` is that of its decoder alone."""
    vision, mrope = cfg.vision, cfg.mrope
    assert vision is not None and mrope is not None
    family = FAMILIES[vision.kind]
    rope: dict[str, Any] = {"rope_type": "default", "mrope_section": list(mrope.sections)}
    tower = {theirs: getattr(vision, ours) for ours, theirs in (_SIZES | _MERGE).items()}
    tower |= {"model_type": vision.kind, "hidden_act": family.activation, "in_channels": 3}
    if vision.kind == "qwen3_vl":
        rope["mrope_interleaved"] = True
        tower |= {
            "num_position_embeddings": vision.position_side**2,
            "deepstack_visual_indexes": list(vision.deepstack),
        }
    else:
        tower |= {
            "window_size": vision.window,
            "fullatt_block_indexes": list(vision.full_blocks),
            "tokens_per_second": vision.ticks_per_second,
        }
    nested = {name: value for name, value in text.items() if name != "architectures"}
    return {
        "architectures": [family.architecture],
        "model_type": vision.kind,
        **{theirs: getattr(vision, ours) for ours, theirs in _TOKENS.items()},
        "tie_word_embeddings": cfg.tie_embeddings,
        "torch_dtype": cfg.dtype,
        "text_config": nested | {"model_type": f"{vision.kind}_text", "rope_scaling": rope},
        "vision_config": tower,
    }


class Prefixes(NamedTuple):
    """What the names of tensors begin with."""

    text: str
    vision: str


def prefixes(names: Collection[str]) -> Prefixes:
    """Those of a checkpoint with these tensors."""
    begin = lambda options: next((p for p in options if any(n.startswith(p) for n in names)), options[-1])
    return Prefixes(begin(("model.language_model.", "model.")), begin(("model.visual.", "visual.")))


def published(cfg: VisionConfig | None) -> Prefixes:
    """Those of the published checkpoints, which are written."""
    nested = cfg is not None and cfg.kind == "qwen3_vl"
    return Prefixes("model.language_model.", "model.visual.") if nested else Prefixes("model.", "visual.")


def gate_prefix(cfg: VisionConfig | None) -> str:
    """What names of gates begin with: the same in both families, whatever the backbone's are."""
    return "model." if cfg is None else "model.language_model."


def tower_places(cfg: VisionConfig, prefix: str) -> list[tuple[str, Place]]:
    """Name in the file and place in the model, for every tensor of the tower."""
    plain, D = cfg.kind == "qwen3_vl", cfg.width
    places = [(f"{prefix}patch_embed.proj.weight", Place(("vision", "patch"), None, "same"))]
    if plain:
        places += [
            (f"{prefix}patch_embed.proj.bias", Place(("vision", "patch_bias"), None, "same")),
            (f"{prefix}pos_embed.weight", Place(("vision", "positions"), None, "same")),
        ]
    up, down = ("linear_fc1", "linear_fc2") if plain else ("up_proj", "down_proj")
    per_block: list[tuple[str, str, Layout, tuple[int, int] | None]] = [
        ("norm1.weight", "attention_norm", "same", None),
        ("norm2.weight", "mlp_norm", "same", None),
        ("attn.proj.weight", "o", "out", None),
        ("attn.proj.bias", "o_bias", "same", None),
        (f"mlp.{up}.weight", "up_proj", "in", None),
        (f"mlp.{up}.bias", "up_bias", "same", None),
        (f"mlp.{down}.weight", "down_proj", "in", None),
        (f"mlp.{down}.bias", "down_bias", "same", None),
    ]
    for i, field in enumerate("qkv"):
        per_block.append(("attn.qkv.weight", field, "in", (i * D, 3 * D)))
        per_block.append(("attn.qkv.bias", f"{field}_bias", "flat", (i * D, 3 * D)))
    if plain:
        per_block.append(("norm1.bias", "attention_norm_bias", "same", None))
        per_block.append(("norm2.bias", "mlp_norm_bias", "same", None))
    else:
        per_block.append(("mlp.gate_proj.weight", "gate_proj", "in", None))
        per_block.append(("mlp.gate_proj.bias", "gate_bias", "same", None))
    for i in range(cfg.depth):
        for name, field, layout, rows in per_block:
            places.append((f"{prefix}blocks.{i}.{name}", Place(("vision", "blocks", field), i, layout, rows)))
    places += _merger_places(f"{prefix}merger.", ("vision", "merger"), None, plain)
    for i in range(len(cfg.deepstack)):
        places += _merger_places(f"{prefix}deepstack_merger_list.{i}.", ("vision", "deepstack"), i, plain)
    return places


def _merger_places(prefix: str, path: tuple[str, ...], layer: int | None, plain: bool) -> list[tuple[str, Place]]:
    norm, up, down = ("norm", "linear_fc1", "linear_fc2") if plain else ("ln_q", "mlp.0", "mlp.2")
    fields: list[tuple[str, str, Layout]] = [
        (f"{norm}.weight", "norm", "same"),
        (f"{up}.weight", "up_proj", "in"),
        (f"{up}.bias", "up_bias", "same"),
        (f"{down}.weight", "down_proj", "in"),
        (f"{down}.bias", "down_bias", "same"),
    ]
    if plain:
        fields.append((f"{norm}.bias", "norm_bias", "same"))
    return [(prefix + name, Place((*path, field), layer, layout)) for name, field, layout in fields]
