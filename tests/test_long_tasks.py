"""LongBench, LongBench v2, LongMemEval and SCBench: prompts, scores and bad rows, on rows in the published formats."""

import json
from typing import Any

import pytest
from text_helpers import write_rows

from retention_jax.tasks import longbench, longbench_v2, longmemeval, scbench

pytestmark = pytest.mark.one_version


def prompt(example, turn=0):
    return example.context + example.turns[turn].question


def mean(task, answers):
    """The mean score when each turn of each example gets the answer of another place in the list."""
    places = [(example, turn) for example in task.examples for turn in range(len(example.turns))]
    scores = [task.score(*place, answer) for place, answer in zip(places, answers, strict=True)]
    return sum(scores) / len(scores)


def golds(task, which=0):
    return [turn.gold[which] for example in task.examples for turn in example.turns]


# LongBench

TEXTS = ("red lorry", "yellow bus", "green tram", "blue ferry")


def longbench_rows(answers=TEXTS, classes=None):
    return [
        {
            "_id": f"id{i}",
            "context": f"context {i}",
            "input": f"input {i}",
            "answers": [answer],
            "length": 3000 + 2500 * i,
            "dataset": "d",
            "language": "en",
            "all_classes": classes,
        }
        for i, answer in enumerate(answers)
    ]


@pytest.mark.parametrize("name", longbench.NAMES)
def test_longbench_golds_are_right_and_others_wrong(name, tmp_path):
    numbers = [f"Paragraph {n}" for n in (3, 17, 25, 8)]
    answers = numbers if name.startswith("passage") else TEXTS
    rows = longbench_rows(answers, list(TEXTS) if name.startswith(("trec", "lsht")) else None)
    task = longbench.load(name, str(write_rows(tmp_path / "rows.jsonl", rows)))
    assert mean(task, golds(task)) == pytest.approx(1, abs=1e-6)
    others = golds(task)[1:] + golds(task)[:1]
    assert mean(task, others) < 0.35  # edit similarity finds letters in common
    assert "{" not in prompt(task.examples[0])
    assert [example.turns[0].group for example in task.examples] == (
        ["0-4k", "4-8k", "8k+", "8k+"] if name.endswith("_e") else [""] * 4
    )
    few_shot_or_code = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
    assert task.chat == (name.removesuffix("_e") not in few_shot_or_code)


def test_longbench_prompts_as_published(tmp_path):
    source = str(write_rows(tmp_path / "rows.jsonl", longbench_rows()))
    load = lambda name: longbench.load(name, source).examples[1]
    assert prompt(load("qasper")) == (
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a "
        "single phrase or sentence if possible. If the question cannot be answered based on the information in the "
        'article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
        "Do not provide any explanation.\n\nArticle: context 1\n\n Answer the question based on the above article as "
        "concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
        'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
        '"no", or "unanswerable". Do not provide any explanation.\n\nQuestion: input 1\n\nAnswer:'
    )
    repobench = load("repobench-p")
    assert repobench.context == "Please complete the code given below. \ncontext 1"
    assert repobench.turns[0].question == "input 1Next line of code:\n"
    assert [load(name).turns[0].max_new_tokens for name in ("narrativeqa", "gov_report", "hotpotqa", "samsum")] == [
        *(128, 512, 32, 128)
    ]


def test_longbench_takes_the_best_reference_and_one_line(tmp_path):
    rows = longbench_rows()
    rows[0]["answers"] = ["a tram", "a red lorry"]
    source = str(write_rows(tmp_path / "rows.jsonl", rows))
    for name, first_line in (("triviaqa", 1), ("hotpotqa", 2 * 2 / (2 + 4))):
        task = longbench.load(name, source)
        assert task.score(task.examples[0], 0, "\nRed lorry.\nQuestion: next") == pytest.approx(first_line)


