"""Pictures that clients send, as data URLs: what is opened, and how large it may be, before anything is decoded."""

from typing import Any

from PIL import Image

from retention_jax.serving.errors import bad_request
from retention_jax.vision import pixels

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # no others: some of Pillow's readers start programs
MOST_PICTURES = 8  # of one request
MOST_PIXELS = 2**24  # of one picture, as it was sent


def opened(messages: list[dict[str, Any]], *, can_see: bool) -> list[dict[str, Any]]:
    """Messages with their pictures decoded, as `vision.messages` takes them.

    Args:
      messages: content is a text or checked parts, as in `protocol.Message`.
      can_see: whether the model reads pictures.

    Raises:
      ApiError: 400, which names the message.
    """
    found, count = [], 0
    for m, message in enumerate(messages):
        field, parts = f"messages.{m}.content", message.get("content")
        if not isinstance(parts, list):
            found.append(message)
            continue
        if not can_see:
            raise bad_request(f"{field}: this model reads text only; image_url parts are not supported", field)
        count += sum(part["type"] == "image_url" for part in parts)
        if count > MOST_PICTURES:
            raise bad_request(f"{field}: a request may have at most {MOST_PICTURES} pictures", field)
        shown = []
        for p, part in enumerate(parts):
            try:
                url = part["image_url"]["url"] if part["type"] == "image_url" else None
                shown.append(part if url is None else {"type": "image", "image": _picture(url)})
            except ValueError as error:
                raise bad_request(f"{field}: part {p}: {error}", field) from None
        found.append({**message, "content": shown})
    return found


def _picture(url: str) -> Image.Image:
    """The picture in a data URL.

    Raises:
      ValueError: when it is not one of FORMATS in base64, is larger than MOST_PIXELS, or is damaged.
    """
    try:
        picture = Image.open(pixels.of_data_url(url), formats=FORMATS)  # reads the header alone
        if picture.width * picture.height > MOST_PIXELS:
            size = f"{picture.width} x {picture.height}"
            raise ValueError(f"a picture may have at most {MOST_PIXELS:,} pixels, got {size}")
        picture.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"a picture may have at most {MOST_PIXELS:,} pixels") from None
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"cannot be read as a picture of {', '.join(FORMATS)}: {error}"[:200]) from None
    return picture
