"""The names of an evaluation's policies, and the options of the cache that each of them runs with."""

import dataclasses
import pathlib
import sys

import numpy as np
import pytest
from absl import flags
from helpers import tiny_model

from retention_jax import dilution
from retention_jax.config import CacheConfig, DataConfig, EvalConfig
from retention_jax.evaluation import buffers, command_flags, plan, sequences
from retention_jax.generation.scoring import score_stream
from retention_jax.policies.table import POLICIES, Policy
from retention_jax.report import page, results, traces

pytestmark = pytest.mark.one_version

DATA = DataConfig()
SMALL = EvalConfig(budgets=(3,), lengths=(36,), recent=6, examples=3, seeds=2)
NAMES = ("full", "retention", "retention_local", "streaming", "streaming_local", "random", "random_local")


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=257)


def test_policy_names():
    make = lambda name: buffers.buffer_of(EvalConfig(seed=7), name, 16, 192)
    assert buffers.names()[:7] == NAMES and "tova_local" not in buffers.names()
    assert {name.removesuffix("_local") for name in buffers.names()} == {"full", *POLICIES}
    assert make("full") == CacheConfig.full(192, recent=8)
    assert make("full").budget == 192 and not make("full").row.uses_gates  # so that none are computed
    assert make("retention") == CacheConfig(budget=16, recent=8)
    assert make("retention_local") == CacheConfig(budget=16, recent=8, local=True)
    assert make("streaming") == CacheConfig(budget=16, recent=8, policy="streaming")
    assert make("streaming_local") == CacheConfig(budget=16, recent=8, policy="streaming", local=True)
    assert make("random") == CacheConfig(budget=16, recent=8, policy="random", seed=7)
    with pytest.raises(ValueError, match="unknown policy 'h3o'; known: full, retention, retention_local"):
        make("h3o")


# ml_collections imports config files by a call that Python 3.12 deprecates.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_every_field_is_set_by_a_flag(monkeypatch):
    """Those that are None by default too, and short names for what is typed daily only."""
    given = dict(limit=3, prefill_chunk=16, threshold=0.5, max_new_tokens=4, context=70, enable_thinking=False)
    given |= dict(temperature=0.6, samples=2, horizon=4, recent=6, min_per_head=1, query_aware=True)
    path = pathlib.Path(__file__).parent.parent / "configs" / "recall.py"
    arguments = ["evaluate", f"--config={path}", "--budgets=4,8", "--seed=5"]
    arguments += [f"--config.eval.{name}={value}" for name, value in given.items()]
    monkeypatch.setattr(sys, "argv", arguments)  # where overrides of a config file are looked for
    values = flags.FlagValues()
    command_flags.define(values)
    values(arguments)
    found = command_flags.read(values).eval
    assert {name: getattr(found, name) for name in given} == given
    assert (found.budgets, found.seed, found.samples) == ((4, 8), 5, 2)
    long_only = {"temperature", "samples", "context", "batch_size", "max_new_tokens", "top_p", "query_aware"}
    assert not long_only & set(values)
    defined = {"config", "checkpoint", "output", *command_flags.SHORT}
    assert defined <= set(values) and set(command_flags.SHORT) <= set(EvalConfig.__dataclass_fields__)


def keep_the_oldest(options, x):
    """Scores of a policy that somebody adds: a function, and a row below."""
    return -x.pos.astype(np.float32), x.stat


@pytest.mark.slow  # goes through every command; the policies of the table do so one by one
def test_a_policy_is_added_by_a_function_and_a_row(model, monkeypatch, tmp_path):
    """It then runs through evaluation, dilution, traces and the report, by its name and as local."""
    monkeypatch.setitem(POLICIES, "oldest", Policy("oldest", keep_the_oldest, "all", options=("horizon",)))
    assert buffers.names()[-2:] == ("oldest", "oldest_local")
    config = dataclasses.replace(SMALL, policies=("full", "oldest", "oldest_local"), seeds=1, horizon=7)
    rows = plan.run(model, config, DATA, tmp_path)
    assert [(r.policy, r.options.get("horizon")) for r in rows] == [("full", None), ("oldest", 7), ("oldest_local", 7)]
    measured = dilution.run(model, config, DATA, None)
    for row, found in zip(rows, measured, strict=True):
        assert found.policy == row.policy and found.accuracy.mean() == pytest.approx(row.score)
    text = traces.recall_texts(36, 1, 0.4, 0)[0]
    made = buffers.buffer_of(config, "oldest", 3, 36)
    trace = traces.record(model, text.tokens, made, names=text.names, title="x", policy="oldest")
    assert trace.log_beta is None and np.all(np.argwhere(trace.evicted == traces.NEVER)[:, 2] < 3)
    traces.save(trace, tmp_path / "oldest_3_0.trace.npz")
    assert "oldest local" in page.build(results.read(tmp_path), "title", 10**6)


