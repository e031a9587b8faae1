"""Chat messages with pictures and clips among their text.

Content is a text, or a list of parts in the order in which they are read:

    {"type": "text", "text": ...}
    {"type": "image", "image": ...}      a path, a data URL, a Pillow picture or an array; also under `path` or `url`
    {"type": "image_url", "image_url": {"url": ...}}
    {"type": "video", "video": ...}      a folder of frames with frames.json, or a film; also under `path`
    {"type": "video", "video": [...], "times": [...]}     pictures, and seconds to each; or `fps` in place of `times`
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from retention_jax.text.chat import Message
from retention_jax.text.tokenizer import Tokenizer
from retention_jax.vision import clips, prompt
from retention_jax.vision import processor as processing
from retention_jax.vision.processor import Processor
from retention_jax.vision.prompt import Patches

_PICTURES = ("image", "image_url")


class Split(NamedTuple):
    """Messages as a template takes them, and what its placeholders stand for."""

    messages: list[Message]  # JSON values: pictures and clips are parts that have a type and nothing else
    media: list[Patches]


def split(messages: Sequence[Message], tokenizer: Tokenizer, processor: Processor) -> Split:
    """Opens the pictures and clips of messages.

    Raises:
      ValueError: on parts of another kind, on placeholders in a text, and as `processor.picture`, `processor.clip` and
        `clips.read` do; with the message and the part.
      ImportError: as `clips.read` does.
    """
    marks = prompt.names(tokenizer.backend.id_to_token, processor.vision)[:2]
    plain: list[Message] = []
    media: list[Patches] = []
    for m, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {m} must be an object with a role and content, got {message!r:.60}")
        content = message.get("content")
        if not isinstance(content, list | tuple):
            _check_text(str(content), marks, f"message {m}")
            plain.append(message)
            continue
        parts = []
        for p, part in enumerate(content):
            try:
                shown, found = _opened(part, marks, processor)
            except ValueError as error:
                raise ValueError(f"message {m}, part {p}: {error}") from None
            parts.append(shown)
            media += found
        plain.append({**message, "content": parts})
    return Split(plain, media)


def _opened(part: Any, marks: Sequence[str], processor: Processor) -> tuple[dict[str, Any], list[Patches]]:
    """A part as the template takes it, and the picture or clip that it is, if any."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        _check_text(part["text"], marks, "its text")
        return dict(part), []
    if kind in _PICTURES:
        source = next((part[name] for name in ("image", "image_url", "path", "url") if name in part), None)
        source = source.get("url") if isinstance(source, Mapping) else source
        if source is None:
            raise ValueError(f"a part of type {kind!r} needs 'image': a path, a data URL, a picture or an array")
        return {"type": "image"}, [processing.picture(processor, source)]
    if kind == "video":
        source = part.get("video", part.get("path"))
        if isinstance(source, list | tuple):
            return {"type": "video"}, [processing.clip(processor, clips.of_pictures(source, _times(part, len(source))))]
        if source is None:
            raise ValueError("a part of type 'video' needs 'video': a film, a folder of frames, or a list of pictures")
        return {"type": "video"}, [processing.film(processor, source)]
    raise ValueError(f"a part must be an object of type text, image, image_url or video, got {part!r:.60}")


def _times(part: Mapping[str, Any], count: int) -> list[float]:
    if "times" in part:
        return list(part["times"])
    if not isinstance(fps := part.get("fps"), int | float) or fps <= 0:
        raise ValueError("a list of frames needs 'times', seconds to each, or 'fps'")
    return [i / fps for i in range(count)]


def _check_text(text: str, marks: Sequence[str], where: str) -> None:
    """A placeholder that somebody typed would be read as a picture's."""
    if found := [mark for mark in marks if mark in text]:
        raise ValueError(f"{where} has {found[0]}, which stands for a picture or clip and cannot be text")
