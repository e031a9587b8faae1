"""What a single token stands for, for lists of tokens with their probabilities."""

import functools
import json
from collections.abc import Callable
from typing import NamedTuple

from retention_jax.text.tokenizer import Tokenizer


class TokenText(NamedTuple):
    """Of a token id: its bytes, which may be a part of a character, and a text."""

    bytes: Callable[[int], bytes]
    text: Callable[[int], str]  # `bytes:\\xe4` where the bytes are no text by themselves, as in OpenAI's


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes with, as GPT-2 began it."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def of(tokenizer: Tokenizer) -> TokenText:
    """Reads the tokenizer's decoder once."""
    backend = tokenizer.backend
    byte_level = '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"])
    added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
    alphabet = _byte_alphabet()

    @functools.lru_cache(maxsize=2**16)
    def of_bytes(token: int) -> bytes:
        if token in added:
            return added[token].encode()
        name = backend.id_to_token(token)
        if name is None:  # a row of the model behind the vocabulary
            return b""
        if byte_level and all(c in alphabet for c in name):
            return bytes(alphabet[c] for c in name)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        return name.replace("\u2581", " ").encode()

    @functools.lru_cache(maxsize=2**16)
    def of_text(token: int) -> str:
        raw = of_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)

    return TokenText(of_bytes, of_text)
