"""Clients that go, and what operators see."""

import asyncio
import json
import pathlib
import runpy

import pytest
from absl import flags
from asking_helpers import CHAT, HI, answer
from fake_engine import FakeEngine, make_service

from retention_jax.serving import app as app_lib
from retention_jax.serving import protocol

pytestmark = pytest.mark.one_version


def posted(app, body, gone, send):
    """A request at the application itself; `gone` is set when the client goes."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
    return asyncio.ensure_future(app(scope, receive, send))


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 30))


async def so(holds):
    while not holds():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_rows(writer, stream):
    """Before the first token, as after it."""
    engine = FakeEngine(run=1)
    engine.hold.set()
    app = app_lib.make(make_service(writer, engine))
    body = {"model": "tiny", "messages": HI, "stream": stream, "n": 2, "max_tokens": 300}

    async def go():
        sent, gone = [], asyncio.Event()

        async def send(message):
            sent.append(message)

        task = posted(app, body, gone, send)
        await so(lambda: len(engine.running) == 2)
        assert not task.done()
        gone.set()
        await task
        await so(lambda: not engine.running)
        return b"".join(m.get("body", b"") for m in sent)

    assert b"[DONE]" not in run(go()) and len(engine.requests) == 2


def test_a_client_that_does_not_read_keeps_nobody_waiting(writer):
    """Its own answer waits for it, whole, without a row."""
    engine = FakeEngine(run=1)
    app = app_lib.make(make_service(writer, engine))
    body = {"model": "tiny", "messages": HI, "stream": True, "max_tokens": 20}

    async def go():
        reads, gone, whole = asyncio.Event(), asyncio.Event(), []

        async def slow(message):
            whole.append(message.get("body", b""))
            await reads.wait()

        async def quick(message):
            pass

        task = posted(app, body, gone, slow)
        await so(lambda: engine.requests and not engine.running)
        for _ in range(3):
            await posted(app, body, gone, quick)
        assert not task.done() and len(whole) == 1
        reads.set()
        await task
        return b"".join(whole)

    assert run(go()).endswith(b"data: [DONE]\n\n")


def test_metrics(serve):
    client, _ = serve()
    answer(client, max_tokens=7)
    client.get("/nowhere/secret")
    text = client.get("/metrics").text
    for line in (
        "retention_jax_rows 4.0",
        "retention_jax_queued 0.0",
        "retention_jax_evicted_entries_total 5.0",
        'retention_jax_http_responses_total{path="/v1/chat/completions",status="200"} 1.0',
        'retention_jax_http_responses_total{path="other",status="404"} 1.0',
        "retention_jax_time_to_first_token_seconds_count 1.0",
        "retention_jax_time_between_tokens_seconds_count 4.0",
    ):
        assert line in text.splitlines(), text


def test_every_field_of_a_request_is_honoured_or_refused():
    """Of the fields that OpenAI's own client knows, so that a new one is noticed."""
    from openai.types import completion_create_params as completion
    from openai.types.chat import completion_create_params as chat

    for params, kind in ((chat, protocol.ChatRequest), (completion, protocol.CompletionRequest)):
        base = params.CompletionCreateParamsBase
        known = {*kind.model_fields, *protocol.IGNORED, *protocol.REFUSED}
        assert set(base.__annotations__) - known == set()


def test_the_load_generator_tells_what_it_measured(listening, capsys):
    address, engine = listening
    module = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "launch" / "load_server.py"), run_name="command")
    values = flags.FlagValues()
    module["define_flags"](values)
    values(["load", f"--url={address}", "--clients=1,3", "--requests=2", "--new_tokens=9", "--prompt_words=5"])
    assert module["main"](["load"], values) == 0
    *_, one, three = capsys.readouterr().out.splitlines()
    assert one.startswith("| 1 | ") and three.startswith("| 3 | ") and one.endswith(" | 0 |")
    assert len(engine.requests) == 8 and len({r.prompt for r in engine.requests}) == 8
    engine.is_ready = False
    assert module["main"](["load"], values) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith(" | 6 |")
