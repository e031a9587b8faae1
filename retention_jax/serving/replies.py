"""One sequence's text as it comes: whole characters, cut at the first stop string, with the tokens that it is of."""

from collections.abc import Sequence
from typing import NamedTuple

from retention_jax.serving.requests import Kept, Piece, Usage
from retention_jax.text.tokenizer import Tokenizer


class Token(NamedTuple):
    """A token that was read or written."""

    id: int
    logprob: float | None  # natural; None where nobody asked, and for a prompt's first token
    top: list[tuple[int, float]]  # the likeliest in its place
    start: int  # where its text begins, in characters of the reply


class Delta(NamedTuple):
    """What is new of a reply."""

    text: str
    tokens: list[Token]


class Reply:
    """Takes in the pieces of one sequence.

    Text that could be the beginning of a stop string is held back, until it is one or is not; so is half a character.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._more, self._stops = tokenizer.stream(), stops
        self._held, self._held_tokens = "", []  # not yet given
        self._shown = 0  # characters given
        self.written: list[int] = []  # all tokens, and to the end of a stop string
        self.all_tokens: list[int] = []  # with those that the engine wrote behind that
        self.text = ""  # all that was given
        self.ended = False  # nothing more will be written
        self.finish = ""  # why: stop, length; or how the engine gave up: cancelled, deadline, error
        self.end: Token | None = None  # the stop token that ended it
        self.stopped_by_text = False
        self.prompt: list[tuple[float, list[tuple[int, float]]]] | None = None
        self.usage: Usage | None = None  # with the last piece
        self.kept: Kept | None = None

    def take(self, piece: Piece) -> Delta:
        """What can be shown now. Where it has ended before the last piece, the engine must be told to cancel."""
        self.prompt = self.prompt or piece.prompt
        self.all_tokens += piece.tokens
        for i, token in enumerate(piece.tokens):
            if self.ended:
                break
            logprob = piece.logprobs[i] if piece.logprobs else None
            shown = Token(token, logprob, piece.top[i] if piece.top else [], self._shown + len(self._held))
            self.written.append(token)
            if piece.finish == "stop" and i == len(piece.tokens) - 1:
                self.end = shown
            else:
                self._held_tokens.append(shown)
                self._add(self._more([token]))
        if piece.finish:
            self.usage, self.kept = piece.usage, piece.kept
            if not self.ended:
                self._add(self._more([], end=True))
            if not self.ended:
                self.ended, self.finish = True, piece.finish
        return self._give()

    def _add(self, text: str) -> None:
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            cut = min(found)[0]
            self._held = self._held[:cut]
            self._held_tokens = [t for t in self._held_tokens if t.start < self._shown + cut]
            self.ended, self.finish, self.stopped_by_text = True, "stop", True

    def _give(self) -> Delta:
        """Everything, once the reply has ended; before, all but what may begin a stop string."""
        free = len(self._held)
        if not self.ended:
            free -= max((_overlap(self._held, stop) for stop in self._stops), default=0)
        text, self._held = self._held[:free], self._held[free:]
        self._shown, self.text = self._shown + len(text), self.text + text
        # A token goes with its last character; where its text began is known, where it ends is where the next begins.
        ends = [t.start for t in self._held_tokens[1:]] + [self._shown + len(self._held)]
        count = len(ends) if self.ended else sum(end <= self._shown for end in ends)
        tokens, self._held_tokens = self._held_tokens[:count], self._held_tokens[count:]
        return Delta(text, tokens)


def _overlap(text: str, stop: str) -> int:
    """The longest end of a text that is a beginning of the stop string, and not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
