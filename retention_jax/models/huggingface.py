"""Hugging Face's layout of a decoder: config.json to and from `ModelConfig`, and the name of every backbone tensor."""

import dataclasses
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

from retention_jax.config import ModelConfig
from retention_jax.config.conversion import from_dict
from retention_jax.models import huggingface_vision
from retention_jax.models.huggingface_vision import Prefixes
from retention_jax.models.tensors import Layout, Place, read_json


class Family(NamedTuple):
    """What a model_type implies, as `transformers` has it."""

    architecture: str
    attention_bias: bool = False  # the config decides about biases of q, k, v and o
    mlp_bias: bool = False  # the config decides about biases of the MLP
    qkv_bias: bool = False  # q, k and v always have biases, o never
    qk_norm: bool = False
    layer_types: bool = False  # the config decides which layers slide; otherwise all do or none
    partial_rotary: bool = False
    defaults: dict[str, Any] = {}  # what the absence of a field means, where it is not what it means elsewhere


FAMILIES = {
    "llama": Family("LlamaForCausalLM", attention_bias=True, mlp_bias=True),
    "mistral": Family("MistralForCausalLM", defaults={"sliding_window": 4096, "num_key_value_heads": 8}),
    "phi3": Family("Phi3ForCausalLM", partial_rotary=True, defaults={"rms_norm_eps": 1e-5}),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, layer_types=True, defaults={"num_key_value_heads": 32}),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        attention_bias=True,
        qk_norm=True,
        layer_types=True,
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
}
# What config.json calls the fields of `ModelConfig` that have other names here.
FILE_NAMES = {
    "num_layers": "num_hidden_layers",
    "width": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "mlp_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "qkv_bias": "attention_bias",
    "output_bias": "attention_bias",
    "tie_embeddings": "tie_word_embeddings",
    "context": "max_position_embeddings",
}
KNOWN_LAYERS = ("full_attention", "sliding_attention")
# Fields of each kind of RoPE in config.json: required ones, optional ones.
ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim")),
    "longrope": (("short_factor", "long_factor"), ("attention_factor", "factor")),
}
NOT_NUMBERS = ("truncate", "short_factor", "long_factor")


def backbone_places(
    cfg: ModelConfig, *, fused: bool = False, prefixes: Prefixes | None = None
) -> list[tuple[str, Place]]:
    """Name in the file and place in the model, for every backbone tensor, a tower's included.

    Args:
      cfg: of the model.
      fused: q, k, v of a layer are rows of one tensor, and so are the MLP's gate and up, as in Phi-3.
      prefixes: of the names; those of the published checkpoints by default.
    """
    prefixes = prefixes or huggingface_vision.published(cfg.vision)
    places = [
        (f"{prefixes.text}embed_tokens.weight", Place(("embedding",), None, "same")),
        (f"{prefixes.text}norm.weight", Place(("final_norm",), None, "same")),
    ]
    if not cfg.tie_embeddings:
        places.append(("lm_head.weight", Place(("lm_head",), None, "same")))
    per_layer: dict[str, tuple[str, Layout]] = {
        "input_layernorm.weight": ("attention_norm", "same"),
        "post_attention_layernorm.weight": ("mlp_norm", "same"),
    }
    for field, biased in (("q", cfg.qkv_bias), ("k", cfg.qkv_bias), ("v", cfg.qkv_bias), ("o", cfg.output_bias)):
        per_layer[f"self_attn.{field}_proj.weight"] = (field, "out" if field == "o" else "in")
        if biased:
            per_layer[f"self_attn.{field}_proj.bias"] = (f"{field}_bias", "flat")
    if cfg.qk_norm:
        per_layer |= {f"self_attn.{field}.weight": (field, "same") for field in ("q_norm", "k_norm")}
    for field in ("gate", "up", "down"):
        per_layer[f"mlp.{field}_proj.weight"] = (f"{field}_proj", "in")
        if cfg.mlp_bias:
            per_layer[f"mlp.{field}_proj.bias"] = (f"{field}_bias", "same")
    q, kv, F = cfg.num_heads * cfg.head_size, cfg.num_kv_heads * cfg.head_size, cfg.mlp_width
    rows = {}  # name of a part -> name of the whole, first row, rows of the whole
    if fused:
        for field, first in (("q", 0), ("k", q), ("v", q + kv)):
            rows[f"self_attn.{field}_proj.weight"] = ("self_attn.qkv_proj.weight", (first, q + 2 * kv))
        for field, first in (("gate", 0), ("up", F)):
            rows[f"mlp.{field}_proj.weight"] = ("mlp.gate_up_proj.weight", (first, 2 * F))
    for i in range(cfg.num_layers):
        for name, (field, layout) in per_layer.items():
            whole, part = rows.get(name, (name, None))
            places.append((f"{prefixes.text}layers.{i}.{whole}", Place(("layers", field), i, layout, part)))
    return places + (huggingface_vision.tower_places(cfg.vision, prefixes.vision) if cfg.vision else [])


