"""Builders and pipeline: the documents are what the config says, packing keeps them whole, resuming is exact."""

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from retention_jax.config import DataConfig
from retention_jax.data import builders, pipeline, recall

TEXT = bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8))


def recall_config(cache, **changes):
    mixed = DataConfig(length=192, batch_size=8, documents=40, document_lengths=(60, 192), cache_dir=str(cache))
    return dataclasses.replace(mixed, **changes)


def text_config(cache, content=TEXT, **changes):
    path = pathlib.Path(cache) / "some.txt"
    path.write_bytes(content)
    fields = {"length": 48, "document_lengths": (48,), "batch_size": 4, "heldout": 0.2, "cache_dir": str(cache)}
    return DataConfig(task="text", path=str(path), **(fields | changes))


def iterate(config, seed=0):
    return pipeline.train_iterator(config, vocab_size=257, seed=seed)


def batches(config, count, **kwargs):
    return list(itertools.islice(iterate(config, **kwargs), count))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def segments(batch):
    """The documents in a batch's rows: (tokens, label_mask) as bytes, after checking the rows' layout."""
    found = []
    for tokens, ids, label_mask in zip(batch["tokens"], batch["segment_ids"], batch["label_mask"], strict=True):
        used = int(np.sum(ids > 0))
        assert used and np.all(ids[:used] > 0), "padding lies at a row's end"
        assert np.all(tokens[used:] == 0) and not np.any(label_mask[used:])
        assert ids[0] == 1 and np.all(np.isin(np.diff(ids[:used]), (0, 1))), "segments are 1, 2, ... and contiguous"
        cuts = np.flatnonzero(np.diff(ids[:used])) + 1
        parts = zip(np.split(tokens[:used], cuts), np.split(label_mask[:used], cuts), strict=True)
        found += [(t.tobytes(), m.tobytes()) for t, m in parts]
    return found


def all_documents(config, seed=0):
    made = [builders.recall_document(config, seed, i) for i in range(config.documents)]
    return [(d.tokens.tobytes(), d.label_mask.tobytes()) for d in made]


# Preparing


def folder(config, seed=0):
    [builder] = pipeline.prepare(config, seed)
    return pathlib.Path(str(builder.data_dir))


def stored_documents(config, seed=0, split="train"):
    [builder] = pipeline.prepare(config, seed)
    return pipeline.documents(builder, split)


def files(cache):
    return sorted(p.relative_to(cache) for p in pathlib.Path(cache).rglob("*"))


def test_documents_are_stored_as_they_were_made(tmp_path):
    config = recall_config(tmp_path, copies=0.5)
    stored = stored_documents(config, 3)
    assert len(stored) == config.documents
    for i in range(len(stored)):
        made = builders.recall_document(config, 3, i)
        np.testing.assert_array_equal(stored[i]["tokens"], made.tokens)
        np.testing.assert_array_equal(stored[i]["label_mask"], made.label_mask)


def test_document_lengths_have_equal_shares_in_every_fourth_document():
    config = DataConfig(documents=1200, document_lengths=(60, 96, 192))
    lengths = np.array([len(builders.recall_document(config, 0, i).tokens) for i in range(config.documents)])
    for first in range(4):
        _, counts = np.unique(lengths[first::4], return_counts=True)
        assert counts.tolist() == [100, 100, 100]


@pytest.mark.parametrize("copies", (0.0, 0.25, 1.0))
def test_share_of_copies(copies):
    config = DataConfig(documents=800, document_lengths=(60,), copies=copies)
    made = [builders.recall_document(config, 0, i).tokens for i in range(config.documents)]

    def repeats(tokens):
        return any(np.array_equal(tokens[p:], tokens[:-p]) for p in range(1, 31))

    assert [repeats(t) for t in made] == [i < copies * 800 for i in range(800)]


