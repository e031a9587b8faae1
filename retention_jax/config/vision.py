"""How a vision-language checkpoint sees: its tower, and how pictures stand among tokens."""

import dataclasses
from typing import Literal

from retention_jax.config.checks import check_types, require


@dataclasses.dataclass(frozen=True)
class MRope:
    """RoPE by three positions of a token: time, height, width. Formulas in `models/rope.py` (arXiv 2409.12191)."""

    sections: tuple[int, ...]  # rotated pairs that turn by time, height and width
    interleaved: bool  # the axes take turns over the pairs (Qwen3-VL); else each has a block of its own (Qwen2.5-VL)

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self,
            (
                len(self.sections) == 3 and min(self.sections, default=0) > 0,
                f"sections must be three numbers above 0, got {self.sections}",
            ),
        )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A tower of one of the two families, the size of its patches, and the tokens that stand for pictures.

    qwen3_vl      LayerNorm, plain MLP, learned positions, DeepStack; a clip is a series of pictures with times as text
    qwen2_5_vl    RMSNorm, gated MLP, windows; a clip's time is an axis of its positions
    """

    kind: Literal["qwen3_vl", "qwen2_5_vl"]
    depth: int
    width: int
    num_heads: int
    mlp_width: int
    out_width: int  # of the decoder that reads the features
    patch: int  # pixels of a side
    image_token: int  # stands in for each feature of a picture
    video_token: int
    start_token: int  # before the placeholders of a picture
    end_token: int
    merge: int = 2  # patches of a side that become one feature
    temporal: int = 2  # frames of a patch
    position_side: int = 0  # qwen3_vl: side of the square table of learned positions
    deepstack: tuple[int, ...] = ()  # qwen3_vl: block j's output goes to the decoder layer of its place here
    window: int = 0  # qwen2_5_vl: pixels of a window's side
    full_blocks: tuple[int, ...] = ()  # qwen2_5_vl: blocks that attend to the whole frame
    ticks_per_second: float = 1.0  # qwen2_5_vl: steps of the time axis in a clip

    def __post_init__(self) -> None:
        check_types(self)
        sizes = ("depth", "width", "num_heads", "mlp_width", "out_width", "patch", "merge", "temporal")
        windowed, blocks = self.kind == "qwen2_5_vl", set(range(self.depth))
        require(
            self,
            *[(getattr(self, n) > 0, f"{n} must be positive, got {getattr(self, n)}") for n in sizes],
            (
                self.num_heads > 0 and self.width % (4 * self.num_heads) == 0,
                f"width must be a multiple of 4 * num_heads for a rotation in two directions, got {self.width} and "
                f"{self.num_heads}",
            ),
            (
                windowed or self.position_side > 0,
                f"position_side must be positive, got {self.position_side}",
            ),
            (
                list(self.deepstack) == sorted(set(self.deepstack) & blocks),
                f"deepstack must be ascending indices below {self.depth}, got {self.deepstack}",
            ),
            (
                not windowed or (self.window > 0 and self.window % (self.patch * self.merge) == 0),
                f"window must be a multiple of patch * merge = {self.patch * self.merge}, got {self.window}",
            ),
            (
                list(self.full_blocks) == sorted(set(self.full_blocks) & blocks),
                f"full_blocks must be ascending indices below {self.depth}, got {self.full_blocks}",
            ),
            (self.ticks_per_second > 0, f"ticks_per_second must be positive, got {self.ticks_per_second}"),
        )

    @property
    def factor(self) -> int:
        """Sides of resized pictures are multiples of so many pixels."""
        return self.patch * self.merge

    @property
    def patch_size(self) -> int:
        """Numbers of one patch: three colours, some frames."""
        return 3 * self.temporal * self.patch**2
