"""Facts of many kinds: what is told, what is asked for later, and the answer.

one        a thing has a value                     profile    several things about one person, one is asked for
changed    a value that changes; the last counts   chain      a value that is found over two or three steps
several    several values, all asked for           handed     a thing goes from hand to hand; who has it last?
table      a cell of a small table                 listing    an entry of a list
votes      what has the most votes
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from retention_jax.corpus import attributes, words
from retention_jax.corpus.attributes import Attribute, capital, fill
from retention_jax.corpus.words import Rng, digits, pick, sample


class Fact(NamedTuple):
    """Something to tell and to ask for. `denial` answers the question where nothing of it was told."""

    kind: str
    subjects: tuple[str, ...]  # whom and what it is about; no other fact of a document may be about them
    told: tuple[str, ...]  # in this order, at one or several places
    question: str
    answer: str
    values: tuple[str, ...]  # what a right answer has in it
    denial: str


NOT_SAID = (
    "That was not mentioned.",
    "Nothing that you gave me says that.",
    "I cannot find that anywhere in what you gave me.",
    "I do not know. It was not mentioned.",
    "You have not told me that.",
)


def draw(rng: Rng, known: Sequence[Attribute]) -> Fact:
    """A fact of any kind. Those about a single value are about one of the `known` attributes."""
    kind = rng.choice(len(_KINDS), p=[share for _, share in _KINDS])
    return _KINDS[kind][0](rng, pick(rng, known))


def one(rng: Rng, attribute: Attribute) -> Fact:
    return _attribute_fact(rng, "one", attribute, 1)


def changed(rng: Rng, attribute: Attribute) -> Fact:
    return _attribute_fact(rng, "changed", attribute, int(rng.integers(2, 4)))


def _attribute_fact(rng: Rng, kind: str, attribute: Attribute, count: int) -> Fact:
    what = attribute.what(rng)
    values = _apart(lambda: attribute.value(rng), count, what)
    told = [_tell(rng, attribute, what, values[0])]
    told += [fill(pick(rng, attributes.CHANGED), attribute, what, value) for value in values[1:]]
    asked = (*attributes.ASKED, *attribute.asked * 2)
    if count > 1:
        asked += attributes.ASKED_AFTER_CHANGES
    return Fact(
        kind=kind,
        subjects=(what,),
        told=tuple(told),
        question=fill(pick(rng, asked), attribute, what),
        answer=_answer(rng, attribute, what, values[-1]),
        values=(values[-1],),
        denial=_denial(rng, attribute, what),
    )


def _tell(rng: Rng, attribute: Attribute, what: str, value: str) -> str:
    return fill(pick(rng, (*attributes.TOLD, *attribute.told * 2)), attribute, what, value)


def _answer(rng: Rng, attribute: Attribute, what: str, value: str) -> str:
    return attributes.to_the_user(fill(pick(rng, (*attributes.ANSWERED, *attribute.answered)), attribute, what, value))


def _denial(rng: Rng, attribute: Attribute, what: str) -> str:
    about = attributes.to_the_user(fill(pick(rng, attributes.NOT_SAID), attribute, what))
    return pick(rng, (about, about, pick(rng, NOT_SAID)))


def profile(rng: Rng, attribute: Attribute) -> Fact:
    """Two or three attributes of one person, one of which is asked for. Which ones does not depend on `attribute`."""
    who = words.somebody(rng)
    about = sample(rng, attributes.PERSONAL, int(rng.integers(2, 4)))
    values = [a.value(rng) for a in about]
    asked = int(rng.integers(len(about)))
    return Fact(
        kind="profile",
        subjects=(who,),
        told=tuple(_tell(rng, a, who, value) for a, value in zip(about, values, strict=True)),
        question=fill(pick(rng, (*attributes.ASKED, *about[asked].asked * 2)), about[asked], who),
        answer=_answer(rng, about[asked], who, values[asked]),
        values=(values[asked],),
        denial=_denial(rng, about[asked], who),
    )


class _Collection(NamedTuple):
    what: Callable[[Rng], str]
    value: Callable[[Rng], str]
    told: tuple[str, ...]  # of `what` and one `value`
    asked: tuple[str, ...]
    answered: str  # of `what` and all `values`


_COLLECTIONS = (
    _Collection(
        words.somebody,
        lambda rng: pick(rng, words.ERRANDS),
        ("{What} needs {value} from the market.", "From the market {what} wants {value}.", "Get {value} for {what}."),
        ("What does {what} need from the market? Name everything.", "What do I have to get for {what}?"),
        "{What} needs {values}.",
    ),
    _Collection(
        lambda rng: pick(rng, words.EVENTS),
        words.person,
        (
            "{value} will come to the {what}.",
            "{value} has a ticket for the {what}.",
            "The {what} has a new guest: {value}.",
        ),
        ("Who will come to the {what}?", "Name all guests of the {what}.", "Whom do we expect at the {what}?"),
        "These will come to the {what}: {values}.",
    ),
    _Collection(
        lambda rng: f"bus {rng.integers(2, 99)}",
        lambda rng: pick(rng, words.TOWNS),
        ("{What} stops in {value}.", "You can take {what} to {value}.", "There is a stop of {what} in {value}."),
        ("Where does {what} stop?", "Which towns does {what} go to?", "List the stops of {what}."),
        "{What} stops in {values}.",
    ),
    _Collection(
        lambda rng: pick(rng, words.PARTS_OF_BUILDINGS),
        words.code,
        (
            "{value} is a code that opens the {what}.",
            "The {what} opens with {value}.",
            "{value} works for the {what} as well.",
        ),
        ("Which codes open the {what}?", "Give me every code that works for the {what}."),
        "The {what} opens with {values}.",
    ),
    _Collection(
        lambda rng: f"{pick(rng, words.QUALITIES)} {pick(rng, words.CONTAINERS)}",
        words.thing,
        (
            "The {value} went into the {what}.",
            "I put the {value} into the {what}.",
            "The {what} also holds the {value}.",
        ),
        ("What is in the {what}?", "What did we put into the {what}? List everything."),
        "The {what} holds these: {values}.",
    ),
    _Collection(
        lambda rng: pick(rng, words.PROJECTS),
        words.person,
        ("{value} has joined the {what}.", "{value} works on the {what}.", "The {what} is partly the work of {value}."),
        ("Who works on the {what}?", "Name everybody who has a part in the {what}."),
        "{values} work on the {what}.",
    ),
)


def several(rng: Rng, attribute: Attribute) -> Fact:
    """Values of one thing, told one by one."""
    kind = pick(rng, _COLLECTIONS)
    what = kind.what(rng)
    values = _apart(lambda: kind.value(rng), int(rng.integers(2, 5)), what)
    put = lambda template, **more: capital(template.format(what=what, What=capital(what), **more))
    return Fact(
        kind="several",
        subjects=(what,),
        told=tuple(put(pick(rng, kind.told), value=value) for value in values),
        question=put(pick(rng, kind.asked)),
        answer=attributes.to_the_user(put(kind.answered, values=_and(values))),
        values=tuple(values),
        denial=pick(rng, NOT_SAID),
    )


def chain(rng: Rng, attribute: Attribute) -> Fact:
    """Dials that show the same number as others, or people who sit where others sit."""
    hops = int(rng.integers(2, 4))
    if rng.random() < 0.5:
        names = [f"dial {name}" for name in _apart(lambda: words.letters(rng, 1) + digits(rng, 1), hops)]
        value = digits(rng, 3)
        told = [f"{capital(names[0])} shows {value}."]
        told += [
            pick(rng, (f"{capital(b)} shows the same as {a}.", f"{capital(b)} is wired to {a} and copies its number."))
            for a, b in zip(names, names[1:], strict=False)
        ]
        if rng.random() < 0.5:
            question, values = f"Which dials show {value}?", tuple(names)
            answer = f"{capital(_and(names))} show {value}."
        else:
            question, values = f"What does {names[-1]} show?", (value,)
            answer = f"{capital(names[-1])} shows {value}."
    else:
        names, value = _apart(lambda: words.person(rng), hops), f"table {rng.integers(2, 60)}"
        told = [f"{names[0]} sits at {value}."]
        told += [
            pick(rng, (f"{b} sits at the same table as {a}.", f"{b} was put at the table where {a} sits."))
            for a, b in zip(names, names[1:], strict=False)
        ]
        question = pick(rng, (f"Where does {names[-1]} sit?", f"At which table do I find {names[-1]}?"))
        answer, values = f"{names[-1]} sits at {value}.", (value,)
    order = rng.permutation(len(told))
    return Fact("chain", (*names, value), tuple(told[i] for i in order), question, answer, values, pick(rng, NOT_SAID))


def handed(rng: Rng, attribute: Attribute) -> Fact:
    """A thing that goes from hand to hand."""
    what = words.thing(rng)
    people = _apart(lambda: words.person(rng), int(rng.integers(2, 5)))
    told = [pick(rng, (f"{people[0]} has the {what}.", f"{people[0]} brought the {what} along."))]
    told += [
        pick(rng, (f"{a} gave the {what} to {b}.", f"{b} took the {what} from {a}.", f"{a} lent the {what} to {b}."))
        for a, b in zip(people, people[1:], strict=False)
    ]
    return Fact(
        kind="handed",
        subjects=(what, *people),
        told=tuple(told),
        question=pick(
            rng, (f"Who has the {what} now?", f"With whom is the {what} at the end?", f"Who had the {what} last?")
        ),
        answer=f"{people[-1]} has the {what}.",
        values=(people[-1],),
        denial=pick(rng, NOT_SAID),
    )


def table(rng: Rng, attribute: Attribute) -> Fact:
    """People and what belongs to them, in one of three layouts."""
    columns = {
        "Room": lambda: f"{pick(rng, 'ABCDEF')}{digits(rng, 2)}",
        "Day": lambda: pick(rng, words.WEEKDAYS),
        "Town": lambda: pick(rng, words.TOWNS),
        "Badge": lambda: digits(rng, 4),
        "Fee": lambda: f"{rng.integers(5, 400)}",
        "Shift": lambda: f"{words.clock(rng)}",
        "Team": lambda: pick(rng, words.CODE_NAMES),
    }
    names = sample(rng, list(columns), int(rng.integers(2, 4)))
    people = _apart(lambda: words.person(rng), int(rng.integers(3, 7)))
    rows = [[who, *(columns[name]() for name in names)] for who in people]
    header = ["Name", *names]
    match rng.integers(3):
        case 0:
            shown = "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])
        case 1:
            shown = "\n".join(", ".join(row) for row in [header, *rows])
        case _:
            pairs = [[f"{name}: {cell}" for name, cell in zip(header, row, strict=True)] for row in rows]
            shown = "\n".join("; ".join(row) for row in pairs)
    row, column = int(rng.integers(len(rows))), int(rng.integers(len(names)))
    who, name, cell = people[row], names[column].lower(), rows[row][column + 1]
    return Fact(
        kind="table",
        subjects=tuple(people),
        told=(shown,),
        question=pick(
            rng,
            (
                f"Which {name} does the table give for {who}?",
                f"According to the table, what is the {name} of {who}?",
                f"What does the row of {who} say under {name}?",
            ),
        ),
        answer=pick(rng, (f"The {name} of {who} is {cell}.", f"{capital(name)}: {cell}.")),
        values=(cell,),
        denial=pick(rng, ("That is not in the table.", f"The table has no {name} of {who}.", *NOT_SAID)),
    )


_LISTINGS: tuple[tuple[str, Callable[[Rng], str], Callable[[Rng], str], tuple[str, ...], str], ...] = (
    (
        "Price list",
        words.thing,
        words.price,
        ("What does the {key} cost on the price list?", "Which price is given for the {key}?"),
        "The {key} costs {value}.",
    ),
    (
        "Extensions",
        words.person,
        lambda rng: digits(rng, 3),
        ("Which extension does {key} have?", "Under which extension do I get {key}?"),
        "{key} has extension {value}.",
    ),
    (
        "Keys on the board",
        lambda rng: pick(rng, words.PARTS_OF_BUILDINGS),
        lambda rng: f"hook {rng.integers(2, 80)}",
        ("On which hook is the key of the {key}?", "Where does the key of the {key} hang?"),
        "It hangs on {value}.",
    ),
    (
        "Duties",
        lambda rng: pick(rng, words.DEPARTMENTS),
        words.person,
        ("Who is on duty in {key}?", "Whose duty is {key} on the list?"),
        "{value} is on duty in {key}.",
    ),
    (
        "settings:",
        lambda rng: pick(rng, words.CODE_NAMES).lower().replace(" ", "_"),
        lambda rng: pick(rng, (digits(rng, 2), digits(rng, 4), pick(rng, words.PASSWORD_WORDS))),
        ("What is {key} set to?", "Which value does {key} have in the settings?"),
        "{key} is set to {value}.",
    ),
)


def listing(rng: Rng, attribute: Attribute) -> Fact:
    """An entry of a list of names and values."""
    title, key, value, asked, answered = pick(rng, _LISTINGS)
    keys = _apart(lambda: key(rng), int(rng.integers(3, 8)))
    values = _apart(lambda: value(rng), len(keys))
    mark = pick(rng, ("- ", "* ", "", "  "))
    shown = "\n".join([title, *(f"{mark}{k}: {v}" for k, v in zip(keys, values, strict=True))])
    i = int(rng.integers(len(keys)))
    return Fact(
        kind="listing",
        subjects=tuple(keys),
        told=(shown,),
        question=pick(rng, asked).format(key=keys[i]),
        answer=answered.format(key=keys[i], value=values[i]),
        values=(values[i],),
        denial=pick(rng, ("That is not on the list.", *NOT_SAID)),
    )


def votes(rng: Rng, attribute: Attribute) -> Fact:
    """Votes one after the other; one choice has more than any other."""
    choices = sample(rng, words.VOTES, int(rng.integers(3, 6)))
    most = int(rng.integers(3, 6))
    cast = [choices[0]] * most + [c for c in choices[1:] for _ in range(rng.integers(1, most))]
    event = pick(rng, words.EVENTS)
    told = ", ".join(cast[i] for i in rng.permutation(len(cast)))
    return Fact(
        kind="votes",
        subjects=(event, *choices),
        told=(f"What people would rather do than go to the {event}, vote by vote: {told}.",),
        question=f"Which choice got the most votes of those who did not want the {event}?",
        answer=f"Most votes went to: {choices[0]}.",
        values=(choices[0],),
        denial=pick(rng, NOT_SAID),
    )


_KINDS = (
    (one, 0.4),
    (changed, 0.15),
    (profile, 0.1),
    (several, 0.1),
    (chain, 0.05),
    (handed, 0.05),
    (table, 0.06),
    (listing, 0.06),
    (votes, 0.03),
)


def _apart(draw_value: Callable[[], str], count: int, context: str = "") -> list[str]:
    """Values none of which is part of another one or of `context`, so that an answer can be told from a wrong one."""
    found: list[str] = []
    while len(found) < count:
        value = draw_value()
        if value not in context and not any(value in other or other in value for other in found):
            found.append(value)
    return found


def _and(values: Sequence[str]) -> str:
    return ", ".join(values[:-1]) + f" and {values[-1]}"
