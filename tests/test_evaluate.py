"""The evaluation: scores worked out by hand, complete rows, results that survive a failed write, clear refusals."""

import dataclasses
import inspect
import json
import os

import jax
import numpy as np
import pytest
import tqdm
from absl import app, flags
from helpers import row, tiny_config, tiny_model
from text_helpers import make_tokenizer

from retention_jax import evaluate
from retention_jax.config import DataConfig, EvalConfig, MeshConfig, TrainConfig, conversion
from retention_jax.data import recall
from retention_jax.evaluation import command_flags, plan, sequences
from retention_jax.evaluation import rows as rows_lib
from retention_jax.generation import scoring
from retention_jax.models import gate_files, weights
from retention_jax.parallel import sharding

pytestmark = pytest.mark.one_version

DATA = DataConfig()
SMALL = EvalConfig(budgets=(3,), lengths=(36,), recent=6, examples=3, seeds=2)  # one shape everywhere: compiled once
TEXT = dataclasses.replace(SMALL, tasks=("text",), policies=("full", "retention"), budgets=(3, 40))


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=257)


def text_data(cache, size=4000):
    path = cache / "some.txt"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes())
    return DataConfig(task="text", path=str(path), length=32, document_lengths=(32,), cache_dir=str(cache))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return text_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def evaluated(model, text, tmp_path_factory):
    """Rows, folder and screen of one run on text, with a budget that evicts and one that holds everything."""
    output = tmp_path_factory.mktemp("eval") / "new" / "folder"
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tqdm.tqdm, "write", lambda text: lines.append(text))
        rows = plan.run(model, TEXT, text, output)
    return rows, output, "\n".join(lines)


@pytest.mark.slow  # compiles a sweep to count programs
def test_programs_of_finished_cells_are_freed(model, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # cells that compile at once
    jax.clear_caches()
    programs = lambda: len(jax.devices()[0].client.live_executables())
    before, budgets = programs(), (3, 4, 5, 6, 7, 8)
    config = dataclasses.replace(SMALL, policies=("streaming",), budgets=budgets, seeds=1)
    monkeypatch.setattr(sequences, "_PROGRAMS", 2)
    assert len(plan.run(model, config, DATA, None)) == len(budgets) > 2
    assert programs() - before < len(budgets)


def test_a_policy_and_budget_are_compiled_once_for_all_lengths(model, monkeypatch):
    compiled, compile_stream = [], scoring.compile_stream
    monkeypatch.setattr(scoring, "compile_stream", lambda *args: compiled.append(args) or compile_stream(*args))
    config = dataclasses.replace(SMALL, policies=("retention", "oracle"), lengths=(36, 47), seeds=1)
    both = plan.run(model, config, DATA, None)
    assert len(compiled) == 1 + 2  # the oracle, which knows what comes, once for each length
    [apart] = plan.run(model, dataclasses.replace(config, policies=("retention",), lengths=(47,)), DATA, None)
    assert [row.score for row in both if (row.policy, row.length) == ("retention", 47)] == [apart.score]


# What a score is.


def test_accuracy_by_hand():
    tokens = np.array([[5, 6, 7, 8], [1, 2, 3, 4]])
    label_mask = np.array([[True, True, False, True], [False, False, False, True]])  # the first token has no prediction
    best = np.array([[6, 0, 9], [2, 3, 4]])  # of the labelled 6, 8 and 4: right, wrong, right
    assert sequences.accuracy(best, tokens, label_mask) == pytest.approx(2 / 3)


def test_bits_per_byte_by_hand():
    log_prob = np.log(np.array([[1 / 2, 1 / 4, 1 / 3], [1 / 8, 1 / 3, 1.0]], np.float32))
    label_mask = np.array([[True, True, True, False], [True, True, False, True]])
    assert sequences.bits_per_byte(log_prob, label_mask) == pytest.approx((1 + 2 + 3 + 0) / 4)


def test_interval_by_hand():
    half = 4.303 * 1 / 3**0.5  # t(0.975; 2) as printed tables have it, s = 1, n = 3
    assert rows_lib.interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - half, 2 + half), abs=1e-3)
    assert rows_lib.interval([0.5]) == (0.5, 0.5, 0.5)


