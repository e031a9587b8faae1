"""Facts told in early turns and asked for late: how conversations are made, read on one buffer, and scored."""

import functools
import pathlib

import numpy as np
import pytest
from helpers import tiny_model
from test_corpus import made_up_text
from text_helpers import make_tokenizer

from retention_jax.config import EvalConfig
from retention_jax.evaluation import buffers
from retention_jax.evaluation.answers import Answers
from retention_jax.generation import decoding, runs
from retention_jax.tasks import conversation, load
from retention_jax.tasks.example import Turn
from retention_jax.text import chat

PLAIN = (
    r"{%- for m in messages -%}{{- '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' -}}{%- endfor -%}"
    r"{%- if add_generation_prompt -%}{{- '<|start|>assistant\n' -}}{%- endif -%}"
)
LENGTH = 700


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(made_up_text())
    return path


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=PLAIN)


def made(book, tok, *, length: int = LENGTH, examples: int = 2, seed: int = 0):
    encode = functools.partial(tok.encode, bos=False)
    return conversation.load(str(book), encode=encode, length=length, examples=examples, seed=seed)


def test_facts_come_first_then_so_many_tokens_then_questions(book, tok):
    first, second = made(book, tok).examples
    assert first != second and made(book, tok, examples=1).examples == (first,)
    assert made(book, tok, seed=1).examples[0] != first
    for example in (first, second):
        assert not example.context
        told, between, asked = example.turns[:4], example.turns[4:-8], example.turns[-8:]
        assert all(turn.max_new_tokens == 0 and turn.told for turn in (*told, *between))
        size = sum(len(tok.encode(text, bos=False)) for turn in between for text in (turn.question, turn.told))
        assert LENGTH - 40 <= size <= LENGTH
        assert all(turn.max_new_tokens > 0 and turn.answer_prefix.endswith(" is") for turn in asked)
        for turn in asked:
            (value,) = turn.gold
            assert sum(value in early.question for early in told) == 1
            assert not any(value in other.question for other in (*between, *asked))
            assert turn.told == f" {value}."
    longer = made(book, tok, length=4 * LENGTH).examples[0]
    assert len(longer.turns) > len(first.turns), "passages of a bearable length"
    with pytest.raises(ValueError, match="length must be at least 200, got 20"):
        made(book, tok, length=20)


@pytest.mark.parametrize(
    "answer, right",
    [
        ("It is room 21.", 1.0),
        ("ROOM 21", 1.0),
        ("It is room 210.", 0.0),
        ("classroom 21", 0.0),
        ("room 2 or 1", 0.0),
        ("", 0.0),
    ],
)
def test_an_answer_is_right_if_the_value_stands_in_it(answer, right):
    assert conversation.score(Turn("Where?", ("room 21",), 8), answer) == right


def test_a_conversation_is_read_in_order_on_one_buffer_and_only_questions_are_scored(book, tok, monkeypatch):
    config = EvalConfig(policies=("full", "streaming"), budgets=(6,), recent=4, max_new_tokens=2, prefill_chunk=128)
    task, read = made(book, tok), []
    prefill, generate = decoding.prefill, runs.generate

    def reading(model, tokens, cache, *, lengths, buffer):
        assert (buffer is None) == (not read)
        read.append([row[:n].tolist() for row, n in zip(np.asarray(tokens), lengths, strict=True)])
        return prefill(model, tokens, cache, lengths=lengths, buffer=buffer)

    answers = []

    def answering(model, asked, *args, **kwargs):
        read.append(asked)
        out = generate(model, asked, *args, **kwargs)
        answers.append(out.tokens)
        return out

    monkeypatch.setattr(decoding, "prefill", reading)
    monkeypatch.setattr(runs, "generate", answering)
    model = tiny_model(vocab_size=300)
    block = Answers(model, tok, config, "conversation", task, LENGTH)
    done = {}
    for unit, result in block.results(
        block.units(*buffers.cells(config, LENGTH)[1]), functools.partial(buffers.buffer_of, config)
    ):
        done[unit] = result | {"scores": block.scores(unit, result), "made_by": ""}
    (batch,) = block.batches
    for row, prompt in enumerate(batch):
        example = task.examples[prompt.index]
        messages = []
        for turn in example.turns[:-8]:
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.told}]
        messages.append({"role": "user", "content": example.turns[-8].question})
        want = tok.encode(chat.render(tok, messages, add_generation_prompt=True), bos=False)
        *_, first, second = [*example.turns[:-8], *example.turns[-8:-6]]
        want += tok.encode_more(first.answer_prefix)
        turns = len(example.turns) - 7
        assert sum((part[row] for part in read[:turns]), []) == want
        # Once more, to be answered; the next question stands behind the right answer, whatever the model's was.
        assert read[turns][row] == read[turns - 1][row]
        then = tok.decode(read[turns + 1][row])
        assert then == f"{first.told}\nuser\n{second.question}\nassistant\n{second.answer_prefix}"
    assert len(answers) == 8
    (row,) = block.rows(done)
    assert (row.n, row.metric, row.task, row.length) == (2, "accuracy", "conversation", LENGTH)
    (result,) = done.values()
    assert [answer["turn"] for answer in result["answers"]] == [*range(len(example.turns) - 8, len(example.turns))] * 2
    assert row.kv_bytes < row.full_kv_bytes


def test_the_task_needs_its_text():
    settings = load.Settings({}, "", "", 10, pathlib.Path(), None, 0)
    assert load.problems(["conversation"], settings) == [
        "task 'conversation' needs its questions: --sources=conversation=FILE"
    ]
    assert load.has_lengths("conversation")
