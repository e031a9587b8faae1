"""Gates before, during and after training: where they start, what checkpoints leave of them, their scores meanwhile."""

import dataclasses
import functools
import json
import os
import pathlib
import signal

import helpers
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from helpers import same

from retention_jax import train
from retention_jax.config import DataConfig, EvalConfig, GateConfig, LossConfig, OptimizerConfig, TrainConfig
from retention_jax.evaluation import curves, devices, journal, plan, sequences
from retention_jax.models import gate_files, weights
from retention_jax.models.gate import GateParam
from retention_jax.parallel import sharding
from retention_jax.training import checkpoint

GATE = GateConfig(width=8, offset_init=3.0)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    root = tmp_path_factory.mktemp("gates")
    backbone = helpers.tiny_model(GATE, vocab_size=64)
    weights.save_backbone(backbone, root / "backbone")
    gate_files.save_gates(backbone, root / "begun")
    return TrainConfig(
        stage="gates",
        backbone=str(root / "backbone"),
        gates=str(root / "begun"),
        data=DataConfig(
            length=24, batch_size=4, documents=64, document_lengths=(24,), cache_dir=str(root / "cache"), decoys=0.2
        ),
        eval=EvalConfig(policies=("full", "retention"), budgets=(4,), lengths=(24,), examples=2, seeds=2, recent=4),
        gate=GATE,
        loss=LossConfig(budget=4),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        steps=6,
        checkpoint_every=2,
        log_every=1,
    )


def gates_of(model):
    return jax.tree.leaves(nnx.state(model, GateParam))


def test_training_starts_from_given_gates(config):
    """On a mesh too, where they lie as fresh ones do."""
    want = gates_of(weights.load(config.backbone, config.gates, "float32"))
    assert same(gates_of(train.make_model(config)), want)
    fresh = dataclasses.replace(config, gates="")
    assert not same(gates_of(train.make_model(fresh)), want)
    with jax.set_mesh(sharding.make_mesh(fsdp=4, tensor=2)):
        begun, drawn = (gates_of(train.make_model(c)) for c in (config, fresh))
    assert same(begun, want)
    assert [a.sharding for a in begun] == [a.sharding for a in drawn]


