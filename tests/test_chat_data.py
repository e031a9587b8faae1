"""From files of conversations to packed, mixed and labelled rows, and what is left out or refused on the way."""

import collections
import dataclasses
import itertools
import json
import logging
import pathlib
import re
import shutil

import helpers
import jax
import numpy as np
import pytest
from text_helpers import save_tokenizer, write_rows

from retention_jax import train
from retention_jax.config import DataConfig, EvalConfig, GateConfig, LossConfig, OptimizerConfig, TrainConfig
from retention_jax.data import builders, conversations, pipeline, show, sources
from retention_jax.models import weights
from retention_jax.text.chat import Message

pytestmark = pytest.mark.one_version

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"
ASKED = [{"role": "user", "content": "two plus two?"}, {"role": "assistant", "content": "four."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, and files of conversations of very different lengths."""
    root = tmp_path_factory.mktemp("chat")
    save_tokenizer(root)
    rng = np.random.default_rng(0)
    words = lambda n: " ".join(rng.choice(["fox", "dog", "two", "plus", "four"], n))
    write_rows(root / "short.jsonl", [{"question": words(4) + "?", "answer": words(3)} for _ in range(40)])
    write_rows(root / "long.parquet", [{"messages": ASKED * int(n)} for n in rng.integers(1, 4, 24)])
    write_rows(root / "text.json", [{"text": words(30)} for _ in range(8)])
    return root


def config_of(folder, *names, **changes):
    fields = {"length": 256, "batch_size": 4, "cache_dir": str(folder / "cache"), "tokenizer": str(folder)}
    return DataConfig(task="chat", files=tuple(str(folder / name) for name in names), **(fields | changes))


def iterate(config, vocab_size=300):
    return pipeline.train_iterator(config, vocab_size=vocab_size, seed=0)


def stored(config):
    """The prepared documents of each source."""
    sources = [pipeline.documents(builder, "train") for builder in pipeline.prepare(config, 0)]
    return [[source[i] for i in range(len(source))] for source in sources]


def key(document):
    return tuple(document["tokens"].tolist())


def documents(batches):
    """The documents in some batches' rows, as tuples of tokens."""
    rows = [row for b in batches for row in zip(b["tokens"], b["segment_ids"], strict=True)]
    return [tuple(tokens[ids == i].tolist()) for tokens, ids in rows for i in range(1, ids.max() + 1)]


# Documents


def test_only_the_assistant_is_trained_on(folder):
    known = builders.load_tokenizer(config_of(folder, "short.jsonl"))
    text = lambda ids: known.backend.decode(ids.tolist(), skip_special_tokens=False)
    conversation: list[Message] = [ASKED[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfour."}, *ASKED]
    tokens, labels = builders.encode(known, conversations.Sample("x", conversation))
    assert text(tokens[labels]) == "<think>\nhm\n</think>\n\nfour.<|end|><think>\n\n</think>\n\nfour.<|end|>"
    asked = "<|start|>user\ntwo plus two?<|end|>\n<|start|>assistant\n"
    assert text(tokens[~labels]) == f"{asked}\n{asked}\n"
    tokens, labels = builders.encode(known, conversations.Sample("x", "two plus"))
    assert text(tokens) == "two plus" and not labels[0] and labels[1:].all()


def test_stored_documents_are_the_encoded_rows(folder):
    config = config_of(folder, "short.jsonl", "long.parquet", "text.json")
    known = builders.load_tokenizer(config)
    for source, made in zip(config.files, stored(config), strict=True):
        samples = list(conversations.read(sources.files_of(source)))
        assert len(made) == len(samples) > 0
        for document, sample in zip(made, samples, strict=True):
            tokens, labels = builders.encode(known, sample)
            np.testing.assert_array_equal(document["tokens"], tokens)
            np.testing.assert_array_equal(document["label_mask"], labels)
            assert document["tokens"].dtype == np.uint16


def test_a_large_vocabulary_needs_wider_tokens(tmp_path):
    save_tokenizer(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["vocab"]["!"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    write_rows(tmp_path / "t.jsonl", [{"text": "two plus two!"}])
    config = config_of(tmp_path, "t.jsonl")
    [[document]] = stored(config)
    assert document["tokens"].dtype == np.uint32 and document["tokens"][-1] == 70_000
    assert next(iterate(config, vocab_size=70_001))["tokens"].max() == 70_000
    with pytest.raises(ValueError, match=r"t\.jsonl has token 70000; the model's vocabulary is 70000"):
        iterate(config, vocab_size=70_000)


def test_another_tokenizer_template_file_or_rule_is_another_dataset(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("cache"))
    base = config_of(copy, "short.jsonl")
    name = lambda config: builders.chat_configs(config)[0].name
    assert name(config_of(folder, "short.jsonl")) == name(base)
    assert name(dataclasses.replace(base, batch_size=8, weights=(2.0,), shuffle=False)) == name(base)
    (tmp_path / "other.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    changes = ({}, {"length": 255}, {"min_length": 3}, {"too_long": "drop"})
    names = [name(dataclasses.replace(base, **change)) for change in changes]
    names.append(name(dataclasses.replace(base, chat_template=str(tmp_path / "other.jinja"))))
    with (copy / "short.jsonl").open("a") as file:
        file.write('{"question": "q", "answer": "a"}\n')
    names.append(name(base))
    save_tokenizer(copy, bos_token="<|bos|>")
    names.append(name(base))
    assert len(set(names)) == len(names) == 7


def test_adding_a_source_leaves_the_others_as_they_are(folder, tmp_path, monkeypatch):
    pipeline.prepare(config_of(folder, "short.jsonl", cache_dir=str(tmp_path)), 0)
    written, write = [], pipeline._write
    monkeypatch.setattr(pipeline, "_write", lambda builder: (written.append(builder), write(builder)))
    pipeline.prepare(config_of(folder, "short.jsonl", "text.json", cache_dir=str(tmp_path)), 0)
    assert [builder.builder_config.source for builder in written] == [str(folder / "text.json")]


# Rows


def test_rows_are_packed_and_full(folder):
    config = config_of(folder, "short.jsonl", "long.parquet")
    batches = list(itertools.islice(iterate(config), 20))
    assert set(documents(batches)) == {key(d) for source in stored(config) for d in source}
    for batch in batches:
        ids = batch["segment_ids"]
        assert np.all(ids[:, 0] == 1) and np.all(np.isin(np.diff(ids)[ids[:, 1:] > 0], (0, 1)))
        assert not batch["label_mask"][ids == 0].any() and batch["label_mask"].any(axis=1).all()
    assert np.mean([b["segment_ids"] > 0 for b in batches]) > 0.9


@pytest.mark.parametrize("weights, want", (((0.25, 0.75), 0.25), ((3.0, 1.0), 0.75), ((), 40 / 48)))
def test_a_mixture_has_its_weights_and_reads_a_source_evenly(folder, weights, want):
    config = config_of(folder, "short.jsonl", "text.json", weights=weights)
    short, texts = stored(config)
    found = collections.Counter(documents(itertools.islice(iterate(config), 30)))
    shares = [sum(found[key(d)] for d in source) / found.total() for source in (short, texts)]
    np.testing.assert_allclose(shares, (want, 1 - want), atol=0.05)
    counts = [found[key(d)] for d in texts]
    assert min(counts) >= 2 and max(counts) - min(counts) <= 8  # 64 rows are open at a time


@pytest.mark.parametrize("done", (1, 7))
def test_resume_of_a_mixture_is_exact(folder, done):
    config = config_of(folder, "short.jsonl", "long.parquet", "text.json", weights=(1.0, 2.0, 0.5))
    iterator = iterate(config)
    for _ in range(done):
        next(iterator)
    resumed = iterate(config)
    resumed.set_state(json.loads(json.dumps(iterator.get_state())))
    for want, got in zip(itertools.islice(iterator, 6), itertools.islice(resumed, 6), strict=True):
        for name in want:
            np.testing.assert_array_equal(want[name], got[name])


def test_every_document_of_every_source_comes(folder):
    config = config_of(folder, "short.jsonl", "text.json")
    seen = set(documents(itertools.islice(iterate(config), 30)))
    assert seen == {key(d) for source in stored(config) for d in source}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_gsm8k_fills_its_rows(tmp_path):
    for name in ("neox/tokenizer.json", "qwen3/tokenizer_config.json"):
        shutil.copy(SHARED / "tokenizer" / name, tmp_path)
    rows = (SHARED / "gsm8k" / "train.jsonl").read_text().splitlines()[:1500]
    (tmp_path / "some.jsonl").write_text("\n".join(rows))
    config = config_of(tmp_path, "some.jsonl", length=2048)
    batches = list(itertools.islice(iterate(config, vocab_size=50_432), 30))
    assert np.mean([b["segment_ids"] > 0 for b in batches]) > 0.95


# What is left out, refused and shown

LENGTHS = (3, 10, 12, 30, 0, 1)


@pytest.mark.parametrize(
    "rule, kept, told",
    (
        (dict(too_long="cut"), [3, 10, 10, 10], "2 documents were cut at length=10, 22 tokens in all"),
        (dict(too_long="drop"), [3, 10], "2 left out with more than length=10 tokens"),
        (dict(min_length=4), [10, 10, 10], "2 .*; 1 left out with fewer than min_length=4 tokens"),
    ),
)
def test_what_is_cut_or_left_out_is_told_once(folder, tmp_path, caplog, monkeypatch, rule, kept, told):
    write_rows(tmp_path / "long.jsonl", [{"text": "x" * n} for n in LENGTHS])  # a letter is a token
    config = config_of(folder, str(tmp_path / "long.jsonl"), length=10, batch_size=2, **rule)
    [made] = stored(config)
    assert [len(document["tokens"]) for document in made] == kept
    with caplog.at_level(logging.WARNING):
        for process_index in range(2):
            monkeypatch.setattr(jax, "process_index", lambda process_index=process_index: process_index)
            iterate(config)
    [message] = [record.getMessage() for record in caplog.records if record.module == "pipeline"]
    assert re.match(f"{told}; 2 left out with no token to learn from$", message)


def test_a_prompt_that_fills_the_row_leaves_nothing_to_learn(folder, tmp_path):
    full, fits = ({"prompt": "x" * n, "response": "four."} for n in (100, 1))
    config = config_of(folder, str(tmp_path / "t.jsonl"), length=64)
    write_rows(tmp_path / "t.jsonl", [full, fits])
    [[document]] = stored(config)
    assert document["label_mask"].any()
    write_rows(tmp_path / "t.jsonl", [full])
    with pytest.raises(ValueError, match=r't\.jsonl: no document is left to train on: .*"without_labels": 1'):
        pipeline.prepare(config, 0)


def test_all_rows_that_a_template_refuses_are_told_before_any_is_made(folder, tmp_path, monkeypatch):
    rows = [{"messages": ASKED}] * 3 + [{"messages": ASKED[1:] + ASKED}] * 12
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "strict.jinja").write_text(
        "{% if messages and messages[0].role == 'assistant' %}{{ raise_exception('begins with the assistant') }}"
        "{% endif %}{% for m in messages %}{{ m.role + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    config = config_of(
        folder,
        str(tmp_path / "rows.jsonl"),
        cache_dir=str(tmp_path / "c"),
        chat_template=str(tmp_path / "strict.jinja"),
    )
    monkeypatch.setattr(builders, "_example", None)  # no document is made
    with pytest.raises(ValueError) as error:
        pipeline.prepare(config, 0)
    lines = str(error.value).splitlines()
    assert (
        len(lines) == 11 and lines[-1] == "and 2 more" and lines[0].startswith(f"{tmp_path / 'rows.jsonl'}, line 4: ")
    )


def test_columns_of_system_and_tools_are_read(tmp_path):
    rows = [{"question": "a", "answer": "b", "system": "s", "tools": [{"name": "f", "x": None}]}]
    for ending in ("jsonl", "parquet"):
        [sample] = conversations.read([write_rows(tmp_path / f"rows.{ending}", rows)])
        assert sample.content[0] == {"role": "system", "content": "s"} and sample.tools == [{"name": "f"}]
    write_rows(tmp_path / "two.jsonl", [{"messages": [{"role": "system", "content": "t"}, *ASKED], "system": "s"}])
    with pytest.raises(ValueError, match="two.jsonl, line 1: has two system messages, 't' and 's'"):
        list(conversations.read([tmp_path / "two.jsonl"]))


def test_half_a_surrogate_pair_is_told_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "ok \\ud83d\\ude00"}\n{"text": "bad \\ud83d"}\n')
    for read in (lambda: list(conversations.read([path])), lambda: sources.objects(str(path))):
        with pytest.raises(ValueError, match="rows.jsonl, line 2: cannot be read as text"):
            read()


def test_refusals_leave_no_files(folder, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "t"}\n{"text"\n')
    (tmp_path / "raises.jinja").write_text("{{ raise_exception('no such role') }}")
    template = lambda name: {"chat_template": str(tmp_path / name)}
    cases = (
        (str(tmp_path / "bad.jsonl"), {}, "bad.jsonl, line 2: not valid JSON"),
        ("short.jsonl", {"tokenizer": str(tmp_path / "none")}, "none: no such checkpoint folder"),
        ("short.jsonl", {"tokenizer": str(tmp_path)}, "has no tokenizer.json"),
        ("short.jsonl", template("none.jinja"), "chat_template must name a readable text file"),
        ("short.jsonl", template("raises.jinja"), "short.jsonl, line 1: .*no such role"),
    )
    for source, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            pipeline.prepare(config_of(folder, source, cache_dir=str(tmp_path / "cache"), **changes), 0)
        assert not any((tmp_path / "cache").rglob("*"))


def test_show_marks_what_is_trained_on(folder):
    data = config_of(folder, "short.jsonl", "text.json", tokenizer="")
    config = TrainConfig(stage="gates", backbone=str(folder), data=data, eval=EvalConfig(tasks=()))
    shown = show.show(config, 2, ("[", "]"))
    assert shown.count("--- row 1, document") > 1 and "--- row 2, document 1: " in shown
    asked = r"<\|start\|>user\n[a-z ]+\?<\|end\|>\n<\|start\|>assistant\n"
    assert re.search(asked + r"\[<think>\n\n</think>\n\n[a-z ]+<\|end\|>\]\n", shown)
    last = r"64 rows of 256 tokens: ([\d.]+)% filled, ([\d.]+)% trained on, [\d.]+ documents a row$"
    filled = re.search(last, shown)
    assert filled and float(filled[1]) > 90 > float(filled[2]) > 30
    with pytest.raises(ValueError, match="has text to show, got 'recall'"):
        show.show(dataclasses.replace(config, data=DataConfig()), 1, ("", ""))


def test_gates_train_on_a_backbone_with_its_own_tokenizer(folder, tmp_path):
    save_tokenizer(tmp_path)
    weights.save_backbone(helpers.tiny_model(vocab_size=320), tmp_path)
    config = TrainConfig(
        stage="gates",
        backbone=str(tmp_path),
        data=config_of(folder, "short.jsonl", "text.json", tokenizer="", length=128),
        eval=EvalConfig(tasks=()),
        gate=GateConfig(width=16, offset_init=5.0),
        loss=LossConfig(budget=4),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        steps=12,
        log_every=1,
    )
    train.run(config, tmp_path / "run")
    capacity = [json.loads(line)["capacity"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(capacity[-3:]) < np.mean(capacity[:3])
    assert (tmp_path / "run" / "gates").is_dir() and not (tmp_path / "run" / "eval").exists()
    weights.save_backbone(helpers.tiny_model(vocab_size=64), tmp_path)
    with pytest.raises(ValueError, match=r"short\.jsonl has token \d+; the model's vocabulary is 64"):
        train.run(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()
