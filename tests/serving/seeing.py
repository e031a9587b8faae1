"""A tiny Qwen3-VL with a tokenizer and a template, and pictures as clients send them."""

import base64
import io
import json
import pathlib

import numpy as np
import tokenizers
from helpers import tiny_model
from PIL import Image
from text_helpers import save_tokenizer

from retention_jax.config import MRope, VisionConfig

MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
TEMPLATE = """{%- for m in messages -%}{{- '<|start|>' + m.role + '\\n' -}}
{%- if m.content is string -%}{{- m.content -}}{%- else -%}{%- for part in m.content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}{%- endif -%}{{- '<|end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant\\n' -}}{%- endif -%}"""
LIMITS = {"shortest_edge": 4096, "longest_edge": 16384}  # 4 to 16 features


def save(folder: pathlib.Path):
    """The tokenizer, the template and how pictures are prepared, in a folder; returns the model."""
    save_tokenizer(folder, chat_template=TEMPLATE)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([tokenizers.AddedToken(mark, special=True) for mark in MARKS])
    backend.save(str(folder / "tokenizer.json"))
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text(json.dumps({"size": LIMITS, "patch_size": 16, "merge_size": 2}))
    image, video, start, end = (backend.token_to_id(mark) for mark in MARKS)
    sizes = dict(depth=3, width=32, num_heads=2, mlp_width=24, out_width=16, position_side=6, deepstack=(0, 2))
    ids = dict(image_token=image, video_token=video, start_token=start, end_token=end)
    vision = VisionConfig("qwen3_vl", patch=16, **sizes, **ids)  # pyright: ignore[reportArgumentType]
    mrope = MRope((2, 1, 1), interleaved=True)
    return tiny_model(vocab_size=320, context=512, qk_norm=True, mrope=mrope, vision=vision)


def picture(seed: int, height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def url(pixels: np.ndarray, kind: str = "PNG") -> str:
    Image.fromarray(pixels).save(file := io.BytesIO(), kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def part(link: str) -> dict:
    return {"type": "image_url", "image_url": {"url": link}}


def asking(*parts: str | np.ndarray) -> list[dict]:
    """A user's message of texts and pictures."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else part(url(p)) for p in parts]
    return [{"role": "user", "content": content}]
