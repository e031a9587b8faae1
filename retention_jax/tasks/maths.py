"""Problems in words with one short result: GSM8K, MATH-500, AIME.

gsm8k     hf://datasets/openai/gsm8k/main/test-*.parquet, or test.jsonl of github.com/openai/grade-school-math
math500   hf://datasets/HuggingFaceH4/MATH-500/test.jsonl
aime      hf://datasets/HuggingFaceH4/aime_2024/data/*.parquet, hf://datasets/MathArena/aime_2025/data/*.parquet
"""

from typing import Any

from retention_jax.data import sources
from retention_jax.runtime import files
from retention_jax.tasks import math_answers
from retention_jax.tasks.example import Example, Task, Turn

# The model cards of Qwen3 and DeepSeek-R1 ask for this sentence in the prompt of a maths problem.
INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
NAMES = ("gsm8k", "math500", "aime")


def load(name: str, source: str, *, max_new_tokens: int) -> Task:
    """A maths benchmark, each problem a question without a context: nothing is read before the question is known.

    Args:
      name: `gsm8k`, `math500` (scores are also averaged over levels) or `aime`.
      source: rows with `problem` or `question`, and `answer` (`data.sources.objects`).
      max_new_tokens: of an answer. R-KV (arXiv 2505.24133) lets GSM8K, MATH-500 and AIME take 8,192, 16,384 and 32,768
        tokens with the prompt, TRIM-KV (arXiv 2512.03324) 32,768 each.

    Raises:
      ValueError: when there is no such benchmark, the source cannot be read, or rows lack a problem or an answer: the
        first ten at once.
    """
    if name not in NAMES:
        raise ValueError(f"{name!r} must be one of {', '.join(NAMES)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    examples, problems = [], []
    for number, row in enumerate(sources.objects(source), 1):
        try:
            examples.append(_example(name, number, row, max_new_tokens))
        except ValueError as error:
            problems.append(f"{source}, row {number}: {error}")
    if problems:
        raise ValueError(files.first_problems(problems))
    source = "prompt: model cards of Qwen3 and DeepSeek-R1"
    return Task(tuple(examples), "accuracy", _score, True, source, of_unended=math_answers.marked)


def _score(example: Example, turn: int, answer: str) -> float:
    return float(any(math_answers.is_right(answer, gold) for gold in example.turns[turn].gold))


def _example(name: str, number: int, row: dict[str, Any], max_new_tokens: int) -> Example:
    problem = row.get("problem", row.get("question"))
    answer = row.get("answer")
    if isinstance(answer, int):
        answer = str(answer)
    if not isinstance(problem, str) or not problem.strip() or not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"needs texts `problem` or `question`, and `answer`; has {', '.join(row)}")
    if name == "gsm8k":
        solution, mark, answer = answer.rpartition("####")
        if not mark:
            raise ValueError(f"answer must end in #### and the result, not {solution[-40:]!r}")
    question = f"{problem.strip()}\n{INSTRUCTION}"
    group = f"level {row['level']}" if name == "math500" and "level" in row else ""
    return Example(f"{name}/{number}", "", (Turn(question, (answer.strip(),), max_new_tokens, group=group),))
