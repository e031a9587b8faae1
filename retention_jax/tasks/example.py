"""What a benchmark is made of: texts to read, questions to answer, and a score for each answer."""

from collections.abc import Callable
from typing import Literal, NamedTuple


class Turn(NamedTuple):
    """One question and what is known about its answer."""

    question: str  # read after the context and the turns before, then answered
    gold: tuple[str, ...]  # reference answers; the task's `score` says how an answer is compared with them
    max_new_tokens: int  # as published; 0: the turn is only read, `told` stands for its answer, and it has no score
    answer_prefix: str = ""  # what the model is made to begin its answer with; not part of what is scored
    group: str = ""  # what its scores are also averaged over, such as a domain or a difficulty
    told: str | None = None  # what later turns are read behind, in place of the model's answer; None: that answer


class Example(NamedTuple):
    """A context and the questions about it, in order. They are one prompt: the context, then the question."""

    name: str  # unique in its task, and the same in every run
    context: str  # all that is read before an eviction that does not know the question; "" where there is none
    turns: tuple[Turn, ...]  # at least one


# What is taken out of a prompt that is too long for a model: tokens from the middle of context and first question
# together, from the middle of the context, or from its end.
Cut = Literal["middle of prompt", "middle of context", "end of context"]


class Task(NamedTuple):
    """A benchmark, ready to run."""

    examples: tuple[Example, ...]
    metric: str  # what a score is, in a word or two: "accuracy", "F1"
    score: Callable[[Example, int, str], float]  # of the answer to a turn, by its index: 0 (wrong) to 1
    chat: bool  # whether context and question are what a user says, in the model's chat template, where it has one
    source: str  # where prompts and metric were published
    cut: Cut | None = None  # as published; None: nothing is, and a prompt that is too long is refused
    of_unended: Callable[[str], str] | None = None  # what is scored of an answer that its limit cut off; None: all
