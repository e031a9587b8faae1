"""LongBench: questions, summaries, few-shot tasks and code over a few thousand words (arXiv 2308.14508).

Prompts, answer lengths and scores are those of github.com/THUDM/LongBench: `config/dataset2prompt.json` (with its
"asconcisely"), `config/dataset2maxlen.json`, `metrics.py`, `eval.py`, `pred.py`; published runs are greedy and take
tokens out of the middle of a prompt that is too long (`text_metrics.truncated_middle`). All English and code tasks are
here, and the two Chinese ones that need no word segmentation; `multifieldqa_zh`, `dureader` and `vcsum` are left out,
since their scores are defined by the words that jieba finds.

Rows are those of `data.zip` at huggingface.co/datasets/THUDM/LongBench: `_id`, `context`, `input`, `answers`, `length`
(words) and `all_classes` (of classifications, else null).
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from .example import Example, Task, Turn
from .rows import checked_rows, known, lacking
from .text_metrics import classification, edit_similarity, number_share, qa_f1, rouge_l


class _SubTask(NamedTuple):
    prompt: str  # {context}, and after it what is asked, with {input} where the task has one
    max_new_tokens: int
    metric: str


_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
_QASPER = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.\n\n'
)
_SUB_TASKS = {
    "narrativeqa": _SubTask(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
        "Story: {context}\n\nNow, answer the question based on the story asconcisely as you can, using a single phrase "
        "if possible. Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
        128,
        "F1",
    ),
    "qasper": _SubTask(
        f"You are given a scientific article and a question. Answer the question {_QASPER}Article: {{context}}\n\n"
        f" Answer the question based on the above article {_QASPER}Question: {{input}}\n\nAnswer:",
        128,
        "F1",
    ),
    "multifieldqa_en": _SubTask(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        64,
        "F1",
    ),
    "hotpotqa": _SubTask(_PASSAGES, 32, "F1"),
    "2wikimqa": _SubTask(_PASSAGES, 32, "F1"),
    "musique": _SubTask(_PASSAGES, 32, "F1"),
    "gov_report": _SubTask(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
        "Report:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512,
        "ROUGE-L",
    ),
    "qmsum": _SubTask(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript "
        "in one or more sentences.\n\nQuery: {input}\nAnswer:",
        512,
        "ROUGE-L",
    ),
    "multi_news": _SubTask(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\n"
        "Now, write a one-page summary of all the news.\n\nSummary:",
        512,
        "ROUGE-L",
    ),
    "trec": _SubTask(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        64,
        "classification",
    ),
    "triviaqa": _SubTask(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
        32,
        "F1",
    ),
    "samsum": _SubTask(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        128,
        "ROUGE-L",
    ),
    "lsht": _SubTask("请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}", 64, "classification"),
    "passage_count": _SubTask(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n{context}\n\n"
        "Please enter the final count of unique paragraphs after removing duplicates. The output format should only "
        "contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: ",
        32,
        "number",
    ),
    "passage_retrieval_en": _SubTask(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\n"
        "Please enter the number of the paragraph that the abstract is from. The answer format must be like "
        '"Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
        32,
        "number",
    ),
    "passage_retrieval_zh": _SubTask(
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n"
        '下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
        32,
        "number",
    ),
    "lcc": _SubTask("Please complete the code given below. \n{context}Next line of code:\n", 64, "edit similarity"),
    "repobench-p": _SubTask(
        "Please complete the code given below. \n{context}{input}Next line of code:\n", 64, "edit similarity"
    ),
}
_IN_E = (
    *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum"),
    *("passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)
NAMES = (*_SUB_TASKS, *(f"{name}_e" for name in _IN_E))
_ONE_LINE = ("trec", "triviaqa", "samsum", "lsht")  # few-shot: what a model writes behind the line is the next shot
_NO_CHAT = (*_ONE_LINE, "lcc", "repobench-p")
_NUMBER = re.compile(r"\d+")
_SCORES: dict[str, Callable[[str, str, tuple[str, ...]], float]] = {
    "F1": lambda answer, gold, classes: qa_f1(answer, gold),
    "ROUGE-L": lambda answer, gold, classes: rouge_l(answer, gold),
    "classification": classification,
    "number": lambda answer, gold, classes: number_share(answer, _NUMBER.findall(gold)[0]),  # of "Paragraph 7"
    "edit similarity": lambda answer, gold, classes: edit_similarity(answer, gold),
}


def load(name: str, source: str) -> Task:
    """One of LongBench's tasks, `NAMES`; those that end in _e are LongBench-E, whose scores are grouped by length.

    Raises:
      ValueError: when there is no such task, and as `checked_rows` does.
    """
    known(name, NAMES, "LongBench")
    plain = name.removesuffix("_e")
    task = _SUB_TASKS[plain]
    rows = checked_rows(source, lambda row: _problems(row, task.metric), unique="_id")
    before, after = task.prompt.split("{context}")
    examples = tuple(
        Example(
            row["_id"],
            before + row["context"],
            (
                Turn(
                    after.format(input=row["input"]),
                    tuple(row["answers"]),
                    task.max_new_tokens,
                    group=_length(row["length"]) if name.endswith("_e") else "",
                ),
            ),
        )
        for row in rows
    )
    classes = {row["_id"]: tuple(row["all_classes"] or ()) for row in rows}

    def score(example: Example, turn: int, answer: str) -> float:
        if plain in _ONE_LINE:
            answer = answer.lstrip("\n").split("\n")[0]
        golds = example.turns[turn].gold
        return max(_SCORES[task.metric](answer, gold, classes[example.name]) for gold in golds)

    published = "arXiv 2308.14508, github.com/THUDM/LongBench"
    return Task(examples, task.metric, score, plain not in _NO_CHAT, published, "middle of prompt")


def _problems(row: dict[str, Any], metric: str) -> list[str]:
    fields = {"_id": str, "context": str, "input": str, "answers": list, "length": int}
    fields["all_classes"] = list if metric == "classification" else (list, type(None))
    found = lacking(row, fields)
    answers = row.get("answers")
    if isinstance(answers, list) and not (answers and all(isinstance(answer, str) for answer in answers)):
        found.append(f"'answers' must be texts, at least one, not {answers}")
    elif metric == "number" and isinstance(answers, list) and not all(map(_NUMBER.search, answers)):
        found.append(f"'answers' must hold numbers, not {answers}")
    return found


def _length(words: int) -> str:
    return "0-4k" if words < 4000 else "4-8k" if words < 8000 else "8k+"
