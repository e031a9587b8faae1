"""Pictures over HTTP, with the engine that serves and a tiny Qwen3-VL: the answers are those of `rj.generate`."""

import base64
import concurrent.futures
import io
import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import seeing
from asking_helpers import CHAT, COMPLETIONS, answer, ask, refusal
from fake_engine import FakeEngine, make_service
from PIL import Image
from seeing import asking, picture
from starlette.testclient import TestClient

import retention_jax as rj
from retention_jax.config import CacheConfig
from retention_jax.generation import conversation
from retention_jax.generation.conversation import Writer
from retention_jax.models import vision as towers
from retention_jax.serving import app, programs, shown, uploads
from retention_jax.serving.engine import Engine
from retention_jax.serving.sessions import Sessions
from retention_jax.text import tokenizer
from retention_jax.vision import processor
from retention_jax.vision.prompt import Prompt

pytestmark = pytest.mark.one_version
NEW = 6


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing")
    model = seeing.save(folder)
    vision = model.config.vision
    assert vision is not None
    return Writer(
        model=model,
        tokenizer=tokenizer.load(folder),
        cache=CacheConfig(budget=8, recent=4, prefill_chunk=16),
        max_new_tokens=NEW,
        drawing={},
        seed=0,
        template=True,
        system="",
        template_kwargs={},
        processor=processor.read(folder, vision),
    )


@pytest.fixture(scope="module")
def client(writer):
    sessions = Sessions(writer.model, writer.cache, host_bytes=2**24)
    engine = Engine(writer.model, writer.cache, rows=3, queue=32, sessions=sessions, run=4, picture=16)
    engine.start()
    with TestClient(app.make(make_service(writer, engine, most_sequences=32)), raise_server_exceptions=False) as client:
        yield client
        assert engine.ready and engine.stats().rows_in_use == 0
    engine.drain(10.0)


def alone(writer, messages, **how):
    """What `rj.generate` writes, by the tokens and pixels that the package makes of the same messages."""
    prompt = conversation.prompt_tokens(writer, messages)
    stops = writer.tokenizer.stop_tokens
    out = rj.generate(writer.model, [prompt], writer.cache, max_new_tokens=NEW, stop_tokens=stops, **how)
    return writer.tokenizer.decode(out.tokens[0])


def said(got) -> str:
    return got["choices"][0]["message"]["content"]


def cached(got) -> int:
    return got["usage"]["prompt_tokens_details"]["cached_tokens"]


ASKED = [
    asking(picture(1), "what is two?"),
    asking("the quick ", picture(2, 70, 90), "brown fox ", picture(3, 128, 40), "jumps?"),
    [{"role": "user", "content": "what is two plus two?"}],
    asking("the lazy dog " * 4, picture(4, 40, 40)),
]


def test_each_is_answered_as_by_generate_alone_and_in_company(writer, client):
    want = [alone(writer, messages) for messages in ASKED]
    assert len(set(want)) == len(want)
    fresh: dict[str, Any] = dict(max_tokens=NEW, retention={"reuse": False})
    assert [said(answer(client, messages=messages, **fresh)) for messages in ASKED] == want
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda m: said(answer(client, messages=m, **fresh)), ASKED[::-1] * 3))
    assert together == want[::-1] * 3


def test_nothing_is_compiled_for_a_request(client):
    """Pictures of every width of the tower, and prompts of every width of a chunk, were seen to before the first."""
    sizes = lambda: [f._cache_size() for f in (towers.see, programs.read)]  # pyright: ignore  # a jitted function
    before = sizes()
    for messages in ASKED:
        answer(client, messages=messages, max_tokens=NEW)
    assert sizes() == before


def test_samples_are_drawn_as_by_generate(writer, client):
    how: dict[str, Any] = dict(temperature=1.0, seed=7)
    got = answer(client, messages=ASKED[1], max_tokens=NEW, n=2, retention={"reuse": False}, **how)
    texts = [choice["message"]["content"] for choice in got["choices"]]
    assert texts == [alone(writer, ASKED[1], row_ids=[i], **how) for i in range(2)] and texts[0] != texts[1]


def test_a_prompt_is_taken_up_only_with_the_very_same_pixels(writer, client):
    """The same words, shapes and tokens: another picture is another prompt, wherever it stands."""
    first, other = picture(10), picture(10)
    other[-1, -1] ^= 255  # a corner, in the last feature
    words = "the quick brown fox jumps over the lazy dog"
    fresh: dict[str, Any] = dict(max_tokens=NEW, retention={"reuse": False})
    want = {i: said(answer(client, messages=asking(p, words), **fresh)) for i, p in enumerate((first, other))}
    assert cached(answer(client, messages=asking(first, words), max_tokens=NEW)) == 0
    got = answer(client, messages=asking(first, words), max_tokens=NEW)
    assert cached(got) >= 16 and said(got) == want[0]
    got = answer(client, messages=asking(other, words), max_tokens=NEW)
    assert cached(got) == 0 and said(got) == want[1] == alone(writer, asking(other, words))


