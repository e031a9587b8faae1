"""Things that have one value: what they are called, how they are told, asked for and answered.

Wordings are templates of `topic`, what is asked for; `what`, whom or what it is about; and `value`. In capitals,
`Topic` and `What`, they begin a sentence.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from retention_jax.corpus import words
from retention_jax.corpus.words import Rng, digits, pick


class Attribute(NamedTuple):
    name: str
    topic: str
    what: Callable[[Rng], str]
    value: Callable[[Rng], str]
    told: tuple[str, ...]  # these, and the ones that fit all attributes
    asked: tuple[str, ...]
    answered: tuple[str, ...] = ()


TOLD = (
    "{Topic} is {value}.",
    "Please remember that {topic} is {value}.",
    "For the record, {topic} is {value}.",
    "Write this down: {topic} is {value}.",
    "It is worth knowing that {topic} is {value}.",
    "I checked, and {topic} is {value}.",
    "There is a note here which says that {topic} is {value}.",
    "{Topic}: {value}.",
)
CHANGED = (
    "Correction: {topic} is {value}, not what I said before.",
    "{Topic} has changed and is now {value}.",
    "From now on {topic} is {value}; forget the old one.",
    "An update: {topic} is now {value}.",
    "I was wrong earlier. {Topic} is {value}.",
)
ASKED = (
    "What is {topic}?",
    "Can you tell me {topic}?",
    "Do you remember {topic}?",
    "Remind me of {topic}, please.",
    "I have forgotten {topic}. What is it?",
    "What was {topic} again?",
    "Please look up {topic} for me.",
    "I need {topic}.",
)
ASKED_AFTER_CHANGES = (
    "What is {topic} now?",
    "What is {topic}, after all the changes?",
    "What is the latest on {topic}?",
    "It was changed at some point, so what is {topic} at the moment?",
)
ANSWERED = ("{Topic} is {value}.", "{Topic} is {value}.", "It is {value}.", "{value}.")
NOT_SAID = (
    "{Topic} was not mentioned.",
    "I do not know {topic}, because it was not mentioned.",
    "You have not told me {topic}.",
    "Nothing so far says what {topic} is.",
    "I cannot find {topic} in what you gave me.",
)


def _room(rng: Rng) -> str:
    return pick(
        rng,
        (f"room {digits(rng, 3)}", f"hall {pick(rng, 'ABCDEFGH')}", f"room {pick(rng, 'ABCDEFGH')}{digits(rng, 2)}"),
    )


def _mail(rng: Rng) -> str:
    first, second = words.sample(rng, words.PASSWORD_WORDS, 2)
    return f"{first}.{second}{digits(rng, 1)}@{pick(rng, ('example.org', 'example.com', 'mail.example'))}"


def _of(options: tuple[str, ...], template: str = "{}") -> Callable[[Rng], str]:
    return lambda rng: template.format(pick(rng, options))


def _number(least: int, most: int, template: str = "{}") -> Callable[[Rng], str]:
    return lambda rng: template.format(rng.integers(least, most))


_door, _event, _project = _of(words.PARTS_OF_BUILDINGS), _of(words.EVENTS), _of(words.PROJECTS)


def _route(rng: Rng) -> str:
    return " to ".join(words.sample(rng, words.TOWNS, 2))


def _contents(rng: Rng) -> str:
    return f"{pick(rng, words.CONTENTS)} in the {pick(rng, words.QUALITIES)} {pick(rng, words.CONTAINERS)}"


PERSONAL = (
    Attribute(
        "phone", "{what}'s phone number", words.somebody, words.phone,
        ("To reach {what}, call {value}.", "Call {what} at {value}.", "In an emergency, ring {what} on {value}."),
        ("Which number do I call to reach {what}?", "How can I reach {what} by phone?"),
        ("You can reach {what} at {value}.",),
    ),
    Attribute(
        "birthday", "{what}'s birthday", words.somebody, words.day,
        ("{What} was born on {value}.", "We celebrate {what} every year on {value}."),
        ("When was {what} born?", "On which day do we celebrate {what}?"),
        ("{What} was born on {value}.",),
    ),
    Attribute(
        "home", "the town where {what} lives", words.somebody, _of(words.TOWNS),
        ("{What} lives in {value}.", "{What} has moved to {value}.", "{What} has a small flat in {value}."),
        ("Where does {what} live?", "In which town does {what} live?"),
        ("{What} lives in {value}.",),
    ),
    Attribute(
        "allergy", "the food that {what} is allergic to", words.somebody, _of(words.FOODS),
        ("{What} is allergic to {value}.", "Careful: {what} must not eat {value}.", "{What} gets a rash from {value}."),
        ("What is {what} allergic to?", "Which food must {what} avoid?", "Is there anything that {what} must not eat?"),
        ("{What} is allergic to {value}.", "{What} must not eat {value}."),
    ),
    Attribute(
        "job", "{what}'s profession", words.somebody, _of(words.JOBS),
        ("{What} works as a {value}.", "By trade {what} is a {value}.", "{What} trained to be a {value}."),
        ("What does {what} do for a living?", "What kind of work does {what} do?"),
        ("{What} works as a {value}.",),
    ),
    Attribute(
        "seat", "{what}'s seat", words.somebody, lambda rng: f"{rng.integers(1, 40)}{pick(rng, 'ABCDEF')}",
        ("{What} sits in {value}.", "{What} has a ticket for seat {value}."),
        ("Where does {what} sit?", "Which seat does {what} have?"),
        ("{What} sits in {value}.",),
    ),
    Attribute(
        "car", "the number plate of {what}'s car", words.somebody,
        lambda rng: f"{words.letters(rng, 2)} {digits(rng, 2)} {words.letters(rng, 3)}",
        ("{What} drives the car with the plate {value}.", "The car marked {value} belongs to {what}."),
        ("Which number plate does {what}'s car have?",),
    ),
    Attribute(
        "mail", "{what}'s e-mail address", words.somebody, _mail,
        ("Letters to {what} go to {value}.", "{What} answers mail at {value}."),
        ("Where do I send an e-mail to {what}?",),
    ),
    Attribute(
        "language", "{what}'s mother tongue", words.somebody, _of(words.LANGUAGES),
        ("{What} grew up speaking {value}.", "At home {what} speaks {value}."),
        ("Which language does {what} speak at home?", "Which language did {what} grow up with?"),
        ("{What} grew up speaking {value}.",),
    ),
    Attribute(
        "locker", "{what}'s locker number", words.somebody, _number(100, 1000),
        ("{What} has been given locker {value}.", "{What} keeps the boots in locker {value}."),
        ("Which locker does {what} have?",),
        ("{What} has locker {value}.",),
    ),
    *(
        Attribute(
            f"favourite_{name}", f"{{what}}'s favourite {name}", words.somebody, _of(values),
            ("If you ask {what} for a favourite " + name + ", the answer is always {value}.",),
            ("Which " + name + " does {what} like best?",),
        )
        for name, values in words.FAVOURITES.items()
    ),
    *(
        Attribute(
            f"name_of_{animal}", f"the name of {{what}}'s {animal}", words.somebody, _of(words.PET_NAMES),
            ("{What} has a " + animal + " called {value}.", "{What} named the new " + animal + " {value}."),
            ("What is {what}'s " + animal + " called?", "How did {what} name the " + animal + "?"),
            ("{What}'s " + animal + " is called {value}.",),
        )
        for animal in words.ANIMALS
    ),
)  # fmt: skip

OTHER = (
    Attribute(
        "access_code", "the access code of the {what}", _door, words.code,
        ("The {what} opens with {value}.", "To get into the {what}, type {value}.", "Use {value} for the {what}."),
        ("How do I get into the {what}?", "What do I type to open the {what}?", "Which code opens the {what}?"),
        ("The {what} opens with {value}.", "Type {value}."),
    ),
    Attribute(
        "password", "the password of the {what}", _of(words.ACCOUNTS), words.password,
        ("To log in to the {what}, use {value}.", "The {what} is protected with {value}."),
        ("How do I log in to the {what}?", "Which password does the {what} have?"),
        ("Log in with {value}.",),
    ),
    Attribute(
        "wireless", "the wireless key of the {what}", _of(words.VENUES), words.password,
        ("At the {what} you get online with {value}.",),
        ("How do I get online at the {what}?",),
    ),
    Attribute(
        "price", "the price of the {what}", words.thing, words.price,
        ("The {what} costs {value}.", "They want {value} for the {what}.", "You can have the {what} for {value}."),
        ("How much is the {what}?", "What does the {what} cost?", "How much do they want for the {what}?"),
        ("The {what} costs {value}.",),
    ),
    Attribute(
        "owner", "the owner of the {what}", words.thing, words.person,
        ("The {what} belongs to {value}.", "{value} owns the {what}.", "The {what} was left here by {value}."),
        ("Who owns the {what}?", "Whose is the {what}?", "To whom does the {what} belong?"),
        ("The {what} belongs to {value}.",),
    ),
    Attribute(
        "hiding_place", "the hiding place of the {what}", words.thing, _of(words.HIDING_PLACES),
        ("The {what} is hidden {value}.", "You will find the {what} {value}.", "We keep the {what} {value}."),
        ("Where is the {what}?", "Where did we hide the {what}?", "Where do I find the {what}?"),
        ("The {what} is hidden {value}.",),
    ),
    Attribute(
        "serial", "the serial number of the {what}", words.thing, words.serial,
        ("The plate on the {what} reads {value}.", "The {what} is registered under {value}."),
        ("Under which number is the {what} registered?",),
    ),
    Attribute(
        "time", "the time of the {what}", _event, lambda rng: f"{pick(rng, words.WEEKDAYS)} at {words.clock(rng)}",
        ("The {what} begins on {value}.", "Be there for the {what} on {value}.", "The {what} was put on {value}."),
        ("When is the {what}?", "When does the {what} begin?", "When do I have to be there for the {what}?"),
        ("The {what} begins on {value}.",),
    ),
    Attribute(
        "room", "the place of the {what}", _event, _room,
        ("The {what} takes place in {value}.", "For the {what} go to {value}.", "We booked {value} for the {what}."),
        ("Where does the {what} take place?", "Where do I have to go for the {what}?"),
        ("The {what} takes place in {value}.",),
    ),
    Attribute(
        "speaker", "the host of the {what}", _event, words.person,
        ("{value} leads the {what}.", "The {what} is hosted by {value}."),
        ("Who leads the {what}?", "Who is the host of the {what}?"),
        ("{value} leads the {what}.",),
    ),
    Attribute(
        "deadline", "the deadline for the {what}", _project, words.day,
        ("The {what} has to be finished by {value}.", "Everything for the {what} is due on {value}."),
        ("When is the {what} due?", "By when does the {what} have to be finished?"),
        ("The {what} is due on {value}.",),
    ),
    Attribute(
        "code_name", "the code name of the {what}", _project, _of(words.CODE_NAMES),
        ("In the office the {what} is only known as {value}.", "We call the {what} {value}."),
        ("What do we call the {what}?", "Under which name is the {what} known in the office?"),
        ("We call the {what} {value}.",),
    ),
    Attribute(
        "budget", "the budget of the {what}", _project,
        lambda rng: f"{rng.integers(2, 90)},{digits(rng, 1)}00 {pick(rng, ('euros', 'dollars', 'pounds'))}",
        ("The {what} may cost {value} at most.", "They have set aside {value} for the {what}."),
        ("How much money is there for the {what}?", "How much may the {what} cost?"),
    ),
    Attribute(
        "head", "the head of {what}", _of(words.DEPARTMENTS), words.person,
        ("{value} runs {what}.", "The new head of {what} is {value}.", "Questions about {what} go to {value}."),
        ("Who runs {what}?", "Whom do I ask about {what}?"),
        ("{value} runs {what}.",),
    ),
    Attribute(
        "distance", "the distance from {what}", _route, _number(11, 490, "{} kilometres"),
        ("It is {value} from {what}.", "The road from {what} is {value} long."),
        ("How far is it from {what}?", "How long is the road from {what}?"),
        ("It is {value} from {what}.",),
    ),
    Attribute(
        "platform", "the platform of the train to {what}", _of(words.TOWNS), _number(2, 30, "platform {}"),
        ("The train to {what} leaves from {value}.", "Go to {value} for the train to {what}."),
        ("Where does the train to {what} leave?",),
        ("The train to {what} leaves from {value}.",),
    ),
    Attribute(
        "count", "the number of {what}", _contents, _number(13, 990),
        ("Somebody counted the {what} and came to {value}.", "We counted {value} {what}."),
        ("How many {what} did we count?",),
        ("We counted {value} {what}.",),
    ),
    Attribute(
        "temperature", "the right temperature for the {what}", words.thing, _number(35, 240, "{} degrees"),
        ("Keep the {what} at {value}.", "The {what} works best at {value}."),
        ("At which temperature do we keep the {what}?",),
        ("Keep it at {value}.",),
    ),
    Attribute(
        "order", "the order number of the {what}", words.thing, lambda rng: f"{digits(rng, 2)}-{digits(rng, 4)}",
        ("The {what} was ordered under {value}.",),
        ("Under which number was the {what} ordered?",),
    ),
)  # fmt: skip


def fill(template: str, attribute: Attribute, what: str, value: str = "") -> str:
    """A wording with its words put in."""
    topic = attribute.topic.format(what=what)
    return capital(template.format(topic=topic, Topic=capital(topic), what=what, What=capital(what), value=value))


def capital(text: str) -> str:
    """With a capital at the beginning, as sentences have it."""
    return text[:1].upper() + text[1:]


def to_the_user(text: str) -> str:
    """What the user would say of "my sister", as the assistant says it."""
    return re.sub(r"\b([Mm])y\b", lambda match: ("Y" if match[1] == "M" else "y") + "our", text)
