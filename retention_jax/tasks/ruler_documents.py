"""RULER's two question answering tasks: a question, the documents that answer it, and as many others as fit.

The questions are SQuAD's (arXiv 1806.03822) and HotpotQA's (arXiv 1809.09600), in the files that these publish.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from retention_jax.data import sources
from retention_jax.runtime import files
from retention_jax.tasks.ruler_prompts import Prompt

_TASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
)


class Question(NamedTuple):
    text: str
    gold: tuple[str, ...]  # any of them is right
    own: tuple[str, ...]  # the documents it was asked about
    near: tuple[str, ...]  # which fill a prompt before all others


class Library(NamedTuple):
    questions: tuple[Question, ...]
    documents: tuple[str, ...]  # all of them, each once, sorted


def prompt(library: Library, index: int, amount: int, seed: Sequence[int]) -> Prompt:
    """A question by its index and `amount` documents, at least its own, in random order."""
    question, rng = library.questions[index], np.random.default_rng(seed)
    first = (*question.own, *(question.near[i] for i in rng.permutation(len(question.near))))
    taken = set(first)
    others = (library.documents[i] for i in rng.permutation(len(library.documents)))
    chosen = [*first, *(document for document in others if document not in taken)][:amount]
    told = [chosen[i] for i in np.random.default_rng((*seed, amount)).permutation(len(chosen))]
    text = "\n\n".join(f"Document {number}:\n{document}" for number, document in enumerate(told, 1))
    return Prompt(
        context=f"{_TASK}The following are given documents.\n\n{text}\n\n",
        question=f"{_TASK}Question: {question.text}",
        answer_prefix=" Answer:",
        gold=question.gold,
    )


def squad(source: str) -> Library:
    """SQuAD, version 1 or 2: `{"data": [{"paragraphs": [{"context", "qas": [{"question", "answers"}]}]}]}`.

    Questions that cannot be answered are left out. Near a question are the other paragraphs of its article.

    Raises:
      ValueError: when the source is not one such file, by article, the first ten at once.
    """
    data = _json(source)
    if not isinstance(data, dict) or not isinstance(data.get("data"), list):
        raise ValueError(f"{source}: must be an object with a list `data`, as SQuAD is published")
    return _library(source, data["data"], "article", _article)


def hotpotqa(source: str) -> Library:
    """HotpotQA: a list of `{"question", "answer", "context": [[title, [sentence, ...]], ...]}`.

    Raises:
      ValueError: when the source is not one such file, by question, the first ten at once.
    """
    data = _json(source)
    if not isinstance(data, list):
        raise ValueError(f"{source}: must be a list, as HotpotQA is published, got {type(data).__name__}")
    return _library(source, data, "question", _hotpot_question)


def _json(source: str) -> Any:
    paths = sources.files_of(source)
    if len(paths) > 1 or paths[0].suffix != ".json":
        raise ValueError(f"{source!r} must be one .json file, is {', '.join(map(str, paths[:3]))}")
    try:
        return json.loads(paths[0].read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{paths[0]}: not valid JSON: {error}") from error


def _library(
    source: str, rows: list[Any], kind: str, parse: Callable[[Any], tuple[list[Question], list[str]]]
) -> Library:
    questions, documents, problems = [], set(), []
    for number, row in enumerate(rows, 1):
        try:
            new_questions, new_documents = parse(row)
            questions += new_questions
            documents.update(new_documents)
        except KeyError as error:
            problems.append(f"{source}, {kind} {number}: has no {error}")
        except (TypeError, ValueError) as error:
            problems.append(f"{source}, {kind} {number}: {error}")
    if problems or not questions:
        raise ValueError(files.first_problems(problems) or f"{source}: has no question with an answer")
    return Library(tuple(questions), tuple(sorted(documents)))


def _article(row: Any) -> tuple[list[Question], list[str]]:
    contexts = list(dict.fromkeys(_text(paragraph["context"]) for paragraph in row["paragraphs"]))
    questions = []
    for paragraph in row["paragraphs"]:
        near = tuple(context for context in contexts if context != paragraph["context"])
        for asked in paragraph["qas"]:
            gold = tuple(dict.fromkeys(_text(answer["text"]) for answer in asked["answers"]))
            if gold and not asked.get("is_impossible", False):  # version 1 has no such field
                questions.append(Question(_text(asked["question"]), gold, (paragraph["context"],), near))
    return questions, contexts


def _hotpot_question(row: Any) -> tuple[list[Question], list[str]]:
    own = tuple(dict.fromkeys(f"{_text(title)}\n{''.join(sentences)}" for title, sentences in row["context"]))
    return [Question(_text(row["question"]), (_text(row["answer"]),), own, ())], list(own)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"must be a text, got {value!r}")
    return value
