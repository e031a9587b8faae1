"""Tiny random vision-language checkpoints written by `transformers`: the same pixels and logits, on 1 device."""

import json
from typing import Any

import numpy as np
import pytest

import retention_jax as rj
from retention_jax.vision import processor

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.one_version,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers, about its own arguments' names
]

IMAGE, VIDEO, START, END = 60, 61, 62, 63
TEXT = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
)
TOWER = dict(depth=3, hidden_size=32, num_heads=2, intermediate_size=24, out_hidden_size=32)
IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
ROPE = dict(rope_type="default", rope_theta=1e4)
TAKING_TURNS = ROPE | dict(mrope_section=[4, 2, 2], mrope_interleaved=True)
CASES: dict[str, Any] = {
    "Qwen3VL": dict(
        text_config=TEXT
        | dict(head_dim=16, rope_parameters=ROPE | dict(mrope_section=[4, 2, 2], mrope_interleaved=True)),
        vision_config=TOWER | dict(patch_size=16, num_position_embeddings=36, deepstack_visual_indexes=[0, 2]),
    ),
    "Qwen2_5_VL": dict(
        text_config=TEXT | dict(hidden_size=64, rope_parameters=ROPE | dict(mrope_section=[2, 3, 3])),
        vision_config=TOWER | dict(patch_size=14, out_hidden_size=64, window_size=56, fullatt_block_indexes=[1]),
    ),
}


def original(case: str):
    """A model of `transformers` with weights large enough that everything in it matters."""
    config = getattr(transformers, f"{case}Config")(**CASES[case], **IDS, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = getattr(transformers, f"{case}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn_like(value)
            value.copy_(1 + 0.1 * noise if "norm" in name and "bias" not in name else 0.2 * noise)
    return model


@pytest.mark.parametrize("case", CASES)
def test_pixels_and_logits(case, tmp_path):
    """Two pictures of odd sizes among text."""
    model = original(case)
    model.save_pretrained(tmp_path)
    patch = CASES[case]["vision_config"]["patch_size"]
    limits = {"shortest_edge": 4096, "longest_edge": 16384}
    settings = {"patch_size": patch, "merge_size": 2, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": limits, **settings}))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"size": limits}))
    ours = rj.load(tmp_path, dtype="float32")
    vision = ours.config.vision
    assert vision is not None
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, size).astype(np.uint8) for size in ((70, 131, 3), (200, 40, 3))]
    theirs = _processor(patch, limits, settings)(images=pictures, return_tensors="np")
    patches = [processor.picture(processor.read(tmp_path, vision), picture) for picture in pictures]
    np.testing.assert_allclose(np.concatenate([p.pixels for p in patches]), theirs["pixel_values"], atol=1e-5)
    np.testing.assert_array_equal([p.grid for p in patches], theirs["image_grid_thw"])
    marks = [[START, *[IMAGE] * (len(p.pixels) // 4), END] for p in patches]
    ids = np.array([[1, 2, *marks[0], 3, *marks[1], 4, 5, 6]], np.int64)
    with torch.no_grad():
        want = model(
            input_ids=torch.from_numpy(ids),
            pixel_values=torch.from_numpy(theirs["pixel_values"]),
            image_grid_thw=torch.from_numpy(theirs["image_grid_thw"]),
            mm_token_type_ids=torch.from_numpy((ids == IMAGE).astype(np.int64)),
        ).logits.numpy()
    inputs = rj.inputs(
        ours, input_ids=ids, pixel_values=theirs["pixel_values"], image_grid_thw=theirs["image_grid_thw"]
    )
    logits, _ = ours(inputs)
    np.testing.assert_allclose(logits, want, rtol=0, atol=2e-4 * np.abs(want).max())


def _processor(patch, limits, settings):
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pil

    return pil.Qwen2VLImageProcessorPil(size=limits, temporal_patch_size=2, **settings)