def read_model_config(folder: str | os.PathLike, dtype: str) -> ModelConfig:
    """The architecture of a Hugging Face folder.

    Raises:
      ValueError: when config.json is missing or not JSON, or asks for anything this decoder does not implement (all
        named).
    """
    path = pathlib.Path(folder) / "config.json"
    return model_config(read_json(path), dtype, where=path)


def model_config(raw: dict[str, Any], dtype: str, *, where: str | os.PathLike) -> ModelConfig:
    """The architecture that a config.json describes; raises like `read_model_config`."""
    if raw.get("model_type") in huggingface_vision.FAMILIES:
        parts = huggingface_vision.split(raw, where)
        decoder = model_config(parts.text, dtype, where=f"{where}: its decoder")
        try:
            return dataclasses.replace(decoder, mrope=parts.mrope, vision=parts.vision)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    family, rope, sliding = FAMILIES.get(str(raw.get("model_type"))), {}, {}
    problems = _not_implemented(raw, family)
    if family is not None:
        raw = family.defaults | raw
        rope, sliding = _rope(raw, family, problems), _sliding(raw, family, problems)
    if family is None or problems:
        raise ValueError(f"{where}: cannot be loaded: " + "; ".join(problems))
    heads, width, bias = raw["num_attention_heads"], raw["hidden_size"], raw.get("attention_bias", False)
    fields = {
        "vocab_size": raw["vocab_size"],
        "num_layers": raw["num_hidden_layers"],
        "width": width,
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_size": raw.get("head_dim") or width // heads,
        "mlp_width": raw["intermediate_size"],
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "qk_norm": family.qk_norm,
        "qkv_bias": family.qkv_bias or bias,
        "output_bias": bias and not family.qkv_bias,
        "mlp_bias": raw.get("mlp_bias", False),
        "tie_embeddings": raw.get("tie_word_embeddings", False),
        **_context(raw, rope["rope_scaling"]),
        "dtype": dtype,
        **rope,
        **sliding,
    }
    try:
        return from_dict(ModelConfig, fields, where="config.json")
    except ValueError as error:
        told = re.sub(r"config\.json\.", "", str(error)).removeprefix("config.json: ")
        told = re.sub(r"\b(?:" + "|".join(FILE_NAMES) + r")\b", lambda found: FILE_NAMES[found[0]], told)
        raise ValueError(f"{where}: " + "; ".join(told.split("\n"))) from None


def _not_implemented(raw: dict[str, Any], family: Family | None) -> list[str]:
    """What a config.json lacks, or asks for and this decoder does not do."""
    sizes = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    problems = [f"{name} is missing" for name in sizes if name not in raw]
    problems += [
        f"{name} must be a whole number above 0, got {raw[name]!r}"
        for name in sizes
        if name in raw and (type(raw[name]) is not int or raw[name] < 1)
    ]
    longest = raw.get("max_position_embeddings")
    if longest is not None and (type(longest) is not int or longest < 1):
        problems.append(f"max_position_embeddings must be a whole number above 0, got {longest!r}")
    problems += [f"{field} {raw[field]}" for field in ("quantization_config", "use_mrope") if raw.get(field)]
    if raw.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {raw['hidden_act']!r} (known: silu)")
    name = raw.get("model_type")
    if family is None:
        return [*problems, f"model_type {name!r} (known: {', '.join((*FAMILIES, *huggingface_vision.FAMILIES))})"]
    if raw.get("attention_bias") and not (family.attention_bias or family.qkv_bias):
        problems.append(f"attention_bias {raw['attention_bias']} ({name} has none)")
    if raw.get("mlp_bias") and not family.mlp_bias:
        problems.append(f"mlp_bias {raw['mlp_bias']} ({name} has none)")
    return problems


