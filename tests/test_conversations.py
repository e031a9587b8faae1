"""Rows of data files: every layout, and every bad file one clear error."""

import json

import huggingface_hub
import pytest
from text_helpers import write_rows

from retention_jax.data import conversations, sources

ASKED = [{"role": "user", "content": "two plus two?"}, {"role": "assistant", "content": "four."}]


def exchange(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def read(*paths):
    return [sample.content for sample in conversations.read(paths)]


# Layouts

ROWS = {
    "messages": ({"messages": ASKED, "prompt": "other", "text": "other"}, ASKED),
    "thinking": (
        {"messages": [ASKED[0], {**ASKED[1], "reasoning_content": "hm", "tool_calls": None}]},
        [ASKED[0], {**ASKED[1], "reasoning_content": "hm"}],
    ),
    "sharegpt": (
        {
            "id": "1",
            "conversations": [
                {"from": "system", "value": "be brief"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ],
        },
        [{"role": "system", "content": "be brief"}, *exchange("q", "a")],
    ),
    "synth_long": ({"conversations": ASKED}, ASKED),
    "ultrachat": ({"data": ["q", "a", "more?", "b"]}, exchange("q", "a") + exchange("more?", "b")),
    "gsm8k": ({"question": "q", "answer": "a"}, exchange("q", "a")),
    "buddhi": ({"context": "x", "extended_context": "c", "question": "q", "answer": "a"}, exchange("c\n\nq", "a")),
    "openr1": ({"problem": "p", "solution": "s", "generations": ["g", "h"], "messages": ASKED}, ASKED),
    "generations": ({"problem": "p", "solution": "s", "generations": ["g", "h"]}, exchange("p", "g")),
    "math": ({"problem": "p", "solution": "s", "answer": "1"}, exchange("p", "s")),
    "prompt": ({"prompt": "p", "response": "r"}, exchange("p", "r")),
    "alpaca": ({"instruction": "i", "input": "x", "output": "o"}, exchange("i\n\nx", "o")),
    "alpaca_no_input": ({"instruction": "i", "input": "", "output": "o"}, exchange("i", "o")),
    "longalpaca": ({"instruction": "i", "output": "o", "file": "f"}, exchange("i", "o")),
    "booksum": (
        {"text": "t", "summary": [{"source": "x", "text": "s"}, {"source": "y", "text": "z"}]},
        exchange("Summarize the following text.\n\nt", "s"),
    ),
    "booksum_text": ({"text": "t", "summary": "s"}, exchange("Summarize the following text.\n\nt", "s")),
    "text": ({"text": " t \n"}, " t \n"),
}


@pytest.mark.parametrize("ending", (".jsonl", ".json", ".parquet"))
@pytest.mark.parametrize("name", ROWS)
def test_layouts(tmp_path, name, ending):
    row, want = ROWS[name]
    samples = list(conversations.read([write_rows(tmp_path / f"rows{ending}", [row, row])]))
    assert [s.content for s in samples] == [want, want]
    assert samples[1].where.endswith(f"rows{ending}, {'line' if ending == '.jsonl' else 'row'} 2")


def test_every_layout_is_tested():
    seen = {conversations._layout(row).columns for row, _ in ROWS.values()}
    assert seen == {layout.columns for layout in conversations.LAYOUTS}


@pytest.mark.parametrize(
    "row",
    (
        {"messages": None},
        {"messages": []},
        {"question": "q", "answer": None},
        {"question": " ", "answer": "a"},
        {"text": ""},
        {"text": "t", "summary": []},
        {"extended_context": "", "question": "q", "answer": "a"},
        {"problem": "p", "generations": None},
    ),
    ids=str,
)
def test_rows_with_nothing_in_them_are_empty(tmp_path, row):
    assert not read(write_rows(tmp_path / "rows.jsonl", [row]))[0]


def test_files_without_frills(tmp_path):
    """Blank lines, a byte order mark, JSON lines named .json, more rows than a Parquet batch."""
    row = json.dumps({"text": "Grüße"}, ensure_ascii=False)
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + f"{row}\n\n{row}\n   \n{row}".encode())
    assert read(tmp_path / "a.json") == ["Grüße"] * 3
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf\n [" + row.encode() + b"]")
    assert read(tmp_path / "b.json") == ["Grüße"]
    many = [{"text": str(i), "other": i} for i in range(600)]
    assert read(write_rows(tmp_path / "c.parquet", many)) == [str(i) for i in range(600)]
    assert [s.where[-7:] for s in conversations.read([tmp_path / "c.parquet"])][-1] == "row 600"


# Bad files


def test_invalid_json_in_line_7(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "t"}] * 9)
    lines = path.read_text().splitlines()
    lines[6] = '{"text": "t" "more": 1}'
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value) == f"{path}, line 7: not valid JSON: Expecting ',' delimiter at column 14"


BAD_ROWS = (
    (b'{"text": 3}', "text: must be text, got 3"),
    (b'{"txt": "t"}', "lacks text, which the file's first row has"),
    (b"[1, 2]", "lacks text"),
    (b'{"text": "\xff"}', "not valid JSON: 'utf-8' codec"),
    (b"[" * 100_000, "not valid JSON: "),
)


