"""Maths benchmarks: what counts as the same answer, and that nothing a model writes can stop the comparison."""

import json
import pathlib
import time

import pytest

from retention_jax.tasks import math_answers, maths
from retention_jax.tasks.math_answers import final_answer, is_right

pytestmark = pytest.mark.one_version

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.parametrize(
    "answer, result",
    [
        (r"first \boxed{3}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}} and \boxed{\frac{1}{", r"\{1, 2\}"),
        ("so 9 * 2 = 18\n#### 18", "18"),
        ("The answer is 18.", None),
    ],
)
def test_the_last_mark_counts(answer, result):
    assert final_answer(answer) == result


RIGHT = [
    (r"\boxed{1/2}", "0.5"),
    (r"\boxed{0.5}", r"\frac{1}{2}"),
    (r"\boxed{\dfrac12}", "1/2"),
    (r"\boxed{1,000}", "1000"),
    (r"\boxed{\$18}", "18"),
    (r"\boxed{18}", r"\$18"),
    (r"\boxed{32348}", r"\$32,\!348"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{50\%}", "0.5"),
    (r"\boxed{18\text{ dollars}}", "18"),
    (r"\boxed{5\,\mathrm{cm}^2}", "5"),
    (r"\boxed{x=5}", "5"),
    (r"\boxed{\left[2,5\right)}", "[2,5)"),
    (r"\boxed{[-2,7]}", r"x \in [-2,7]"),
    (r"\boxed{\{1, 2, 3\}}", r"\{3,2,1\}"),
    (r"\boxed{2,1,3}", "1,2,3"),
    (r"\boxed{\begin{bmatrix}1&2\\3&4\end{bmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\boxed{Evelyn}", r"\text{Evelyn}"),
    (r"\boxed{C}", r"\text{(C)}"),
    (r"\boxed{1-\sqrt{19}, 1+\sqrt{19}}", r"1 \pm \sqrt{19}"),
    (r"\boxed{ab+2a+5b+10}", "(a+5)(b+2)"),
    ("so she has\n#### 1,450", "1450"),
    ("#### -3", "-3"),
    ("She makes $18 every day.", "18"),
    ("The answer is **18**.", "18"),
    ("Thus \\[\n x = 5\n\\]", "5"),
    ("#### 18.", "18"),
    ("#### 18 dollars", "18"),
    ("#### **18**", "18"),
    ("#### Answer: 18", "18"),
    (r"\boxed{18.}", "18"),
    (r"\boxed{\text{18 apples}}", "18"),
    (r"\boxed{18~\text{apples}}", "18"),
    (r"\boxed{18 km/h}", "18"),
    (r"\boxed{18 miles per hour.}", "18"),
    (r"\boxed{18 million dollars}", "18000000"),
    (r"\boxed{18}. (It stands in \boxed{} as asked.)", "18"),
    (r"\boxed{1\,000}", "1000"),
    ("#### Step 1\nShe sells 9.\n#### 2. Add 4 eggs\n#### Conclusion\nShe has 18 eggs.", "18"),
    (r"\boxed{1/2006!}", r"\frac{1}{2006!}"),
]
WRONG = [
    (r"\boxed{0.33}", "1/3"),
    ("#### 18", "-18"),
    (r"\boxed{[2,5]}", "[2,5)"),
    (r"\boxed{\{1,2\}}", r"\{1,2,3\}"),
    (r"\boxed{\begin{pmatrix}1&2\\3&5\end{pmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\boxed{\text{Navin}}", r"\text{Evelyn}"),
    (r"\boxed{(B)}", r"\text{(C)}"),
    (r"\boxed{18}, no \boxed{19}", "18"),
    ("", "18"),
    (r"\boxed{}", "18"),
    (r"\boxed{x=5}", "6"),
    (r"\boxed{100}", "1,000"),
    (r"\boxed{(1,2,3)}", "(3,2,1)"),
    ("The answer is 18", "81"),
    (r"\boxed{1/2004!}", "1/2006!"),
    (r"\boxed{10^{-8}}", "10^{-9}"),
    (r"\boxed{18 million}", "18"),
    (r"\boxed{3 x}", "3"),
    (r"\boxed{18 or 19}", "18"),
]


def test_right_answers_oddly_written():
    assert [case for case in RIGHT if not is_right(*case)] == []


def test_wrong_answers():
    assert [case for case in WRONG if is_right(*case)] == []


def test_an_answer_that_cannot_be_computed_is_wrong_and_the_next_one_is_compared(monkeypatch):
    monkeypatch.setattr(math_answers, "TIME_LIMIT", 2.0)
    start = time.monotonic()
    assert not is_right(r"\boxed{9^{9^{9^{9}}}}", "5")
    assert time.monotonic() - start < 10
    assert is_right(r"\boxed{2/4}", "0.5")


@pytest.mark.parametrize(
    "answer, kept",
    [
        (r"so \boxed{\frac{1}{2}}. Let me che", r"\boxed{\frac{1}{2}}"),
        ("#### 1,018", r"\boxed{1,018}"),
        ("first 3 * 6 = 18", ""),
        (r"it is \boxed{1", ""),
    ],
)
def test_of_a_cut_answer_only_a_mark_counts(answer, kept):
    assert math_answers.marked(answer) == kept


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_gsm8k_rows(tmp_path):
    rows = [
        {"question": "How many?", "answer": "<<9*2=18>>\n#### 1,018"},
        {"question": "How cold?", "answer": "#### -3"},
    ]
    task = maths.load("gsm8k", write(tmp_path / "a.jsonl", *rows), max_new_tokens=8)
    assert [example.turns[0].gold for example in task.examples] == [("1,018",), ("-3",)]
    assert task.examples[0].turns[0].question == f"How many?\n{maths.INSTRUCTION}"
    assert task.score(task.examples[0], 0, r"It is \boxed{1018}.") == 1
    assert task.score(task.examples[1], 0, r"It is \boxed{3}.") == 0


def test_bad_rows_are_told_at_once(tmp_path):
    source = write(tmp_path / "a.jsonl", {"question": "x", "answer": "18"}, {"question": "", "answer": "#### 1"})
    with pytest.raises(ValueError, match="(?s)row 1: answer must end in ####.*row 2: needs texts"):
        maths.load("gsm8k", source, max_new_tokens=8)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_golds_of_gsm8k_score_and_those_of_other_problems_do_not():
    source = SHARED / "gsm8k" / "test.jsonl"
    task = maths.load("gsm8k", str(source), max_new_tokens=8)
    solutions = [json.loads(line)["answer"] for line in source.read_text().splitlines()]  # end in #### and the result
    assert len(task.examples) == len(solutions) == 1319
    chosen = range(0, 1319, 40)
    scores = lambda shift: [task.score(task.examples[i], 0, solutions[(i + shift) % 1319]) for i in chosen]
    assert scores(0) == [1.0] * len(chosen)
    assert sum(scores(1)) <= 2


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_golds_of_math500_score_and_those_of_other_problems_do_not():
    task = maths.load("math500", str(SHARED / "math500" / "test.jsonl"), max_new_tokens=8)
    chosen = task.examples[::16]
    boxes = [rf"So it is \boxed{{{example.turns[0].gold[0]}}}." for example in chosen]
    assert [task.score(example, 0, box) for example, box in zip(chosen, boxes, strict=True)] == [1.0] * len(chosen)
    shifted = [task.score(example, 0, box) for example, box in zip(chosen, boxes[1:] + boxes[:1], strict=True)]
    assert sum(shifted) <= 2  # two neighbours may have the same answer
