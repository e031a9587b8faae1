"""Which tokens the text of earlier conversations was made of.

A reply's tokens need not be those that a tokenizer makes of its text. A snapshot of a conversation holds the tokens
that were written, so the next turn must begin with the very same, or nothing of it can be taken up.
"""

import collections
import threading

from retention_jax.text.tokenizer import Tokenizer

MOST_CHARACTERS = 2**22


class Transcripts:
    """The newest conversations, by their text; from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._lock = tokenizer, threading.Lock()
        self._known: collections.OrderedDict[str, tuple[int, ...]] = collections.OrderedDict()
        self._characters = 0
        self._special = tuple(sorted(tokenizer.special_strings()))

    def remember(self, text: str, tokens: tuple[int, ...]) -> None:
        """A conversation's whole text until a turn's end, and its tokens. The oldest are forgotten for it."""
        if len(text) > MOST_CHARACTERS:
            return
        with self._lock:
            self._characters += 0 if text in self._known else len(text)
            self._known[text] = tokens
            self._known.move_to_end(text)
            while self._characters > MOST_CHARACTERS:
                self._characters -= len(self._known.popitem(last=False)[0])

    def tokens(self, text: str) -> list[int]:
        """Tokens of a rendered conversation: those of the longest one remembered that it goes on from, then the rest.

        It goes on from one where a control token stands at the seam, since no token reaches over that.

        Raises:
          ValueError: as `Tokenizer.encode` does.
        """
        with self._lock:
            fitting = [known for known in self._known if text.startswith(known) and self._seam(text, len(known))]
            start = max(fitting, key=len, default="")
            begun = self._known.get(start, ())
            if start:
                self._known.move_to_end(start)
        if not start:
            return self._tokenizer.encode(text, bos=False)
        rest = text[len(start) :]
        return [*begun, *(self._tokenizer.encode_more(rest) if rest else [])]

    def _seam(self, text: str, at: int) -> bool:
        return text.startswith(self._special, at) or text.endswith(self._special, 0, at) if self._special else False
