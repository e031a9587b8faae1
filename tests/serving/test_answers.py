"""Answers of the HTTP layer: layouts, whole and in parts, scores, defaults."""

from typing import Any

import pytest
from asking_helpers import COMPLETIONS, answer, events
from fake_engine import FakeEngine

pytestmark = pytest.mark.one_version


def test_a_chat(serve, writer):
    client, engine = serve()
    got = answer(client, max_tokens=5, seed=3, temperature=0.5, top_p=0.9, top_k=4, min_p=0.1)
    [request] = engine.requests
    text = "<|start|>user\ntwo plus two?<|end|>\n<|start|>assistant\n"
    assert list(request.prompt) == writer.tokenizer.encode(text, bos=False)
    assert request.stop_tokens == (1,) and request.max_new_tokens == 5 and request.row_id == 0
    assert (request.seed, request.temperature, request.top_p, request.top_k, request.min_p) == (3, 0.5, 0.9, 4, 0.1)
    assert got["object"] == "chat.completion" and got["model"] == "tiny" and got["id"].startswith("chatcmpl-")
    [choice] = got["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": writer.tokenizer.decode(request.prompt[:5]),
        "refusal": None,
    }
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    prompt = len(request.prompt)
    assert got["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 5,
        "total_tokens": prompt + 5,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    full = 2 * (prompt + 4) * 2 * 2 * 8 * 4
    assert choice["retention"] == {"kept": 7, "budget_bytes": 4096, "full_bytes": full}


def test_a_stop_token_ends_a_reply_and_is_not_in_its_text(serve):
    client, engine = serve()
    [choice] = answer(client, max_tokens=100)["choices"]
    assert choice["finish_reason"] == "stop" and "two plus two?" in choice["message"]["content"]
    assert "<|end|>" not in choice["message"]["content"]


def test_defaults_are_the_servers(serve):
    client, engine = serve()
    answer(client)
    answer(client)
    first, second = engine.requests
    assert first.max_new_tokens == 6 and first.temperature == 0.0 and first.top_logprobs == -1
    assert first.seed != second.seed  # drawn where none is given
    assert first.reuse and not first.show_kept


def test_parts_together_are_the_whole(serve):
    client, _ = serve()
    fields: dict[str, Any] = dict(max_tokens=20, logprobs=True, top_logprobs=2, n=2)
    whole, parts = answer(client, **fields), events(client, **fields)
    assert {part["object"] for part in parts} == {"chat.completion.chunk"} and len({p["id"] for p in parts}) == 1
    for index in range(2):
        mine = [c for part in parts for c in part["choices"] if c["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        want = whole["choices"][index]
        assert "".join(c["delta"].get("content", "") for c in mine) == want["message"]["content"]
        scores = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert scores == want["logprobs"]["content"]
        assert mine[-1]["finish_reason"] == want["finish_reason"] and mine[-1]["retention"] == want["retention"]
        assert len(mine) > 3
    assert all("usage" not in part for part in parts)


def test_usage_at_the_end_of_a_stream(serve):
    client, _ = serve()
    parts = events(client, stream_options={"include_usage": True}, max_tokens=4)
    assert [part["usage"] for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1]["choices"] == [] and parts[-1]["usage"]["completion_tokens"] == 4


def test_several_replies_draw_with_ids_of_their_own(serve):
    client, engine = serve()
    got = answer(client, n=3, seed=5)
    assert [c["index"] for c in got["choices"]] == [0, 1, 2]
    assert [(r.row_id, r.seed) for r in engine.requests] == [(0, 5), (1, 5), (2, 5)]
    assert got["usage"]["completion_tokens"] == 18 and got["usage"]["prompt_tokens"] == len(engine.requests[0].prompt)


def test_chat_logprobs(serve, writer):
    client, engine = serve()
    content = answer(client, logprobs=True, top_logprobs=2, max_tokens=2)["choices"][0]["logprobs"]["content"]
    first = engine.requests[-1].prompt[0]
    assert first == 0 and content[0]["token"] == "<|start|>" and content[0]["bytes"] == list(b"<|start|>")
    assert [entry["logprob"] for entry in content] == [-0.1, -0.2]
    assert [t["logprob"] for t in content[0]["top_logprobs"]] == [-0.1, -1.1]
    assert content[0]["top_logprobs"][1]["token"] == "<|end|>"
    plain = answer(client, logprobs=True, max_tokens=1)["choices"][0]["logprobs"]["content"]
    assert plain[0]["top_logprobs"] == [] and plain[0]["logprob"] == -0.1


def test_completions_take_texts_and_token_ids_alone_or_many(serve, writer):
    client, engine = serve()
    ids = writer.tokenizer.encode("the fox", bos=False)
    for prompt, count in (("the fox", 1), (ids, 1), (["the fox", "two"], 2), ([ids, ids], 2), ([ids, "two"], 2)):
        got = answer(client, COMPLETIONS, prompt=prompt, max_tokens=2)
        assert got["object"] == "text_completion" and [c["index"] for c in got["choices"]] == list(range(count))
    assert list(engine.requests[0].prompt) == list(engine.requests[1].prompt) == ids
    assert got["choices"][0]["text"] == writer.tokenizer.decode(ids[:2])
    got = answer(client, COMPLETIONS, prompt=["the", "two"], n=2, max_tokens=1)
    assert [r.row_id for r in engine.requests[-4:]] == [0, 1, 0, 1] and got["usage"]["prompt_tokens"] == sum(
        len(r.prompt) for r in engine.requests[-4::2]
    )


@pytest.mark.parametrize("limit", [0, 1])
def test_scores_of_a_prompt_as_evaluation_harnesses_read_them(serve, writer, limit):
    """`echo` with `logprobs`: the first token has none, and the last one is the new one, where one was made."""
    client, engine = serve()
    ids = writer.tokenizer.encode("what is two plus two", bos=False)
    got = answer(client, COMPLETIONS, prompt=[ids], max_tokens=limit, echo=True, logprobs=1, temperature=0)
    [choice] = got["choices"]
    scores = choice["logprobs"]
    assert engine.requests[0].prompt_logprobs and engine.requests[0].max_new_tokens == 1
    assert scores["token_logprobs"] == [None, *[-float(i) for i in range(1, len(ids))], *[-0.1] * limit]
    assert scores["top_logprobs"][0] is None
    both = zip(scores["top_logprobs"], scores["token_logprobs"], strict=True)
    assert all(max(top.values()) == score for top, score in [*both][1:])
    assert "".join(scores["tokens"][: len(ids)]) == "what is two plus two"
    new = writer.tokenizer.decode(ids[:1]) if limit else ""
    assert choice["text"] == "what is two plus two" + new
    offsets = scores["text_offset"]
    assert offsets[0] == 0 and offsets == sorted(offsets) and (not limit or offsets[-1] == len("what is two plus two"))
    assert got["usage"]["completion_tokens"] == limit


def test_a_stop_token_is_scored_in_completions(serve, writer):
    client, _ = serve(FakeEngine(script=[1]))
    ids = writer.tokenizer.encode("the fox", bos=False)
    [choice] = answer(client, COMPLETIONS, prompt=ids, max_tokens=1, echo=True, logprobs=0)["choices"]
    assert len(choice["logprobs"]["tokens"]) == len(ids) + 1 and choice["text"] == "the fox"
    assert choice["logprobs"]["top_logprobs"][-1] == {"<|end|>": -0.1} and choice["finish_reason"] == "stop"


def test_echo_in_parts(serve):
    client, _ = serve()
    fields: dict[str, Any] = dict(echo=True, logprobs=1, max_tokens=7)
    whole, parts = answer(client, COMPLETIONS, **fields), events(client, COMPLETIONS, **fields)
    choices = [c for part in parts for c in part["choices"]]
    assert "".join(c["text"] for c in choices) == whole["choices"][0]["text"]
    assert [x for c in choices for x in c["logprobs"]["text_offset"]] == whole["choices"][0]["logprobs"]["text_offset"]
