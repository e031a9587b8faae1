"""`python -m retention_jax.corpus`: facts in a text, plain text, and a model's own answers."""

import pathlib
import re
import runpy

import numpy as np
import pytest
from absl import flags, logging
from text_helpers import save_tokenizer

from retention_jax.corpus import attributes, documents, facts, passages, talk, words
from retention_jax.data import conversations, sources
from retention_jax.tasks import ruler_prompts
from retention_jax.text import chat, tokenizer

ATTRIBUTES = (*attributes.PERSONAL, *attributes.OTHER)
KINDS = (
    facts.one,
    facts.changed,
    facts.profile,
    facts.several,
    facts.chain,
    facts.handed,
    facts.table,
    facts.listing,
    facts.votes,
)


def rng_of(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def made_up_text(paragraphs: int = 120) -> str:
    """Sentences of syllables, so that no fact is in them, with a heading and lines of 60 characters."""
    rng, lines = rng_of(1), ["CHAPTER ONE"]
    for _ in range(paragraphs):
        sentences = []
        for _ in range(rng.integers(1, 6)):
            said = ["".join(rng.choice(["ba", "do", "ki", "lu", "mo"], 3)) for _ in range(rng.integers(4, 20))]
            sentences.append(" ".join(said).capitalize() + ".")
        text = " ".join(sentences)
        lines += ["", *re.findall(r".{1,60}(?:\s|$)", text)]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("texts") / "book.txt"
    path.write_text(made_up_text())
    return path


def command(*arguments: str) -> None:
    """The command's main, as `python -m` runs it."""
    module = runpy.run_module("retention_jax.corpus.__main__", run_name="command")
    values = flags.FlagValues()
    values["verbosity"] = flags.FLAGS["verbosity"]
    module["define_flags"](values)
    before = logging.get_verbosity()
    try:
        module["main"](values(["corpus", *arguments])[:1], values)
    finally:
        logging.set_verbosity(before)


def characters(shortest: int, longest: int) -> documents.Lengths:
    return documents.Lengths(shortest, longest, len, length_of)


def length_of(messages) -> int:
    return sum(len(m["content"]) for m in messages)


def some_rows(book: pathlib.Path, count: int = 60, shortest: int = 800, longest: int = 4000) -> list[dict]:
    texts = [passages.read(str(book))]
    return [documents.conversation(rng_of(7, i), texts, characters(shortest, longest)) for i in range(count)]


# Facts


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_an_answer_has_its_values_and_they_were_told(kind):
    for i in range(60):
        fact = kind(rng_of(i), ATTRIBUTES[i % len(ATTRIBUTES)])
        assert fact.kind == kind.__name__ and fact.values
        for value in fact.values:
            assert value.lower() in fact.answer.lower()
            assert any(value.lower() in told.lower() for told in fact.told)
        assert not any(value.lower() in fact.denial.lower() for value in fact.values)
        assert not re.search(r"[{}]", "".join((*fact.told, fact.question, fact.answer, fact.denial)))


def test_every_attribute_is_told_asked_and_answered():
    for attribute in ATTRIBUTES:
        for i in range(20):
            fact = facts.one(rng_of(i), attribute)
            assert fact.values[0] in fact.told[0] and fact.values[0].lower() in fact.answer.lower()
            assert fact.values[0] not in fact.question


@pytest.mark.parametrize("kind", [facts.changed, facts.handed], ids=lambda k: k.__name__)
def test_the_last_value_counts(kind):
    for i in range(60):
        fact = kind(rng_of(i), ATTRIBUTES[i % len(ATTRIBUTES)])
        (value,) = fact.values
        assert len(fact.told) > 1 and value in attributes.capital(fact.told[-1]) + fact.told[-1]
        assert not any(value in told for told in fact.told[:-1])


def test_votes_have_one_winner():
    for i in range(60):
        fact = facts.votes(rng_of(i), ATTRIBUTES[0])
        cast = fact.told[0].rpartition(": ")[2].removesuffix(".").split(", ")
        counts = sorted((cast.count(choice), choice) for choice in set(cast))
        assert counts[-1][1] == fact.values[0] and counts[-1][0] > counts[-2][0]


def test_a_chain_leads_from_its_question_to_its_answer():
    """By following what is told, and nothing else."""
    for i in range(60):
        fact = facts.chain(rng_of(i), ATTRIBUTES[0])
        shown: dict[str, str] = {}
        for _ in fact.told:
            for told in fact.told:
                if plain := re.match(r"(.+?) (?:shows|sits at) (\d+|table \d+)\.", told):
                    shown[plain[1].lower()] = plain[2]
                elif copied := re.match(
                    r"(.+?) (?:shows|is wired|sits at the same|was put).*? (dial \w+|\w+ \w+)(?: and| sits|\.)", told
                ):
                    if copied[2].lower() in shown:
                        shown[copied[1].lower()] = shown[copied[2].lower()]
        (value,) = set(shown.values())
        if fact.question.startswith("Which dials"):
            assert set(shown) == {dial.lower() for dial in fact.values} and value in fact.question
        else:
            assert fact.values == (value,)


def test_yours_for_mine():
    assert attributes.to_the_user("My sister met my aunt in Tammy's.") == "Your sister met your aunt in Tammy's."


# Documents


def test_facts_are_told_in_order_before_they_are_asked_for(book):
    seen = set()
    for row in some_rows(book):
        messages = row["messages"]
        assert row["facts"]
        for fact in row["facts"]:
            asking = messages[fact["message"]]
            assert asking["role"] == "user" and fact["question"] in asking["content"]
            assert fact["answer"] in messages[fact["message"] + 1]["content"]
            before = "\n".join(m["content"] for m in messages[: fact["message"] + 1])
            at = before.rindex(fact["question"])
            for told in reversed(fact["told"]):
                at = before.rindex(told, 0, at)
            seen.add(fact["kind"])
    assert seen == {kind.__name__ for kind in KINDS} | {"unsaid"}


def test_what_was_not_said_is_not_answered(book):
    unsaid = 0
    for row in some_rows(book):
        told = "\n".join(m["content"] for m in row["messages"] if m["role"] == "user")
        for fact in row["facts"]:
            if fact["kind"] == "unsaid":
                unsaid += 1
                assert fact["told"] == fact["values"] == []
                assert told.count(fact["question"]) == 1
                assert re.search(r"\b(not|Nothing|cannot|no)\b", fact["answer"])
    assert unsaid > 20


def test_users_and_assistants_take_turns(book):
    for row in some_rows(book):
        roles = [m["role"] for m in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(m["content"].strip() for m in row["messages"])


def test_a_table_or_list_stands_alone(book):
    blocks = 0
    for row in some_rows(book):
        messages = "\n\n".join(m["content"] for m in row["messages"])
        for block in {t for fact in row["facts"] for t in fact["told"] if "\n" in t}:
            blocks += 1
            assert f"\n\n{block}\n\n" in f"\n\n{messages}\n\n"
    assert blocks > 10


def test_nobody_says_the_same_thing_twice(book):
    for row in some_rows(book, 200):
        said = [m["content"] for m in row["messages"] if m["role"] == "user"]
        assert len(set(said)) == len(said)


def test_questions_come_far_after_what_they_are_about(book):
    distances = []
    for row in some_rows(book):
        texts = [m["content"] for m in row["messages"]]
        for fact in row["facts"]:
            if fact["told"]:
                before = "\n".join(texts[: fact["message"] + 1])
                asked = before.rindex(fact["question"])
                distances.append((asked - before.rindex(fact["told"][0], 0, asked)) / len(before))
    assert np.median(distances) > 0.4


@pytest.mark.parametrize("shortest, longest", [(800, 900), (1500, 6000), (20_000, 21_000)])
def test_lengths_are_in_the_range_and_spread_over_it(book, shortest, longest):
    texts = [passages.read(str(book))]
    found = []
    for i in range(20):
        found.append(length_of(documents.conversation(rng_of(i), texts, characters(shortest, longest))["messages"]))
        found.append(len(documents.text(rng_of(i), texts, characters(shortest, longest))["text"]))
    assert shortest <= min(found) and max(found) <= longest
    assert np.ptp(found) > 0.5 * (longest - shortest)


def test_lengths_in_tokens_are_those_that_training_reads(book, tmp_path):
    save_tokenizer(tmp_path)
    known = tokenizer.load(tmp_path)
    command(
        f"--texts={book}", f"--tokenizer={tmp_path}", "--shortest=1200", "--longest=1300", "--documents=4",
        f"--output={tmp_path}/facts.jsonl",
    )  # fmt: skip
    for row in sources.objects(f"{tmp_path}/facts.jsonl"):
        text = chat.render(known, row["messages"], add_generation_prompt=False)
        assert 1200 <= len(known.encode(text, bos=False)) <= 1300


def test_text_is_the_users_own_in_order(book):
    texts = [passages.read(str(book))]
    words_of_book = " ".join(book.read_text().split()[2:])
    found = documents.text(rng_of(0), texts, characters(1000, 2000))["text"]
    assert " ".join(found.split()) in f"{words_of_book} {words_of_book}"
    assert "\n\n" in found and "CHAPTER" not in found


def test_sentences_end_where_they_end(tmp_path):
    text = 'He saw Mr. Hill and J. Low. "Is it so?" She asked. It was 3.5 m high! Yes.'
    text += '\n\nII. THE NEXT DAY.\n\n"I?" I said.'
    (tmp_path / "t.txt").write_text(text)
    found = passages.read(str(tmp_path / "t.txt"))
    assert [p.text for p in found] == [
        "He saw Mr. Hill and J. Low.",
        '"Is it so?"',
        "She asked.",
        "It was 3.5 m high!",
        "Yes.",
        '"I?"',
        "I said.",
    ]
    assert [p.begins for p in found] == [True, False, False, False, False, True, False]


def test_a_long_sentence_is_cut_between_words(tmp_path):
    (tmp_path / "t.txt").write_text("word " * 300 + "end.")
    found = passages.read(str(tmp_path / "t.txt"))
    assert len(found) > 3 and max(len(p.text) for p in found) <= 400
    assert passages.join(found) == "word " * 300 + "end."
    assert [p.ends for p in found] == [False] * (len(found) - 1) + [True]


def test_nothing_shares_eight_words_with_ruler(book):
    """RULER is how gates are tested. Its sentences must not be what they were trained on."""
    kinds = [
        ruler_prompts.Needles(h, k, v, 4, 2, 2)
        for h in ("repeat", "needle")
        for k in ("word", "uuid")
        for v in ("number", "uuid")
    ]
    prompts = [ruler_prompts.needles(kind, (), 40, (0, i)) for i, kind in enumerate(kinds)]
    prompts += [
        ruler_prompts.needles(ruler_prompts.Needles("repeat"), (), 9, (1,)),
        ruler_prompts.variables(30, 9, (2,)),
    ]
    listed = ruler_prompts.english_words("noun")
    prompts += [ruler_prompts.common_words(60, listed, 1024, (3,)), ruler_prompts.frequent_words(300, 1024, (4,))]
    documents_of_qa = "Answer the question based on the given documents. Only give me the answer and do not output any "
    documents_of_qa += "other words. The following are given documents."
    prompts.append(ruler_prompts.Prompt("", documents_of_qa, "", ()))
    theirs = {gram for prompt in prompts for gram in grams(prompt.text)}
    assert len(theirs) > 500
    ours = {gram for row in some_rows(book, 120) for m in row["messages"] for gram in grams(m["content"])}
    templates = [*attributes.TOLD, *attributes.CHANGED, *attributes.ASKED, *talk.FIRST, *talk.NEXT, *talk.READ]
    templates += [wording for a in ATTRIBUTES for wording in (*a.told, *a.asked, *a.answered)]
    ours |= {gram for wording in templates for gram in grams(wording)}
    assert ours & theirs == set()
    assert grams("x " + prompts[0].question)[1] in theirs  # what the test would find


def grams(text: str, size: int = 8) -> list[tuple[str, ...]]:
    said = re.findall(r"\w+", text.lower())
    return [tuple(said[i : i + size]) for i in range(len(said) - size + 1)]


def test_no_module_here_takes_words_from_a_benchmark():
    folder = pathlib.Path(words.__file__).parent
    assert not [p for p in folder.glob("*.py") if re.search(r"import.*(wonderwords|ruler|tasks)", p.read_text())]


# The command


def write_facts(book: pathlib.Path, output: pathlib.Path, *more: str) -> bytes:
    command(f"--texts={book}", "--documents=6", "--shortest=900", "--longest=1500", f"--output={output}", *more)
    return output.read_bytes()


def test_the_same_arguments_write_the_same_file(book, tmp_path):
    first = write_facts(book, tmp_path / "a.jsonl")
    assert write_facts(book, tmp_path / "b.jsonl") == first
    assert write_facts(book, tmp_path / "c.jsonl", "--seed=1") != first
    longer = write_facts(book, tmp_path / "d.jsonl", "--documents=8")
    assert longer.startswith(first) and longer.count(b"\n") == 8


@pytest.mark.parametrize("kind, of", [("facts", list), ("text", str)])
def test_training_reads_what_is_written(book, tmp_path, kind, of):
    write_facts(book, tmp_path / "a.jsonl", f"--kind={kind}")
    samples = list(conversations.read([tmp_path / "a.jsonl"]))
    assert len(samples) == 6 and all(isinstance(s.content, of) and s.content for s in samples)


def test_heldout_documents_are_of_text_that_the_others_lack(book, tmp_path):
    write_facts(
        book, tmp_path / "a.jsonl", "--kind=text", "--documents=40", f"--heldout={tmp_path}/h.jsonl",
        "--heldout_documents=3", "--heldout_share=0.3",
    )  # fmt: skip
    train, heldout = (sources.objects(f"{tmp_path}/{name}.jsonl") for name in "ah")
    assert len(heldout) == 3
    seen = {gram for row in train for gram in grams(row["text"], 12)}
    read = {gram for text in [passages.read(str(book))[-5:]] for gram in grams(passages.join(text), 12)}
    assert seen and not seen & read
    # Where a text begins anew after its end, words meet that do not meet in the book.
    assert not seen & {gram for row in heldout for gram in grams(row["text"], 12)}


def test_a_file_is_whole_or_not_there(book, tmp_path, monkeypatch):
    made = []

    def then_fails(*arguments):
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return {"messages": []}

    monkeypatch.setattr(documents, "conversation", then_fails)
    with pytest.raises(KeyboardInterrupt):
        write_facts(book, tmp_path / "a.jsonl")
    assert len(made) == 3 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--documents=2"], "--kind=facts needs --texts"),
        (["--kind=answers", "--texts=BOOK"], "--model; .*--prompts; .*needs --answers; --texts does not go"),
        (["--texts=BOOK", "--documents=2", "--model=m"], "--model does not go with --kind=facts"),
        (["--texts=BOOK", "--documents=2", "--shortest=10", "--longest=20"], "shortest must be .*longest must"),
        (["--texts=nowhere.txt", "--documents=2"], "nowhere.txt"),
        (["--texts=EMPTY", "--documents=2"], "has no paragraph that ends like a sentence"),
        (["--texts=BOOK", "--documents=2", "--tokenizer=FOLDER"], "tokenizer"),
    ],
)  # fmt: skip
def test_bad_flags_are_named(book, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("CONTENTS\n\nI. A BEGINNING")
    places = {"BOOK": str(book), "EMPTY": str(tmp_path / "empty.txt"), "FOLDER": str(tmp_path)}
    given = [re.sub("BOOK|EMPTY|FOLDER", lambda m: places[m[0]], argument) for argument in arguments]
    with pytest.raises(ValueError, match=message):
        command(*given, f"--output={tmp_path}/out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