# What is evaluated.


def test_recall_examples_differ_by_seed_only():
    one, mask = sequences.examples("recall", SMALL, DATA, 36)
    assert one.shape == mask.shape == (2, 3, 36) and mask[..., 1:].any(axis=-1).all()
    np.testing.assert_array_equal(one, sequences.examples("recall", SMALL, DATA, 36)[0])
    later, _ = sequences.examples("recall", EvalConfig(examples=3, seeds=2, seed=1), DATA, 36)
    np.testing.assert_array_equal(one[1], later[0])
    assert len(np.unique(np.concatenate([one, later[1:]]).reshape(-1, 36), axis=0)) == 9


def test_text_examples_share_no_row_between_seeds(tmp_path):
    data = text_data(tmp_path)  # 400 bytes are held out: 8 rows of 48
    config = EvalConfig(tasks=("text",), examples=100, seeds=3)
    tokens, mask = sequences.examples("text", config, data, 48)
    assert tokens.shape == mask.shape == (3, 2, 48) and mask.all()
    assert len(np.unique(tokens.reshape(6, 48), axis=0)) == 6
    with pytest.raises(ValueError, match="8 held-out rows of 48 tokens, too few for 9 seeds"):
        sequences.examples("text", EvalConfig(tasks=("text",), seeds=9), data, 48)


# A run.


def test_rows_are_complete(evaluated):
    rows, _, _ = evaluated
    assert [(r.policy, r.budget) for r in rows] == [("full", 36), ("retention", 3), ("retention", 40)]
    full_bytes = 2 * 2 * 36 * 2 * 8 * 4  # layers, heads, tokens, key and value, head size, float32
    for r in rows:
        assert (r.task, r.length, r.metric, r.n, r.seeds) == ("text", 36, "bits_per_byte", 2 * 3 * 35, 2)
        assert 5 < r.score < 20, "an untrained model of 257 tokens needs about 8 bits"
        assert r.low < r.score < r.high and r.seconds > 0
        assert r.made_by == [rows_lib.made_by()] and "math-verify" in r.made_by[0]
        assert r.full_kv_bytes == full_bytes
        # A slot of the buffer also has log_beta and a position, 4 bytes each.
        assert r.kv_bytes == (full_bytes if r.policy == "full" else 2 * 2 * (r.budget + 6) * (2 * 8 * 4 + 8))


def test_only_a_budget_that_holds_everything_scores_as_the_full_cache(evaluated):
    full, evicted, held = evaluated[0]
    numbers = lambda r: (r.score, r.low, r.high)
    assert numbers(held) == pytest.approx(numbers(full), rel=1e-5)
    assert numbers(evicted) != pytest.approx(numbers(full), rel=1e-3)


def test_blocks_of_logits_change_nothing(model, monkeypatch):
    tokens = sequences.examples("recall", SMALL, DATA, 36)[0][0]
    whole = scoring.score_full(model, tokens)
    monkeypatch.setattr(scoring, "_LOGITS_BLOCK", 16)
    blocks = inspect.unwrap(scoring.score_full)(model, tokens)
    np.testing.assert_allclose(whole.log_prob, blocks.log_prob, atol=1e-6)
    np.testing.assert_array_equal(whole.best, blocks.best)


def test_same_seed_same_numbers_and_other_seed_other_numbers(evaluated, model, text):
    again, other = (plan.run(model, dataclasses.replace(TEXT, seed=seed), text, None) for seed in (0, 1))
    untimed = lambda rows: [r._replace(seconds=0.0, tokens_per_second=0.0) for r in rows]
    assert untimed(again) == untimed(evaluated[0])
    assert all(a.score != b.score for a, b in zip(again, other, strict=True))


def test_results_read_back_as_rows(evaluated):
    rows, output, _ = evaluated
    assert rows_lib.load(output / "results.json") == rows
    assert sorted(os.listdir(output)) == ["journal-0.jsonl", "quality_text.png", "results.json"]


