"""Whatever is asked, the answer is an answer or an error object that fits, and no row stays behind."""

import json
import threading
from typing import Any

import pytest
from asking_helpers import CHAT, COMPLETIONS, HI, wait_until
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retention_jax.serving import protocol
from retention_jax.serving.engine import Engine
from retention_jax.serving.sessions import Sessions

pytestmark = pytest.mark.one_version

NUMBERS = st.one_of(
    st.integers(-3, 30),
    st.integers(),
    st.floats(),
    st.sampled_from([0, -0.0, 1, 2**31, 2**63, -(2**63), 10**400, 1e308, 5e-324, True]),
)
TEXTS = st.one_of(
    st.text(max_size=20), st.sampled_from(["", "a" * 300, "<|end|>", "{{ messages }}", "\x00", "two plus"])
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)
CONTENTS = st.one_of(
    TEXTS,
    VALUES,
    st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url", ""]), "text": TEXTS}), max_size=3),
    st.lists(st.fixed_dictionaries({"type": st.just("image_url"), "image_url": VALUES}), max_size=2),
)
ROLES = st.sampled_from(["system", "user", "assistant", "developer", "tool", ""])
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": st.one_of(ROLES, VALUES), "content": CONTENTS},
            optional={"name": VALUES, "tool_calls": VALUES, "reasoning_content": VALUES},
        ),
        VALUES,
    ),
    max_size=4,
)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["tiny", "tiny", "tiny", "other"]),
    "messages": st.one_of(st.just(HI), MESSAGES),
    "prompt": st.one_of(
        TEXTS, st.lists(st.integers(0, 319), min_size=1, max_size=5), st.lists(TEXTS, max_size=3), VALUES
    ),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "min_p": st.floats(0, 1),
    "top_k": st.integers(0, 50),
    "n": st.integers(1, 4),
    "max_tokens": st.integers(0, 40),
    "stop": st.lists(st.text(min_size=1, max_size=4), max_size=3),
    "stream": st.booleans(),
    "echo": st.booleans(),
    "logprobs": st.one_of(st.booleans(), st.integers(-1, 21)),
    "top_logprobs": st.integers(0, 20),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "retention": st.fixed_dictionaries({"reuse": st.booleans(), "show_kept": st.booleans()}),
    "chat_template_kwargs": st.dictionaries(TEXTS, LEAVES, max_size=2),
}
FIELDS = sorted(
    {*protocol.ChatRequest.model_fields, *protocol.CompletionRequest.model_fields, *protocol.REFUSED, *protocol.IGNORED}
)


@st.composite
def requests(draw, path: str):
    """A request that is right but for a few fields, which hold whatever they hold."""
    body: dict[str, Any] = {"model": "tiny", **({"messages": HI} if path == CHAT else {"prompt": "the fox"})}
    wanted = draw(st.lists(st.sampled_from(sorted(LIKELY)), max_size=6, unique=True))
    for name in wanted:
        body[name] = draw(LIKELY[name])
    for name in draw(st.lists(st.one_of(st.sampled_from(FIELDS), TEXTS), max_size=1)):
        body[name] = draw(VALUES)
    return body


def check(got) -> int:
    assert got.status_code in (200, 400, 404, 413), got.text
    if got.status_code != 200:
        error = got.json()["error"]
        assert error["type"] == "invalid_request_error" and error["message"]
    elif got.headers["content-type"].startswith("text/event-stream"):
        assert got.text.endswith("data: [DONE]\n\n") and '"error"' not in got.text
    else:
        assert all(choice["finish_reason"] in ("stop", "length") for choice in got.json()["choices"])
    return got.status_code


def fuzz(client, count):
    found = []
    path = st.sampled_from([CHAT, COMPLETIONS])
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=slow)
    @given(path.flatmap(lambda p: st.tuples(st.just(p), requests(p))))
    def ask_all(asked):
        body = json.dumps(asked[1])  # NaN, infinity and halves of surrogate pairs too
        found.append(check(client.post(asked[0], content=body, headers={"Content-Type": "application/json"})))

    @settings(max_examples=count // 4, deadline=None, database=None, derandomize=True)
    @given(st.one_of(st.binary(max_size=60), VALUES.map(lambda value: json.dumps(value).encode())))
    def ask_rubbish(body):
        assert check(client.post(CHAT, content=body, headers={"Content-Type": "application/json"})) == 400

    ask_all()
    ask_rubbish()
    assert 0.1 < found.count(200) / len(found) < 0.95  # it is no fuzzer whose every request falls at the first check


def test_no_request_makes_the_server_fail(serve):
    client, engine = serve(FakeEngine(run=50, queue=64))
    fuzz(client, 80)
    assert not engine.running


@pytest.mark.slow  # ten thousand requests
def test_no_request_of_many_makes_the_server_fail(serve):
    client, engine = serve(FakeEngine(run=50, queue=64))
    fuzz(client, 8000)
    assert not engine.running


@pytest.mark.slow  # compiles an engine's programs
def test_no_request_makes_an_engine_fail(serve, writer):
    """The one that serves, with a tiny model; threads and rows are afterwards as before."""
    sessions = Sessions(writer.model, writer.cache, host_bytes=2**20)
    engine = Engine(writer.model, writer.cache, rows=3, queue=64, sessions=sessions)
    engine.start()
    try:
        client, _ = serve(engine)
        fuzz(client, 100)
        threads = threading.active_count()
        fuzz(client, 600)
        wait_until(lambda: engine.stats().rows_in_use == 0)
        assert engine.ready and engine.stats().queued == 0 and engine.stats().requests > 100
        assert threading.active_count() <= threads + 2
    finally:
        engine.drain(10.0)
