"""RULER's prompts: beside prepared rows, followed, counted, filled, scored."""

import collections
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from text_helpers import write_rows

from retention_jax.tasks import ruler

pytestmark = pytest.mark.one_version

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")
LENGTHS = (1024, 4096, 8192)


def encode(text):
    """A token for each word."""
    return [0] * len(text.split())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An essay, and SQuAD and HotpotQA of 300 documents of 36 words each."""
    folder, rng = tmp_path_factory.mktemp("ruler"), np.random.default_rng(0)
    words = [f"w{i}" for i in range(500)]

    def sentence():
        return " ".join(rng.choice(words, 11)) + "."

    (folder / "essay.txt").write_text("\n\n".join(" ".join(sentence() for _ in range(5)) for _ in range(60)))
    articles = [
        {
            "title": f"title {a}",
            "paragraphs": [
                {
                    "context": f"{sentence()} The fact {a}.{p} is: answer{a}_{p}! {sentence()} {sentence()}",
                    "qas": [
                        {"question": f"What is fact {a}.{p}?", "answers": [{"text": f"answer{a}_{p}!"}] * 2},
                        {"question": "What is no fact?", "answers": [], "is_impossible": True},
                    ],
                }
                for p in range(10)
            ],
        }
        for a in range(30)
    ]
    write_rows(folder / "squad.json", [])
    (folder / "squad.json").write_text(json.dumps({"version": "v2.0", "data": articles}, indent=1))
    hotpot = [
        {
            "question": f"Who is number {q}?",
            "answer": f"person{q}.",
            "context": [[f"{q} and {d}", [sentence(), f" It is person{q}.", sentence()]] for d in range(10)],
        }
        for q in range(40)
    ]
    write_rows(folder / "hotpot.json", hotpot)
    return folder


def load(name, files, length=4096, examples=3, seed=0, encode=encode):
    return ruler.load(
        name,
        encode=encode,
        length=length,
        examples=examples,
        seed=seed,
        haystack=str(files / "essay.txt"),
        qa=str(files / ("squad.json" if name == "qa_1" else "hotpot.json")),
    )


def text_of(example):
    [turn] = example.turns
    return example.context + turn.question + turn.answer_prefix


# Beside rows that others have prepared


MULTIKEY_3 = re.compile(
    r"A special magic uuid is hidden within the following text\. Make sure to memorize it\. I will quiz you about the "
    r"uuid afterwards\.\n"
    rf"(?P<needles>(?:One of the special magic uuids for {UUID} is: {UUID}\.\n)+)"
    rf"What is the special magic uuid for (?P<asked>{UUID}) mentioned in the provided text\? "
    r"The special magic uuid for (?P=asked) mentioned in the provided text is"
)


def parse_multikey_3(example):
    """How many needles a prompt has, and where the asked one lies, 0 for the first and 1 for the last."""
    match = MULTIKEY_3.fullmatch(text_of(example))
    assert match
    needles = NEEDLE.findall(match["needles"])
    keys, values = [key for _, key, _ in needles], [value for _, _, value in needles]
    [gold] = example.turns[0].gold
    assert keys.count(match["asked"]) == 1 and values.count(gold) == 1
    place = keys.index(match["asked"])
    assert values[place] == gold
    return len(keys), place / (len(keys) - 1)


@needs_data
def test_needles_among_needles_are_like_prepared_rows(files):
    prepared = ruler.from_rows(str(SHARED / "ruler" / "niah_multikey_3_4096.jsonl"))
    assert len(prepared.examples) == 500
    backend = tokenizers.Tokenizer.from_file(str(SHARED / "tokenizer" / "neox" / "tokenizer.json"))
    neox = lambda text: backend.encode(text, add_special_tokens=False).ids
    theirs = [parse_multikey_3(example) for example in prepared.examples]
    tokens = [len(neox(text_of(example))) for example in prepared.examples[:100]]

    made = load("niah_multikey_3", files, int(np.mean(tokens)) + 128, 60, encode=neox)
    ours = [parse_multikey_3(example) for example in made.examples]
    for (theirs_count, _), (ours_count, _) in zip(theirs, ours, strict=False):
        assert abs(theirs_count - ours_count) <= 1
    for depths in ([depth for _, depth in theirs], [depth for _, depth in ours]):
        low, *quarters, high = np.quantile(depths, (0, 0.25, 0.5, 0.75, 1))
        np.testing.assert_allclose(quarters, (0.25, 0.5, 0.75), atol=0.15)
        assert low < 0.05 and high > 0.95
    assert made.metric == prepared.metric
    golds = [f"It is {example.turns[0].gold[0]}." for example in prepared.examples]
    scores = lambda said: [prepared.score(*pair) for pair in zip(prepared.examples, [0] * 500, said, strict=True)]
    assert scores(golds) == [1.0] * 500 and scores(golds[1:] + golds[:1]) == [0.0] * 500
    assert made.examples[0].turns[0].max_new_tokens == prepared.examples[0].turns[0].max_new_tokens


@pytest.mark.parametrize("name", ruler.NAMES)
def test_rows_fall_into_the_parts_they_were_made_of(name, files, tmp_path):
    task = load(name, files)
    rows = []
    for index, example in enumerate(task.examples):
        [turn] = example.turns
        whole = {"input": text_of(example)}
        if index == 1:  # as newer versions of RULER write them
            whole = {"input": example.context + turn.question, "answer_prefix": turn.answer_prefix}
        rows.append({"index": index, "outputs": list(turn.gold), "length": 4096, **whole})
    again = ruler.from_rows(str(write_rows(tmp_path / "rows.jsonl", rows)))
    assert [e._replace(name="") for e in again.examples] == [e._replace(name="") for e in task.examples]
    assert (again.metric, again.chat) == (task.metric, task.chat)
    assert len({e.name for e in again.examples}) == len({e.name for e in task.examples}) == 3


def test_rows_that_are_none_are_all_told(tmp_path, files):
    good = {"input": text_of(load("fwe", files).examples[0]), "outputs": ["a"]}
    other = {"input": text_of(load("vt", files).examples[0]), "outputs": ["a"]}
    bad = [
        good,
        {},
        {**good, "outputs": []},
        {**good, "input": "Why?"},
        {**other, "input": other["input"][:-200]},
        other,
    ]
    with pytest.raises(ValueError) as told:
        ruler.from_rows(str(write_rows(tmp_path / "rows.jsonl", bad)))
    lines = str(told.value).splitlines()
    wanted = ("row 2: input", "row 3: outputs", "row 4: .*no question", "row 5: .*answer prefix", "one task.*vt")
    assert len(lines) == len(wanted)
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.search(pattern, line)


# What is asked and what is right


@pytest.mark.parametrize(
    "name, haystack, key, value, keys, values, asked",
    (
        ("niah_single_1", "repeat", r"[A-Za-z '-]+-[A-Za-zñ '-]+", r"\d{7}", 1, 1, 1),
        ("niah_single_2", "essay", r"[A-Za-z '-]+-[A-Za-zñ '-]+", r"\d{7}", 1, 1, 1),
        ("niah_single_3", "essay", r"[A-Za-z '-]+-[A-Za-zñ '-]+", UUID, 1, 1, 1),
        ("niah_multikey_1", "essay", r"[A-Za-z '-]+-[A-Za-zñ '-]+", r"\d{7}", 4, 1, 1),
        ("niah_multikey_2", "needle", r"[A-Za-z '-]+-[A-Za-zñ '-]+", r"\d{7}", 1, 1, 1),
        ("niah_multikey_3", "needle", UUID, UUID, 1, 1, 1),
        ("niah_multivalue", "essay", r"[A-Za-z '-]+-[A-Za-zñ '-]+", r"\d{7}", 1, 4, 1),
        ("niah_multiquery", "essay", r"[A-Za-z '-]+-[A-Za-zñ '-]+", r"\d{7}", 4, 1, 4),
    ),
)
def test_needles(name, haystack, key, value, keys, values, asked, files):
    many = asked * values > 1
    number = "uuid" if value == UUID else "number"
    for example in load(name, files, examples=5).examples:
        [turn] = example.turns
        told = re.findall(rf"One of the special magic {number}s for ({key}) is: ({value})\.", example.context)
        held = collections.defaultdict(list)
        for k, v in told:
            held[k].append(v)
        assert all(len(v) == values for v in held.values())
        assert len(held) == keys if haystack != "needle" else len(held) > 100
        what = number + "s" if many else number
        pattern = (
            rf"What {'are all' if many else 'is'} the special magic {what} for (.*) mentioned in the provided text\?"
        )
        query = re.fullmatch(pattern, turn.question)
        assert query
        are = "are" if many else "is"
        assert turn.answer_prefix == f" The special magic {what} for {query[1]} mentioned in the provided text {are}"
        intro, *lines, last = example.context.split("\n")
        assert intro == (
            f"{'Some' if many else 'A'} special magic {what} {are} hidden within the following text. Make sure to "
            f"memorize it. I will quiz you about the {what} afterwards."
        )
        assert last == ""
        names = query[1].replace(" and ", " ").split(", ") if asked > 1 else [query[1]]
        assert len(names) == len(set(names)) == asked
        assert sorted(turn.gold) == sorted(itertools.chain(*(held[k] for k in names)))
        assert all(example.context.count(gold) == 1 for gold in turn.gold)
        rest = [re.sub(rf"One of the special magic {number}s for {key} is: {value}\. ?", "", line) for line in lines]
        if haystack == "repeat":
            noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
            assert collections.Counter(rest) == {noise: len(lines) - 1, "": 1}
        elif haystack == "needle":
            assert set(rest) == {""}
        else:  # the essay as it is, from its beginning
            assert len(lines) == 1
            words, essay = rest[0].split(), (files / "essay.txt").read_text().split()
            assert words == (essay * 2)[: len(words)]


def test_places_of_a_needle_in_an_essay_are_spread(files):
    depths = []
    for example in load("niah_single_2", files, examples=200).examples:
        depths.append(example.context.index("One of the") / len(example.context))
    np.testing.assert_allclose(np.quantile(depths, (0, 0.25, 0.5, 0.75, 1)), (0, 0.25, 0.5, 0.75, 1), atol=0.1)


def test_variables_can_be_followed(files):
    for example in load("vt", files, examples=20).examples:
        [turn] = example.turns
        match = re.fullmatch(r"Question: Find all variables that are assigned the value (\d{5}) in .*", turn.question)
        assert match
        shown, asked = re.split("(?<=\n\n)(?=Memorize)", example.context)
        for text, value, names, letters in (
            (shown, re.findall(r"assigned the value (\d{5}), they", shown)[0], shown.split()[-5:], 3),
            (asked, match[1], list(turn.gold), 5),
        ):
            values, has = {}, []  # in the order of the text, as a reader would
            for variable, given in re.findall(r"^VAR ([A-Z]+) = (?:VAR )?(\w+) ?$", text, re.MULTILINE):
                values[variable] = values.get(given, given)
                has.append(variable)
            assert has == names and set(values.values()) == {value}
            assert {len(name) for name in names} == {letters} and len(set(names)) == 5
        assert turn.answer_prefix == (
            " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the "
            f"value {match[1]}, they are: "
        )


@pytest.mark.parametrize("length, often, seldom", ((1024, 6, 1), (4096, 30, 3)))
def test_common_words_are_the_most_common(length, often, seldom, files):
    for example in load("cwe", files, length, examples=5).examples:
        shown, asked = re.split("(?<=\n)(?=Below is a numbered)", example.context)
        for text, gold, counts in (
            (shown, re.findall(r"\d+\. (.+?)(?= \d+\. |$)", shown.split("list are: ")[1].strip()), None),
            (asked, example.turns[0].gold, {often, seldom}),
        ):
            listing = text.split("\n")[1]
            numbered = re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", listing)
            assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
            counted = collections.Counter(word for _, word in numbered)
            most, least = counted.most_common(10), counted.most_common()[10:]
            assert {word for word, _ in most} == set(gold)
            assert most[-1][1] > least[0][1]
            assert counts is None or set(counted.values()) == counts


@pytest.mark.parametrize("length", LENGTHS)
def test_frequent_words_are_the_most_frequent(length, files):
    for example in load("fwe", files, length, examples=5).examples:
        text = re.search(r"coded words\. (.*)\n", example.context)
        assert text
        (dots, most), *ranked = collections.Counter(text[1].split()).most_common()
        assert dots == "..." and [word for word, _ in ranked[:3]] == list(example.turns[0].gold)
        assert ranked[2][1] > ranked[3][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked)
        for rank, (_, count) in enumerate(ranked[:8], 2):
            assert abs(count - most / rank**2) <= 1


@pytest.mark.parametrize("name", ("qa_1", "qa_2"))
def test_documents_hold_the_answer_and_none_comes_twice(name, files):
    places = []
    for index, example in enumerate(load(name, files, examples=40).examples):
        [turn] = example.turns
        found = re.findall(r"Document (\d+):\n(.*?)(?=\n\nDocument |\n\n$)", example.context, re.S)
        numbers, documents = [number for number, _ in found], [document for _, document in found]
        assert [int(number) for number in numbers] == list(range(1, len(numbers) + 1))
        assert len(set(documents)) == len(documents) > 90
        holders = [i for i, document in enumerate(documents) if turn.gold[0] in document]
        assert len(holders) == (1 if name == "qa_1" else 10)
        places.append(holders[0] / len(documents))
        asked = f"What is fact 0.{index % 10}?" if name == "qa_1" else f"Who is number {index}?"
        if name == "qa_2" or index < 10:
            assert turn.question.endswith(f"\n\nQuestion: {asked}")
        if name == "qa_1":  # all of the same article
            assert sum(f"The fact {index // 10}." in document for document in documents) == 10
    assert min(places) < 0.2 and (name == "qa_2" or max(places) > 0.8)


# Scores


@pytest.mark.parametrize("name", ruler.NAMES)
def test_gold_is_right_and_another_gold_is_not(name, files):
    task = load(name, files, examples=8)
    everything = lambda example: "It is: " + ", ".join(example.turns[0].gold).upper() + "."
    assert all(task.score(example, 0, everything(example)) == 1 for example in task.examples)
    others = [*task.examples[1:], task.examples[0]]
    wrong = [task.score(a, 0, everything(b)) for a, b in zip(task.examples, others, strict=True)]
    assert np.mean(wrong) < 0.05
    assert all(task.score(example, 0, "") == 0 for example in task.examples)
    assert all(gold not in example.turns[0].question for example in task.examples for gold in example.turns[0].gold)
    assert task.chat and task.metric == ("string_match_part" if name.startswith("qa") else "string_match_all")


def test_scores_by_hand():
    assert ruler.string_match("string_match_all", ("one", "Two", "three", "4"), "TWO, 3, and one") == 0.5
    assert ruler.string_match("string_match_part", ("one", "Two"), "it is two.") == 1
    assert ruler.string_match("string_match_part", ("one", "Two"), "it is three.") == 0


# Lengths


@pytest.mark.parametrize("name", ruler.NAMES)
@pytest.mark.parametrize("length", LENGTHS)
def test_prompts_fill_the_length_and_never_exceed_it(name, length, files):
    new = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}[name.split("_")[0]]
    for example in load(name, files, length, examples=2).examples:
        assert example.turns[0].max_new_tokens == new
        assert 0.95 * length <= len(encode(text_of(example))) + new <= length


@pytest.mark.parametrize("start", (1, 5, 7, 50, 99, 1000))
@pytest.mark.parametrize("least, most", ((1, 10**6), (5, 99), (7, 7)))
def test_largest_amount(least, most, start):
    for limit in {least, least + 1, 50, 98, 99, 100, most} - set(range(least)):
        tried = []
        fits = lambda n, limit=limit, tried=tried: tried.append(n) or n <= limit
        assert ruler.largest(fits, start, least, most) == min(limit, most)
        assert all(least <= n <= most for n in tried)
        assert len(tried) <= 2 * np.log2(abs(min(limit, most) - min(max(start, least), most)) + 2) + 3


def test_what_comes_depends_on_the_arguments_only(files):
    script = """