def test_a_failed_write_leaves_the_old_results(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    rows_lib.save({}, [row()], path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        rows_lib.save({}, [row(), row(score=float("nan"))], path)

    def disk_full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(OSError, match="no space left"):
        rows_lib.save({}, [row(budget=1)], path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["results.json"]


def test_table_on_screen_and_figure(evaluated):
    rows, output, screen = evaluated
    assert (output / "quality_text.png").stat().st_size > 5000
    assert screen.strip() == rows_lib.table(rows)
    full = row(policy="full", budget=768, score=0.611, low=0.601, high=0.621)
    text = rows_lib.table(
        [full, row(budget=16, score=0.5, low=0.488, high=0.512), row(), row(policy="random", score=0.1)]
    )
    assert text.splitlines() == [
        "recall, 768 tokens: % of answers right, mean ± half the 95 % interval over 5 seeds",
        "kept per layer and head          16          48",
        "retention                50.0 ± 1.2  75.0 ± 2.0",
        "random                               10.0 ± 2.0",
        "full cache               61.1 ± 1.0",
    ]
    answers = row(seeds=1, n=20, cut=3)
    assert "interval over 20 problems; 3 of 20 prompts were too long and are cut" in rows_lib.table([answers])
    alone = rows_lib.table(
        [
            row(task="text", metric="bits_per_byte", policy="full", seeds=1)._replace(
                score=2.34567, low=2.34567, high=2.34567
            )
        ]
    )
    assert alone.splitlines()[1].split() == ["full", "cache", "2.346"]


# Refusals.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": ["recal"]}, "unknown task 'recal'; known: recall, text"),
        ({"policies": ["full", "h3o"]}, "unknown policy 'h3o'; known: full, retention"),
        ({"tasks": ["text"]}, "needs a config whose data.task is 'text', got 'recall'"),
        ({"lengths": ["192", "8"]}, "'recall' needs lengths of at least 9"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"budgets": ["16", "x"]}, "--budgets must be whole numbers separated by commas, got 'x'"),
        ({"lengths": ["-3"]}, "--lengths must be whole numbers separated by commas, got '-3'"),
        ({"budgets": ["0"]}, "budgets must be at least 1"),
        ({"tasks": []}, "no task is named; known: recall, text"),
    ],
)
def test_bad_flags_are_refused(changes, message):
    given = dict.fromkeys(("tasks", "policies", "budgets", "lengths", "seed")) | changes
    with pytest.raises(ValueError, match=message):
        plan.check(command_flags.override(EvalConfig(), **given), DATA)


def test_flags_replace_only_what_they_name():
    nothing = dict.fromkeys(("tasks", "policies", "budgets", "lengths", "seed"))
    assert command_flags.override(SMALL, **nothing) == SMALL
    some = command_flags.override(SMALL, **(nothing | {"budgets": ["4", "8"], "seed": 3}))
    assert (some.budgets, some.seed, some.lengths) == ((4, 8), 3, SMALL.lengths)


def test_a_vocabulary_too_small_is_refused():
    with pytest.raises(ValueError, match="task 'recall' has token 6[0-3]; the model's vocabulary is 32"):
        plan.run(tiny_model(), SMALL, DATA, None)


def test_wrong_sources_show_before_anything_is_evaluated(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sequences, "compile_scorer", lambda *args: pytest.fail("evaluated"))
    (tmp_path / "math.jsonl").write_text('{"problem": "1 + 1?"}')
    sources = ("gsm8k=nowhere.jsonl", f"math500={tmp_path / 'math.jsonl'}", "ruler/qa_1=nothing.json")
    config = dataclasses.replace(SMALL, tasks=("recall", "gsm8k", "math500", "ruler/qa_1"), lengths=(512,))
    with pytest.raises(ValueError) as caught:
        plan.run(model, dataclasses.replace(config, sources=sources), DATA, tmp_path, make_tokenizer(tmp_path))
    told = str(caught.value)
    assert "'nowhere.jsonl' names no file" in told and "nothing.json" in told and "math.jsonl, row 1" in told