def test_longbench_tells_all_bad_rows(tmp_path):
    rows = longbench_rows()
    del rows[1]["context"]
    rows[2]["answers"] = []
    rows[3]["length"] = "9"
    source = str(write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ValueError) as error:
        longbench.load("trec", source)
    said = str(error.value)
    assert "row 1: needs 'all_classes' (list), has NoneType" in said
    assert "row 2: needs 'context' (str)" in said
    assert "row 3: 'answers' must be texts, at least one" in said
    assert "row 4: needs 'length' (int), has str" in said
    write_rows(tmp_path / "rows.jsonl", longbench_rows() + longbench_rows())
    with pytest.raises(ValueError, match="row 5: has the '_id' of row 1, 'id0'"):
        longbench.load("qasper", source)
    with pytest.raises(ValueError, match="row 1: 'answers' must hold numbers"):
        longbench.load("passage_count", source)
    with pytest.raises(ValueError, match="'dureader' is not a task of LongBench: it has narrativeqa"):
        longbench.load("dureader", source)


# LongBench v2


def v2_rows():
    return [
        {
            "_id": f"id{i}",
            "domain": "d",
            "sub_domain": "s",
            "difficulty": ("easy", "hard")[i % 2],
            "length": ("short", "medium", "short")[i],
            "question": f" question {i} ",
            **{f"choice_{letter}": f"choice {letter}" for letter in "ABCD"},
            "answer": "BDA"[i],
            "context": f"\ncontext {i}\n",
        }
        for i in range(3)
    ]


def test_longbench_v2(tmp_path):
    source = str(write_rows(tmp_path / "data.json", v2_rows()))
    task = longbench_v2.load("all", source)
    assert prompt(task.examples[1]) == (
        "Please read the following text and answer the question below.\n\n<text>\ncontext 1\n</text>\n\n"
        "What is the correct answer to this question: question 1\nChoices:\n(A) choice A\n(B) choice B\n(C) choice C\n"
        '(D) choice D\n\nFormat your response as follows: "The correct answer is (insert answer here)".'
    )
    assert [example.turns[0].group for example in task.examples] == ["easy, short", "hard, medium", "easy, short"]
    assert mean(task, [f"The correct answer is ({letter})." for letter in golds(task)]) == 1
    assert mean(task, [f"The correct answer is ({letter})." for letter in "DAB"]) == 0
    assert [e.name for e in longbench_v2.load("short", source).examples] == ["id0", "id2"]
    with pytest.raises(ValueError, match="none of 3 questions is 'long'"):
        longbench_v2.load("long", source)


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("**The correct answer is (C)**", "C"),
        ("So: The correct answer is B.", "B"),
        ("The correct answer is A, no, The correct answer is (D)", "D"),  # in parentheses goes first
        ("the correct answer is (C)", None),
        ("C", None),
    ],
)
def test_longbench_v2_reads_answers(answer, letter):
    assert longbench_v2.choice(answer) == letter


def test_longbench_v2_bad_rows(tmp_path):
    rows = v2_rows()
    rows[0]["answer"], rows[1]["length"] = "E", "huge"
    del rows[2]["choice_C"]
    with pytest.raises(ValueError, match="row 1: 'answer'.*'E'\n.*row 2: 'length'.*'huge'\n.*row 3: needs 'choice_C'"):
        longbench_v2.load("all", str(write_rows(tmp_path / "data.json", rows)))


# LongMemEval


def memory_rows():
    kinds = [*longmemeval._JUDGED, "multi-session"]
    sessions = [
        [{"role": "user", "content": "late", "has_answer": True}, {"role": "assistant", "content": "é"}],
        [{"role": "user", "content": "early"}],
    ]
    return [
        {
            "question_id": f"q{i}" + ("_abs" if i == 6 else ""),
            "question_type": kind,
            "question": f"question {i}?",
            "answer": i if i == 2 else f"answer {i}",
            "question_date": "2023/05/30 (Tue) 23:40",
            "haystack_session_ids": ["a", "b"],
            "haystack_dates": ["2023/05/21 (Sun) 10:00", "2023/05/20 (Sat) 02:21"],
            "haystack_sessions": sessions,
            "answer_session_ids": ["a"],
        }
        for i, kind in enumerate(kinds)
    ]


