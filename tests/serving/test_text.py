"""The text of replies: stop strings, whole characters, the tokens of earlier turns."""

import pytest
from asking_helpers import COMPLETIONS, HI, answer, events
from fake_engine import FakeEngine

from retention_jax.serving.transcripts import Transcripts

pytestmark = pytest.mark.one_version


def stopped(client, stop, **fields):
    """Text and reason, whole and in parts, which must agree."""
    [choice] = answer(client, COMPLETIONS, stop=stop, **fields)["choices"]
    parts = [c for part in events(client, COMPLETIONS, stop=stop, **fields) for c in part["choices"]]
    assert "".join(part["text"] for part in parts) == choice["text"]
    assert parts[-1]["finish_reason"] == choice["finish_reason"]
    return choice["text"], choice["finish_reason"], parts


@pytest.mark.parametrize("run", [1, 2, 3, 100])
def test_stop_strings_are_found_across_pieces(serve, run):
    client, _ = serve(FakeEngine(run=run))
    prompt = "the quick brown fox jumps over the lazy dog"
    text, finish, parts = stopped(client, "own fo", prompt=prompt, max_tokens=60)
    assert (text, finish) == ("the quick br", "stop")
    text, finish, _ = stopped(client, ["zebra", "jum"], prompt=prompt, max_tokens=60)
    assert (text, finish) == ("the quick brown fox ", "stop")
    text, finish, _ = stopped(client, ["dogma"], prompt=prompt, max_tokens=5)
    assert finish == "length" and prompt.startswith(text)


def test_text_that_may_begin_a_stop_string_is_shown_when_it_does_not(serve, writer):
    client, engine = serve(FakeEngine(run=1))
    prompt = "two plus two is four"
    count = len(writer.tokenizer.encode(prompt, bos=False))
    text, finish, parts = stopped(client, ["is five", "four!"], prompt=prompt, max_tokens=count)
    assert text == prompt and finish == "length"
    assert not any("is" in part["text"] and "four" not in part["text"] for part in parts[:-1])


def test_a_stop_string_ends_the_engines_request(serve):
    engine = FakeEngine(run=1)
    engine.slow = 0.02
    client, _ = serve(engine)
    got = answer(client, COMPLETIONS, prompt="two plus two", stop="plus", max_tokens=400)
    assert got["choices"][0]["text"] == "two " and got["usage"]["completion_tokens"] < 12
    assert not engine.running


def test_tokens_behind_a_stop_string_are_not_scored(serve):
    client, _ = serve(FakeEngine(run=100))
    [choice] = answer(client, COMPLETIONS, prompt="two plus two", stop=" pl", logprobs=0, max_tokens=40)["choices"]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"] == "two"


def test_characters_of_several_tokens_come_whole(serve, writer):
    client, engine = serve(FakeEngine(run=1))
    prompt = "é 日本 🦊"
    ids = writer.tokenizer.encode(prompt, bos=False)
    streamed = events(client, COMPLETIONS, prompt=ids, max_tokens=len(ids), logprobs=0)
    parts = [c for part in streamed for c in part["choices"]]
    assert "".join(part["text"] for part in parts) == prompt and "\ufffd" not in str(parts)
    tokens = [t for part in parts for t in part["logprobs"]["tokens"]]
    assert len(tokens) == len(ids) and tokens[0] == "bytes:\\xc3"
    [choice] = answer(client, messages=[{"role": "user", "content": prompt}], logprobs=True, max_tokens=100)["choices"]
    raw = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    assert prompt in raw.decode()


def test_the_next_turn_begins_with_the_very_tokens_that_were_written(serve, writer):
    """The reply is written in single bytes, which is not how its text would be encoded."""
    reply = [writer.tokenizer.backend.token_to_id(c) for c in "two"]
    assert writer.tokenizer.encode("two", bos=False) != reply
    client, engine = serve(FakeEngine(script=[*reply, 1]))
    assert answer(client)["choices"][0]["message"]["content"] == "two"
    turns = [*HI, {"role": "assistant", "content": "two"}, {"role": "user", "content": "why?"}]
    answer(client, messages=turns)
    answer(client, messages=turns, retention={"reuse": False})
    first, second, fresh = engine.requests
    assert second.prompt[: len(first.prompt) + 4] == (*first.prompt, *reply, 1)
    assert fresh.prompt != second.prompt and not fresh.reuse
    decode = lambda ids: writer.tokenizer.backend.decode(list(ids), skip_special_tokens=False)
    assert decode(second.prompt) == decode(fresh.prompt)


def test_transcripts_forget_the_oldest(tokenizer, monkeypatch):
    monkeypatch.setattr("retention_jax.serving.transcripts.MOST_CHARACTERS", 40)
    known = Transcripts(tokenizer)
    known.remember("<|start|>one<|end|>", (0, 9, 1))
    known.remember("<|start|>two<|end|>", (0, 8, 1))
    assert known.tokens("<|start|>two<|end|>")[:3] == [0, 8, 1]
    assert known.tokens("<|start|>one<|end|>two")[:3] == [0, 9, 1]
    known.remember("<|start|>six<|end|>", (0, 7, 1))
    assert known.tokens("<|start|>two<|end|>") == tokenizer.encode("<|start|>two<|end|>", bos=False)
    known.remember("<|start|>si", (0, 5))
    assert known.tokens("<|start|>sip") == tokenizer.encode("<|start|>sip", bos=False)  # no control token at the seam


def test_what_is_kept_of_each_token(serve, writer):
    client, engine = serve()
    [choice] = answer(client, retention={"show_kept": True}, max_tokens=3)["choices"]
    told = choice["retention"]
    assert told["by_head"] == [[3, 4], [5, 6]] and len(told["tokens"]) == len(told["by_token"])
    assert told["tokens"][0] == "<|start|>" and len(told["tokens"]) == len(engine.requests[0].prompt) + 2