def _rope(raw: dict[str, Any], family: Family, problems: list[str]) -> dict[str, Any]:
    """The fields of `ModelConfig` about RoPE; adds to `problems`.

    transformers 5 keeps all of them in `rope_parameters`; before, there was `rope_scaling`, with the rest beside it.
    """
    where = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(where) or {}
    if not isinstance(rope, dict):
        problems.append(f"{where} must be an object, got {rope!r}")
        return {}
    rope = {name: value for name, value in rope.items() if value is not None}
    share = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if share != 1 and not family.partial_rotary:
        problems.append(f"partial_rotary_factor {share} ({raw.get('model_type')} has none)")
    return {
        "rope_theta": rope.get("rope_theta", raw.get("rope_theta", 10_000.0)),
        "partial_rotary_factor": share,
        "rope_scaling": _rope_scaling(raw, rope, where, problems),
    }


def _rope_scaling(raw: dict[str, Any], rope: dict[str, Any], where: str, problems: list[str]) -> dict[str, Any] | None:
    """The fields of `RopeScaling`; adds to `problems`."""
    kind, phi3 = str(rope.get("rope_type", rope.get("type", "default"))), raw.get("model_type") == "phi3"
    if phi3 and kind in ("su", "yarn"):  # what Phi-3 called longrope at first
        kind = "longrope"
    if kind not in ROPE_FIELDS:
        problems.append(f"{where} {kind!r} (known: {', '.join(ROPE_FIELDS)})")
        return None
    required, optional = ROPE_FIELDS[kind]
    original = ("original_max_position_embeddings",) * (kind in ("llama3", "yarn", "longrope"))
    everywhere = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    unknown = sorted(rope.keys() - {*everywhere, *original, *required, *optional})
    found = [f"{where}.{name} is not known for {kind!r}" for name in unknown]
    found += [f"{where}.{name} is missing" for name in required if name not in rope]
    longest: Any = raw.get("max_position_embeddings")
    length: Any = rope.get("original_max_position_embeddings", longest)
    if phi3:
        length = raw.get("original_max_position_embeddings", 4096)
    numbers = {f"{where}.{n}": rope[n] for n in (*required, *optional) if n in rope and n not in NOT_NUMBERS}
    numbers |= {name: length for name in original}
    if kind == "longrope" and "factor" not in rope:
        numbers["max_position_embeddings"] = longest
    found += [f"{n} must be a positive number, got {v!r}" for n, v in numbers.items() if not _is_positive(v)]
    problems += found
    if kind == "default" or found:
        return None
    fields = {"kind": kind} | {n: rope[n] for n in (*required, *optional) if n in rope}
    if original:
        fields["original_length"] = length
    if kind in ("yarn", "longrope"):
        fields.setdefault("attention_factor", _attention_factor(kind, rope, length, longest))
    if kind == "longrope":
        fields.pop("factor", None)  # only the attention factor depends on it
    return {name: value for name, value in fields.items() if name not in ("mscale", "mscale_all_dim")}


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _attention_factor(kind: str, rope: dict[str, Any], original: int, longest: Any) -> float:
    """The default of yarn (arXiv 2309.00071, section 3.4; DeepSeek's mscales) and of longrope (arXiv 2402.13753)."""
    factor = rope["factor"] if "factor" in rope else longest / original
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    grown = lambda scale: 0.1 * scale * math.log(factor) + 1
    if "mscale" in rope and "mscale_all_dim" in rope:
        return grown(rope["mscale"]) / grown(rope["mscale_all_dim"])
    return grown(1)


def _context(raw: dict[str, Any], scaling: dict[str, Any] | None) -> dict[str, int]:
    """How many tokens a config.json says that the model reads, {} where it does not.

    With yarn the number beside it may be that of pretraining (Qwen2.5) or already the longer one (DeepSeek).
    """
    longest = raw.get("max_position_embeddings")
    if scaling is not None and scaling["kind"] == "yarn":
        longest = max(longest or 0, int(scaling["factor"] * scaling["original_length"]))
    return {} if longest is None else {"context": longest}