def test_longmemeval(tmp_path):
    asked = []

    def ask(text):
        asked.append(text)
        response, gold = text.split("Model Response: ")[1].split("\n")[0], text.split("\n\n")[2]
        return "Yes." if gold.endswith(f": {response}") else "No."

    source = str(write_rows(tmp_path / "s.json", memory_rows()))
    task = longmemeval.load("direct", source, ask)
    assert prompt(task.examples[0]) == (
        "I will give you several history chats between you and a user. Please answer the question based on the "
        "relevant chat history.\n\n\nHistory Chats:\n\n"
        "\n### Session 1:\nSession Date: 2023/05/20 (Sat) 02:21\nSession Content:\n\n"
        '[{"role": "user", "content": "early"}]\n'
        "\n### Session 2:\nSession Date: 2023/05/21 (Sun) 10:00\nSession Content:\n\n"
        '[{"role": "user", "content": "late"}, {"role": "assistant", "content": "\\u00e9"}]\n'
        "\n\nCurrent Date: 2023/05/30 (Tue) 23:40\nQuestion: question 0?\nAnswer:"
    )
    assert [example.turns[0].group for example in task.examples][5:] == [
        *("single-session-preference", "multi-session, abstention")
    ]
    assert mean(task, golds(task)) == 1
    assert mean(task, golds(task)[1:] + golds(task)[:1]) == 0
    assert ["off-by-one" in text for text in asked[:7]] == [False, False, False, True, False, False, False]
    assert "\n\nRubric: answer 5\n\n" in asked[5]
    assert asked[6].startswith("I will give you an unanswerable question") and "\n\nExplanation: answer 6" in asked[6]
    steps = longmemeval.load("step_by_step", source, ask)
    assert steps.examples[0].turns[0].question.endswith("\nAnswer (step by step):")
    assert (task.examples[0].turns[0].max_new_tokens, steps.examples[0].turns[0].max_new_tokens) == (500, 800)


def test_longmemeval_bad_rows(tmp_path):
    rows = memory_rows()
    rows[0]["question_type"] = "riddle"
    rows[1]["haystack_dates"] = []
    rows[2]["haystack_sessions"] = [[{"role": "user"}], "text"]
    del rows[3]["question_date"]
    source = str(write_rows(tmp_path / "s.json", rows))
    with pytest.raises(ValueError) as error:
        longmemeval.load("direct", source, str)
    for part in (
        "row 1: 'question_type' must be one of",
        "row 2: 'haystack_dates' must be 2 texts",
        "row 3: session 1: a message needs 'content' (str)",
        "row 3: session 2 must be a list",
        "row 4: needs 'question_date'",
    ):
        assert part in str(error.value)


# SCBench


def scbench_rows(name):
    turns: list[dict[str, Any]] = [{"input": f"ask {i}", "answer": answer} for i, answer in enumerate(TEXTS)]
    row: dict[str, Any] = {"id": 1, "context": "the context", "multi_turns": turns}
    for i, turn in enumerate(turns):
        if name == "qa_chn":  # no character is in two answers
            turn["answer"] = ("张三", "红楼梦", "北京", "李白")[i]
        if name == "mf":
            turn |= {"input": f"One number. The {i}th number is: ", "answer": 10 + i}
        if name == "vt":
            turn["answer"] = [f"{turn['answer']} {n}" for n in range(2)]
        if name == "choice_eng":
            turn["options"] = [TEXTS[(i + n) % 4] for n in (i, i + 1, i + 2, i + 3)]
        if name == "summary_with_needles":
            turn |= {"task": "scbench_passkey", "answer": f"7{i}"} if i % 2 else {"task": "scbench_summary"}
    if name == "mf":
        row["context"] = [3, 1, 2]
    if name == "many_shot":
        row["task"] = "snarks"
    if name == "vt":
        row["input"] = row.pop("context")
    return [row]


@pytest.mark.parametrize("mode", scbench.MODES)
@pytest.mark.parametrize("name", scbench.NAMES)
def test_scbench_golds_are_right_and_others_wrong(name, mode, tmp_path):
    task = scbench.load(name, str(write_rows(tmp_path / "rows.jsonl", scbench_rows(name))), mode)
    said = golds(task)
    if name == "vt":
        said = [" ".join(turn.gold) for example in task.examples for turn in example.turns]
    if name == "choice_eng":
        said = golds(task, 1)
        assert said == ["A", "D", "C", "B"]
    assert mean(task, said) == 1
    assert mean(task, said[1:] + said[:1]) == 0
    assert len(task.examples) == (1 if mode == "multi_turn" else 4)
    assert len({example.context for example in task.examples}) == 1


