"""What is said around the facts: how a text is handed over, how the assistant acknowledges it, and other talk."""

from retention_jax.corpus import words
from retention_jax.corpus.words import Rng, pick, sample

FIRST = (
    "Please read this. I will come back to it later.\n\n{text}",
    "I am going to ask you about this text, so read it carefully.\n\n{text}",
    "Here is something to read first.\n\n{text}",
    "{text}\n\nThat was the text. Tell me when you are ready for questions.",
    "{text}\n\nKeep this in mind for later.",
    "Below is a text with some notes of mine in it.\n\n{text}",
    "These are my papers, in no good order:\n\n{text}\n\nJust confirm that you have them.",
    "{text}",
)
NEXT = (
    "Here is the next part.\n\n{text}",
    "It goes on like this:\n\n{text}",
    "Some more to read:\n\n{text}",
    "{text}\n\nThat was another part.",
    "Read this as well, please.\n\n{text}",
    "{text}",
)
READ = (
    "I have read it.",
    "Thank you. I am ready.",
    "Understood. What would you like to know?",
    "I have it. Go on.",
    "Done. Ask me anything about it.",
    "All right, I will keep it in mind.",
    "Got it.",
    "Thanks, I have read this part.",
)
LEADS = (
    "{}",
    "{}",
    "{}",
    "{}",
    "Note: {}",
    "By the way: {}",
    "Reminder: {}",
    "({})",
    "P.S. {}",
)  # before a fact in a text
# What begins so needs no lead.
OPENINGS = ("Please ", "For the record", "Write this", "It is worth", "I checked", "There is a note")
OPENINGS += ("Correction", "From now on", "An update", "I was wrong")
BY_THE_WAY = ("By the way: {}", "{}", "{} Keep that in mind.", "Before I forget: {}", "One more thing. {}")
NOTED = (
    "Noted.",
    "Thank you, I will remember that.",
    "All right.",
    "I have made a note of it.",
    "Okay, got it.",
    "Understood.",
)
TWO = ("{} And another question: {}", "Two questions. {} {}", "{} Also: {}")

_CHATS = (
    ("Thank you, that helps.", "You are welcome."),
    ("Are you still there?", "Yes, I am here. What can I do for you?"),
    ("I need a short break.", "Take your time. I will be here."),
    ("Say something kind, please.", "You are doing well, and there is no hurry."),
    ("How do I stop hiccups?", "Hold your breath for ten seconds, then drink a glass of water in small sips."),
    ("How long do I boil an egg?", "About six minutes for a soft yolk, and nine or ten for a firm one."),
    (
        "Why do leaves turn yellow?",
        "In autumn trees take the green pigment back, and the yellow that was below it shows.",
    ),
    (
        "What is a good stretch for the neck?",
        "Lower one ear to its shoulder, hold for twenty seconds, then change sides.",
    ),
    ("How often do I water a cactus?", "Rarely: about every two weeks in summer and once a month in winter."),
    (
        "Explain briefly what a dam does.",
        "It holds back a river, so that water can be stored, or used to make electricity.",
    ),
    ("How do I get wax out of a tablecloth?", "Let it harden, scrape it off, and iron the rest into a sheet of paper."),
    ("What keeps bread fresh?", "A cloth bag or a bread box, at room temperature. A fridge makes it stale sooner."),
    ("Suggest a name for a boat.", "How about Second Breakfast?"),
    ("Write one sentence about rain.", "The rain came over the hills and made the roofs shine."),
    ("Write one sentence about the sea.", "Far out, the sea was as flat and grey as a slate."),
    ("What is the opposite of generous?", "Stingy."),
    ("Give me another word for quickly.", "Rapidly."),
    ("How do you say thank you in French?", "Merci."),
    ("Is a tomato a fruit?", "To a botanist, yes: it is a berry. In the kitchen it counts as a vegetable."),
    ("What do bees make honey from?", "From the nectar of flowers, which they thicken in the hive."),
)


def other(rng: Rng) -> tuple[str, str]:
    """A question that has nothing to do with what was read, and its answer."""
    a, b = int(rng.integers(2, 60)), int(rng.integers(2, 60))
    day, days = int(rng.integers(7)), int(rng.integers(2, 7))
    three = sample(rng, words.PASSWORD_WORDS, 3)
    made = (
        (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."),
        (f"How much is {a} times {b % 10 + 2}?", f"It is {a * (b % 10 + 2)}."),
        (f"How many minutes are {a} hours?", f"{a} hours are {a * 60} minutes."),
        (
            f"Today is {words.WEEKDAYS[day]}. Which day is it in {days} days?",
            f"In {days} days it is {words.WEEKDAYS[(day + days) % 7]}.",
        ),
        (f"Put these in alphabetical order: {', '.join(three)}.", f"In order: {', '.join(sorted(three))}."),
        (f"Name three things that one can eat, none of them {pick(rng, words.FOODS)}.", "Rice, potatoes and noodles."),
    )
    return pick(rng, _CHATS) if rng.random() < 0.5 else made[rng.integers(len(made))]
