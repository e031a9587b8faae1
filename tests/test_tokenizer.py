"""Tokenizers of checkpoint folders, on small ones trained here."""

import json
import pathlib
import random

import pytest
import tokenizers
from text_helpers import TEXT, save_tokenizer
from tokenizers import models, processors

from retention_jax.text import tokenizer

pytestmark = pytest.mark.one_version


def test_text_comes_back(tmp_path):
    save_tokenizer(tmp_path)
    tok = tokenizer.load(tmp_path)
    for text in (TEXT[0], "naïve 😀\n\n  two spaces", ""):
        assert tok.decode(tok.encode(text, bos=True)) == text
    assert tok.decode(tok.encode("a<|end|>b", bos=False)) == "ab"
    assert tok.special_tokens["eos_token"] == "<|end|>" and "<|start|>" in tok.special_strings()
    assert tok.vocab_size == max(tok.backend.get_vocab().values()) + 1


@pytest.mark.parametrize("flag", (None, True, False))
@pytest.mark.parametrize("in_file", (True, False))
def test_one_bos_or_none(tmp_path, flag, in_file):
    backend = save_tokenizer(tmp_path, bos_token="<|bos|>", **({} if flag is None else {"add_bos_token": flag}))
    bos = 2
    if in_file:
        backend.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", pair=None, special_tokens=[("<|bos|>", bos)]
        )
        backend.save(str(tmp_path / "tokenizer.json"))
    tok = tokenizer.load(tmp_path)
    adds = in_file if flag is None else flag
    assert tok.encode("hello", bos=True).count(bos) == adds
    assert tok.encode("<|bos|>hello", bos=True).count(bos) == 1
    assert tok.encode("hello", bos=False).count(bos) == 0


def test_tokens_of_the_config_go_behind_the_vocabulary(tmp_path):
    backend = save_tokenizer(tmp_path)
    size = backend.get_vocab_size()
    listed = {str(n): {"content": text, "special": n == 901} for n, text in ((901, "<|x|>"), (900, "<y>"))}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": listed}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<|pad|>"}}))
    tok = tokenizer.load(tmp_path)
    assert tok.encode("<y><|x|><|pad|>", bos=False) == [size, size + 1, size + 2]
    assert tok.decode([size, size + 1, size + 2]) == "<y>"
    assert tok.special_tokens["pad_token"] == "<|pad|>"


@pytest.mark.parametrize(
    "given, want",
    (
        (None, ["<|end|>"]),
        (2, ["<|bos|>", "<|end|>"]),
        ([1, 0], ["<|end|>", "<|start|>"]),
        ([], ["<|end|>"]),
        ("<|bos|>", ["<|bos|>", "<|end|>"]),
    ),
)
def test_stop_tokens(tmp_path, given, want):
    save_tokenizer(tmp_path)
    if given is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given, "top_k": 7}))
    tok = tokenizer.load(tmp_path)
    assert [tok.backend.id_to_token(i) for i in tok.stop_tokens] == want
    assert tok.generation.get("top_k") == (None if given is None else 7)


def byte_fallback_tokenizer() -> tokenizers.Tokenizer:
    vocab = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}, "▁the": 257, "▁": 258, "é": 259}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def streamed(tok, ids):
    more = tok.stream()
    return [more([token]) for token in ids]


def test_streamed_text_is_whole_characters(tmp_path):
    save_tokenizer(tmp_path)
    tok = tokenizer.load(tmp_path)
    fallback = tok._replace(backend=byte_fallback_tokenizer())
    for text in ("naïve 😀 👩‍👩‍👧 日本語 ok", "  two  spaces\n\n"):
        ids = tok.encode(text, bos=False)
        pieces = streamed(tok, ids)
        assert len(pieces) == len(ids) and "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    ids = [257, 258, 259, *(b + 1 for b in "😀日".encode()), 257]
    pieces = streamed(fallback, ids)
    assert "".join(pieces) == fallback.decode(ids) == "the é😀日 the"
    assert not any("\ufffd" in piece for piece in pieces)
    # A character cut off by the end is shown only when nothing else can come.
    cut, more = tok.encode("ok 😀", bos=False)[:-1], tok.stream()
    assert "\ufffd" in tok.decode(cut) and more(cut).strip() == "ok"
    assert "ok " + more([], end=True).removeprefix(" ") == tok.decode(cut)


