"""What the HTTP layer refuses, and how it says so; keys and limits."""

import json
import threading
import time

import pytest
from asking_helpers import CHAT, COMPLETIONS, HI, answer, ask, refusal, wait_until
from fake_engine import FakeEngine

from retention_jax.serving import app as app_lib
from retention_jax.serving import keys as keys_lib
from retention_jax.serving.requests import Piece, Usage

pytestmark = pytest.mark.one_version


CONTEXT = 512


def shown(url, **detail):
    return {"type": "image_url", "image_url": {"url": url, **detail}}


BAD = [
    ({"messages": ...}, "messages", "is needed"),
    ({"model": ...}, "model", "is needed"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role", "'system'"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "a text or a list of parts"),
    (
        {"messages": [*HI, {"role": "user", "content": [shown("data:image/png;base64,")]}]},
        "messages.1.content",
        "reads text only; image_url parts are not supported",
    ),
    ({"messages": [{"role": "user", "content": [shown("http://a/b.png")]}]}, "messages.0.content", "are not fetched"),
    ({"messages": [{"role": "user", "content": [shown("file:///etc/hosts")]}]}, "messages.0.content", "not fetched"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content", "image parts are not"),
    ({"messages": [{"role": "user", "content": "a", "colour": 1}]}, "messages.0.colour", "is not a field"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages.0.tool_calls", "not supported"),
    ({"tools": [{"type": "function"}]}, "tools", "is not supported"),
    ({"tool_choice": "required"}, "tool_choice", "is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
    ({"logit_bias": {"5": 100}}, "logit_bias", "is not supported"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "is not supported"),
    ({"presence_penalty": True}, "presence_penalty", "is not supported"),
    ({"audio": {"voice": "a"}}, "audio", "is not supported"),
    ({"temperatur": 1}, "temperatur", "is not a field"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0, got -1"),
    ({"temperature": "1"}, "temperature", "valid number, got '1'"),
    ({"temperature": 10**400}, "temperature", ""),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_k": 1.5}, "top_k", "integer"),
    ({"seed": 2**63}, "seed", ""),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 9}, "n", "9 sequences in one request, at most 8"),
    ({"n": True}, "n", "integer"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 10**6}, "max_tokens", "more than the model's 512 tokens"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "must be the same"),
    ({"stop": ""}, "stop", "1 to 256 characters"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"stop": [1]}, "stop", "1 to 256 characters"),
    ({"logprobs": 1}, "logprobs", "boolean"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs=true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true only"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "is not a field"),
    ({"retention": {"reus": True}}, "retention.reus", "is not a field"),
    ({"chat_template_kwargs": {"messages": []}}, "messages", "is an argument of its own"),
    ({"messages": [{"role": "user", "content": "a"}], "prompt": "a"}, "prompt", "is not a field"),
]
BAD_COMPLETIONS = [
    ({"prompt": ...}, "prompt", "is needed"),
    ({"prompt": ""}, "prompt", "the prompt is empty"),
    ({"prompt": []}, "prompt", "not empty"),
    ({"prompt": [[]]}, "prompt", "none of them empty"),
    ({"prompt": [1, "a"]}, "prompt", "must be a text"),
    ({"prompt": [True]}, "prompt", "must be a text"),
    ({"prompt": [-1]}, "prompt", "token -1 is outside [0, 320)"),
    ({"prompt": [320]}, "prompt", "token 320 is outside"),
    ({"prompt": [10**30]}, "prompt", "is outside"),
    ({"suffix": "a"}, "suffix", "is not supported"),
    ({"best_of": 2}, "best_of", "is not supported"),
    ({"max_tokens": 0}, "max_tokens", "unless echo=true"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"logprobs": True}, "logprobs", "integer"),
]


@pytest.mark.parametrize("path, cases", [(CHAT, BAD), (COMPLETIONS, BAD_COMPLETIONS)])
def test_a_bad_field_is_refused_by_its_name(serve, path, cases):
    client, engine = serve()
    for fields, param, told in cases:
        error = refusal(ask(client, path, **fields), 400)
        assert error["param"] == param and told in error["message"], (fields, error)
        assert error["type"] == "invalid_request_error"
    assert not engine.requests


def test_all_problems_are_told_at_once(serve):
    client, _ = serve()
    error = refusal(ask(client, tools=[1], temperature=-1, stop=""), 400)
    assert [part.partition(":")[0] for part in error["message"].split("; ")] == ["tools", "temperature", "stop"]


def test_fields_that_ask_for_nothing_are_let(serve):
    client, engine = serve()
    nothing = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}}
    nothing |= {"frequency_penalty": 0, "presence_penalty": 0.0, "audio": None, "top_p": None, "seed": None}
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    sent_back = {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "tool_calls": None}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    answer(client, messages=[{"role": "developer", "content": "be"}, *HI, sent_back, parts], **nothing, **harmless)
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff", b'{"model": NaN}', b'{"a":"\\ud800"}', b"[" * 10**5, b"1" * 10**5]
)
def test_bodies_that_are_no_request(serve, body):
    client, _ = serve()
    got = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert refusal(got, 400)["code"] in ("invalid_json", "invalid_value")


