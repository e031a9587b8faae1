"""The model's own answers as training data: `python -m retention_jax.corpus --kind=answers`."""

import json
import pathlib

import numpy as np
import pytest
from helpers import tiny_model
from test_corpus import command
from text_helpers import save_tokenizer, write_rows

import retention_jax as rj
from retention_jax.corpus import answers
from retention_jax.data import sources
from retention_jax.runtime import files
from retention_jax.text import chat, tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    rj.save_backbone(tiny_model(vocab_size=320), folder)
    save_tokenizer(folder)
    return folder


PROMPTS = [{"turns": ["what is two", "and four"]}, {"question": "the fox", "answer": "4"}, {"prompt": "two plus two"}]


def write_answers(checkpoint, folder, output, *more):
    write_rows(folder / "prompts.jsonl", PROMPTS)
    command(
        "--kind=answers", f"--model={checkpoint}", f"--prompts={folder}/prompts.jsonl", f"--output={folder}/{output}",
        "--max_new_tokens=6", "--dtype=float32", "--answers=5", "--batch_size=2", *more,
    )  # fmt: skip
    return sources.objects(f"{folder}/{output}")


def test_prompts_have_one_turn_or_several(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", PROMPTS)
    assert answers.read_prompts(str(path)) == [["what is two", "and four"], ["the fox"], ["two plus two"]]
    write_rows(path, [*PROMPTS, {"turns": []}, {"text": "x"}, {"prompt": " "}])
    with pytest.raises(ValueError, match=r"row 4: needs turns.*\n.*row 5: .*\n.*row 6: "):
        answers.read_prompts(str(path))


@pytest.mark.slow  # answers with a model, and once more after a kill or without a cache
def test_answers_are_the_models_own(checkpoint, tmp_path):
    """Each is what the model says alone, with a full cache; a killed run goes on to the same file."""
    rows = write_answers(checkpoint, tmp_path, "a.jsonl")
    assert [row["index"] for row in rows] == list(range(5))
    said = [[m["content"] for m in row["messages"] if m["role"] == "user"] for row in rows]
    assert said[1:3] == [["the fox"], ["two plus two"]] and said[4] == ["the fox"]
    assert said[0] == (["what is two", "and four"] if len(said[0]) == 2 else ["what is two"])
    assert all(len(s) == 1 or row["messages"][1] for s, row in zip(said, rows, strict=True))
    assert rows[1]["messages"] != rows[4]["messages"]  # other draws for the same prompt

    content = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_bytes(b"".join(content[:2]) + content[2][:20])
    assert write_answers(checkpoint, tmp_path, "b.jsonl") == rows
    assert (tmp_path / "b.jsonl").read_bytes().splitlines(keepends=True)[:2] == content[:2]
    assert write_answers(checkpoint, tmp_path, "c.jsonl", "--batch_size=4") == rows

    with pytest.raises(ValueError, match="line 1: written with other settings or prompts"):
        write_answers(checkpoint, tmp_path, "b.jsonl", "--seed=1")
    (tmp_path / "d.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(ValueError, match="line 1: not written by this command"):
        write_answers(checkpoint, tmp_path, "d.jsonl")
    assert (tmp_path / "d.jsonl").read_text() == '{"mine": 1}\n'


@pytest.mark.slow  # answers with a model, and once more after a kill or without a cache
def test_greedy_answers_are_those_of_a_full_forward_pass(checkpoint, tmp_path):
    row = write_answers(checkpoint, tmp_path, "g.jsonl", "--temperature=0")[1]
    known, model = tokenizer.load(checkpoint), rj.load(checkpoint, None, "float32")
    tokens = known.encode(chat.render(known, row["messages"][:1], add_generation_prompt=True), bos=False)
    new: list[int] = []
    while len(new) < 6 and (not new or new[-1] not in known.stop_tokens):
        logits, _ = model(np.asarray([tokens + new]))
        new.append(int(np.argmax(logits[0, -1])))
    assert known.decode(new) == row["messages"][1]["content"]
    assert row["stopped"] == (new[-1] in known.stop_tokens)
    assert json.loads(files.json_line(row)) == row