def test_problems_are_told_together_and_only_ten(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "t"}\n' + b"\n".join(row for row, _ in BAD_ROWS))
    other = tmp_path / "other.jsonl"
    other.write_text("")
    with pytest.raises(ValueError) as error:
        read(path, other)
    told = str(error.value).splitlines()
    assert len(told) == len(BAD_ROWS) + 1 and told[-1] == f"{other}: has no rows"
    for number, (line, (_, message)) in enumerate(zip(told, BAD_ROWS, strict=False), 2):
        assert line.startswith(f"{path}, line {number}: {message}")
    path.write_bytes(b"{\n" * 50)
    with pytest.raises(ValueError) as error:
        read(path)
    assert len(str(error.value).splitlines()) == 11 and str(error.value).endswith("and perhaps more")


@pytest.mark.parametrize(
    "row, message",
    (
        ({"prompt": "p", "chosen": "c"}, "has prompt, chosen; needed is one of: messages; conversations; "),
        ({}, "has no columns; needed is one of: "),
        ({"messages": "hello"}, "messages: must be a list, got 'hello'"),
        ({"messages": ["hello"]}, "messages: a message must be an object, got 'hello'"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "messages: a message's role must be one of system, .*'usr'"),
        ({"messages": [{"content": "x"}]}, "role must be one of .*, got None"),
        ({"messages": [{"role": "user", "content": None}]}, "content must be text, got None"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content must be text, got "),
        ({"question": "q", "answer": 42}, "question, answer: must be text, got 42"),
        ({"data": "q"}, "data: must be a list"),
        ({"problem": "p", "generations": [1]}, "must be text, got 1"),
    ),
)
def test_rows_that_fit_no_layout(tmp_path, row, message):
    for ending in (".jsonl", ".json"):
        path = write_rows(tmp_path / f"rows{ending}", [row, row])
        with pytest.raises(ValueError, match=rf"rows{ending}, (line|row) 1: .*{message}"):
            read(path)


def test_damaged_files(tmp_path):
    (tmp_path / "list.json").write_text('[{"text": "t"},\n{"text" "t"}]')
    with pytest.raises(ValueError, match=r"list\.json, list: not valid JSON: .* at line 2, column 9"):
        read(tmp_path / "list.json")
    (tmp_path / "text.parquet").write_text("no Parquet at all")
    with pytest.raises(ValueError, match=r"text\.parquet, after row 0: not valid Parquet: "):
        read(tmp_path / "text.parquet")
    whole = write_rows(tmp_path / "cut.parquet", [{"text": "t" * 1000}] * 10)
    whole.write_bytes(whole.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut\.parquet, after row 0: not valid Parquet: "):
        read(whole)
    with pytest.raises(ValueError, match=r"odd\.parquet, row 1: has a, b; needed is one of: "):
        read(write_rows(tmp_path / "odd.parquet", [{"a": 1, "b": 2}]))


def test_sources(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.jsonl", "[x].json", "notes.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder").mkdir()
    names = lambda source: [path.name for path in sources.files_of(str(source))]
    assert names(tmp_path / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(tmp_path / "[x].json") == ["[x].json"]
    for source, message in (
        (tmp_path / "c.jsonl", r"c\.jsonl' names no file"),
        (tmp_path / "folder", r"folder' names no file; it is a folder, .*folder/\* would be its files"),
        (tmp_path / "*.txt", r"notes\.txt' must end in one of \.jsonl, \.json, \.parquet"),
        ("hf://datasets/only/two", r"'hf://datasets/only/two' must be hf://datasets/ORG/NAME/FILE"),
    ):
        with pytest.raises(ValueError, match=message):
            sources.files_of(str(source))
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **kwargs: asked.append((args, kwargs)) or str(tmp_path)
    )
    assert names("hf://datasets/org/some.name@v1/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert sources.beside("hf://datasets/org/name/to/*.jsonl", "prompts.yaml") == tmp_path / "to" / "prompts.yaml"
    assert asked.pop()[1]["allow_patterns"] == ["to/prompts.yaml"]
    want = {"repo_type": "dataset", "revision": "v1", "allow_patterns": ["*.jsonl"]}
    assert asked == [(("org/some.name",), want)]

    def refused(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(ValueError, match="hf://datasets/org/name/x.jsonl' cannot be downloaded: no network"):
        sources.files_of("hf://datasets/org/name/x.jsonl")


def test_objects_of_a_source(tmp_path):
    for i in range(2):
        write_rows(tmp_path / f"{i}.jsonl", [{"n": i}, {"n": i + 10}])
    assert sources.objects(str(tmp_path / "*.jsonl")) == [{"n": 0}, {"n": 10}, {"n": 1}, {"n": 11}]
    (tmp_path / "1.jsonl").write_text('{"n": 1}\n[2]\n{"n":')
    with pytest.raises(ValueError, match=r"line 2: must be an object\n.*1\.jsonl, line 3: not valid JSON"):
        sources.objects(str(tmp_path / "*.jsonl"))
    (tmp_path / "2.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"2\.jsonl: has no rows"):
        sources.objects(str(tmp_path / "2.jsonl"))
