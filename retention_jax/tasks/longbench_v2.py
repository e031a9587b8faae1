"""LongBench v2: four-choice questions over 8 thousand to 2 million words (arXiv 2412.15204).

Prompt, answer length and the reading of answers are those of github.com/THUDM/LongBench, `prompts/0shot.txt` and
`pred.py`. Published runs sample at temperature 0.1 and take tokens out of the middle of a prompt that is too long
(`text_metrics.truncated_middle`). Rows are those of hf://datasets/THUDM/LongBench-v2/data.json.
"""

import re
from typing import Any

from .example import Example, Task, Turn
from .rows import checked_rows, known, lacking

_DIFFICULTIES = ("easy", "hard")
_LENGTHS = ("short", "medium", "long")  # up to 32 and 128 thousand words, and above
_CHOICES = ("A", "B", "C", "D")
_BEFORE = "Please read the following text and answer the question below.\n\n<text>\n"
_AFTER = (
    "\n</text>\n\nWhat is the correct answer to this question: {question}\n"
    "Choices:\n(A) {choice_A}\n(B) {choice_B}\n(C) {choice_C}\n(D) {choice_D}\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".'
)
_ASKED = ("question", *(f"choice_{letter}" for letter in _CHOICES))
_MAX_NEW_TOKENS = 128
NAMES = ("all", *_DIFFICULTIES, *_LENGTHS)


def load(name: str, source: str) -> Task:
    """All questions, or those of one difficulty or length, `NAMES`. Groups are both, such as "hard, short".

    Raises:
      ValueError: when there is no such part, none of it in the source, and as `checked_rows` does.
    """
    known(name, NAMES, "LongBench v2")
    rows = checked_rows(source, _problems, unique="_id")
    examples = tuple(
        Example(
            row["_id"],
            _BEFORE + row["context"].strip(),
            (
                Turn(
                    _AFTER.format(**{k: row[k].strip() for k in _ASKED}),
                    (row["answer"],),
                    _MAX_NEW_TOKENS,
                    group=f"{row['difficulty']}, {row['length']}",
                ),
            ),
        )
        for row in rows
        if name in ("all", row["difficulty"], row["length"])
    )
    if not examples:
        raise ValueError(f"{source}: none of {len(rows)} questions is {name!r}")
    published = "arXiv 2412.15204, github.com/THUDM/LongBench"
    return Task(examples, "accuracy", _score, True, published, "middle of prompt")


def choice(answer: str) -> str | None:
    """The letter that an answer chooses, None when it does not say so in the words that were asked for."""
    answer = answer.replace("*", "")
    match = re.search(r"The correct answer is \(([A-D])\)", answer) or re.search(
        r"The correct answer is ([A-D])", answer
    )
    return match[1] if match else None


def _score(example: Example, turn: int, answer: str) -> float:
    return float(choice(answer) == example.turns[turn].gold[0])


def _problems(row: dict[str, Any]) -> list[str]:
    fields = ("_id", "context", *_ASKED, "answer", "difficulty", "length")
    found = lacking(row, dict.fromkeys(fields, str))
    if found:
        return found
    allowed = {"answer": _CHOICES, "difficulty": _DIFFICULTIES, "length": _LENGTHS}
    return [
        f"{field!r} must be one of {', '.join(values)}, not {row[field]!r}"
        for field, values in allowed.items()
        if row[field] not in values
    ]
