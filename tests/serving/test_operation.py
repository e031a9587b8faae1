"""Clients that go, and what operators see."""

import asyncio
import json
from typing import Any

import pytest
from asking_helpers import CHAT, HI, answer
from fake_engine import FakeEngine, make_service

from retention_jax.serving import app as app_lib
from retention_jax.serving import protocol

pytestmark = pytest.mark.one_version


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_rows(writer, stream):
    """Before the first token, as after it."""
    engine = FakeEngine(run=1)
    engine.hold.set()
    app = app_lib.make(make_service(writer, engine))
    body = json.dumps({"model": "tiny", "messages": HI, "stream": stream, "n": 2, "max_tokens": 300}).encode()

    async def run():
        gone = asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        sent: list[dict[str, Any]] = []
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
        task = asyncio.ensure_future(app(scope, receive, send))
        while len(engine.running) < 2:
            await asyncio.sleep(0.01)
        assert not task.done()
        gone.set()
        await asyncio.wait_for(task, 10)
        while engine.running:
            await asyncio.sleep(0.01)
        return sent

    sent = asyncio.run(asyncio.wait_for(run(), 30))
    assert len(engine.requests) == 2 and b"[DONE]" not in b"".join(m.get("body", b"") for m in sent)


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
