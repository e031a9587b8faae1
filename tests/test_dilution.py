"""Dilution: what `measure` finds beside plain NumPy, files, refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags, logging
from flax import nnx
from helpers import Step, assert_close, simulate, tiny_config, tiny_model

from retention_jax.config import CacheConfig, DataConfig, EvalConfig, TrainConfig, conversion
from retention_jax.data import recall
from retention_jax.dilution import __main__ as command
from retention_jax.dilution import measure, plots, statements, sweep
from retention_jax.evaluation import plan
from retention_jax.evaluation.sequences import examples
from retention_jax.generation import scoring
from retention_jax.models import gate as gate_lib
from retention_jax.models import gate_files, rope, weights
from retention_jax.parallel import distributed, sharding

pytestmark = pytest.mark.one_version

T, R = 36, 6
FULL = CacheConfig(budget=T, recent=T)
SMALL = EvalConfig(policies=("full", "retention"), budgets=(3,), lengths=(T,), recent=R, examples=3, seeds=2)
DATA = DataConfig()
MARK, ASK, NOISE = recall.MARK, recall.ASK, recall.FIRST_NOISE
KEY, VALUE = recall.FIRST_KEY, recall.FIRST_VALUE


@pytest.fixture(scope="module")
def model():
    """Heads as wide as there are marks to weigh: narrower ones, which need several turns, take long to compile."""
    return tiny_model(vocab_size=recall.VOCAB_SIZE, head_size=40)


@pytest.fixture(scope="module")
def streams():
    """Tokens, the facts they tell of, and the fact each asks for."""
    tokens = examples("recall", SMALL, DATA, T)[0][0]
    return tokens, recall.facts_at(tokens), np.clip(tokens - KEY, 0, recall.NUM_KEYS - 1)


@pytest.fixture(scope="module")
def results(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("dilution") / "new" / "folder"
    return sweep.run(model, SMALL, DATA, output), output


# Which tokens are useful.


def test_facts_at_their_slot_and_the_next():
    fact, other = [MARK, KEY + 2, VALUE], [MARK, KEY, VALUE + 1]
    tokens = np.array([*fact, NOISE, KEY + 5, VALUE, *other, ASK, KEY + 2, VALUE, NOISE])
    at = recall.facts_at(tokens)
    assert at.shape == (13, recall.NUM_KEYS)
    assert {key: np.flatnonzero(at[:, key]).tolist() for key in np.flatnonzero(at.any(axis=0))} == {
        0: [6, 7, 8, 9, 10, 11],
        2: [0, 1, 2, 3, 4, 5],
    }


def test_a_last_fact_reaches_into_the_incomplete_slot():
    tokens = np.array([[NOISE, NOISE, NOISE, MARK, KEY + 1, VALUE, NOISE], [NOISE] * 7])
    at = recall.facts_at(tokens)
    assert np.argwhere(at).tolist() == [[0, t, 1] for t in (3, 4, 5, 6)]


# What is measured.


def evenly(model):
    """The model with all queries 0: every token attends to all it sees alike."""
    graphdef, state = nnx.split(model)
    flat = [(p, v.replace(jnp.zeros_like(v[...])) if p[-1] == "q" else v) for p, v in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def test_shares_by_hand(model):
    """Even attention, so that a share is a count: of the fact's six tokens among all that are seen."""
    tokens = np.array([[NOISE] * 3 + [MARK, KEY + 3, VALUE] + [NOISE] * 3 + [ASK, KEY + 3, VALUE]])
    asked = np.full_like(tokens, 3)
    found = measure.measure(evenly(model), tokens, recall.facts_at(tokens), asked, CacheConfig(budget=12, recent=12))
    want = [0, 0, 0, 1 / 4, 2 / 5, 3 / 6, 4 / 7, 5 / 8, 6 / 9, 6 / 10, 6 / 11, 6 / 12]
    everywhere = lambda a: np.broadcast_to(np.asarray(a, np.float64)[None, :, None, None], found.asked.shape)
    assert found.asked.shape == (1, 12, 2, 4)
    assert_close(found.asked, everywhere(want), 1e-6)
    assert_close(found.any_fact, everywhere(want), 1e-6)
    assert_close(found.seen, everywhere(np.arange(1, 13)), 1e-6)
    assert_close(found.useful, everywhere([0, 0, 0, 1, 2, 3, 4, 5, 6, 6, 6, 6]), 1e-6)
    nothing = measure.measure(evenly(model), tokens, recall.facts_at(tokens), asked + 1, CacheConfig(12, 12))
    assert not np.any(nothing.asked) and not np.any(nothing.useful), "a fact that is nowhere"
    assert_close(nothing.any_fact, found.any_fact, 1e-6)


