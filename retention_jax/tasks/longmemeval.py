"""LongMemEval: questions about many dated chat sessions, judged by a language model (arXiv 2410.10813).

Prompts, the history's format (sessions as JSON, in order of their dates), answer lengths and the judge's prompts are
those of github.com/xiaowu0162/LongMemEval, `src/generation/run_generation.py` and `src/evaluation/evaluate_qa.py`.
There the judge is gpt-4o-2024-08-06 at temperature 0 with 10 tokens, and a history that is too long loses its end.
Rows are those of `longmemeval_s`, `longmemeval_m` and `longmemeval_oracle` at
huggingface.co/datasets/xiaowu0162/longmemeval, whose files have no ending: give them the ending .json.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from .example import Example, Task, Turn
from .rows import checked_rows, known, lacking


class _Reading(NamedTuple):
    before: str
    after: str
    max_new_tokens: int


_BEFORE = (
    "I will give you several history chats between you and a user. Please answer the question based on the relevant "
    "chat history."
)
_STEPS = (
    " Answer the question step by step: first extract all the relevant information, and then reason over the "
    "information to get the answer."
)
_HISTORY = "\n\n\nHistory Chats:\n\n"
_ASKED = "\n\nCurrent Date: {question_date}\nQuestion: {question}\n"
_READINGS = {
    "direct": _Reading(_BEFORE + _HISTORY, _ASKED + "Answer:", 500),
    "step_by_step": _Reading(_BEFORE + _STEPS + _HISTORY, _ASKED + "Answer (step by step):", 800),
}
NAMES = tuple(_READINGS)

_CORRECT = (
    "I will give you a question, a correct answer, and a response from a model. Please answer yes if the response "
    "contains the correct answer. Otherwise, answer no. "
)
_COMPLETE = (
    "If the response is equivalent to the correct answer or contains all the intermediate steps to get the correct "
    "answer, you should also answer yes. If the response only contains a subset of the information required by the "
    "answer, answer no. "
)
_OFF_BY_ONE = (
    "In addition, do not penalize off-by-one errors for the number of days. If the question asks for the number of "
    "days/weeks/months, etc., and the model makes off-by-one errors (e.g., predicting 19 days when the answer is 18), "
    "the model's response is still correct. "
)
_UPDATED = (
    "If the response contains some previous information along with an updated answer, the response should be "
    "considered as correct as long as the updated answer is the required answer."
)
_PREFERENCE = (
    "I will give you a question, a rubric for desired personalized response, and a response from a model. Please "
    "answer yes if the response satisfies the desired response. Otherwise, answer no. The model does not need to "
    "reflect all the points in the rubric. The response is correct as long as it recalls and utilizes the user's "
    "personal information correctly."
)
_UNANSWERABLE = (
    "I will give you an unanswerable question, an explanation, and a response from a model. Please answer yes if the "
    "model correctly identifies the question as unanswerable. The model could say that the information is incomplete, "
    "or some other information is given but the asked information is not."
)
_IS_CORRECT = "\n\nModel Response: {}\n\nIs the model response correct? Answer yes or no only."
_ANSWER = "\n\nQuestion: {}\n\nCorrect Answer: {}" + _IS_CORRECT
_JUDGED = {
    "single-session-user": _CORRECT + _COMPLETE + _ANSWER,
    "single-session-assistant": _CORRECT + _COMPLETE + _ANSWER,
    "multi-session": _CORRECT + _COMPLETE + _ANSWER,
    "temporal-reasoning": _CORRECT + _COMPLETE + _OFF_BY_ONE + _ANSWER,
    "knowledge-update": _CORRECT + _UPDATED + _ANSWER,
    "single-session-preference": _PREFERENCE + "\n\nQuestion: {}\n\nRubric: {}" + _IS_CORRECT,
}
_JUDGED_ABSTENTION = (
    _UNANSWERABLE + "\n\nQuestion: {}\n\nExplanation: {}\n\nModel Response: {}\n\n"
    "Does the model correctly identify the question as unanswerable? Answer yes or no only."
)
_ABSTENTION = "_abs"  # in the name of a question that has no answer in the history


def load(name: str, source: str, ask: Callable[[str], str]) -> Task:
    """All questions, read in the way that `name` says, "direct" or "step_by_step" (what its authors advise).

    `ask` puts a prompt to the judge and returns what it says (`judge.client`). Groups are question types such as
    "multi-session", and "multi-session, abstention" where the history has no answer.

    Raises:
      ValueError: when there is no such way, and as `checked_rows` does.
    """
    known(name, NAMES, "LongMemEval")
    reading = _READINGS[name]
    rows = checked_rows(source, _problems, unique="question_id")
    examples = tuple(
        Example(
            row["question_id"],
            reading.before + history(row["haystack_dates"], row["haystack_sessions"]),
            (
                Turn(
                    reading.after.format(**row),
                    (str(row["answer"]),),
                    reading.max_new_tokens,
                    group=row["question_type"] + (", abstention" if _ABSTENTION in row["question_id"] else ""),
                ),
            ),
        )
        for row in rows
    )
    asked = {row["question_id"]: (row["question_type"], row["question"]) for row in rows}

    def score(example: Example, turn: int, answer: str) -> float:
        kind, question = asked[example.name]
        prompt = judge_prompt(kind, question, example.turns[turn].gold[0], answer, _ABSTENTION in example.name)
        return float("yes" in ask(prompt).lower())

    published = "arXiv 2410.10813, github.com/xiaowu0162/LongMemEval"
    return Task(examples, "accuracy", score, True, published, "end of context")


def history(dates: list[str], sessions: list[list[dict[str, Any]]]) -> str:
    """Chat sessions as the text that a model reads: by date, without the labels that say where the answer is."""
    text = ""
    for number, (date, session) in enumerate(sorted(zip(dates, sessions, strict=True), key=lambda each: each[0]), 1):
        messages = [{key: value for key, value in message.items() if key != "has_answer"} for message in session]
        text += f"\n### Session {number}:\nSession Date: {date}\nSession Content:\n\n{json.dumps(messages)}\n"
    return text


def judge_prompt(question_type: str, question: str, gold: str, answer: str, abstention: bool) -> str:
    """What the judge is asked about an answer; it is right when the judge's reply contains "yes"."""
    return (_JUDGED_ABSTENTION if abstention else _JUDGED[question_type]).format(question, gold, answer)


def _problems(row: dict[str, Any]) -> list[str]:
    texts = dict.fromkeys(("question_id", "question_type", "question", "question_date"), str)
    found = lacking(row, texts | {"answer": (str, int, float), "haystack_dates": list, "haystack_sessions": list})
    if found:
        return found
    if row["question_type"] not in _JUDGED:
        found.append(f"'question_type' must be one of {', '.join(_JUDGED)}, not {row['question_type']!r}")
    dates, sessions = row["haystack_dates"], row["haystack_sessions"]
    if len(dates) != len(sessions) or not all(isinstance(date, str) for date in dates):
        found.append(f"'haystack_dates' must be {len(sessions)} texts, one a session, not {dates}")
    for number, session in enumerate(sessions, 1):
        if not isinstance(session, list):
            found.append(f"session {number} must be a list of messages, not {type(session).__name__}")
            continue
        for message in session:
            found += [f"session {number}: a message {each}" for each in lacking(message, {"role": str, "content": str})]
    return found
