"""JSON bytes of what is sent."""

import json
from typing import Any


def dump(value: Any) -> bytes:
    """Compact UTF-8. Half of a surrogate pair, which UTF-8 cannot hold, becomes its JSON escape.

    Raises:
      ValueError: on NaN and infinity, which JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")
