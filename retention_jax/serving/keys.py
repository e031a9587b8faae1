"""API keys: who may ask."""

import hashlib
import hmac
import pathlib
from typing import NamedTuple


class Keys(NamedTuple):
    """Keys by their SHA-256. Comparing takes the same time whichever key is given, and however much of it is right."""

    digests: tuple[bytes, ...]

    def allow(self, authorization: str | None) -> bool:
        """Whether an Authorization header has one of the keys as its bearer token."""
        kind, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        found = [hmac.compare_digest(given, digest) for digest in self.digests]
        return kind.lower() == "bearer" and any(found)


def read(path: pathlib.Path) -> Keys:
    """The keys of a file, one a line; empty lines and lines that begin with # do not count.

    Raises:
      ValueError: when there is none, or a line has a space or what is not ASCII in it, as no header could say it.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    keys = [(i, line) for i, line in enumerate(lines, 1) if line and not line.startswith("#")]
    if bad := [i for i, key in keys if not key.isascii() or len(key.split()) != 1]:
        raise ValueError(f"{path}: line {bad[0]}: a key must be of ASCII characters without spaces")
    if not keys:
        raise ValueError(f"{path}: has no keys")
    return Keys(tuple(_digest(key) for _, key in keys))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