def test_gates_of_another_kind_or_model_are_refused(config, tmp_path):
    kind = dataclasses.replace(config, gate=GateConfig(width=16, share="none", tie_offset=True))
    told = r"begun: gates of another kind: width=8 \(the configuration's gate has 16\), share='layers' \(.*'none'\)"
    with pytest.raises(ValueError, match=told):
        train.train(kind, tmp_path)
    drawn = dataclasses.replace(config, gate=dataclasses.replace(GATE, offset_init=9.0))
    assert same(gates_of(train.make_model(drawn)), gates_of(train.make_model(config)))
    weights.save_backbone(helpers.tiny_model(vocab_size=64, num_layers=3), tmp_path / "deeper")
    with pytest.raises(ValueError, match="gates of another model: layers 2, the model's 3"):
        train.make_model(dataclasses.replace(config, backbone=str(tmp_path / "deeper")))
    for changes in ({"backbone": "", "backbone_steps": 3}, {"stage": "backbone", "backbone": ""}):
        with pytest.raises(ValueError, match="gates, a folder to start from, goes with stage='gates'"):
            dataclasses.replace(config, model=helpers.tiny_config(vocab_size=64), **changes)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run without evaluations, the gates that each checkpoint left, and the gates at the end."""
    workdir, left = tmp_path_factory.mktemp("whole"), {}
    save = checkpoint.save

    def saved(manager, state, position):
        left[int(state.step)] = read(workdir) if (workdir / "gates").exists() else None
        save(manager, state, position)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", saved)
        model = train.train(config, workdir)
    return workdir, left, gates_of(model)


def read(workdir) -> dict[str, np.ndarray]:
    return gate_files.read_gates(workdir / "gates").tensors


def test_every_checkpoint_leaves_its_gates(config, whole, tmp_path):
    workdir, left, last = whole
    assert left[2] is None and not same(left[4], left[6])
    assert same(gates_of(weights.load(config.backbone, workdir / "gates", "float32")), last)
    # Killed before the gates of the newest checkpoint were written: the next start writes them.
    file = workdir / "gates" / gate_files.OURS
    safetensors.numpy.save_file(left[6], file)
    assert same(gates_of(train.train(config, workdir)), last)
    assert same(gates_of(weights.load(config.backbone, workdir / "gates", "float32")), last)


def test_the_gates_that_a_run_started_from_belong_to_it(config, whole):
    workdir, _, _ = whole
    file = pathlib.Path(config.gates, gate_files.OURS)
    before = file.read_bytes()
    gate_files.save_gates(helpers.tiny_model(GATE, seed=1, vocab_size=64), config.gates)
    with pytest.raises(ValueError, match=f"a run of other inputs; .*: gates of {config.gates}$"):
        train.train(config, workdir)
    file.write_bytes(before)
    train.train(config, workdir)


@pytest.mark.slow  # two whole runs with evaluations
def test_scores_while_training_leave_the_run_as_it_is(config, whole, tmp_path, monkeypatch, capsys):
    """Stopped in the midst of an evaluation, and started again."""
    config, evaluated, units = dataclasses.replace(config, eval_every=2), [], []
    run, written, programs = (
        plan.run,
        journal.Journal.write,
        functools.cache(lambda: compile_once(train.make_model(config))),
    )
    compile_once = sequences.compile_once

    def noting(model, asked, data, output, tokenizer=None):
        evaluated.append((output.name, asked.policies))
        return run(model, asked, data, output, tokenizer)

    def stopping(book, unit, result):
        written(book, unit, result)
        units.append(unit)
        if len(units) == 4 + 1:  # full and retention for two seeds; then retention's first
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sequences, "compile_once", lambda model: programs())  # the same for all gates
    monkeypatch.setattr(plan, "run", noting)
    monkeypatch.setattr(journal.Journal, "write", stopping)
    with pytest.raises(SystemExit, match="143"):
        train.train(config, tmp_path)
    assert "stopped by SIGTERM after step 4;" in capsys.readouterr().err
    assert [scored.step for scored in curves.read(tmp_path / "curves")] == [2]
    model = train.train(config, tmp_path)

    (_, left, last), folders = whole, ("curves/step_4", "eval")
    assert same(gates_of(model), last)
    assert evaluated == [
        ("step_2", ("full", "retention")),
        ("step_4", ("retention",)),
        ("step_4", ("retention",)),
        ("eval", ("full", "retention")),
    ]
    assert len(units) == len(set(enumerate(units))) == 4 + 2 + 4, "nothing is computed twice"
    scores = {scored.step: scored.rows for scored in curves.read(tmp_path / "curves")}
    assert list(scores) == [2, 4, 6] and [len(rows) for rows in scores.values()] == [2, 1, 2]
    # What was scored are the gates that the checkpoint left.
    scored = [json.loads((tmp_path / f / "journal-0.jsonl").read_text().splitlines()[0]) for f in folders]
    fourth = weights.load(config.backbone, config.gates, "float32")
    gate_files.load_gates(fourth, gate_files.Gates(config.gate, left[6], tmp_path))
    assert [first["fingerprint"]["model"] for first in scored] == [devices.digest(m) for m in (fourth, model)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    named = {line["step"]: line for line in lines if "loss" not in line}
    assert sorted(line["step"] for line in lines if "loss" in line) == [1, 2, 3, 4, 5, 6]
    assert {step: line["eval/recall/24/retention_4"] for step, line in named.items()} == {
        step: next(row.score for row in rows if row.policy == "retention") for step, rows in scores.items()
    }
    assert (tmp_path / "curves" / "curves.png").read_bytes().startswith(b"\x89PNG")
    train.train(config, tmp_path)
    assert len(evaluated) == 4, "what is finished is not done again"


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"eval_every": 3}, "eval_every must be 0 or a multiple of checkpoint_every=2, got 3"),
        ({"eval_every": 2, "eval": EvalConfig(tasks=())}, "eval_every needs eval.tasks"),
    ],
)
def test_when_to_score_must_fit(config, changes, told):
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(config, **changes)


def test_an_evaluation_that_cannot_be_is_refused_before_training(config, tmp_path):
    missing = dataclasses.replace(config.eval, tasks=("perplexity",), sources=("perplexity=nowhere.txt",))
    for asked, told in (
        (missing, "task 'perplexity' needs the model's tokenizer|tokenizer"),
        (dataclasses.replace(config.eval, policies=("retentoin",)), "unknown policy 'retentoin'"),
    ):
        with pytest.raises(ValueError, match=told):
            train.run(dataclasses.replace(config, eval=asked), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_workdirs_of_older_code_go_on(config, whole):
    """Their config.json lacks the fields that came later."""
    workdir, _, _ = whole
    known = json.loads((workdir / "config.json").read_text())
    older = {name: value for name, value in known.items() if name not in ("gates", "eval_every")}
    (workdir / "config.json").write_text(json.dumps(older))
    checkpoint.check_workdir(workdir, dataclasses.replace(config, gates=""), {})
    with pytest.raises(ValueError, match=r"go back to: gates='' \(now"):
        checkpoint.check_workdir(workdir, config, {})
    (workdir / "config.json").write_text(json.dumps(known))
