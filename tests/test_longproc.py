"""LongProc: prompts and scores beside the published files, odd answers, bad rows and bad prompts."""

import json
import pathlib
import shutil

import pytest
from text_helpers import write_rows

from retention_jax.tasks import countdown, longproc

pytestmark = pytest.mark.one_version

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data" / "longproc"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
REAL = ("countdown_0.5k", "countdown_2k", "path_traversal_0.5k", "tom_tracking_0.5k")

PROMPTS = {
    "countdown": "Search.\n{demonstration}\n\nNumbers: {nums}\nTarget: {target}",
    "path_traversal": "{city_context}\n\nFrom {src_city} to {dst_city}.",
    "tom_tracking": "Write {{place}}.\n{story}\n\n{question}",
}
ROUTE = "From Rome, take a bus to Bonn.\nFrom Bonn, take a train to Oslo.\nFrom Oslo, take a ferry to Bath."
STEPS = """Ann's belief on the cup:
- Step 0: (initial state) {Ann location: den; Ann's belief on cup: None}
- Step 1: (Ann location changed) {Ann location: attic; Ann's belief on cup: attic's shelf}
Final Answer: the attic's shelf"""
ROWS = {
    "countdown": {"nums": [21, 16, 17, 26], "target": 46},
    "path_traversal": {"context_nl": "Links {x} %s.", "question_repr": ["Rome", "Bath"], "answer_nl": ROUTE},
    "tom_tracking": {"story": "Step 0: Ann is in the {den}.", "question": "Where?", "solution": STEPS},
}


def load(folder, name, *rows, metric="accuracy", prompt=None):
    plain = name.rpartition("_")[0]
    text = PROMPTS[plain] if prompt is None else prompt
    (folder / "prompts.yaml").write_text(json.dumps({"USER_PROMPT": text}))  # JSON is YAML
    return longproc.load(name, str(write_rows(folder / "rows.json", list(rows) or [ROWS[plain]])), metric)


def load_real(folder, name, metric="accuracy"):
    """The published files under their published names."""
    shutil.copy(SHARED / f"{name.rpartition('_')[0]}_prompts.yaml", folder / "prompts.yaml")
    return longproc.load(name, shutil.copy(SHARED / f"{name}.json", folder), metric)


def score(task, answer):
    return task.score(task.examples[0], 0, answer)


# The published files


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_golds_are_right_and_those_of_other_rows_wrong(name, tmp_path):
    task, partial = (load_real(tmp_path, name, metric) for metric in longproc.METRICS)
    golds = [example.turns[0].gold[0] for example in task.examples]
    shifted = golds[1:] + golds[:1]
    mean = lambda task, answers: sum(map(lambda e, a: task.score(e, 0, a), task.examples, answers)) / len(answers)
    assert len(golds) == 200
    assert mean(task, golds) == mean(partial, golds) == 1
    assert mean(task, shifted) == 0
    assert mean(partial, shifted) < 0.1
    for example in task.examples:
        prompt = example.context + example.turns[0].question
        assert "{demonstration}" not in prompt and "{{" not in prompt
        assert example.turns[0].max_new_tokens == {"0.5k": 1024, "2k": 3072}[name.rpartition("_")[2]]


