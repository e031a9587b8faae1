"""Where RULER's longer prompts end, and files of questions that are damaged."""

import json
import re

import pytest

from retention_jax.tasks import ruler, ruler_documents, ruler_prompts

pytestmark = pytest.mark.one_version


def test_common_words_end_with_the_words(caplog):
    encode = lambda text: [0] * len(text.split())
    task = ruler.load("cwe", encode=encode, length=100_000, examples=1, seed=0)
    kinds = ("noun", "adjective", "verb")
    words = {word for kind in kinds for word in ruler_prompts.english_words(kind)}
    listing = task.examples[0].context.split("\n")[-2]
    assert set(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", listing)) == words
    assert "length=100000: all English words are listed" in caplog.text


@pytest.mark.parametrize(
    "read, data, told",
    (
        (ruler_documents.squad, {"data": [{"paragraphs": []}]}, "no question with an answer"),
        (
            ruler_documents.squad,
            {"data": [{}, {"paragraphs": [{"context": 3}]}]},
            "article 1: has no 'paragraphs'\n.*2",
        ),
        (ruler_documents.hotpotqa, [3, {"question": "q", "answer": "a", "context": [["t"]]}], "question 1: .*\n.*2: "),
    ),
)
def test_damaged_documents_are_told_by_place(read, data, told, tmp_path):
    (tmp_path / "qa.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=told):
        read(str(tmp_path / "qa.json"))