@pytest.mark.parametrize("picture_of_next_turn", [False, True])
def test_the_next_turn_goes_on_at_its_positions(writer, client, picture_of_next_turn):
    """As `generate` does with the buffer of the first turn: what a snapshot holds is not looked at again."""
    seed = 20 + picture_of_next_turn
    first = asking(picture(seed, 96, 64), "two?")
    said_first = said(answer(client, messages=first, max_tokens=NEW))
    content = [{"type": "text", "text": " plus two?"}]
    if picture_of_next_turn:
        content.append(seeing.part(seeing.url(picture(seed + 10))))
    turns = [*first, {"role": "assistant", "content": said_first}, {"role": "user", "content": content}]
    got = answer(client, messages=turns, max_tokens=NEW)
    assert cached(got) > 16

    start, tokens = conversation.turn_tokens(writer, conversation.Conversation(), first[0]["content"])
    reply = conversation.reply(writer._replace(drawing=dict(temperature=0.0)), tokens, lambda _: None, seed=0)
    assert writer.tokenizer.decode(reply.tokens) == said_first
    held = conversation.Conversation(
        [*start, {"role": "assistant", "content": said_first}], reply.tokens[-1], reply.buffer
    )
    _, more = conversation.turn_tokens(writer, held, content)
    want = rj.generate(
        writer.model,
        [more],
        writer.cache,
        max_new_tokens=NEW,
        stop_tokens=writer.tokenizer.stop_tokens,
        buffer=reply.buffer,
    )
    assert said(got) == writer.tokenizer.decode(want.tokens[0])


def test_pictures_of_every_kind_that_is_taken(client):
    for kind in uploads.FORMATS:
        messages = [{"role": "user", "content": [seeing.part(seeing.url(picture(1), kind))]}]
        assert answer(client, messages=messages, max_tokens=1)["usage"]["prompt_tokens"] > 6


def huge(width: int, height: int) -> str:
    """A PNG of a few bytes that says it is large."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(content).decode()


def eps() -> str:
    Image.fromarray(picture(1)).save(file := io.BytesIO(), "EPS")
    return "data:image/eps;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    "link, told",
    [
        ("data:image/png;base64,???", "not valid base64"),
        ("data:image/png;base64,", "cannot be read as a picture"),
        ("data:image/png;base64," + base64.b64encode(b"no picture").decode(), "cannot be read as a picture"),
        (seeing.url(picture(1))[: 22 + 400], "cannot be read as a picture"),
        (huge(4097, 4096), "at most 16,777,216 pixels, got 4097 x 4096"),
        (huge(12000, 12000), "at most 16,777,216 pixels"),
        (huge(60000, 60000), "at most 16,777,216 pixels"),
        (huge(100, 100), "cannot be read as a picture"),
        (eps(), "cannot be read as a picture of PNG, JPEG, WEBP, GIF"),
        (seeing.url(picture(1, 3, 700)), "at most 200 times"),
    ],
    ids=lambda x: x[:40] if x.startswith("data") else "",
)
def test_pictures_that_are_not_taken(client, link, told):
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, seeing.part(link)]}]
    error = refusal(ask(client, messages=messages), 400)
    assert told in error["message"] and "part 1" in error["message"] and len(error["message"]) < 400
    assert (error["param"] or "").startswith("messages")


def test_too_many_pictures(client):
    error = refusal(ask(client, messages=asking(*[picture(1)] * 9)), 400)
    assert error["param"] == "messages.0.content" and "at most 8 pictures" in error["message"]


@pytest.mark.parametrize("mark", ["<|image_pad|>", "<|video_pad|>"])
def test_typed_placeholders_are_refused(writer, client, mark):
    for messages in (
        [{"role": "user", "content": f"a {mark}"}],
        [{"role": "system", "content": mark}, *asking(picture(1))],
        asking(picture(1), mark),
    ):
        assert "cannot be text" in refusal(ask(client, messages=messages), 400)["message"]
    token = writer.tokenizer.backend.token_to_id(mark)
    for prompt in (mark, [5, token]):
        error = refusal(ask(client, COMPLETIONS, prompt=prompt), 400)
        assert error["param"] == "prompt" and "cannot be text" in error["message"]


def shown_of(writer, messages) -> shown.Shown:
    prompt = conversation.prompt_tokens(writer, messages)
    assert isinstance(prompt, Prompt)
    return shown.of(prompt, writer.model.config.vision)


def test_a_server_that_takes_no_pictures(writer):
    """Its model could."""
    engine = FakeEngine()
    service = make_service(writer._replace(processor=None), engine)
    client = TestClient(app.make(service), raise_server_exceptions=False)
    body = json.dumps({"model": "tiny", "messages": asking(picture(1))})
    got = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert "reads text only" in refusal(got, 400)["message"] and not engine.requests
    seen = shown_of(writer, ASKED[1])
    assert shown.problems(seen, writer.model.config, 0) and shown.problems(seen, writer.model.config, 4)
    assert not shown.problems(seen, writer.model.config, 16)


def test_a_prompts_key_tells_every_feature_apart(writer):
    a, b = (shown_of(writer, asking(picture(i), picture(1))) for i in (1, 2))
    assert len(set(a.key)) > len(set(a.prompt.tokens.tolist())) and min(a.key) < 0
    marks = np.flatnonzero(a.prompt.feature >= 0)
    assert all((a.key[i] < 0) == (i in marks) for i in range(len(a.key)))
    half = len(marks) // 2
    assert a.ends == b.ends and all(a.key[i] != b.key[i] for i in marks[:half])
    assert [a.key[i] for i in marks[half:]] == [b.key[i] for i in marks[half:]] == [a.key[i] for i in marks[:half]]