import sys
from retention_jax.tasks import ruler

encode = lambda text: [0] * len(text.split())
names = ("niah_multikey_2", "cwe", "vt", "fwe")
tasks = [ruler.load(name, encode=encode, length=1024, examples=2, seed=5) for name in names]
sys.stdout.buffer.write("\\n".join(repr(task.examples) for task in tasks).encode())
"""
    other = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, check=True
    )
    for told, name in zip(other.stdout.split(b"\n"), ("niah_multikey_2", "cwe", "vt", "fwe"), strict=True):
        assert told == repr(load(name, files, 1024, 2, seed=5).examples).encode()
    for name in ruler.NAMES:
        a, b = load(name, files, 1024, 2, seed=5), load(name, files, 1024, 2, seed=6)
        assert a.examples[0].context != b.examples[0].context
        assert a.examples[0].context != a.examples[1].context


# Files and numbers that are refused


@pytest.mark.parametrize(
    "name, changes, told",
    (
        ("niah_single_9", {}, "unknown RULER task 'niah_single_9'; known: niah_single_1"),
        ("vt", dict(length=255, examples=0, seed=-1), "length must be .* 255; examples .* 0; seed must not .* -1"),
        ("niah_single_2", dict(haystack=""), "haystack must name .*Paul Graham"),
        ("qa_1", dict(qa=""), "qa must name SQuAD"),
        ("qa_2", dict(qa="squad.json"), "must be a list, as HotpotQA"),
        ("qa_1", dict(qa="hotpot.json"), "must be an object with a list `data`, as SQuAD"),
        ("qa_1", dict(examples=301), "has 300 questions, examples=301"),
        ("qa_2", dict(length=256), "example 0: needs .* tokens at least, length=256"),
        ("qa_2", dict(length=32768), "there is text for .* tokens, length=32768"),
    ),
)
def test_refused(name, changes, told, files):
    given = dict(encode=encode, length=4096, examples=1, seed=0, haystack="essay.txt")
    given |= dict(qa="hotpot.json" if name == "qa_2" else "squad.json") | changes
    given |= {key: str(files / given[key]) for key in ("haystack", "qa") if given[key]}
    with pytest.raises(ValueError, match=told):
        ruler.load(name, **given)
