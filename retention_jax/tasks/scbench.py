"""SCBench: several questions about one shared context, by turns or each on its own (arXiv 2412.10319).

Prompts, answer lengths and scores are those of github.com/microsoft/MInference, `scbench/eval_utils.py` and
`scbench/compute_scores.py`, in chat templates as in its scripts; published runs are greedy, take tokens out of the
middle of a context that is too long (`text_metrics.truncated_middle`), and let the model read the reference answers of
earlier turns instead of its own. Where the published script does not do what it means, this does:

    many_shot, qa_chn   an answer is compared with the reference; the script compares it with every single character
                        of the reference, so nearly all answers to many_shot are right there
    mf                  every later turn names its own quantity; in the script all name that of the last turn

`repoqa` and `repoqa_and_kv` are left out: their score needs tree-sitter grammars and NLTK's smoothed BLEU.

Rows are those of hf://datasets/microsoft/SCBench/scbench_NAME/*.parquet: `context`, and `multi_turns`, which have
`input` and `answer`.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from .example import Example, Task, Turn
from .rows import checked_rows, known, lacking
from .text_metrics import chinese_qa_f1, first_number, rouge_l_sum, share_contained


class _SubTask(NamedTuple):
    before: str  # what stands before the context
    asked: str
    max_new_tokens: dict[str, int]  # of a turn of each kind; all turns of most sub-tasks are of one
    metric: str


_CHOICE = "Question: {input}\nA. {options[0]}\nB. {options[1]}\nC. {options[2]}\nD. {options[3]}\n\n"
_SUB_TASKS = {
    "kv": _SubTask(
        "Extract the value corresponding to the specified key in the JSON object below.\n\n",
        "{input}",
        {"kv": 150},
        "accuracy",
    ),
    "prefix_suffix": _SubTask("", "{input}", {"prefix_suffix": 150}, "accuracy"),
    "vt": _SubTask("", "{input}", {"vt": 30}, "share found"),
    "qa_eng": _SubTask(
        "Read the book and answer the question. Be very concise in your answer.\n\n",
        "Question: {input}\nAnswer:",
        {"qa_eng": 40},
        "accuracy",
    ),
    "qa_chn": _SubTask("阅读以下书籍然后回答问题。\n\n", "问题：{input}\n答案：", {"qa_chn": 40}, "F1"),
    "choice_eng": _SubTask(
        "Read the book and answer the question.\n\n",
        _CHOICE + "The the correct answer is",  # as published
        {"choice_eng": 40},
        "accuracy",
    ),
    "many_shot": _SubTask("", "{input}", {"many_shot": 10}, "accuracy"),
    "mf": _SubTask("{prefix}\n\n", "What is {quantity}?\n\n{input}", {"mf": 5}, "accuracy"),
    "summary": _SubTask("", "{input}", {"summary": 200}, "ROUGE-Lsum"),
    # Published are two numbers, here groups: ROUGE-Lsum of the summaries, accuracy of the needles.
    "summary_with_needles": _SubTask("", "{input}", {"summary": 800, "passkey": 15}, "mean of ROUGE-Lsum and accuracy"),
}
NAMES = tuple(_SUB_TASKS)
MODES = ("multi_turn", "same_context")
_QUANTITY = re.compile(r"The (.+) is")
_ANSWERS = {"vt": list, "mf": int}  # other kinds: one text


def load(name: str, source: str, mode: str) -> Task:
    """One of SCBench's tasks, `NAMES`, in one of its `MODES`.

    In "multi_turn" an example is a context and its questions, each read after those before it. In "same_context" an
    example is a context and one question, and the examples of a context follow each other. Groups: the task that the
    examples of many_shot show, and the kinds of question of summary_with_needles.

    Raises:
      ValueError: when there is no such task or mode, and as `checked_rows` does.
    """
    known(name, NAMES, "SCBench")
    if mode not in MODES:
        raise ValueError(f"{mode!r} must be a mode of SCBench, {' or '.join(MODES)}")
    rows = checked_rows(source, lambda row: _problems(name, row))
    examples = []
    for number, row in enumerate(rows, 1):
        turns, context = row["multi_turns"], _context(name, row, mode)
        group = row["task"] if name == "many_shot" else ""
        if mode == "multi_turn":
            asked = tuple(_turn(name, turn, i, group) for i, turn in enumerate(turns))
            examples.append(Example(str(number), context, asked))
            continue
        for i, turn in enumerate(turns, 1):
            examples.append(Example(f"{number}, {i}", context, (_turn(name, turn, None, group),)))

    def score(example: Example, turn: int, answer: str) -> float:
        asked = example.turns[turn]
        return _SCORES[asked.group if _is_mixed(name) else name](answer, asked.gold)

    source = "arXiv 2412.10319, github.com/microsoft/MInference"
    return Task(tuple(examples), _SUB_TASKS[name].metric, score, True, source, "middle of context")


def _context(name: str, row: dict[str, Any], mode: str) -> str:
    first = row["multi_turns"][0]["input"]
    prefix = f"What is {_quantity(first)}?" if name == "mf" and mode == "multi_turn" else first
    # The rows of vt come from RULER, which calls a prompt `input`.
    return _SUB_TASKS[name].before.format(prefix=prefix) + str(row["context"] if "context" in row else row["input"])


def _turn(name: str, turn: dict[str, Any], place: int | None, group: str) -> Turn:
    """A question at its place in a conversation, None for one that stands right behind the context."""
    task = _SUB_TASKS[name]
    kind = turn["task"].removeprefix("scbench_") if _is_mixed(name) else name
    asked = task.asked
    if name == "mf" and place == 0:
        asked = "{input}"  # what it asks for is said before the context
    quantity = _quantity(turn["input"]) if name == "mf" else ""
    question = asked.format(input=turn["input"], options=turn.get("options"), quantity=quantity)
    answer = turn["answer"]
    gold = tuple(answer) if isinstance(answer, list) else (str(answer),)
    if name == "choice_eng":
        gold += ("ABCD"[turn["options"].index(answer)],)
    later_summary = name == "summary" and place is not None and place > 0
    return Turn(
        "\n\n" + question if place == 0 else question,
        gold,
        task.max_new_tokens[kind],
        "This paper" if later_summary else "",
        group=kind if _is_mixed(name) else group,
        told=str(answer),
    )


def _quantity(question: str) -> str:
    """What a question of mf asks for: "The largest number is: " asks for "the largest number"."""
    return "the " + _QUANTITY.findall(question)[0].lower()


def _is_mixed(name: str) -> bool:
    return len(_SUB_TASKS[name].max_new_tokens) > 1


# Scores of an answer beside the references


def _contained(answer: str, gold: tuple[str, ...]) -> float:
    return float(gold[0] in answer)


def _contained_in_any_case(answer: str, gold: tuple[str, ...]) -> float:
    return float(gold[0].upper() in answer.upper())


def _chosen(answer: str, gold: tuple[str, ...]) -> float:
    """Whether an answer chooses the right letter or text, as the script reads it: by its first letter, by its words
    behind "answer is" and the like, or by the first word that is A, B, C or D."""
    answer = answer.strip()
    if not answer:
        return 0.0
    if answer[0] in "ABCD":
        return float(answer[0] in gold)
    if answer in gold:
        return 1.0
    answer = re.sub(" +", " ", re.sub(r"[\n\"'.,?!{}]", " ", answer))
    for opening in ("answer is:", "answer:", "answer is", "option is"):
        if opening in answer:
            return float(answer.partition(opening)[2][1:].startswith(gold))
    word = next((word for word in answer.split() if word in "ABCD"), None)
    return float(word in gold)


def _same_number(answer: str, gold: tuple[str, ...]) -> float:
    number = first_number(answer)
    return float(number is not None and int(number) == int(gold[0]))


def _same_digits(answer: str, gold: tuple[str, ...]) -> float:
    digits = re.search("[0-9]+", answer)
    return float(digits is not None and digits[0] == gold[0])


_SCORES: dict[str, Callable[[str, tuple[str, ...]], float]] = {
    "kv": _contained,
    "prefix_suffix": _contained,
    "vt": share_contained,
    "qa_eng": _contained_in_any_case,
    "qa_chn": lambda answer, gold: chinese_qa_f1(answer, gold[0]),
    "choice_eng": _chosen,
    "many_shot": _contained_in_any_case,
    "mf": _same_number,
    "summary": lambda answer, gold: rouge_l_sum(answer, gold[0]),
    "passkey": _same_digits,
}


def _problems(name: str, row: dict[str, Any]) -> list[str]:
    context = "input" if name == "vt" and "context" not in row else "context"
    fields = {context: list if name == "mf" else str, "multi_turns": list}
    found = lacking(row, fields | ({"task": str} if name == "many_shot" else {}))
    turns = row.get("multi_turns")
    if turns == []:
        found.append("'multi_turns' must hold at least one turn")
    for number, turn in enumerate(turns if isinstance(turns, list) else [], 1):
        found += [f"turn {number}: {problem}" for problem in _problems_of_turn(name, turn)]
    return found


def _problems_of_turn(name: str, turn: Any) -> list[str]:
    fields = {"input": str, "answer": _ANSWERS.get(name, str)}
    fields |= ({"options": list} if name == "choice_eng" else {}) | ({"task": str} if _is_mixed(name) else {})
    found = lacking(turn, fields)
    if found:
        return found
    if name == "vt" and not (turn["answer"] and all(isinstance(each, str) for each in turn["answer"])):
        found.append(f"'answer' must be texts, at least one, not {turn['answer']}")
    if name == "choice_eng" and (len(turn["options"]) != 4 or turn["answer"] not in turn["options"]):
        found.append(f"'answer' must be one of four 'options', not {turn['answer']!r} of {turn['options']}")
    if name == "mf" and not _QUANTITY.search(turn["input"]):
        found.append(f"'input' must say \"The ... is\", not {turn['input']!r}")
    kinds = [f"scbench_{kind}" for kind in _SUB_TASKS[name].max_new_tokens]
    if _is_mixed(name) and turn["task"] not in kinds:
        found.append(f"'task' must be one of {', '.join(kinds)}, not {turn['task']!r}")
    return found