@needs_data
@pytest.mark.parametrize("name", REAL[:2])
def test_the_search_writes_the_published_traces(name):
    for row in json.loads((SHARED / f"{name}.json").read_text()):
        found = countdown.search(row["nums"], row["target"])
        published = row["demonstration"].replace("<Search Procedure>", countdown.HEADING)
        assert found is not None and found.text() == published.replace("\n</Search Procedure>", "")
        # Another of the published solutions, which the search does not come to first.
        assert countdown.is_solution(row["nums"], row["target"], "\n".join(row["solution"]))


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_prompts_are_the_published_template(name, tmp_path):
    task = load_real(tmp_path, name)
    plain = name.rpartition("_")[0]
    row = json.loads((SHARED / f"{name}.json").read_text())[3]
    context, question = task.examples[3].context, task.examples[3].turns[0].question
    whole = (tmp_path / "prompts.yaml").read_text()
    assert context.startswith("[TASK]\n") and whole.startswith("USER_PROMPT: |-\n  [TASK]\n")
    if plain == "countdown":
        assert context.count("# Example\nNumbers: [") == 2 and context.endswith("</Solution>\n")
        assert "Numbers: [40, 19, 23, 7]\nTarget: 29\n\n# Search Procedure\nInitial number set: [40, 19, 23" in context
        assert question.endswith(f"\nNumbers: {row['nums']}\nTarget: {row['target']}")
        assert question.startswith("\n\n[Problem]\n")
    elif plain == "path_traversal":
        assert context.endswith(f"[PROBLEM]\n{row['context_nl']}")
        start, end = row["question_repr"]
        assert question.startswith(f"\n\nNow find the route from {start} to {end} based on")
    else:
        assert context.endswith(f"[STORY]\n{row['story']}") and "(initial state) {Catherine location: patio;" in context
        assert question == f"\n\n[QUESTION]\n{row['question']}\n\n[YOUR ANSWER]"


def test_braces_in_data_are_text(tmp_path):
    path = load(tmp_path, "path_traversal_0.5k").examples[0]
    assert (path.context, path.turns[0].question) == ("Links {x} %s.", "\n\nFrom Rome to Bath.")
    tom = load(tmp_path, "tom_tracking_8k").examples[0]
    assert tom.context == "Write {place}.\nStep 0: Ann is in the {den}."
    assert tom.turns[0] == ("\n\nWhere?", (STEPS,), 9216, "", "", None)


# Answers


@pytest.mark.parametrize(
    "solution",
    [
        "21 + 16 = 37\n37 - 17 = 20\n26 + 20 = 46",
        "21+16=37\n 37-17 =20 \r\n20 + 26= 46",
        "16 - 17 = -1\n-1 + 21 = 20\n20 + 26 = 46",  # forbidden by the prompt, right in the published script
    ],
)
def test_countdown_right_answers_oddly_written(tmp_path, solution):
    task = load(tmp_path, "countdown_0.5k")
    assert score(task, f"I think\n<Solution>\n\n{solution}\n</Solution> of <Solution>1</Solution>") == 1


@pytest.mark.parametrize(
    "solution",
    [
        "21 + 16 = 37\n37 - 17 = 20",
        "21 + 16 = 37\n37 - 17 = 20\n26 + 20 = 46\n46 + 0 = 46",
        "21 + 21 = 42\n42 - 16 = 26\n26 + 20 = 46",  # a number twice
        "21 + 16 = 37\n37 - 17 = 20\n20 + 26 = 47",  # another target
        "21 + 16 = 36\n36 - 16 = 20\n26 + 20 = 46",  # wrong
        "21 + 16 = 37\n37 - 17 = 20\n26 + 21 = 46",  # not left
        "21 / 16 = 1\n17 + 1 = 18\n26 + 20 = 46",  # with a remainder
        "26 / 0 = 46\n21 + 16 = 37\n37 - 17 = 20",
        "21 + 16 = 37 = 37\n37 - 17 = 20\n26 + 20 = 46",
        "(21 + 16) = 37\n37 - 17 = 20\n26 + 20 = 46",
        "21 + 16 = 37.0\n37 - 17 = 20\n26 + 20 = 46",
        "__import__('os') + 16 = 37\n37 - 17 = 20\n26 + 20 = 46",
        "21 * 16 = 336\n336 * 17 = 5712\n5712 + 26 = 46",
        f"{'9' * 5000} + 16 = 37\n37 - 17 = 20\n26 + 20 = 46",
        "",
    ],
)
def test_countdown_wrong_answers(tmp_path, solution):
    task = load(tmp_path, "countdown_0.5k")
    assert score(task, f"<Solution>\n{solution}\n</Solution>") == 0