def test_where_gates_and_backbone_are(tmp_path, model):
    run, gates = tmp_path / "run", tmp_path / "run" / "gates"
    (run / "backbone").mkdir(parents=True)
    find = lambda checkpoint, backbone="", policies=("retention",): command_flags.checkpoint_folders(
        str(checkpoint), str(backbone), policies
    )
    with pytest.raises(ValueError, match="neither gates.safetensors nor gates/"):
        find(run)
    assert find(run, policies=("full", "streaming")) == (str(run / "backbone"), None)
    gate_files.save_gates(model, gates)
    assert find(run) == find(gates) == (str(run / "backbone"), str(gates))
    assert find(gates, backbone=tmp_path) == (str(tmp_path), str(gates))
    assert find("", backbone=tmp_path, policies=("full",)) == (str(tmp_path), None)
    with pytest.raises(ValueError, match="--checkpoint must name"):
        find("", backbone=tmp_path)
    with pytest.raises(ValueError, match="no such checkpoint folder"):
        find(tmp_path / "nowhere")


def test_what_does_not_fit_the_mesh_is_refused_all_at_once(model):
    mesh = sharding.make_mesh(context=8)
    laid_out = jax.device_put(model, sharding.of_tree(mesh, model, sharding.DECODING))
    config = dataclasses.replace(SMALL, policies=("full", "retention", "tova"))
    with pytest.raises(ValueError) as caught:
        plan.run(laid_out, config, DATA, None)
    told = str(caught.value)
    assert "retention with 3 entries: buffer: layers * key/value heads * budget must be a multiple of mesh" in told
    assert "tova with 3 entries: " in told and "policy 'tova' needs whole heads" in told
    (row,) = plan.run(laid_out, dataclasses.replace(SMALL, policies=("full",)), DATA, None)
    (alone,) = plan.run(model, dataclasses.replace(SMALL, policies=("full",)), DATA, None)
    assert row.score == alone.score  # 4 heads on 8 devices, 36 tokens


# The command.


# ml_collections imports config files by a call that Python 3.12 deprecates.
reads_config = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def command(tmp_path, *arguments):
    """Runs main on flags of its own, with a config that trains its backbone."""
    path = tmp_path / "config.py"
    path.write_text(
        "import pathlib, json, ml_collections\n\n\ndef get_config():\n    values = json.loads("
        "(pathlib.Path(__file__).parent / 'config.json').read_text())\n"
        "    return ml_collections.ConfigDict(values, convert_dict=True)\n"
    )
    config = TrainConfig(
        stage="gates",
        model=tiny_config(vocab_size=257),
        data=DATA,
        eval=SMALL,
        backbone_steps=1,
        mesh=MeshConfig(data=-1, tensor=4),
    )
    (tmp_path / "config.json").write_text(json.dumps(conversion.to_dict(config)))
    values = flags.FlagValues()
    evaluate.define_flags(values)
    evaluate.main(values(["evaluate", f"--config={path}", *arguments]), values)


@reads_config
def test_command_from_workdir_to_results(tmp_path, model, capsys):
    """On two rows of four devices, which three sequences a seed do not fill."""
    assert jax.device_count() == 8
    weights.save_backbone(model, tmp_path / "run" / "backbone")
    gate_files.save_gates(model, tmp_path / "run" / "gates")
    output = tmp_path / "out"
    command(tmp_path, f"--checkpoint={tmp_path / 'run'}", f"--output={output}", "--policies=full,retention", "--seed=4")
    rows = rows_lib.load(output / "results.json")
    assert [(r.policy, r.budget) for r in rows] == [("full", 36), ("retention", 3)]
    assert all(r.metric == "accuracy" and r.n == 2 * 3 * round(recall.QUERY_SHARE * 12) for r in rows)
    assert rows_lib.table(rows) in capsys.readouterr().out
    alone = plan.run(model, dataclasses.replace(SMALL, policies=("full", "retention"), seed=4), DATA, None)
    measured = dict(seconds=0.0, tokens_per_second=0.0, peak_bytes=None)
    assert [r._replace(**measured) for r in rows] == [r._replace(**measured) for r in alone]


@reads_config
def test_command_refuses_before_it_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "load", lambda *args: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="unknown policy 'h3o'; known: full"):
        command(tmp_path, f"--checkpoint={tmp_path}", "--policies=h3o")
    with pytest.raises(app.UsageError, match="unexpected arguments"):
        command(tmp_path, "recall")
