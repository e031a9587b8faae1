"""Text as rows of tokens: which text each token covers, and what is said of how well tokens are predicted."""

import pathlib

import numpy as np
import pytest
import tokenizers
from text_helpers import save_tokenizer, write_rows

from retention_jax.config import DataConfig
from retention_jax.data import perplexity, pipeline, sources
from retention_jax.evaluation import sequences
from retention_jax.text import tokenizer

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"
TEXT = "the quick brown fox é jumps über 狐狸 the lazy dog 🦊🦊!\n what is  two plus two?\tfour. " * 9


def encoder(folder, backend=None):
    (backend or save_tokenizer(folder)).save(str(folder / "tokenizer.json"))
    loaded = tokenizer.load(folder)
    return loaded, perplexity.by_tokenizer(loaded)


def test_every_token_covers_its_text(tmp_path):
    loaded, encode = encoder(tmp_path)
    ids, ends = encode(TEXT)
    assert ids.tolist() == loaded.encode(TEXT, bos=False)
    assert np.all(np.diff(ends) >= 0) and ends[-1] == len(TEXT.encode()) > len(ids) > len(TEXT) / 3
    whole = [n for n in range(1, len(ids) + 1) if "�" not in loaded.decode(ids[:n].tolist())]
    assert len(whole) > len(ids) / 2
    for n in whole:  # the other tokens end inside a character
        assert len(loaded.decode(ids[:n].tolist()).encode()) == ends[n - 1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_wikitext_under_a_published_tokenizer(tmp_path):
    loaded, encode = encoder(
        tmp_path, tokenizers.Tokenizer.from_file(str(SHARED / "tokenizer" / "neox" / "tokenizer.json"))
    )
    source = SHARED / "text" / "wikitext2_test.txt"
    (tmp_path / "head.txt").write_text(source.read_text()[:60_000])
    rows = perplexity.rows(str(tmp_path / "head.txt"), encode, length=512, limit=20)
    assert rows.tokens.shape == rows.num_bytes.shape == (20, 512)
    for n in range(1, 21):  # spaces at the end of a row may count to the next
        text, covered = loaded.decode(rows.tokens[:n].ravel().tolist()), rows.num_bytes[:n].sum()
        assert source.read_text().startswith(text)
        assert len(text.rstrip().encode()) <= covered <= len(text.encode())
    assert 3.5 < rows.num_bytes.mean() < 5


def test_byte_rows_are_those_of_training(tmp_path):
    (tmp_path / "all.txt").write_text(TEXT)
    config = DataConfig(task="text", path=str(tmp_path / "all.txt"), length=32, cache_dir=str(tmp_path), heldout=0.5)
    want = pipeline.heldout_rows(config, length=50, limit=3)
    (tmp_path / "tail.txt").write_bytes(TEXT.encode()[-(len(TEXT.encode()) // 2) :])
    got = perplexity.rows(str(tmp_path / "tail.txt"), perplexity.by_bytes, length=50, limit=3)
    np.testing.assert_array_equal(got.tokens, want)
    np.testing.assert_array_equal(got.num_bytes, np.ones_like(want))


def test_rows_are_consecutive_and_limited(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefghijk")
    rows = perplexity.rows(str(tmp_path / "text.txt"), perplexity.by_bytes, length=4, limit=None)
    assert [bytes(row - 1) for row in rows.tokens.astype(np.uint8)] == [b"abcd", b"efgh"]
    assert perplexity.rows(str(tmp_path / "text.txt"), perplexity.by_bytes, length=4, limit=1).tokens.shape == (1, 4)
    for length, limit, told in ((0, None, "length=0"), (4, 0, "limit=0"), (12, None, "has 11 tokens; .*length=12")):
        with pytest.raises(ValueError, match=told):
            perplexity.rows(str(tmp_path / "text.txt"), perplexity.by_bytes, length=length, limit=limit)


def test_scores_by_hand():
    log_prob = np.log(np.array([[0.5, 0.25], [0.125, 0.5]]))  # 1, 2, 3 and 1 bits
    assert perplexity.perplexity(log_prob) == pytest.approx(2 ** (7 / 4))
    assert perplexity.bits_per_byte(log_prob, np.array([[9, 3, 4], [9, 2, 5]])) == pytest.approx(7 / 14)
    bytes_each = np.ones((2, 3), int)
    same = sequences.bits_per_byte(log_prob, np.ones((2, 3), bool))
    assert perplexity.bits_per_byte(log_prob, bytes_each) == pytest.approx(same)


def test_text_of_files_and_of_rows(tmp_path):
    (tmp_path / "a.txt").write_text("some\ntext")
    assert sources.text(str(tmp_path / "a.txt")) == "some\ntext"
    rows = [{"text": "some"}, {"text": "text"}]
    for ending in ("jsonl", "json", "parquet"):
        assert sources.text(str(write_rows(tmp_path / f"a.{ending}", rows))) == "some\n\ntext"
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    write_rows(tmp_path / "other.jsonl", [{"text": "a"}, {"content": "b"}, {}])
    cases = (("empty.txt", "has no text"), ("latin.txt", "not UTF-8"), ("other.jsonl", "row 2: .*2 rows have none"))
    for name, told in (*cases, ("none.txt", "names no file")):
        with pytest.raises(ValueError, match=told):
            sources.text(str(tmp_path / name))
