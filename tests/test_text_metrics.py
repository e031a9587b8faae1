"""Scores of texts, against numbers worked by hand from the published definitions."""

import pytest

from retention_jax.tasks import text_metrics as metrics

pytestmark = pytest.mark.one_version

A_LITTLE_LESS = 1e-7  # the package `rouge` adds 1e-8 to a denominator


@pytest.mark.parametrize(
    "length, limit, kept",
    [(6, 6, [0, 1, 2, 3, 4, 5]), (7, 6, [0, 1, 2, 4, 5, 6]), (7, 5, [0, 1, 5, 6]), (9, 2, [0, 8]), (2, 9, [0, 1])],
)
def test_truncated_middle(length, limit, kept):
    assert metrics.truncated_middle(range(length), limit) == kept


@pytest.mark.parametrize("limit", [1, 0, -4])
def test_nothing_is_left_to_keep(limit):
    with pytest.raises(ValueError, match=f"cut to {limit} tokens"):
        metrics.truncated_middle(range(9), limit)


def test_normalised():
    assert metrics.normalised("  The cat's  toy, an-other\tA; theory ") == "cats toy another theory"


@pytest.mark.parametrize(
    "answer, gold, f1",
    [
        ("The Eiffel Tower.", "eiffel tower", 1),
        ("in Paris, France", "Paris", 2 * 1 / (3 + 1)),
        ("red red blue", "red green red yellow", 2 * 2 / (3 + 4)),  # a word counts as often as both have it
        ("London", "Paris", 0),
        ("the", "the", 0),  # nothing is left of it
        ("", "Paris", 0),
    ],
)
def test_qa_f1(answer, gold, f1):
    assert metrics.qa_f1(answer, gold) == pytest.approx(f1)


def test_chinese_qa_f1():
    assert metrics.chinese_qa_f1("是张三。", "张三") == pytest.approx(2 * 2 / (3 + 2))
    assert metrics.chinese_qa_f1("「红 楼梦」", "红楼梦！") == 1
    assert metrics.chinese_qa_f1("《红楼梦》", "红楼梦") == pytest.approx(
        2 * 3 / 7
    )  # the list has only the closing one
    assert metrics.chinese_qa_f1("李四", "张三") == 0


@pytest.mark.parametrize(
    "answer, gold, hits, words_of_answer, words_of_gold",
    [
        ("police kill the gunman", "police killed the gunman", 3, 4, 4),  # Lin 2004, section 3.1
        ("the gunman police killed", "police killed the gunman", 2, 4, 4),
        # Lin 2004, section 3.2: one sentence finds w1 w2, the other w1 w3 w5.
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 4, 8, 5),  # as sets: w1 and w8 count once
        ("a a a a", "a b", 1, 1, 2),  # words count once
        ("a b.  ", "a b.", 2, 3, 2),  # the space behind the stop is a sentence of one empty word
        ("Red", "red", 0, 1, 1),  # case is kept
    ],
)
def test_rouge_l(answer, gold, hits, words_of_answer, words_of_gold):
    precision, recall = hits / words_of_answer, hits / words_of_gold
    f = 2 * precision * recall / (precision + recall) if hits else 0
    assert metrics.rouge_l(answer, gold) == pytest.approx(f, abs=A_LITTLE_LESS)


@pytest.mark.parametrize("answer, gold", [("", "a b"), ("a b", ""), ("...", "a"), ("", "")])
def test_rouge_l_of_nothing(answer, gold):
    assert metrics.rouge_l(answer, gold) == 0


@pytest.mark.parametrize(
    "answer, gold, hits, words",
    [
        ("Police, kill the GUNMAN!", "police killed the gunman", 3, 8),
        ("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 4, 15),
        ("w1 w3\nw1 w2", "w1 w2 w3", 3, 7),
        ("w1 w3. w1 w2", "w1 w2 w3", 2, 7),  # one sentence: stops end none
        ("a", "a\na", 1, 3),  # both lines find the one word of the answer
        ("a a\n\n", "a b a", 2, 5),
        ("...", "a", 0, 1),
    ],
)
def test_rouge_l_sum(answer, gold, hits, words):
    assert metrics.rouge_l_sum(answer, gold) == pytest.approx(2 * hits / words)


def test_which_longest_common_subsequence_counts():
    # "b a" and "a b" share a or b. `rouge` steps back in the answer first and keeps b, so "a x" adds a;
    # `rouge_score` steps back in the reference first and keeps a, to which "a x" adds nothing.
    assert metrics.rouge_l("b a", "a b") == pytest.approx(1 / 2, abs=A_LITTLE_LESS)
    assert metrics.rouge_l("b a. a x", "a b") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3), abs=A_LITTLE_LESS)
    assert metrics.rouge_l_sum("b a\na x", "a b") == pytest.approx(2 * 1 / 6)


CLASSES = ("Date", "Expression abbreviated", "Abbreviation", "Other location", "Location")


@pytest.mark.parametrize(
    "answer, gold, score",
    [
        ("Date", "Date", 1),
        ("Type: Date or Abbreviation", "Date", 1 / 2),
        ("Abbreviation", "Date", 0),
        ("date", "Date", 0),
        ("", "Date", 0),
        ("Other location, not Location", "Other location", 1 / 2),  # "Location" is no part of "Other location"
    ],
)
def test_classification(answer, gold, score):
    assert metrics.classification(answer, gold, CLASSES) == score


def test_parts_of_the_right_class_do_not_count():
    assert metrics.classification("a hot dog", "hot dog", ("dog", "cat", "hot dog")) == 1
    assert metrics.classification("a dog", "hot dog", ("dog", "cat", "hot dog")) == 0
    # Walking along the list that it shortens, the published loop skips "hot" behind "dog", so two names are left.
    assert metrics.classification("a hot dog", "hot dog", ("dog", "hot", "hot dog")) == 1 / 2


@pytest.mark.parametrize(
    "answer, score", [("7", 1), ("Paragraph 7 or 12", 1 / 2), ("17", 0), ("seven", 0), ("7, 7", 1)]
)
def test_number_share(answer, score):
    assert metrics.number_share(answer, "7") == score


@pytest.mark.parametrize(
    "answer, gold, score",
    [
        ("return x", "return x", 1),
        ("\n\nreturn x\nreturn y", "return x", 1),  # the first line
        ("```python\n# a comment\n// another\nreturn x", "return x", 1),  # the first that is code
        ("```", "return x", 0),
        ("abcd", "bcde", 0.75),  # "bcd" of both: 2 * 3 / 8
        ("abc", "axc", 0.67),  # "a" and "c": 2 * 2 / 6, in whole percent
        ("ab", "ba", 0.5),  # one letter in order; difflib finds one block, 2 * 1 / 4
        ("", "", 1),
    ],
)
def test_edit_similarity(answer, gold, score):
    assert metrics.edit_similarity(answer, gold) == score


@pytest.mark.parametrize(
    "answer, number", [("it is 12.", 12), ("3.5 or 4", 3.5), ("-8", 8), ("1,234", 1), ("none", None), (".5", 5)]
)
def test_first_number(answer, number):
    assert metrics.first_number(answer) == number


def test_share_contained():
    assert metrics.share_contained("x1 and X2", ("X1", "x2", "X3")) == 0.67
    assert metrics.share_contained("X1 X2 X3", ("X1", "X2", "X3")) == 1
    assert metrics.share_contained("", ("X1",)) == 0
