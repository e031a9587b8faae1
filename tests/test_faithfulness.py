"""Closeness to the full cache: by hand, as decoding token by token has it, and from the command's plan to its rows."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, tiny_model
from text_helpers import make_tokenizer, write_rows

from retention_jax.config import CacheConfig, DataConfig, EvalConfig
from retention_jax.evaluation import buffers, faithfulness, plan, rows
from retention_jax.evaluation.faithfulness import Faithfulness
from retention_jax.generation import decoding
from retention_jax.models.inputs import padded

PROMPTS = [
    {"prompt": "the quick brown fox jumps over the lazy dog. what is two plus two?"},
    {"turns": ["the dog jumps over the fox", "and the fox?"]},
    {"question": "what is lazy?"},
]


@pytest.fixture(scope="module", autouse=True)
def programs_kept():
    """All tests here run the same few programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "clear_caches", lambda: None)
        yield


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=300)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", PROMPTS)
    return EvalConfig(
        tasks=("faithfulness",),
        policies=("full", "retention"),
        budgets=(5,),
        recent=4,
        prefill_chunk=32,
        max_new_tokens=11,
        batch_size=2,
        sources=(f"faithfulness={path}",),
    )


def test_divergence_by_hand():
    full = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]))
    other = jnp.log(jnp.array([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]])) + 3.0
    kl, same = faithfulness.divergence(full, other)
    assert_close(kl, [0.5 * math.log(2) - 0.25 * math.log(2), 0.0])
    assert same.tolist() == [False, True]


def test_scores_are_those_of_decoding_token_by_token(model, tok, config):
    block = Faithfulness(model, tok, config)
    assert [len(batch) for batch in block.batches] == [2, 1] and block.prompts[1] == block._tokens(
        PROMPTS[1]["turns"][0]
    )
    cell = buffers.cells(config, block.length)[1]
    (unit, result), _ = block.results(block.units(*cell), functools.partial(buffers.buffer_of, config))
    answers = block._full[0][0]
    caches = CacheConfig.full(256, recent=4, prefill_chunk=32), CacheConfig(budget=5, recent=4, prefill_chunk=32)
    prompts = [block.prompts[i] for i in block.batches[0]]
    lengths, most = [len(prompt) for prompt in prompts], max(map(len, answers))
    tokens, written = padded(prompts, decoding.bucket(max(lengths), 32)), padded(answers, most)
    logits = []
    for cache in caches:
        following, buffer = decoding.prefill(model, tokens, cache, lengths=lengths)
        logits.append([following])
        for token in written[:, :-1].T:
            following, buffer = decoding.decode(model, token, buffer)
            logits[-1].append(following)
    of_caches = jax.nn.log_softmax(np.array(logits), axis=-1)  # [2, tokens, rows, V]
    for row in range(len(prompts)):
        kept, evicted = np.asarray(of_caches)[:, : len(answers[row]), row]
        assert kept.argmax(axis=1).tolist() == answers[row], "the full cache's own answer"
        kl = (np.exp(kept) * (kept - evicted)).sum(axis=1)
        assert_close(result["scores"][row], kl.mean(), 1e-4)
        assert result["agreement"][row] == np.mean(kept.argmax(axis=1) == evicted.argmax(axis=1))
    assert min(result["scores"]) > 0.01, "the policy is not the full cache"


def test_from_plan_to_rows_and_again(model, tok, config, tmp_path, monkeypatch, capsys):
    found = plan.run(model, config, DataConfig(), tmp_path, tok)
    by_name = {(row.task, row.policy): row for row in found}
    assert list(by_name) == [
        (f"faithfulness/{metric}", policy) for policy in ("full", "retention") for metric in ("kl", "agreement")
    ]
    full, kept = (by_name["faithfulness/kl", policy] for policy in ("full", "retention"))
    assert full.score == 0 and by_name["faithfulness/agreement", "full"].score == 1
    assert kept.score > 0.01 and kept.low < kept.score < kept.high and kept.n == 3 and kept.budget == 5
    assert by_name["faithfulness/agreement", "retention"].score < 1
    assert kept.kv_bytes == 2 * 2 * (5 + 4) * (2 * 8 + 2) * 4 < kept.full_kv_bytes == full.kv_bytes
    shown = capsys.readouterr().out
    assert "KL to the full cache, nats a token, lower is better" in shown
    assert "% of tokens predicted as by the full cache" in shown
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "quality_faithfulness_kl.png",
        "quality_faithfulness_agreement.png",
    }
    monkeypatch.setattr(Faithfulness, "_compared", lambda *args: pytest.fail("nothing is computed twice"))
    again = plan.run(model, config, DataConfig(), tmp_path, tok)
    assert again == found == rows.load(tmp_path / "results.json")
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 4


def test_what_cannot_be_is_refused(model, tok, config, tmp_path):
    change = lambda **changes: EvalConfig(**{**{f: getattr(config, f) for f in config.__dataclass_fields__}, **changes})
    with pytest.raises(ValueError, match="task 'faithfulness' needs its prompts: --sources=faithfulness=FILE"):
        plan.check(change(sources=()), DataConfig())
    with pytest.raises(ValueError, match="policy 'oracle' must know what comes: not with task 'faithfulness'"):
        plan.check(change(policies=("oracle",)), DataConfig())
    with pytest.raises(ValueError, match="task 'faithfulness' needs the model's tokenizer"):
        plan.check_sources(config, DataConfig(), None)
    with pytest.raises(ValueError, match=r"row 1: needs turns"):
        path = write_rows(tmp_path / "bad.jsonl", [{"text": "x"}])
        plan.check_sources(change(sources=(f"faithfulness={path}",)), DataConfig(), tok)
    with pytest.raises(
        ValueError, match=r"the longest of 3 prompts has \d+ tokens and an answer of up to 11, the context"
    ):
        Faithfulness(model, tok, change(context=30))