def _sliding(raw: dict[str, Any], family: Family, problems: list[str]) -> dict[str, Any]:
    """The fields of `ModelConfig` about sliding windows; adds to `problems`."""
    window, types, depth = raw.get("sliding_window"), raw.get("layer_types"), raw.get("num_hidden_layers")
    if type(depth) is not int:
        return {}
    if family.layer_types and not raw.get("use_sliding_window", False):
        window = None
    if raw.get("model_type") == "llama":
        window = None  # transformers does not look at it
    if window is not None and (type(window) is not int or window < 1):
        problems.append(f"sliding_window must be null or a whole number above 0, got {window!r}")
        return {}
    every = "full_attention" if window is None else "sliding_attention"
    if types is None:
        first = raw.get("max_window_layers", 28) if family.layer_types else 0
        if type(first) is not int:
            problems.append(f"max_window_layers must be a whole number, got {first!r}")
            return {}
        types = ["full_attention" if l < first else every for l in range(depth)]
    if not isinstance(types, list) or len(types) != depth:
        problems.append(f"layer_types must name {depth} layers, got {types!r}")
        return {}
    if other := [t for t in types if t not in KNOWN_LAYERS]:
        problems.append(f"layer_types {other} (known: {', '.join(KNOWN_LAYERS)})")
    elif "sliding_attention" in types and window is None:
        problems.append("layer_types has sliding_attention, but there is no sliding_window in use")
    elif not family.layer_types and set(types) != {every}:
        problems.append(f"layer_types {types} ({raw.get('model_type')} has {every} in all layers)")
    layers = tuple(l for l, t in enumerate(types) if t == "sliding_attention")
    return {"sliding_window": window if layers else None, "sliding_layers": layers}


def model_config_json(cfg: ModelConfig) -> dict[str, Any]:
    """config.json of a backbone of ours, readable by `transformers` too.

    Raises:
      ValueError: if no family has what this one has; its fields are named.
    """
    if cfg.vision is not None:
        decoder = model_config_json(dataclasses.replace(cfg, vision=None, mrope=None))
        return _checked(huggingface_vision.joined(decoder, cfg), cfg)
    if cfg.qk_norm:
        name = "qwen3"
    elif cfg.qkv_bias and not cfg.output_bias:
        name = "qwen2"
    else:
        name = "llama" if cfg.sliding_window is None else "mistral"
    family, scaling = FAMILIES[name], cfg.rope_scaling
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": name,
        "vocab_size": cfg.vocab_size,
        "num_hidden_layers": cfg.num_layers,
        "hidden_size": cfg.width,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_size,
        "intermediate_size": cfg.mlp_width,
        "hidden_act": "silu",
        "rope_theta": cfg.rope_theta,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "max_position_embeddings": cfg.context,
        "torch_dtype": cfg.dtype,
    }
    if family.attention_bias:
        values["attention_bias"] = cfg.qkv_bias
    if family.mlp_bias:
        values["mlp_bias"] = cfg.mlp_bias
    if cfg.sliding_window is not None:
        values["sliding_window"] = cfg.sliding_window
        if family.layer_types:
            types = [KNOWN_LAYERS[l in cfg.sliding_layers] for l in range(cfg.num_layers)]
            values |= {"use_sliding_window": True, "layer_types": types}
    if scaling is not None:
        ours = dataclasses.asdict(scaling) | {"original_max_position_embeddings": scaling.original_length}
        names = [n for group in ROPE_FIELDS[scaling.kind] for n in group if n in ours]
        if scaling.kind == "longrope":
            names.remove("factor")
        names += ["original_max_position_embeddings"] * (scaling.kind != "linear")
        values["rope_scaling"] = {"rope_type": scaling.kind} | {n: ours[n] for n in names}
    return _checked(values, cfg)


def _checked(values: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """A config.json that says all of a model; what comes back of it shows what it cannot say."""
    back = model_config(values, cfg.dtype, where="config.json")
    lost = [f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != getattr(back, f.name)]
    if lost:
        told = ", ".join(f"{field}={getattr(cfg, field)}" for field in lost)
        raise ValueError(f"no Hugging Face family has {told}; the nearest is {values['model_type']}")
    return values