def test_every_policy_protects_the_same_tokens(model):
    config = dataclasses.replace(SMALL, protect_first=1, protect_last=1)
    tokens = sequences.examples("recall", SMALL, DATA, 36)[0][0]
    kept = lambda told: score_stream(model, tokens, buffers.buffer_of(told, "random", 3, 36), np.full(3, 36, np.int32))[
        1
    ].positions(1)
    assert all({0, 35} <= set(head) for layer in kept(config) for head in layer)
    assert not all({0, 35} <= set(head) for layer in kept(SMALL) for head in layer)
    made = [buffers.buffer_of(config, name, 40, 36) for name in buffers.names()[1:]]
    assert {(c.protect_first, c.protect_last) for c in made} == {(1, 1)}
    assert buffers.buffer_of(config, "full", 36, 36) == CacheConfig.full(36, recent=6)


def test_every_option_of_the_cache_is_one_of_the_evaluation():
    ours = {"budget", "policy", "local"}  # `budgets`, `policies` and names that end in _local
    assert set(CacheConfig.__dataclass_fields__) - ours - {"seed"} == set(buffers.OPTIONS)
    for name in buffers.OPTIONS:
        if name != "recent":
            assert getattr(EvalConfig(), name) == getattr(CacheConfig(budget=1), name), name


def test_an_option_applies_to_the_policies_that_honour_it():
    config = dataclasses.replace(
        SMALL,
        policies=buffers.names(),
        budgets=(16,),
        horizon=4,
        threshold=0.5,
        observe=8,
        pool_width=3,
        min_per_head=2,
    )
    assert buffers.problems(config) == []
    for name in buffers.names():
        made, options = buffers.buffer_of(config, name, 16, 36), buffers.options(config, name)
        ranks, observes = name.startswith("retention"), name in ("snapkv", "pyramidkv", "adakv", "rkv")
        assert (made.horizon, made.threshold) == ((4, 0.5) if ranks else (1, None)), name
        assert (made.observe, made.pool_width) == ((8, 3) if observes else (32, 7)), name
        assert made.min_per_head == (0 if name == "full" else 2)
        assert {option: getattr(made, option) for option in options} == options
        rest = dataclasses.replace(CacheConfig(budget=made.budget, policy=made.policy), **options)
        assert rest == made, "all that is not an option is as it is by default"


def test_an_option_that_no_policy_honours_is_refused_by_name():
    config = dataclasses.replace(SMALL, policies=("full", "streaming", "tova"), horizon=4, observe=8)
    with pytest.raises(ValueError) as caught:
        plan.check(config, DATA)
    said = str(caught.value)
    assert "horizon=4 changes nothing for full, streaming, tova; it goes with retention, retention_local" in said
    assert "observe=8 changes nothing for full, streaming, tova; it goes with snapkv, pyramidkv, adakv, rkv" in said
    plan.check(dataclasses.replace(config, policies=("full", "retention_local", "rkv")), DATA)
    with pytest.raises(ValueError, match="retention with 3 entries: .*horizon must be at least 1, got 0"):
        plan.check(dataclasses.replace(SMALL, horizon=0), DATA)


def test_options_change_what_is_kept_and_stand_in_the_rows(model):
    config = dataclasses.replace(SMALL, policies=("retention", "random_local"), budgets=(9,), min_per_head=4, horizon=9)
    plain = dataclasses.replace(config, min_per_head=0, horizon=1)
    first, second = plan.run(model, config, DATA, None)
    assert first.options["horizon"] == 9 and first.options["min_per_head"] == 4 and not first.options["local"]
    assert "horizon" not in second.options and second.options["local"] and second.options["seed"] == 0

    tokens = sequences.examples("recall", SMALL, DATA, 36)[0][0]
    kept = lambda c: score_stream(model, tokens, buffers.buffer_of(c, "retention", 9, 36), np.full(3, 36, np.int32))[
        1
    ].positions(0)
    least = lambda c: min(len(head) for layer in kept(c) for head in layer)
    assert least(config) >= 4 > least(plain)


def test_more_protected_than_kept_is_refused_with_every_policy_it_concerns():
    config = EvalConfig(policies=("full", "tova", "pyramidkv"), budgets=(4, 8), protect_first=3, protect_last=2)
    with pytest.raises(ValueError) as caught:
        plan.check(config, DATA)
    told = str(caught.value)
    assert "tova with 4 entries: " in told and "pyramidkv with 8 entries: " in told
    assert "tova with 8" not in told and "full" not in told