def test_countdown_wants_one_solution_in_its_tags(tmp_path):
    task = load(tmp_path, "countdown_0.5k")
    lines = "21 + 16 = 37\n37 - 17 = 20\n26 + 20 = 46"
    for answer in (lines, f"<Solution>\n{lines}", f"</Solution>{lines}<Solution>", f"<solution>{lines}</solution>"):
        assert score(task, answer) == 0
    assert score(task, f"<Solution>1</Solution><Solution>{lines}</Solution>") == 0


def test_division_is_exact():
    numbers, target = (50, 6, 7, 2), 58
    assert countdown.is_solution(numbers, target, "50 / 2 = 25\n7 * 6 = 42\n25 + 42 = 67") is False
    assert countdown.is_solution(numbers, 67, "50 / 2 = 25\n7 * 6 = 42\n25 + 42 = 67")
    assert not countdown.is_solution((7, 2, 1, 1), 5, "7 / 2 = 3\n3 + 1 = 4\n4 + 1 = 5")


def test_search_by_hand():
    found = countdown.search((1, 1, 1, 1), 4)
    assert found is not None and found.solution == ("1 + 1 = 2", "2 + 1 = 3", "3 + 1 = 4")
    assert found.trace.splitlines()[-1] == "     |- Try 3 + 1 = 4. Evaluate 4 == 4, target found!"
    assert countdown.search((1, 1, 1, 1), 99) is None


def test_countdown_in_part(tmp_path):
    task = load(tmp_path, "countdown_0.5k", metric="partial_accuracy")
    gold = task.examples[0].turns[0].gold[0]
    trace = gold.split("\n\n")[0].split("\n")  # the heading, and 11 lines
    assert len(trace) == 12 and trace[8] == "     |- Try 54 * 26 = 1404. Evaluate 1404 != 46, drop this branch."
    assert score(task, "\n".join(trace[:8])) == 7 / 11
    other = trace.copy()
    other[8] = "     |- Try 54 * 26 = 1400. Evaluate 1400 != 46, drop this branch."  # a wrong product, the right step
    assert score(task, "\n".join(other[:10])) == 9 / 11
    other[8] = "     |- Try 54 * 26 = 46. Evaluate 46 == 46, target found!"
    assert score(task, "\n".join(other)) == 7 / 11
    other[4] = other[4].replace("37", "73")  # other numbers are picked
    assert score(task, "\n".join(other)) == 3 / 11
    assert score(task, "\n".join(trace[1:])) == 0
    assert score(task, "<Solution>21+16=37\n37-17=20\n26+20=46</Solution>") == 1


def test_path_answers(tmp_path):
    whole, partial = (load(tmp_path, "path_traversal_2k", metric=metric) for metric in longproc.METRICS)
    lines = ROUTE.split("\n")
    wrong = ROUTE.replace("train", "plane")
    for answer, all_right, in_part in [
        (f"So:\n<Route>{ROUTE}\n\n</Route> done", 1, 1),
        (f"<Route>\n{ROUTE}\nFrom Bath, take a bus to Rome.\n</Route>", 0, 1),
        (f"<Route>\n{wrong}\n</Route>", 0, 1 / 3),
        ("<Route>\n" + "\n".join(lines[:2]) + "\n</Route>", 0, 2 / 3),
        ("<Route>\n" + "\n".join(lines[1:]) + "\n</Route>", 0, 0),
        (f"<Route>\n{ROUTE}", 0, 0),
        (ROUTE, 0, 0),
        ("", 0, 0),
    ]:
        assert (score(whole, answer), score(partial, answer)) == pytest.approx((all_right, in_part)), answer


