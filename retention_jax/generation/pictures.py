"""Prompts with pictures: from what a processor of `transformers` returns, and from chat messages."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np

from retention_jax.config import VisionConfig
from retention_jax.models import huggingface
from retention_jax.models.decoder import Decoder
from retention_jax.runtime import hub
from retention_jax.text import chat, tokenizer
from retention_jax.text.chat import Message
from retention_jax.text.tokenizer import Tokenizer
from retention_jax.vision import prompt
from retention_jax.vision.prompt import Prompt, text_prompt

_MEDIA = ("image", "image_url", "video")


@overload
def inputs(model: Decoder, rows: Sequence[Mapping[str, Any]], /) -> list[Prompt]: ...
@overload
def inputs(
    model: Decoder,
    rows: None = None,
    /,
    *,
    input_ids: Any,
    pixel_values: Any = None,
    image_grid_thw: Any = None,
    pixel_values_videos: Any = None,
    video_grid_thw: Any = None,
    second_per_grid_ts: Any = None,
) -> Prompt: ...
def inputs(model: Decoder, rows: Sequence[Mapping[str, Any]] | None = None, /, **fields: Any) -> Prompt | list[Prompt]:
    """What a processor of `transformers` returned for one row, as a prompt; or a list of such, each one row.

    Args:
      model: the decoder.
      rows: a batch: the fields below of each row.
      fields: NumPy arrays. `input_ids` [T] or [1, T], without padding; `pixel_values` and `pixel_values_videos`
        [patches, size]; `image_grid_thw` and `video_grid_thw` [n, 3]; `second_per_grid_ts` [n], which clips of
        Qwen2.5-VL need.

    Raises:
      ValueError: on unknown fields, several rows in one, other numbers of patches or placeholders than the grids say,
        and pictures for a model without a tower; with the row.
    """
    if rows is None:
        return _row(model.config.vision, fields)
    found, problems = [], []
    for i, row in enumerate(rows):
        try:
            found.append(_row(model.config.vision, row))
        except ValueError as error:
            problems.append(f"row {i}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return found


def _row(vision: VisionConfig | None, fields: Mapping[str, Any]) -> Prompt:
    known = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    unknown = [name for name in fields if name not in ("input_ids", *known)]
    if unknown or fields.get("input_ids") is None:
        raise ValueError(f"fields are input_ids and perhaps {', '.join(known)}; got {', '.join(fields) or 'none'}")
    ids = np.asarray(fields["input_ids"])
    if ids.shape[:-1] not in ((), (1,)) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"input_ids must be whole numbers of one row, [T] or [1, T], got {ids.dtype} {list(ids.shape)}"
        )
    ids = ids.reshape(-1).astype(np.int32)
    given = {name: np.asarray(fields[name]) for name in known if fields.get(name) is not None}
    if vision is None:
        if given:
            raise ValueError(f"the model has no vision tower, but there are {', '.join(given)}")
        return text_prompt(ids.tolist(), 0)
    pixels, grids = [], []
    for values, shapes in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        found = given.get(values, np.zeros((0, vision.patch_size), np.float32)).astype(np.float32)
        shape = given.get(shapes, np.zeros((0, 3), np.int32)).reshape(-1, 3)
        if found.shape != (count := int(shape.prod(axis=1).sum()), vision.patch_size):
            raise ValueError(
                f"{values} must have the {count} patches that {shapes} says, of {vision.patch_size} numbers, got "
                f"{list(found.shape)}"
            )
        pixels.append(found)
        grids.append([(int(t), int(h), int(w)) for t, h, w in shape])
    pictures, clips = grids
    seconds = given.get("second_per_grid_ts", np.zeros(0)).reshape(-1).tolist()
    return prompt.of_pixels(ids, vision, np.concatenate(pixels), pictures, clips, seconds)


def read_messages(
    folder: str | os.PathLike, messages: Sequence[Message], *, template_kwargs: Mapping[str, Any] | None = None
) -> Prompt:
    """Chat messages before a reply as a prompt, by a checkpoint's template, tokenizer and preprocessor.

    Args:
      folder: of the checkpoint, or its name on the hub.
      messages: content is a text or a list of parts, as `vision/messages.py` describes them.
      template_kwargs: further variables of the template.

    Raises:
      ValueError: when a file of the folder is missing or damaged, a picture or clip cannot be read (with message and
        part), or the model has no tower for them.
      ImportError: for films when PyAV is not installed.
    """
    found = hub.resolve(folder)
    vision = huggingface.read_model_config(found, "float32").vision
    tok = tokenizer.load(found)
    processor = None
    if vision is not None and holds_media(messages):
        from retention_jax.vision import processor as processing  # with Pillow, which text does without

        processor = processing.read(found, vision)
    plain, media = opened(tok, processor, messages)
    text = chat.render(tok, plain, add_generation_prompt=True, template_kwargs=template_kwargs)
    return encoded(tok, vision, text, media)


def holds_media(messages: Sequence[Message]) -> bool:
    """Whether any message has a picture or a clip."""
    contents = [m.get("content") for m in messages if isinstance(m, Mapping)]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    return any(isinstance(part, Mapping) and part.get("type") in _MEDIA for part in parts)


def opened(tok: Tokenizer, processor: Any, messages: Sequence[Message]) -> tuple[list[Message], list[prompt.Patches]]:
    """Messages as a template takes them, and the pictures and clips in them.

    Args:
      tok: of the checkpoint.
      processor: a `vision.processor.Processor`; None where the model has no tower.
      messages: the turns.

    Raises:
      ValueError: as `vision.messages.split` does, and when there are pictures and no processor.
    """
    if processor is None:
        if holds_media(messages):
            raise ValueError("the messages have pictures or clips, but the model has no vision tower")
        return list(messages), []
    from retention_jax.vision import messages as parts  # with Pillow

    return parts.split(messages, tok, processor)


def encoded(
    tok: Tokenizer,
    vision: VisionConfig | None,
    text: str,
    media: Sequence[prompt.Patches],
    *,
    begin: Sequence[int] | None = None,
) -> Prompt:
    """The prompt of a rendered template and its media.

    Args:
      tok: of the checkpoint.
      vision: of the checkpoint.
      text: has one placeholder for each of `media`.
      media: pictures and clips.
      begin: tokens that come first, where the text goes on from an earlier one; None where it stands alone.

    Raises:
      ValueError: as `prompt.expand` and `prompt.assemble` do.
    """
    text = expanded(tok, vision, text, media)
    tokens = tok.encode(text, bos=False) if begin is None else [*begin, *tok.encode_more(text)]
    return prompt.assemble(tokens, media, vision) if vision is not None else text_prompt(tokens, 0)


def expanded(tok: Tokenizer, vision: VisionConfig | None, text: str, media: Sequence[prompt.Patches]) -> str:
    """A rendered template with a placeholder for each feature of its media; arguments and errors as in `encoded`."""
    if vision is None or not media:
        return text
    return prompt.expand(text, media, vision, prompt.names(tok.backend.id_to_token, vision))