def test_unshuffled_documents_come_in_the_order_they_were_made(tmp_path):
    config = recall_config(tmp_path, length=60, document_lengths=(60,), documents=400, shuffle=False)
    batches = iterate(config, seed=3)
    rows = np.concatenate([next(batches)["tokens"] for _ in range(300 // config.batch_size)])
    number = {builders.recall_document(config, 3, i).tokens.tobytes(): i for i in range(config.documents)}
    order = np.array([number[row.astype(np.int32).tobytes()] for row in rows])
    # Packing fills 64 rows side by side, so a document may be overtaken by so many, not more.
    assert np.abs(order - np.arange(len(order))).max() < 64


def test_second_preparation_writes_nothing(tmp_path, monkeypatch):
    config = recall_config(tmp_path)
    first = folder(config)
    monkeypatch.setattr(pipeline, "_write", None)
    assert folder(config) == first
    # What does not change the documents does not make them anew.
    assert folder(dataclasses.replace(config, length=300, batch_size=2, heldout=0.5)) == first


@pytest.mark.parametrize(
    "change",
    ({"documents": 41}, {"document_lengths": (192, 60)}, {"decoys": 0.4}, {"copies": 0.1}, {"seed": 1}),
    ids=lambda change: next(iter(change)),
)
def test_other_recall_config_is_another_dataset(tmp_path, change):
    config, seed = recall_config(tmp_path), change.pop("seed", 0)
    assert folder(config) != folder(dataclasses.replace(config, **change), seed)


def test_other_task_code_is_another_dataset(tmp_path, monkeypatch):
    before = folder(recall_config(tmp_path))
    monkeypatch.setattr(recall, "FACT_SHARE", 0.2)
    assert folder(recall_config(tmp_path)) != before


def test_other_text_or_other_cut_is_another_dataset(tmp_path):
    config = text_config(tmp_path)
    before = folder(config)
    assert folder(config, seed=1) == before
    assert folder(dataclasses.replace(config, length=50)) != before
    assert folder(dataclasses.replace(config, heldout=0.3)) != before
    assert folder(text_config(tmp_path, TEXT[:-1] + b"!")) != before


def test_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    config = recall_config(tmp_path)

    def interrupted(data, seed, index):
        if index == 20:
            raise KeyboardInterrupt
        return builders.recall.stream(np.random.default_rng(index), 60, 0.3)

    with monkeypatch.context() as patch:
        name = builders.recall_config(config, 0)
        patch.setattr(builders, "recall_config", lambda config, seed: name)
        patch.setattr(builders, "recall_document", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipeline.prepare(config, 0)
    assert files(tmp_path) == []
    assert len(stored_documents(config)) == config.documents


def test_process_that_comes_second_takes_what_the_first_made(tmp_path, monkeypatch):
    config, write, mine = recall_config(tmp_path), pipeline._write, []

    def overtaken(builder):
        monkeypatch.setattr(pipeline, "_write", write)
        mine.append(folder(config))  # another process does all of it meanwhile
        mine.append(mine[0].stat().st_ino)
        write(builder)

    monkeypatch.setattr(pipeline, "_write", overtaken)
    assert [folder(config), folder(config).stat().st_ino] == mine
    assert [p.name for p in tmp_path.iterdir()] == ["recall"]


_PROCESS = """
import hashlib, random, sys
random.seed(0)
from retention_jax.config import DataConfig
from retention_jax.data import pipeline
config = DataConfig(length=60, batch_size=4, documents=400, document_lengths=(60,), cache_dir=sys.argv[1])
batch = next(pipeline.train_iterator(config, vocab_size=64, seed=0))
assert "tensorflow" not in sys.modules
print(hashlib.sha256(batch["tokens"].tobytes()).hexdigest())
"""


@pytest.mark.slow  # starts several processes
def test_processes_at_once_without_tensorflow(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", _PROCESS, str(tmp_path)]
    root = pathlib.Path(__file__).parent.parent
    running = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert printed[0] == printed[1] and len(printed[0].split()) == 1  # and TFDS prints nothing to stdout
    assert [p.name for p in tmp_path.iterdir()] == ["recall"]


# Batches


def test_batch_layout(tmp_path):
    batch = next(iterate(recall_config(tmp_path)))
    assert batch.keys() == {"tokens", "segment_ids", "label_mask"}
    assert batch["tokens"].shape == batch["segment_ids"].shape == batch["label_mask"].shape == (8, 192)
    assert batch["tokens"].dtype == batch["segment_ids"].dtype == np.int32 and batch["label_mask"].dtype == np.bool_


@pytest.mark.parametrize("changes", ({}, {"document_lengths": (192,)}, {"length": 200, "copies": 0.5}), ids=str)
def test_rows_hold_whole_documents(tmp_path, changes):
    config = recall_config(tmp_path, **changes)
    known = set(all_documents(config))
    found = [d for batch in batches(config, 10) for d in segments(batch)]
    assert set(found) == known


@pytest.mark.parametrize("seed", (0, 7))
def test_every_epoch_has_every_document_once_in_another_order(tmp_path, seed):
    # 64 documents of a row's length: the packer fills 64 rows at a time, so that it ends with an epoch.
    config = recall_config(tmp_path, documents=64, document_lengths=(192,))
    found = [d for batch in batches(config, 24, seed=seed) for d in segments(batch)]
    epochs = [found[i : i + 64] for i in (0, 64, 128)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(all_documents(config, seed))
    assert epochs[0] != epochs[1] != epochs[2]


def test_same_seed_same_batches_and_other_seed_other_order(tmp_path):
    for config in (recall_config(tmp_path), text_config(tmp_path)):
        first, again, other = (batches(config, 12, seed=seed) for seed in (0, 0, 1))
        assert_same(first, again)
        assert any(np.any(a["tokens"] != b["tokens"]) for a, b in zip(first, other, strict=True))


def test_every_document_comes_in_every_epoch(tmp_path):
    config = recall_config(tmp_path, documents=42)
    seen = {d for batch in batches(config, 20) for d in segments(batch)}
    assert {len(tokens) // 4 for tokens, _ in seen} == {60, 192}
    assert seen == set(all_documents(config))


# An epoch of the 40 documents is about 27 rows, 3 batches.
@pytest.mark.parametrize("done", (0, 1, 2, 3, 4, 8, 13))
@pytest.mark.parametrize("lengths", ((60, 192), (192,)), ids=str)
def test_resume_is_exact(tmp_path, done, lengths):
    config = recall_config(tmp_path, document_lengths=lengths)
    iterator = iterate(config)
    for _ in range(done):
        next(iterator)
    state = json.dumps(iterator.get_state())
    expected = list(itertools.islice(iterator, 12))
    fresh, used = iterate(config), iterate(config)
    next(used)
    for resumed in (fresh, used):
        resumed.set_state(json.loads(state))
        assert json.dumps(resumed.get_state()) == state
        assert_same(list(itertools.islice(resumed, 12)), expected)


# Text


@pytest.mark.parametrize("content", (TEXT, bytes(range(256)) * 8, "Grüße, 世界!\n".encode() * 100), ids=len)
def test_text_round_trip(tmp_path, content):
    config = text_config(tmp_path, content)
    parts = {}
    for split in ("train", "heldout"):
        source = stored_documents(config, split=split)
        stored = [source[i] for i in range(len(source))]
        assert all(len(d["tokens"]) == config.length for d in stored[:-1])
        assert all(not d["label_mask"][0] and np.all(d["label_mask"][1:]) for d in stored)
        parts[split] = b"".join((d["tokens"] - 1).astype(np.uint8).tobytes() for d in stored)
    assert parts["train"] + parts["heldout"] == content
    assert len(parts["heldout"]) == int(0.2 * len(content))


def test_text_batches_come_from_the_head(tmp_path):
    config = text_config(tmp_path)
    for tokens, _ in (d for batch in batches(config, 40) for d in segments(batch)):
        row = np.frombuffer(tokens, np.int32)
        assert row.max() < builders.TEXT_VOCAB_SIZE and row.min() > 0
        assert TEXT[:4000].find((row - 1).astype(np.uint8).tobytes()) >= 0


@pytest.mark.parametrize("length", (1, 48, 192, 1000))
@pytest.mark.parametrize("limit", (None, 1, 3))
def test_heldout_rows_are_the_tail(tmp_path, length, limit):
    rows = pipeline.heldout_rows(text_config(tmp_path), length=length, limit=limit)
    assert rows.dtype == np.int32
    assert rows.shape == (min(1000 // length, limit or 1000), length)
    assert (rows - 1).astype(np.uint8).tobytes() == TEXT[4000:][: rows.size]


# Bad inputs


def test_bad_text_files(tmp_path):
    config = text_config(tmp_path)
    with pytest.raises(ValueError, match=r"must name a readable text file, got .*missing\.txt.*No such file"):
        pipeline.prepare(dataclasses.replace(config, path=str(tmp_path / "missing.txt")), 0)
    with pytest.raises(ValueError, match=r"must name a readable text file, got .*Is a directory"):
        pipeline.prepare(dataclasses.replace(config, path=str(tmp_path)), 0)
    for content in (b"", b"x" * 59):  # 48 / (1 - 0.2) = 60
        with pytest.raises(ValueError, match=rf"some\.txt.* has {len(content)} bytes; at least 60 are needed"):
            iterate(text_config(tmp_path, content))
    assert [p.name for p in tmp_path.iterdir()] == ["some.txt"]
    assert next(iterate(text_config(tmp_path, b"x" * 60)))["tokens"].shape == (4, 48)


def test_tokens_beyond_the_vocabulary(tmp_path):
    for config, largest in ((text_config(tmp_path), 256), (recall_config(tmp_path), 63)):
        with pytest.raises(ValueError, match=f"has token {largest}; the model's vocabulary is {largest}"):
            pipeline.train_iterator(config, vocab_size=largest, seed=0)


def test_bad_heldout_requests(tmp_path):
    config = text_config(tmp_path)
    with pytest.raises(ValueError, match=r"some\.txt.* has 1000 tokens with heldout=0\.2; one row of length=1001"):
        pipeline.heldout_rows(config, length=1001, limit=None)
    with pytest.raises(ValueError, match="at least 1, got length=48 and limit=0"):
        pipeline.heldout_rows(config, length=48, limit=0)
    with pytest.raises(ValueError, match="task='text', got 'recall'"):
        pipeline.heldout_rows(recall_config(tmp_path), length=48, limit=1)


@pytest.mark.parametrize(
    "changes, call, message",
    (
        ({}, {"seed": -1}, "seed must be in .*, got -1"),
        ({}, {"seed": 2**32}, "seed must be in .*, got 4294967296"),
    ),
)
def test_bad_requests(tmp_path, changes, call, message):
    with pytest.raises(ValueError, match=message):
        iterate(recall_config(tmp_path, **changes), **call)