def test_scbench_prompts_as_published(tmp_path):
    load = lambda name, mode: (
        scbench.load(name, str(write_rows(tmp_path / "rows.jsonl", scbench_rows(name))), mode).examples
    )
    (kv,) = load("kv", "multi_turn")
    assert kv.context == (
        "Extract the value corresponding to the specified key in the JSON object below.\n\nthe context"
    )
    assert [turn.question for turn in kv.turns[:2]] == ["\n\nask 0", "ask 1"]
    assert [turn.told for turn in kv.turns] == list(TEXTS)  # what the model reads as its own answers
    assert load("vt", "multi_turn")[0].turns[0].told == "['red lorry 0', 'red lorry 1']"
    assert [example.turns[0].question for example in load("kv", "same_context")[:2]] == ["ask 0", "ask 1"]

    (mf,) = load("mf", "multi_turn")
    assert prompt(mf) == "What is the 0th number?\n\n[3, 1, 2]\n\nOne number. The 0th number is: "
    assert mf.turns[1].question == "What is the 1th number?\n\nOne number. The 1th number is: "
    assert load("mf", "same_context")[0].context == "One number. The 0th number is: \n\n[3, 1, 2]"

    (choice,) = load("choice_eng", "multi_turn")
    options = "A. red lorry\nB. yellow bus\nC. green tram\nD. blue ferry\n\n"
    assert choice.turns[0].question == f"\n\nQuestion: ask 0\n{options}The the correct answer is"
    assert choice.turns[0].gold == ("red lorry", "A")

    (summary,) = load("summary", "multi_turn")
    assert [turn.answer_prefix for turn in summary.turns] == ["", "This paper", "This paper", "This paper"]
    (mixed,) = load("summary_with_needles", "multi_turn")
    assert [turn.max_new_tokens for turn in mixed.turns] == [800, 15, 800, 15]
    assert [turn.group for turn in mixed.turns] == ["summary", "passkey"] * 2
    assert [example.turns[0].group for example in load("summary_with_needles", "same_context")] == [
        *("summary", "passkey") * 2
    ]


@pytest.mark.parametrize(
    "name, answer, right",
    [
        ("choice_eng", "A. red lorry", True),
        ("choice_eng", "Because", False),  # its first letter is one
        ("choice_eng", "red lorry", True),
        ("choice_eng", "I say the answer is: A", True),
        ("choice_eng", "the answer is B, not A", False),
        ("choice_eng", "it is (x) or A?", True),
        ("choice_eng", "no idea", False),
        ("choice_eng", "", False),
        ("mf", "it is 10.7", True),  # whole numbers are cut
        ("mf", "11 or 10", False),
        ("mf", "none", False),
        ("qa_eng", "a Red Lorry!", True),
        ("kv", "Red lorry", False),  # keys and values keep their case
        ("many_shot", "red", False),
    ],
)
def test_scbench_reads_answers(name, answer, right, tmp_path):
    task = scbench.load(name, str(write_rows(tmp_path / "rows.jsonl", scbench_rows(name))), "multi_turn")
    assert task.score(task.examples[0], 0, answer) == right


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("kv", {"answer": 3}, "row 1: turn 2: needs 'answer' \\(str\\), has int"),
        ("vt", {"answer": []}, "turn 2: 'answer' must be texts, at least one"),
        ("choice_eng", {"answer": "purple"}, "turn 2: 'answer' must be one of four 'options', not 'purple'"),
        ("mf", {"input": "how many?"}, "turn 2: 'input' must say \"The ... is\", not 'how many\\?'"),
        ("summary_with_needles", {"task": "scbench_kv"}, "turn 2: 'task' must be one of scbench_summary, scbench_pass"),
    ],
)
def test_scbench_bad_rows(name, change, message, tmp_path):
    rows = scbench_rows(name)
    rows[0]["multi_turns"][1] |= change
    source = str(write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ValueError, match=message):
        scbench.load(name, source, "multi_turn")


def test_scbench_bad_names(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"context": "c", "multi_turns": []}))
    source = str(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="'multi_turns' must hold at least one turn"):
        scbench.load("kv", source, "multi_turn")
    with pytest.raises(ValueError, match="'repoqa' is not a task of SCBench: it has kv,"):
        scbench.load("repoqa", source, "multi_turn")
    with pytest.raises(ValueError, match="'scdq' must be a mode of SCBench, multi_turn or same_context"):
        scbench.load("kv", source, "scdq")
