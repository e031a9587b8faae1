"""Runs of sentences from a user's text."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from retention_jax.corpus.words import Rng
from retention_jax.data import sources

_LONGEST = 400  # characters of a piece; longer sentences are cut between words
# A sentence ends here, unless the stop belongs to a title or to an initial.
_END = re.compile(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)(?<!\b[A-Z]\.)[\"'”’)]* +(?=[\"'“‘(]*[A-Z0-9])")
_LOWER = 0.5  # share of a paragraph's letters that are small; headings and tables of contents have fewer


class Piece(NamedTuple):
    """A sentence, or a part of a long one."""

    text: str
    begins: bool  # a paragraph
    ends: bool  # a sentence: something may be said after it


def read(source: str) -> list[Piece]:
    """The prose of a text, in pieces, without headings, tables of contents and line breaks within paragraphs.

    Args:
      source: as `sources.text` reads it.

    Raises:
      ValueError: when it has no prose, and as `sources.text` does.
    """
    pieces = []
    for paragraph in re.split(r"\n\s*\n", sources.text(source)):
        paragraph = " ".join(paragraph.split())
        if _is_prose(paragraph):
            pieces += [p._replace(begins=not i) for i, p in enumerate(_cut(_sentences(paragraph)))]
    if not pieces:
        raise ValueError(f"{source}: has no paragraph that ends like a sentence and is mostly small letters")
    return pieces


def _is_prose(paragraph: str) -> bool:
    ends = paragraph.rstrip("\"'”’)_ ").endswith((".", "!", "?", ":", ";", ",", "-"))
    return ends and sum(map(str.islower, paragraph)) >= _LOWER * sum(map(str.isalpha, paragraph))


def _sentences(paragraph: str) -> list[str]:
    starts = [0, *(match.end() for match in _END.finditer(paragraph)), len(paragraph)]
    return [s for a, b in zip(starts, starts[1:], strict=False) if (s := paragraph[a:b].strip())]


def _cut(sentences: Sequence[str]) -> Iterator[Piece]:
    for sentence in sentences:
        while len(sentence) > _LONGEST and (at := sentence.rfind(" ", 1, _LONGEST)) > 0:
            yield Piece(sentence[:at], False, False)
            sentence = sentence[at + 1 :]
        yield Piece(sentence, False, True)


def split(texts: Sequence[Sequence[Piece]], heldout: float) -> tuple[list[Sequence[Piece]], list[Sequence[Piece]]]:
    """The beginning of every text, and its last part, a share of `heldout`."""
    cuts = [round(len(text) * (1 - heldout)) for text in texts]
    return [t[:cut] for t, cut in zip(texts, cuts, strict=True)], [t[cut:] for t, cut in zip(texts, cuts, strict=True)]


def run(rng: Rng, texts: Sequence[Sequence[Piece]]) -> Iterator[Piece]:
    """Pieces of one text from a random paragraph on, for ever: its beginning follows its end."""
    at = int(rng.integers(sum(map(len, texts))))
    for text in texts:
        if at < len(text):
            break
        at -= len(text)
    while at < len(text) and not text[at].begins:
        at += 1
    while True:
        yield from text[at:]
        at = 0


def join(pieces: Sequence[Piece]) -> str:
    """The pieces as text, with an empty line between paragraphs."""
    text = ""
    for piece in pieces:
        text += ("\n\n" if piece.begins else " ") * bool(text) + piece.text
    return text
