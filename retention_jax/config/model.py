"""A decoder's architecture, as a checkpoint's config.json says it, and that of its retention gates."""

import dataclasses
from typing import Literal

import numpy as np

from retention_jax.config.checks import check_types, require
from retention_jax.config.vision import MRope, VisionConfig

Share = Literal["layers", "layers_and_heads", "none"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How RoPE reaches beyond the context of pretraining; the formulas are in `models/rope.py`."""

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = 1.0  # linear, llama3, yarn: how many times longer the context becomes
    original_length: int = 0  # llama3, yarn, longrope: tokens in pretraining
    attention_factor: float = 1.0  # yarn, longrope: multiplies rotated queries and keys
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: ramp from whole to whole component
    short_factor: tuple[float, ...] = ()  # longrope: divides each frequency in sequences up to original_length
    long_factor: tuple[float, ...] = ()  # longrope: in longer ones

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self,
            (self.factor > 0, f"factor must be positive, got {self.factor}"),
            (self.attention_factor > 0, f"attention_factor must be positive, got {self.attention_factor}"),
            (
                self.kind == "linear" or self.original_length > 0,
                f"original_length must be positive for {self.kind}, got {self.original_length}",
            ),
            (
                self.high_freq_factor > self.low_freq_factor > 0,
                f"high_freq_factor must exceed low_freq_factor, got {self.high_freq_factor}, {self.low_freq_factor}",
            ),
            (
                self.beta_fast >= self.beta_slow > 0,
                f"beta_fast must not be below beta_slow, got {self.beta_fast} and {self.beta_slow}",
            ),
            (
                min((*self.short_factor, *self.long_factor), default=1.0) > 0,
                "short_factor and long_factor must be positive",
            ),
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama/Qwen family: RMSNorm, RoPE, grouped queries, SwiGLU."""

    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    mlp_width: int
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0  # share of a head's components, the first ones, that RoPE turns (Phi-4-mini)
    sliding_window: int | None = None  # tokens that sliding layers see, the newest included
    sliding_layers: tuple[int, ...] = ()  # their indices; the other layers see everything
    norm_eps: float = 1e-6
    qk_norm: bool = False  # RMSNorm on each head's query and key before RoPE (Qwen3)
    qkv_bias: bool = False  # Qwen2
    output_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    mrope: MRope | None = None  # vision-language models: tokens have three positions
    vision: VisionConfig | None = None  # their tower
    context: int = 2**20  # tokens that it was made to read; nobody is held to it but benchmarks
    dtype: Literal["float32", "bfloat16"] = "float32"  # backbone weights, activations, cached keys and values

    def __post_init__(self) -> None:
        check_types(self)
        sizes = ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_size", "mlp_width", "context")
        scaling = self.rope_scaling
        require(
            self,
            *[(getattr(self, n) > 0, f"{n} must be positive, got {getattr(self, n)}") for n in sizes],
            (
                self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0,
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}",
            ),
            (self.head_size % 2 == 0, f"head_size must be even for RoPE, got {self.head_size}"),
            (
                0 < self.partial_rotary_factor <= 1 and self.rotary_size % 2 == 0,
                f"partial_rotary_factor must be in (0, 1] and leave an even number of the {self.head_size} components, "
                f"got {self.partial_rotary_factor}",
            ),
            (
                scaling is None
                or scaling.kind != "longrope"
                or {len(scaling.short_factor), len(scaling.long_factor)} == {self.rotary_size // 2},
                f"short_factor and long_factor must have {self.rotary_size // 2} numbers each, got {scaling}",
            ),
            (
                self.sliding_window is None or self.sliding_window > 0,
                f"sliding_window must be None or positive, got {self.sliding_window}",
            ),
            (
                bool(self.sliding_layers) == (self.sliding_window is not None)
                and list(self.sliding_layers) == sorted(set(self.sliding_layers) & set(range(self.num_layers))),
                f"sliding_layers must be ascending indices below {self.num_layers}, none without a sliding_window, got "
                f"{self.sliding_layers} and {self.sliding_window}",
            ),
            *_about_vision(self),
        )

    @property
    def rotary_size(self) -> int:
        """Components of each head that RoPE turns."""
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def windows(self) -> tuple[int, ...] | None:
        """Tokens that each layer sees, the newest included; None where all layers see everything."""
        if self.sliding_window is None:
            return None
        everything = np.iinfo(np.int32).max
        return tuple(self.sliding_window if l in self.sliding_layers else everything for l in range(self.num_layers))


def _about_vision(cfg: ModelConfig) -> list[tuple[bool, str]]:
    """Checks of what only vision-language models have."""
    mrope, vision, pairs = cfg.mrope, cfg.vision, cfg.rotary_size // 2
    if mrope is None:
        return [(vision is None, "vision needs mrope: pictures have positions of three axes")]
    return [
        (cfg.rope_scaling is None, f"mrope goes with plain RoPE only, got rope_scaling {cfg.rope_scaling}"),
        (
            cfg.partial_rotary_factor == 1,
            f"mrope turns whole heads, got partial_rotary_factor {cfg.partial_rotary_factor}",
        ),
        (sum(mrope.sections) == pairs, f"mrope.sections must sum to head_size / 2 = {pairs}, got {mrope.sections}"),
        (
            vision is None or vision.out_width == cfg.width,
            f"vision.out_width must be the width {cfg.width}, got {vision and vision.out_width}",
        ),
        (
            vision is None or len(vision.deepstack) <= cfg.num_layers,
            f"vision.deepstack must not have more than the {cfg.num_layers} layers, got {vision and vision.deepstack}",
        ),
    ]


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """Retention gates: one small MLP a layer and a final projection (design in `models/gate.py`)."""

    width: int = 512
    hidden_layers: Literal[1, 2] = 2
    share: Share = "layers"  # what the final projection, with its offset, is shared over
    tie_offset: bool = True  # False: an offset for each layer beside a projection that `share="layers"` shares
    offset_init: float = 18.0  # sigmoid(18) is 1 - 1.5e-8: training starts from the untouched model
    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self,
            (self.width > 0, f"width must be positive, got {self.width}"),
            (self.init_std > 0, f"init_std must be positive, got {self.init_std}"),
            (
                self.tie_offset or self.share == "layers",
                f"tie_offset=False goes with share='layers' only, got share={self.share!r}",
            ),
            (
                self.hidden_layers == 2 or self.share != "layers_and_heads",
                "share='layers_and_heads' needs hidden_layers=2: the second gives each head features of its own",
            ),
        )