def test_tom_answers(tmp_path):
    whole, partial = (load(tmp_path, "tom_tracking_0.5k", metric=metric) for metric in longproc.METRICS)
    odd = STEPS.lower().replace("step", "Step").replace("shelf}", "shelf").replace("'", "’").replace("belief on", "is")
    first, last = STEPS.index("- Step 0"), STEPS.index("- Step 1")
    for answer, all_right, in_part in [
        (STEPS, 1, 1),
        (odd, 1, 1),
        (f"- Step 0: let me see\n- Step 1: so\n\n{STEPS}", 1, 1),  # the last one counts
        (STEPS.replace("Final Answer: the attic's", "Final Answer: the den's"), 1, 1),  # not scored
        (STEPS.replace("attic; Ann", "den; Ann"), 0, 1 / 2),
        (STEPS.replace("None", "cup"), 0, 0),
        (STEPS[:last], 0, 1 / 2),
        (STEPS[:first] + STEPS[last:], 0, 0),
        (STEPS.replace("- Step 0", "   - Step 0"), 1, 1),  # the trace is cut out from there
        (STEPS.replace("- Step 1", "   - Step 1"), 0, 1 / 2),  # an indented line is none of it
        (STEPS.replace("\nFinal", "\n- Step 2: more\nFinal"), 0, 1),
        ("", 0, 0),
    ]:
        assert (score(whole, answer), score(partial, answer)) == (all_right, in_part), answer


# Bad files


def test_bad_rows_are_told_at_once(tmp_path):
    good = ROWS["countdown"]
    rows = [
        good,
        {"nums": [1, 2, 3]},
        good | {"nums": [1, 2, 3, "4"]},
        good | {"target": 9999},
        good | {"nums": [0] * 4},
    ]
    with pytest.raises(ValueError) as error:
        load(tmp_path, "countdown_0.5k", *rows)
    source = tmp_path / "rows.json"
    assert str(error.value).splitlines() == [
        f"{source}, row 2: needs 'target' (int)",
        f"{source}, row 3: 'nums' must be 4 whole numbers from 1 to 1999, not [1, 2, 3, '4']",
        f"{source}, row 4: 'target' cannot be reached: 9999 from [21, 16, 17, 26]",
        f"{source}, row 5: 'nums' must be 4 whole numbers from 1 to 1999, not [0, 0, 0, 0]",
    ]
    good = ROWS["path_traversal"]
    with pytest.raises(
        ValueError, match=r"(?s)row 1: 'question_repr' must be two texts.*row 2: 'answer_nl' must not be"
    ):
        load(tmp_path, "path_traversal_2k", good | {"question_repr": ["Rome"]}, good | {"answer_nl": " "})
    with pytest.raises(ValueError, match="row 1: 'solution' must have lines"):
        load(tmp_path, "tom_tracking_2k", ROWS["tom_tracking"] | {"solution": "Final Answer: x"})
    with pytest.raises(ValueError, match="row 1: needs 'story' .str.\n.*row 1: needs 'solution' .str., has NoneType"):
        load(tmp_path, "tom_tracking_2k", {"question": "x", "solution": None})


def test_bad_prompts_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"prompts.yaml: the fields .* must be story, question, not question, story"):
        load(tmp_path, "tom_tracking_2k", prompt="{question} {story}")
    for text in ("{story", "{story} }"):
        with pytest.raises(ValueError, match="prompts.yaml: needs USER_PROMPT, a text with fields in braces"):
            load(tmp_path, "tom_tracking_2k", prompt=text)
    rows = str(write_rows(tmp_path / "rows.json", [ROWS["tom_tracking"]]))
    for text in ("USER_PROMPT: [", "- USER_PROMPT", "USER: x", "USER_PROMPT: 3", ""):
        (tmp_path / "prompts.yaml").write_text(text)
        with pytest.raises(ValueError, match="prompts.yaml: needs USER_PROMPT, a text with fields in braces"):
            longproc.load("tom_tracking_2k", rows, "accuracy")
    (tmp_path / "prompts.yaml").unlink()
    with pytest.raises(ValueError, match="prompts.yaml: the prompt must lie beside .*rows.json: No such file"):
        longproc.load("tom_tracking_2k", rows, "accuracy")


def test_bad_names_are_refused():
    with pytest.raises(
        ValueError, match="'countdown_4k' is not a task of LongProc: it has countdown_0.5k, countdown_2k"
    ):
        longproc.load("countdown_4k", "x", "accuracy")
    with pytest.raises(ValueError, match="'f1' must be a metric of LongProc, accuracy or partial_accuracy"):
        longproc.load("countdown_2k", "x", "f1")