BYTE_FALLBACK = pathlib.Path(__file__).parent / "byte_fallback_tokenizer"


def test_stray_bytes_do_not_end_a_stream():
    tok = tokenizer.load(BYTE_FALLBACK)
    token = lambda name: tok.backend.token_to_id(name) or 0
    more = tok.stream()
    pieces = [more([token(name)]) for name in ("<0x0A>", "<0xF0>", "a")]
    ids = [token(name) for name in ("<0x0A>", "<0xF0>", "a")]
    assert "".join(pieces) == tok.decode(ids) and pieces[-1].endswith("\ufffda")


@pytest.mark.parametrize("name", ("byte fallback", "byte level"))
def test_what_is_streamed_is_what_is_decoded_at_once(tmp_path, name):
    save_tokenizer(tmp_path)
    tok = tokenizer.load(BYTE_FALLBACK if name == "byte fallback" else tmp_path)
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(tok.vocab_size + 3) for _ in range(rng.randrange(1, 30))]
        more = tok.stream()
        assert "".join(more([i]) for i in ids) + more([], end=True) == tok.decode(ids)


def test_text_that_goes_on_is_tokenised_as_in_the_whole():
    tok = tokenizer.load(BYTE_FALLBACK)
    first, more = "<s>[INST] the [/INST] two", " </s><s>[INST] and? [/INST]"
    whole = tok.encode(first + more, bos=False)
    assert tok.encode(first, bos=False) + tok.encode_more(more) == whole
    assert tok.encode(first, bos=False) + tok.encode(more, bos=False) != whole


def test_half_a_surrogate_pair_is_named():
    tok = tokenizer.load(BYTE_FALLBACK)
    for text in ("bad \ud83d half", "bad \udcff bytes"):
        for encode in (tok.encode_more, lambda t: tok.encode(t, bos=True)):
            with pytest.raises(ValueError, match=r"character \d is '.u(d83d|dcff)', half a surrogate pair"):
                encode(text)


def test_stop_tokens_are_those_of_all_files(tmp_path):
    save_tokenizer(tmp_path)  # its own is <|end|>
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0]}')
    assert sorted(tokenizer.load(tmp_path).stop_tokens) == [0, 1, 2]
    (tmp_path / "config.json").write_text('{"eos_token_id": [true, 9999, "<|none|>"]}')
    with pytest.raises(ValueError, match="(?s)config.json: eos_token_id True.*9999 is no token.*'<|none|>'"):
        tokenizer.load(tmp_path)


def test_special_tokens_are_not_streamed(tmp_path):
    save_tokenizer(tmp_path)
    tok = tokenizer.load(tmp_path)
    assert tok.stream()(tok.encode("one<|end|> two", bos=False)) == "one two"


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def no_tokenizer(folder: pathlib.Path):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"")


@pytest.mark.parametrize(
    "damage, message",
    (
        (no_tokenizer, "has no tokenizer.json.*tokenizer.model can be converted with transformers"),
        (write("tokenizer.json", "{}"), "tokenizer.json: not a tokenizer of the `tokenizers` library"),
        (write("tokenizer_config.json", "{"), "tokenizer_config.json: not valid JSON"),
        (write("generation_config.json", "[]"), "generation_config.json: must hold a JSON object, got list"),
        (write("generation_config.json", '{"eos_token_id": 9999}'), "eos_token_id 9999 is no token"),
    ),
)
def test_bad_folders(tmp_path, damage, message):
    save_tokenizer(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        tokenizer.load(tmp_path)
