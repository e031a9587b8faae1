"""Pixels and prompts: against the public implementations' arrays, and what is refused."""

import base64
import json

import numpy as np
import pytest
from PIL import Image
from vision_goldens import (
    CASES,
    GOLDEN,
    MODELS,
    NAMES,
    VISION,
    film,
    media_of,
    needs_goldens,
    processor_of,
    recorded,
    still,
    texts,
)

from retention_jax.config import VisionConfig
from retention_jax.generation import pictures
from retention_jax.text import chat, tokenizer
from retention_jax.vision import clips, messages, pixels, processor, prompt
from retention_jax.vision.clips import Sampling
from retention_jax.vision.pixels import Limits


@needs_goldens
def test_sizes_of_pictures_and_clips():
    for height, width, factor, least, most, *want in recorded("sizes")["image"].tolist():
        assert [*pixels.picture_size(height, width, factor, Limits(least, most))] == want
    for frames, height, width, temporal, factor, least, most, *want in recorded("sizes")["video"].tolist():
        assert [*pixels.clip_size(frames, height, width, temporal, factor, Limits(least, most))] == want


@needs_goldens
def test_frames_of_films():
    for total, per_second, wanted, least, most, count, *indices in recorded("sizes")["sampling"].tolist():
        got = clips.frames_wanted(int(total), per_second, Sampling(wanted, int(least), int(most)))
        assert got == indices[: int(count)]


@needs_goldens
def test_time_of_clips():
    for ticks, step, *want in recorded("sizes")["time"].tolist():
        cfg = VisionConfig(**{**VISION["q25"].__dict__, "ticks_per_second": ticks})
        tokens = np.full(16, 387, np.int32)
        shift, _, _ = prompt.positions(tokens, cfg, [], [(16, 2, 2)], [step])
        assert (shift[0] + np.arange(16)).tolist() == want


@needs_goldens
@pytest.mark.parametrize("name", MODELS)
def test_pixels(name):
    want, made = recorded(f"{name}_pixels"), processor_of(name)
    small = processor.picture(made, want["small/image"])
    np.testing.assert_allclose(small.pixels, want["small/pixel_values"], rtol=0, atol=1e-5)
    assert [small.grid] == [tuple(g) for g in want["small/grid"].tolist()]
    resized = pixels.resize(want["small/image"][None], *want["small/resized_0"].shape[:2])
    np.testing.assert_array_equal(resized[0], want["small/resized_0"])
    moving = processor.clip(made, film(name))
    np.testing.assert_allclose(moving.pixels, want["video/pixel_values"], rtol=0, atol=1e-5)
    assert [moving.grid] == [tuple(g) for g in want["video/grid"].tolist()]
    resized = pixels.resize(film(name).frames, *want["video/resized"].shape[1:3])
    np.testing.assert_array_equal(resized, want["video/resized"])
    for i, picture in enumerate(("4.jpg", "20.jpg", "11.jpg")):
        folders = (GOLDEN.parent / "data" / folder for folder in ("vl/mathvision_images", "mathvision/images"))
        got = processor.picture(made, next(folder / picture for folder in folders if (folder / picture).exists()))
        np.testing.assert_allclose(got.pixels, still(name, i).pixels, rtol=0, atol=1e-5)


@needs_goldens
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_prompts(name, case):
    want, media = recorded(f"{name}_prompts"), media_of(name, case)
    text = texts(name)[case]
    assert prompt.expand(text["template"], media, VISION[name], NAMES) == text["expanded"]
    got = prompt.assemble(want[f"{case}/ids"], media, VISION[name])
    np.testing.assert_array_equal(got.shift + np.arange(len(got.tokens)), want[f"{case}/position_ids"])
    assert got.next_shift == want[f"{case}/delta"]
    np.testing.assert_array_equal(got.feature >= 0, want[f"{case}/types"] > 0)


@pytest.fixture(scope="module")
def tok():
    return tokenizer.load(GOLDEN / "q3_model")


MESSAGES = {
    "mixed": ("The clip ", "film", " beside ", 2, ": what differs?"),
    "two": ("First ", 0, " and then ", 1, ": which of them is larger?"),
}


@needs_goldens
@pytest.mark.parametrize("case", MESSAGES)
def test_messages(tok, case):
    """Through the checkpoint's template, from arrays: the goldens' tokens, and pixels of the pictures' sizes."""
    rng, stored = np.random.default_rng(0), recorded("q3_pixels")

    def part(piece):
        if isinstance(piece, str) and piece != "film":
            return {"type": "text", "text": piece}
        if piece == "film":
            return {"type": "video", "video": [*stored["video/frames"]], "times": stored["video/indices"] / 25.0}
        size = stored["images/size"][piece]
        return {"type": "image", "image": Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8))}

    made = processor_of("q3")
    content = [part(piece) for piece in MESSAGES[case]]
    split = messages.split([{"role": "user", "content": content}], tok, made)
    text = chat.render(tok, split.messages, add_generation_prompt=True)
    assert text == texts("q3")[case]["template"]
    got, want = pictures.encoded(tok, VISION["q3"], text, split.media), recorded("q3_prompts")
    np.testing.assert_array_equal(got.tokens, want[f"{case}/ids"])
    np.testing.assert_array_equal(got.shift + np.arange(len(got.tokens)), want[f"{case}/position_ids"])


def test_pictures_of_every_kind(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (6, 9, 4)).astype(np.uint8)
    rgb, picture = colours[..., :3], Image.fromarray(colours)
    picture.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    for source in (colours, rgb, picture, tmp_path / "a.png", str(tmp_path / "a.png"), f"file://{tmp_path}/a.png", url):
        np.testing.assert_array_equal(pixels.open_picture(source), rgb)
    np.testing.assert_array_equal(pixels.open_picture(tmp_path / "turned.png"), np.rot90(rgb, -1))
    np.testing.assert_array_equal(pixels.open_picture(rgb[..., 0]), np.repeat(rgb[..., :1], 3, axis=-1))


