"""Requests as a client sends them, and what they must come back as."""

import json
import threading

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "two plus two?"}]


def ask(client, path=CHAT, **fields):
    given = {"model": "tiny", **({"messages": HI} if path == CHAT else {"prompt": "the fox"}), **fields}
    return client.post(path, json={k: v for k, v in given.items() if v is not ...})


def answer(client, path=CHAT, **fields):
    got = ask(client, path, **fields)
    assert got.status_code == 200, got.text
    return got.json()


def events(client, path=CHAT, **fields):
    got = ask(client, path, stream=True, **fields)
    assert got.status_code == 200 and got.headers["content-type"].startswith("text/event-stream")
    parts = got.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def refusal(got, status):
    assert got.status_code == status, got.text
    error = got.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def wait_until(holds, seconds=10.0):
    waiting = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if holds():
            return
        waiting.wait(0.01)
    raise AssertionError("it did not happen in time")
