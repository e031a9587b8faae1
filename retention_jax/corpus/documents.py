"""Long conversations about a user's text, with facts put in and asked for later; and plain long text.

A conversation hands over one to four passages. Between their sentences, and sometimes in a turn of its own, something
is said that has nothing to do with the text. After a passage, mostly after the last, come questions about it, questions
about what was never said, and other talk.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from retention_jax.corpus import attributes, facts, passages, talk
from retention_jax.corpus.facts import Fact
from retention_jax.corpus.passages import Piece
from retention_jax.corpus.words import Rng, pick, sample
from retention_jax.text.chat import Message

_ATTRIBUTES = (*attributes.PERSONAL, *attributes.OTHER)
_MOST_FACTS = 24
_MOST_ADDED = 0.7  # share of a document that is not text
_LAST = 0.7  # chance that a question waits until the last passage was read
_ASKED = 0.8  # share of the facts that are asked for
_DIRECT = 0.2  # share of what is told in a turn of its own
_LATEST = 0.9  # share of the text after which nothing is told any more


class Lengths(NamedTuple):
    """How long documents are. `of_text` and `of_messages` count in the same unit, characters or tokens."""

    shortest: int
    longest: int
    of_text: Callable[[str], int]
    of_messages: Callable[[list[Message]], int]


class _Told(NamedTuple):
    text: str
    place: float  # share of all text that stands before it
    direct: bool  # in a turn of its own, after the passage that it would have been in


class _Turn(NamedTuple):
    user: str
    assistant: str
    asked: tuple[dict[str, Any], ...] = ()  # what the row says about the questions


class _Plan(NamedTuple):
    """Everything about a conversation but the text."""

    told: list[_Told]  # by place
    ends: list[float]  # share of all text that stands before each passage's end
    wordings: list[str]  # of each passage, with {text}
    first: list[_Turn | None]  # a question that comes with a passage; None: the passage is acknowledged
    acknowledgements: list[str]
    turns: list[list[_Turn]]  # after each passage


def conversation(rng: Rng, texts: Sequence[Sequence[Piece]], lengths: Lengths) -> dict[str, Any]:
    """A row for training: `messages`, and `facts`, what is asked for in them.

    Each of the facts has `kind` ("unsaid" for what was never told), `told`, its texts in order, `question`, `answer`,
    `values`, what a right answer has in it, and `message`, the index of the message that asks.
    """
    target = int(rng.integers(lengths.shortest, lengths.longest + 1))
    plan = _plan(rng, target, lengths)
    while lengths.of_messages(_write(plan, [])[0]) > _MOST_ADDED * target:
        plan = _plan(rng, target, lengths)
    pieces = _filled(rng, texts, lengths, target, lambda pieces: lengths.of_messages(_write(plan, pieces)[0]))
    messages, asked = _write(plan, pieces)
    return {"messages": messages, "facts": asked}


def text(rng: Rng, texts: Sequence[Sequence[Piece]], lengths: Lengths) -> dict[str, Any]:
    """A row for training with a run of a text: `text`."""
    target = int(rng.integers(lengths.shortest, lengths.longest + 1))
    pieces = _filled(rng, texts, lengths, target, lambda pieces: lengths.of_text(passages.join(pieces)))
    return {"text": passages.join(pieces)}


def _filled(
    rng: Rng,
    texts: Sequence[Sequence[Piece]],
    lengths: Lengths,
    target: int,
    size_with: Callable[[list[Piece]], int],
) -> list[Piece]:
    """As many pieces of a text as bring a document to its target, and no further than to the longest."""
    pieces: list[Piece] = []
    source, size = passages.run(rng, texts), size_with([])
    while size < target:
        while size < target:  # about: pieces that are joined may have fewer tokens
            pieces.append(next(source))
            size += lengths.of_text(f" {pieces[-1].text}")
        size = size_with(pieces)
    while size_with(pieces) > lengths.longest:
        words = pieces[-1].text.rpartition(" ")[0]
        pieces[-1:] = [pieces[-1]._replace(text=words, ends=False)] * bool(words)
    return pieces


def _plan(rng: Rng, target: int, lengths: Lengths) -> _Plan:
    known = sample(rng, _ATTRIBUTES, int(rng.integers(2, 10)))  # few kinds: many facts are of the same kind
    cost = lambda *texts: lengths.of_text(" ".join(texts))
    left = rng.uniform(0.1, 0.45) * target
    drawn: list[Fact] = []
    while len(drawn) < _MOST_FACTS:
        fact = _other_than(rng, known, drawn)
        left -= cost(*fact.told, fact.question, fact.answer)
        if drawn and left < 0:
            break
        drawn.append(fact)

    sentences = target / max(cost(talk.READ[0] * 5), 1)  # of some 75 characters
    count = int(rng.integers(1, 1 + min(max(int(sentences / 8), 1), 4)))
    ends = [*sorted(rng.uniform(0.15, 0.85, count - 1).tolist()), 1.0]
    told: list[_Told] = []
    turns: list[list[_Turn]] = [[] for _ in ends]
    for fact in drawn:
        places = sorted(rng.uniform(0, _LATEST, len(fact.told)).tolist())
        spoken = -1  # the passage after which something was last told in a turn of its own
        for words, place in zip(fact.told, places, strict=True):
            at = _passage(ends, place)
            may_be = "\n" not in words and at < count - 1
            # What follows it in order must not stand in the passage before it.
            direct = may_be and (at == spoken or rng.random() < _DIRECT)
            spoken = at if direct else spoken
            told.append(_Told(_with_lead(rng, words, direct), place, direct))
        last = max(_passage(ends, places[-1]), spoken + 1)  # what was just said is not asked for at once
        if fact is drawn[0] or rng.random() < _ASKED:
            when = count - 1 if rng.random() < _LAST else int(rng.integers(last, count))
            turns[when].append(_question(fact.kind, fact, fact.told, fact.answer, fact.values))
    for _ in range(rng.binomial(3, 0.35)):
        fact = _other_than(rng, known, drawn)
        drawn.append(fact)
        turns[count - 1 if rng.random() < _LAST else 0].append(_question("unsaid", fact, (), fact.denial, ()))
    said: set[str] = set()
    for after in turns:
        for _ in range(rng.integers(0, 3 if sentences > 8 * count else 2)):
            user, assistant = talk.other(rng)
            if user not in said:  # nobody says the same thing twice
                said.add(user)
                after.append(_Turn(user, assistant))
    turns = [_some_joined(rng, [after[i] for i in rng.permutation(len(after))]) for after in turns]
    return _Plan(
        told=sorted(told, key=lambda t: t.place),
        ends=ends,
        wordings=[pick(rng, talk.NEXT if i else talk.FIRST) for i in range(count)],
        first=[after.pop(0) if after and after[0].asked and rng.random() < 0.35 else None for after in turns],
        acknowledgements=[pick(rng, talk.READ) for _ in ends],
        turns=turns,
    )


def _other_than(rng: Rng, known: Sequence[attributes.Attribute], drawn: Sequence[Fact]) -> Fact:
    """A fact about nothing and nobody that the drawn ones are about."""
    taken = {subject for fact in drawn for subject in fact.subjects}
    while taken & set((fact := facts.draw(rng, known)).subjects):
        pass
    return fact


def _passage(ends: Sequence[float], place: float) -> int:
    return sum(place >= end for end in ends)


def _with_lead(rng: Rng, told: str, direct: bool) -> str:
    if "\n" in told or told.startswith(talk.OPENINGS):
        return told
    return pick(rng, talk.BY_THE_WAY if direct else talk.LEADS).format(told)


def _question(kind: str, fact: Fact, told: Sequence[str], answer: str, values: Sequence[str]) -> _Turn:
    about = {
        "kind": kind,
        "told": list(told),
        "question": fact.question,
        "answer": answer,
        "values": list(values),
    }
    return _Turn(fact.question, answer, (about,))


def _some_joined(rng: Rng, turns: list[_Turn]) -> list[_Turn]:
    """With one question or another put together with the one before it."""
    joined: list[_Turn] = []
    for turn in turns:
        before = joined[-1] if joined else None
        if before and _told_once(before) and _told_once(turn) and rng.random() < 0.25:
            joined.pop()
            user = pick(rng, talk.TWO).format(before.user, turn.user)
            turn = _Turn(user, f"{before.assistant} {turn.assistant}", before.asked + turn.asked)
        joined.append(turn)
    return joined


def _told_once(turn: _Turn) -> bool:
    """Whether a turn asks one question, whose answer was told."""
    return len(turn.asked) == 1 and bool(turn.asked[0]["told"])


def _write(plan: _Plan, pieces: Sequence[Piece]) -> tuple[list[Message], list[dict[str, Any]]]:
    """The messages, with these pieces of text in them, and what is asked for, with the messages that ask."""
    messages: list[Message] = []
    asked: list[dict[str, Any]] = []

    def say(turn: _Turn) -> None:
        asked.extend({**about, "message": len(messages)} for about in turn.asked)
        messages.extend(({"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.assistant}))

    begin = 0.0
    for i, end in enumerate(plan.ends):
        inside = [t for t in plan.told if begin <= t.place < end]
        own = pieces[int(begin * len(pieces)) : int(end * len(pieces))]
        within = [(t.text, (t.place - begin) / (end - begin)) for t in inside if not t.direct]
        passage, first = _mixed(own, within), plan.first[i]
        handed_over = plan.wordings[i].replace("{text}", passage)
        if first is not None:
            say(first._replace(user=f"{handed_over}\n\n{first.user}" if passage else first.user))
        elif passage:
            say(_Turn(handed_over, plan.acknowledgements[i]))
        for number, t in enumerate(t for t in inside if t.direct):
            say(_Turn(t.text, talk.NOTED[(i + number) % len(talk.NOTED)]))
        for turn in plan.turns[i]:
            say(turn)
        begin = end
    return messages, asked


def _mixed(pieces: Sequence[Piece], told: Sequence[tuple[str, float]]) -> str:
    """A passage with things told after the sentences that have these shares of it before them."""
    gaps = [0, *(i + 1 for i, piece in enumerate(pieces) if piece.ends)]
    added: dict[int, list[str]] = {}
    for words, share in told:
        gap = gaps[min(int(share * len(gaps)), len(gaps) - 1)]
        added.setdefault(gap, []).append(words)
    parts: list[Piece] = []

    def add(piece: Piece, begins: bool) -> None:
        """What has lines of its own stands alone; what follows it begins a paragraph."""
        alone = "\n" in piece.text or (bool(parts) and "\n" in parts[-1].text)
        parts.append(piece._replace(begins=begins or alone))

    for i in range(len(pieces) + 1):
        between = i == len(pieces) or pieces[i].begins
        for words in added.get(i, ()):
            add(Piece(words, begins=False, ends=True), between)
        if i < len(pieces):
            add(pieces[i], pieces[i].begins)
    return passages.join(parts)