def test_too_many_prompts_are_refused_before_they_are_read(serve, tokenizer, monkeypatch):
    client, engine = serve()
    monkeypatch.setattr(type(tokenizer), "encode", lambda *_, **__: 1 / 0)
    error = refusal(ask(client, COMPLETIONS, prompt=["the fox"] * 9), 400)
    assert error["param"] == "prompt" and "9 sequences in one request, at most 8" in error["message"]
    assert refusal(ask(client, COMPLETIONS, prompt=["the fox"] * 5, n=2), 400)["param"] == "n" and not engine.requests


def test_a_requests_time_runs_while_it_is_read(serve, tokenizer, monkeypatch):
    client, engine = serve(time_limit=5.0)
    encode = type(tokenizer).encode
    monkeypatch.setattr(type(tokenizer), "encode", lambda *a, **k: time.sleep(0.3) or encode(*a, **k))
    began = time.monotonic()
    answer(client, COMPLETIONS)
    assert began + 5.0 <= engine.requests[0].deadline < began + 5.3


def test_only_json_is_taken(serve):
    client, engine = serve()
    body = json.dumps({"model": "tiny", "messages": HI})
    got = client.post(CHAT, content=body, headers={"Content-Type": "text/plain"})
    assert refusal(got, 415)["code"] == "content_type" and not engine.requests
    assert "access-control-allow-origin" not in client.options(CHAT, headers={"Origin": "http://a"}).headers


def test_paths_methods_and_models_that_are_not_there(serve):
    client, _ = serve()
    assert refusal(client.get("/v1/nothing"), 404)["code"] == "not_found"
    assert refusal(client.get("/v1/chat/completions/"), 404)["code"] == "not_found"
    got = client.get(CHAT)
    assert refusal(got, 405)["code"] == "method_not_allowed" and got.headers["allow"] == "POST"
    error = refusal(ask(client, model="other"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found") and "'tiny'" in error["message"]
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/v1/models/tiny").json()["max_model_len"] == CONTEXT
    refusal(client.get("/v1/models/a/b"), 404)


def test_prompts_and_bodies_that_are_too_long(serve, monkeypatch):
    client, engine = serve()
    error = refusal(ask(client, COMPLETIONS, prompt=[5] * CONTEXT), 413)
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    answer(client, COMPLETIONS, prompt=[5] * (CONTEXT - 1))
    assert engine.requests[-1].max_new_tokens == 1
    monkeypatch.setattr(app_lib, "BODY_LIMIT", 1000)
    assert refusal(ask(client, user="a" * 1000), 413)["code"] == "body_too_large"
    chunks = (b'{"user": "' if i == 0 else b"a" * 100 for i in range(20))  # without a Content-Length
    got = client.post(CHAT, content=chunks, headers={"Content-Type": "application/json"})
    assert refusal(got, 413)["code"] == "body_too_large"


def test_a_full_queue(serve):
    client, engine = serve(FakeEngine(queue=2))
    engine.hold.set()
    got = ask(client, n=3)
    assert refusal(got, 429)["code"] == "queue_full" and got.headers["retry-after"] == "3"
    wait_until(lambda: not engine.running)  # none of the three stays behind


def test_not_ready_and_draining(serve):
    draining = threading.Event()
    client, engine = serve(draining=draining)
    engine.is_ready = False
    got = ask(client)
    assert refusal(got, 503)["type"] == "server_error" and int(got.headers["retry-after"]) > 0
    assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
    engine.is_ready = True
    assert client.get("/ready").status_code == 200
    draining.set()
    assert "is ending" in refusal(ask(client), 503)["message"] and client.get("/ready").status_code == 503


@pytest.mark.parametrize("finish, status", [("deadline", 504), ("cancelled", 503), ("error", 500)])
def test_requests_that_the_engine_gives_up(serve, finish, status):
    client, engine = serve()
    engine.evil = Piece([], [], [], finish, Usage(1, 0, 0, 0, 4096), None)
    refusal(ask(client), status)
    got = ask(client, stream=True)
    last = got.text.rstrip().split("\n\n")[-1]
    assert got.status_code == 200 and json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


def test_a_fault_is_told_without_its_text(serve, monkeypatch):
    client, engine = serve()
    monkeypatch.setattr(engine, "submit", lambda *_: 1 / 0)
    error = refusal(ask(client), 500)
    assert error["code"] == "internal_error" and "division" not in error["message"]


def test_api_keys(serve, tmp_path):
    (file := tmp_path / "keys").write_text("# ours\nsecret-one\n\n  secret-two\n")
    client, engine = serve(keys=keys_lib.read(file))
    got = ask(client)
    assert refusal(got, 401)["code"] == "invalid_api_key" and got.headers["www-authenticate"] == "Bearer"
    for wrong in ("Bearer secret-on", "secret-one", "Basic secret-one", "Bearer ", "Bearer # ours", "Bearer \xe9"):
        headers = [(b"Authorization", wrong.encode("latin-1"))]
        assert client.get("/v1/models", headers=headers).status_code == 401
    assert client.get("/health").status_code == client.get("/").status_code == 200
    for right in ("Bearer secret-one", "bearer secret-two"):
        client.headers["Authorization"] = right
        assert ask(client).status_code == client.get("/v1/models").status_code == 200
    assert len(engine.requests) == 2


@pytest.mark.parametrize("text, told", [("# none\n", "has no keys"), ("a\nb c\n", "line 2"), ("é\n", "line 1")])
def test_bad_key_files(tmp_path, text, told):
    (file := tmp_path / "keys").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        keys_lib.read(file)