def test_shares_of_what_was_kept_by_hand():
    """StreamingLLM with five entries: after 3, 6 and 9 tokens it holds 0 to 2, 0 to 3 with 5, and 0 to 3 with 8.

    Heads are narrower than there are facts: their marks are weighed in several turns.
    """
    model = tiny_model(vocab_size=recall.VOCAB_SIZE)
    tokens = np.array([[NOISE] * 3 + [MARK, KEY + 3, VALUE] + [NOISE] * 3 + [ASK, KEY + 3, VALUE]])
    cache = CacheConfig(budget=5, recent=3, policy="streaming")
    found = measure.measure(evenly(model), tokens, recall.facts_at(tokens), np.full_like(tokens, 3), cache)
    want = [0, 0, 0, 1 / 4, 2 / 5, 3 / 6, 3 / 6, 4 / 7, 5 / 8, 2 / 6, 2 / 7, 2 / 8]
    assert_close(found.asked, np.broadcast_to(np.array(want)[None, :, None, None], found.asked.shape), 1e-6)
    assert_close(found.seen[0, :, 1, 2], [1, 2, 3, 4, 5, 6, 6, 7, 8, 6, 7, 8], 1e-6)


def plainly(model, row, facts, asked, cache):
    """`measure` of one sequence in float64 NumPy: a softmax over explicit lists of what each head still has.

    Queries, keys and values are the model's; what is kept after each chunk is `helpers.simulate`'s.
    """
    cfg, length, chunk = model.config, len(row), min(cache.recent, len(row))
    K, G = cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads
    own = np.tril(np.ones((length, length), bool)) & (np.arange(length)[:, None] // chunk == np.arange(length) // chunk)
    sees = np.broadcast_to(own, (cfg.num_layers, K, length, length)).copy()  # tokens of earlier chunks: none yet
    turn = rope.rotation(jnp.arange(length)[None], jnp.full((1, 1), length), cfg)
    weight, offset = model.final_projection.per_layer(cfg.num_layers, K)
    told = facts[np.arange(length)[None], asked[:, None]]  # [t, i]: token i tells of what token t asks for
    for end in [*range(chunk, length, chunk), length]:
        x, log_beta, shares = model.embedding[...][row][None], [], []
        for l in range(cfg.num_layers):
            layer = jax.tree.map(lambda a, l=l: a[l], model.layers)
            q, k, v, features = layer.project(x, turn)
            log_beta.append(np.asarray(gate_lib.log_retention(features, weight[l], offset[l]))[0])
            q, k, v = (np.asarray(a, np.float64)[0] for a in (q, k, v))
            out = np.zeros_like(q)
            for n in range(cfg.num_heads):
                h = n // G
                a = np.where(sees[l, h], np.exp(q[:, n] @ k[:, h].T * cfg.head_size**-0.5), 0)
                a /= a.sum(axis=1, keepdims=True)
                out[:, n] = a @ v[:, h]
                useful, seen = (told & sees[l, h]).sum(axis=1), sees[l, h].sum(axis=1)
                shares.append(((a * told).sum(axis=1), a @ facts.any(axis=1), useful, seen))
            x = layer.finish(x, jnp.asarray(out[None], jnp.float32))
        steps: list[Step] = [("read", chunk)] * (end // chunk)
        kept = simulate(np.stack(log_beta)[:, :, :end], steps, cache)[-1:]
        for head in range(cfg.num_layers * K if kept and end < length else 0):
            sees[head // K, head % K, end : end + chunk, kept[0].positions(head)] = True
    shaped = lambda a: np.moveaxis(np.array(a).reshape(cfg.num_layers, cfg.num_heads, length), 2, 0)
    return [shaped(a) for a in zip(*shares, strict=True)]


@pytest.mark.parametrize(
    "cache",
    [
        FULL,
        CacheConfig(budget=4, recent=R),
        CacheConfig(budget=4, recent=R, local=True),
        CacheConfig(budget=7, recent=R, policy="streaming"),
    ],
    ids=("full", "retention", "local", "streaming"),
)
def test_as_plain_softmax_over_what_is_kept(model, streams, cache):
    tokens, facts, asked = streams
    found = measure.measure(model, tokens, facts, asked, cache)
    for row in range(2):
        want = plainly(model, tokens[row], facts[row], asked[row], cache)
        for got, right, tolerance in zip(found[:4], want, (1e-5, 1e-5, 1e-4, 1e-4), strict=True):
            np.testing.assert_allclose(got[row], right, rtol=0, atol=tolerance)
    assert np.ptp(found.seen, axis=(2, 3)).any() == (
        cache.policy == "retention" and cache.budget == 4 and not cache.local
    )


def test_a_budget_that_holds_everything_is_the_full_cache(model, streams):
    full, held = (measure.measure(model, *streams, cache) for cache in (FULL, CacheConfig(budget=T, recent=R)))
    for a, b in zip(full[:4], held[:4], strict=True):
        assert_close(b, a)
    np.testing.assert_array_equal(full.best, held.best)
    assert_close(full.seen, np.broadcast_to(np.arange(1, T + 1)[None, :, None, None], full.seen.shape))


@pytest.mark.parametrize("recent", [R, 7])  # 36 tokens are six whole chunks of 6, and five of 7 with one token more
def test_predicts_what_decoding_predicts(model, streams, recent):
    cache = CacheConfig(budget=4, recent=recent)
    scores, _ = scoring.score_stream(model, streams[0], cache, np.full(len(streams[0]), T))
    found = measure.measure(model, *streams, cache)
    assert found.asked.shape[:2] == found.best.shape == streams[0].shape
    np.testing.assert_array_equal(found.best[:, :-1], scores.best)


# A run.


def test_run_measures_every_cell(model, results):
    found, _ = results
    assert [(r.length, r.policy, r.budget) for r in found] == [(T, "full", T), (T, "retention", 3)]
    scores = {row.policy: row.score for row in plan.run(model, SMALL, DATA, None)}
    for r in found:
        assert r.queries == 2 * 3 * round(recall.QUERY_SHARE * T / recall.SLOT)
        assert r.accuracy.mean() == pytest.approx(scores[r.policy])
        assert r.dilution.shape == r.off_facts.shape == (2, 2, 4) and r.margin.shape == r.crowd.shape == (2, 4)
        assert np.all((0 <= r.off_facts) & (r.off_facts <= r.dilution + 1e-6) & (r.dilution <= 1))
    assert np.abs(found[0].dilution - found[1].dilution).max() > 0.01


def test_margin_and_crowd_are_medians_over_queries(model, results):
    """The full cache's, from `measure` once more."""
    tokens, labels = examples("recall", SMALL, DATA, T)
    at_queries = []
    for rows, answers in zip(tokens, labels, strict=True):
        asked = np.clip(rows - KEY, 0, recall.NUM_KEYS - 1)
        found = measure.measure(model, rows, recall.facts_at(rows), asked, FULL)
        at_queries.append(
            [np.asarray(a)[np.roll(answers, -1, axis=1)] for a in (found.asked, found.useful, found.seen)]
        )
    share, useful, seen = (np.concatenate(a).astype(np.float64) for a in zip(*at_queries, strict=True))
    full = results[0][0]
    np.testing.assert_allclose(full.crowd, np.median((seen - useful) / useful, axis=0), rtol=1e-4)
    needed = statements.needed_margin(useful, seen - useful, 1 - share)
    np.testing.assert_allclose(full.margin, np.median(needed, axis=0), atol=1e-3)


def test_files_of_a_run(results):
    found, output = results
    assert sorted(p.name for p in output.iterdir()) == ["dilution.json", "dilution.png"]
    assert (output / "dilution.png").read_bytes().startswith(b"\x89PNG")
    for row, r in zip(json.loads((output / "dilution.json").read_text()), found, strict=True):
        assert set(row) == set(r._fields)
        np.testing.assert_array_equal(row["dilution"], r.dilution)


def one(**changes):
    plain = plots.Result(
        length=768,
        policy="retention",
        budget=48,
        accuracy=np.array([0.7, 0.8]),
        dilution=np.array([[[0.5, 0.5], [0.2, 0.4]], [[0.5, 0.5], [0.2, 0.4]]]),
        off_facts=np.full((2, 2, 2), 0.125),
        margin=np.array([[1.0, 2.0], [3.0, np.nan]]),
        crowd=np.array([[4.0, 4.0], [4.0, np.nan]]),
        queries=640,
    )
    return plain._replace(**changes)


def test_what_no_query_sees_is_null(tmp_path):
    sweep.save([one()], tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())[0]["margin"] == [[1.0, 2.0], [3.0, None]]


def test_table_by_hand():
    half = 12.706 * np.std([70, 80], ddof=1) / 2**0.5  # t(0.975; 1) as printed tables have it
    lines = sweep.table([one(policy="full", budget=768), one(policy="retention_local")]).splitlines()
    assert lines[0] == "recall, 768 tokens, 640 queries; mean ± half the 95 % interval over 2 seeds"
    assert lines[1].split("  ")[-1] == "off all facts, layer 1"
    assert lines[2].split() == f"full cache 75.0 ± {half:.1f} 0.500 ± 0.000 0.300 ± 0.000 0.125 ± 0.000".split()
    assert lines[3].startswith("retention local, 48 kept")
    alone = one(accuracy=np.array([0.7]), dilution=np.full((1, 2, 2), 0.5), off_facts=np.full((1, 2, 2), 0.25))
    assert sweep.table([alone]).splitlines()[2].split()[-4:] == ["70.0", "0.500", "0.500", "0.250"]


def test_figure_of_degenerate_results(tmp_path):
    """All attention off, nothing right, one seed, one length, and no query that sees its fact."""
    nothing = dict(accuracy=np.zeros(1), dilution=np.ones((1, 2, 2)), off_facts=np.ones((1, 2, 2)))
    nothing |= dict(margin=np.full((2, 2), np.nan), crowd=np.full((2, 2), np.nan))
    for name, chosen in {
        "one": [one(**nothing)],
        "two": [one(policy="full", budget=768, **nothing), one(**nothing)],
    }.items():
        plots.figure(chosen, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000


def test_figure_of_any_choice_of_cells(tmp_path):
    full = lambda length, crowd: one(policy="full", length=length, budget=length, crowd=np.full((2, 2), crowd))
    choices = {
        "full": [full(192, 30.0), full(768, 127.0)],
        "one": [one()],
        "many": [full(192, 30.0), one(length=192), full(768, 127.0), one(), one(budget=8), one(policy="streaming")],
    }
    for name, chosen in choices.items():
        plots.figure(chosen, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000
    assert plots.message(choices["many"]).endswith("dilution 0.30 against 0.30, accuracy 75 % against 75 %")


@pytest.mark.slow  # compiles a measurement on a mesh; `test_sharding.py` shows that a mesh keeps the same entries
def test_a_mesh_measures_as_one_device(model):
    """Two rows of devices, which three sequences do not fill; slots of the pool are cut in two."""
    mesh = sharding.make_mesh(data=2, context=2)
    laid_out = jax.device_put(model, sharding.of_tree(mesh, model, sharding.DECODING))
    config = dataclasses.replace(SMALL, policies=("full", "retention", "streaming"), budgets=(4,), seeds=1)
    for found, alone in zip(sweep.run(laid_out, config, DATA, None), sweep.run(model, config, DATA, None), strict=True):
        assert (found.policy, found.budget, found.queries) == (alone.policy, alone.budget, alone.queries)
        np.testing.assert_array_equal(found.accuracy, alone.accuracy)
        for name in ("dilution", "off_facts", "margin", "crowd"):
            np.testing.assert_allclose(getattr(found, name), getattr(alone, name), rtol=1e-4, atol=1e-4)
    assert found.dilution.std() > 0.01


def test_options_of_the_cache_are_honoured(model):
    config = dataclasses.replace(SMALL, policies=("retention",), budgets=(9,), seeds=1)
    plain, protected = (
        sweep.run(model, c, DATA, None)[0] for c in (config, dataclasses.replace(config, protect_first=9))
    )
    assert np.abs(plain.dilution - protected.dilution).max() > 0.01
    with pytest.raises(ValueError, match="observe=8 changes nothing for retention"):
        sweep.run(model, dataclasses.replace(config, observe=8), DATA, None)


def test_results_of_other_processes_stay_bitwise(monkeypatch):
    """As `distributed.gather` carries them, nan included."""
    mine = [one(dilution=np.random.default_rng(0).random((2, 2, 2)))]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda text: [text, text])
    for got in sweep._shared_out(mine):
        assert got._fields == mine[0]._fields
        for a, b in zip(got, mine[0], strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_cannot_be_measured_is_refused(model, monkeypatch):
    monkeypatch.setattr(sweep, "measure", lambda *args: pytest.fail("measured"))
    change = lambda **fields: dataclasses.replace(SMALL, **fields)
    with pytest.raises(ValueError, match="unknown task 'recal'; known: recall"):
        sweep.run(model, change(tasks=("recal",)), DATA, None)
    text = DataConfig(task="text", path="some.txt")
    with pytest.raises(ValueError, match="only the task 'recall' knows its useful tokens, got recall, text"):
        sweep.run(model, change(tasks=("recall", "text")), text, None)
    with pytest.raises(ValueError, match="policy 'oracle' must know what comes"):
        sweep.run(model, change(policies=("oracle",)), DATA, None)
    with pytest.raises(ValueError, match="'recall' needs a vocabulary of 64, got 32"):
        sweep.run(tiny_model(), SMALL, DATA, None)


# ml_collections imports config files by a call that Python 3.12 deprecates.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_command_from_workdir_to_results(tmp_path, model, capsys, monkeypatch):
    weights.save_backbone(model, tmp_path / "run" / "backbone")
    gate_files.save_gates(model, tmp_path / "run" / "gates")
    config = TrainConfig(
        stage="gates", model=tiny_config(vocab_size=recall.VOCAB_SIZE), data=DATA, eval=SMALL, backbone_steps=1
    )
    (tmp_path / "config.json").write_text(json.dumps(conversion.to_dict(config)))
    (tmp_path / "config.py").write_text(
        "import pathlib, json, ml_collections\n\n\ndef get_config():\n    values = json.loads("
        "(pathlib.Path(__file__).parent / 'config.json').read_text())\n"
        "    return ml_collections.ConfigDict(values, convert_dict=True)\n"
    )
    values = flags.FlagValues()
    values["verbosity"] = flags.FLAGS["verbosity"]
    command.define_flags(values)
    given = ["--policies=retention", f"--output={tmp_path / 'out'}"]
    before = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    try:
        argv = ["dilution", f"--config={tmp_path / 'config.py'}", f"--checkpoint={tmp_path / 'run'}", *given]
        command.main(values(argv), values)
        assert logging.get_verbosity() == logging.WARNING, "which kernels run is told at INFO"
    finally:
        logging.set_verbosity(before)
    rows = json.loads((tmp_path / "out" / "dilution.json").read_text())
    assert [(row["policy"], row["budget"], row["length"]) for row in rows] == [("retention", 3, T)]
    assert "retention, 3 kept" in capsys.readouterr().out