def test_clips_from_folders(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3)).astype(np.uint8)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    listed = [{"file": f"{i}.png", "index": 10 * i} for i in range(3)]
    for told, step in (({"fps": 4, "total_frames": 60}, 5.0), ({"fps": 4}, 2.5)):
        (tmp_path / "frames.json").write_text(json.dumps({**told, "frames": listed}))
        for path in (tmp_path, tmp_path / "frames.json"):
            got = clips.read(path, Sampling())
            np.testing.assert_array_equal(got.frames, frames)
            assert (got.times, got.frame_seconds) == ([0.0, 2.5, 5.0], step)


def test_clips_from_films(tmp_path):
    """The frames that were written, up to what compressing does to them; chosen by what the sampling says."""
    av = pytest.importorskip("av")
    shades = np.linspace(20, 230, 24).astype(np.uint8)
    with av.open(str(tmp_path / "film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in shades:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade), format="rgb24")))
        film.mux(stream.encode(None))
    got = clips.read(tmp_path / "film.mp4", Sampling())
    indices = [0, 8, 15, 23]
    assert got.frames.shape == (4, 48, 64, 3) and got.frame_seconds == 0.5
    np.testing.assert_allclose(got.times, np.divide(indices, 12))
    assert np.abs(got.frames.mean(axis=(1, 2, 3)) - shades[indices]).max() < 4


WRONG_PICTURES = {
    "no.png: cannot be read as a picture": lambda folder: folder / "no.png",
    "text.png: cannot be read as a picture": lambda folder: folder / "text.png",
    "not downloaded": lambda _: "https://example.org/a.png",
    "must be in base64": lambda _: "data:image/png,abc",
    "not valid base64": lambda _: "data:image/png;base64,%%%",
    r"must be uint8 .* got float64 \[2, 2\]": lambda _: np.zeros((2, 2)),
}


@pytest.mark.parametrize("message", WRONG_PICTURES)
def test_wrong_pictures(tmp_path, message):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=message):
        pixels.open_picture(WRONG_PICTURES[message](tmp_path))


def black(*sizes: tuple[int, int]) -> list[np.ndarray]:
    return [np.zeros((*size, 3), np.uint8) for size in sizes]


WRONG_CLIPS = {
    "at least 2 frames, got 1": (black((4, 4)), [0.0]),
    "a time for each of its 2 frames, got 1": (black((4, 4), (4, 4)), [0.0]),
    "grow from frame to frame": (black((4, 4), (4, 4)), [1.0, 1.0]),
    "one size, got 4 x 4, 4 x 5": (black((4, 4), (4, 5)), [0.0, 1.0]),
}


@pytest.mark.parametrize("message", WRONG_CLIPS)
def test_wrong_clips(message):
    with pytest.raises(ValueError, match=message):
        clips.of_pictures(*WRONG_CLIPS[message])


@pytest.mark.parametrize(
    "told, message",
    [
        ("{", "not valid JSON"),
        ("[]", "must be an object with 'frames'"),
        ('{"frames": [{"file": "0.png"}]}', "frames need a 'time'"),
        (None, "must have frames.json"),
    ],
)
def test_wrong_folders_of_frames(tmp_path, told, message):
    if told is not None:
        (tmp_path / "frames.json").write_text(told)
    with pytest.raises(ValueError, match=message):
        clips.read(tmp_path, Sampling())


def test_a_narrow_picture_is_refused():
    with pytest.raises(ValueError, match="at most 200 times the shorter one, got 1 x 201"):
        pixels.picture_size(1, 201, 32, Limits(4096, 8192))
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        pixels.clip_size(1, 32, 32, 2, 32, Limits(4096, 8192))


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([386] * 3, "3 image placeholders, but 4 features of 1 images"),
        ([386] * 4 + [387], "1 video placeholders, but 0 features of 0 videos"),
        ([386, 1, 386, 386, 386], "must stand together, at token 0"),
    ],
)
def test_wrong_placeholders(tokens, message):
    with pytest.raises(ValueError, match=message):
        prompt.positions(np.asarray(tokens, np.int32), VISION["q3"], [(1, 4, 4)], [])


@needs_goldens
@pytest.mark.parametrize(
    "content, message",
    [
        ("what is <|image_pad|>?", "message 0 has <.image_pad.>"),
        ([{"type": "text", "text": "<|video_pad|>"}], "message 0, part 0: its text has <.video_pad.>"),
        ([{"type": "audio"}], "part 0: a part must be an object of type text, image"),
        ([{"type": "image"}], "needs 'image'"),
        ([{"type": "video"}], "needs 'video'"),
        ([{"type": "video", "video": black((4, 4), (4, 4))}], "needs 'times'"),
    ],
)
def test_wrong_messages(tok, content, message):
    with pytest.raises(ValueError, match=message):
        messages.split([{"role": "user", "content": content}], tok, processor_of("q3"))


def test_wrong_preprocessor_files(tmp_path):
    with pytest.raises(ValueError, match="preprocessor_config.json: no such file"):
        processor.read(tmp_path, VISION["q3"])
    (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 14, "resample": 2}')
    with pytest.raises(ValueError) as caught:
        processor.read(tmp_path, VISION["q3"])
    for part in ("patch_size must be 16, got 14", "resample must be 3, got 2", "must have min_pixels and max_pixels"):
        assert part in str(caught.value)
