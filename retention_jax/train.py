"""Trains retention gates on a frozen backbone, or a small backbone first, and ends with the evaluation.

    python -m retention_jax.train --config=configs/recall.py --workdir=runs/recall

A run can be killed at any time and started again with the same command: it goes on from the newest checkpoint, bitwise
as if it had never stopped.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import signal
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app, flags, logging
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float
from ml_collections import config_flags

from retention_jax.config import ModelConfig, OptimizerConfig, TrainConfig, conversion
from retention_jax.data import pipeline
from retention_jax.evaluation import curves, plan
from retention_jax.models import gate_files, huggingface, weights
from retention_jax.models.decoder import Decoder
from retention_jax.models.gate import GateParam
from retention_jax.parallel import checksum, distributed, sharding
from retention_jax.runtime import command, hub, interrupts
from retention_jax.text import tokenizer
from retention_jax.training import checkpoint, losses, metrics
from retention_jax.training.checkpoint import TrainState
from retention_jax.training.metrics import StepMetrics


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW with linear warm-up, cosine decay to the final rate, and clipping by global norm.

    A run of fewer steps than `warmup_steps` is the first part of that warm-up, as it is in a longer run.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),  # a run that ends within its warm-up never gets to decay
        end_value=config.final_learning_rate,
    )
    adamw = optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def trained_kind(config: TrainConfig) -> type[nnx.Variable]:
    """The variables a stage trains; everything else is frozen and in no checkpoint."""
    return GateParam if config.stage == "gates" else nnx.Param


def loss_and_metrics(
    model: Decoder, batch: pipeline.Batch, config: TrainConfig
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The stage's loss, with its terms."""
    tokens, segment_ids, label_mask = batch["tokens"], batch["segment_ids"], batch["label_mask"]
    if config.stage == "backbone":
        ce = losses.next_token(
            model, tokens, segment_ids, label_mask, vocab_block=config.loss.vocab_block, remat=config.remat
        )
        return ce, {"loss": ce}
    terms = losses.distillation(model, tokens, segment_ids, label_mask, config.loss, remat=config.remat)
    named = {"loss": terms.total, "kl": terms.kl, "ce": terms.ce, "capacity": terms.capacity}
    return terms.total, {**named, "retained": terms.retained}


@functools.partial(jax.jit, static_argnames=("graphdef", "optimizer", "config"), donate_argnames="state")
def train_step(
    state: TrainState,
    frozen: nnx.State,
    batch: pipeline.Batch,
    *,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
) -> tuple[TrainState, StepMetrics]:
    """One optimiser step over `optimizer.accumulation` micro-batches, whose gradients are averaged."""

    def loss_fn(params: nnx.State, micro: pipeline.Batch):
        return loss_and_metrics(nnx.merge(graphdef, params, frozen), micro, config)

    def one_micro_batch(carry, micro):
        micro = {name: sharding.constrain(a, "batch") for name, a in micro.items()}
        found, grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, micro)
        return jax.tree.map(jnp.add, carry, (found, sharding.constrain_weights(grads))), None

    parts = config.optimizer.accumulation
    micro_batches = jax.tree.map(lambda a: a.reshape(parts, a.shape[0] // parts, *a.shape[1:]), batch)
    shapes = jax.eval_shape(
        jax.value_and_grad(loss_fn, has_aux=True), state.params, jax.tree.map(lambda a: a[0], micro_batches)
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(one_micro_batch, zeros, micro_batches)
    (_, terms), grads = jax.tree.map(lambda a: a / parts, total)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = typing.cast(nnx.State, optax.apply_updates(state.params, updates))
    retained = terms.pop("retained", None)
    state = sharding.constrain_weights(TrainState(params, opt_state, state.step + 1))
    # `constrain_weights` cuts arrays by the names of weights. Metrics have other names: every process gets them whole.
    return state, sharding.constrain_weights(StepMetrics(terms, optax.tree.norm(grads), retained))


def architecture(config: TrainConfig) -> ModelConfig:
    """The backbone's, before any weight is downloaded or read."""
    if config.model is not None:
        return config.model
    return huggingface.read_model_config(hub.resolve(config.backbone, files=("config.json",)), config.dtype)


def make_model(config: TrainConfig) -> Decoder:
    """The backbone as configured, freshly initialised or loaded, with fresh gates; on the mesh that was entered."""
    mesh = sharding.entered()
    if config.stage == "gates":
        kind, gates = (config.gate, config.dtype), _gates_to_start_from(config)
        return weights.load_backbone(config.backbone, *kind, seed=config.seed, gates=gates, mesh=mesh)
    architecture = config.model
    assert architecture is not None  # TrainConfig checks it
    model = _on_mesh(lambda: Decoder(architecture, config.gate, rngs=nnx.Rngs(config.seed)))
    if mesh is not None:
        sharding.warn_of_uncut(mesh, model)
    return model


def _gates_to_start_from(config: TrainConfig) -> gate_files.Gates | None:
    """None: fresh ones. Raises ValueError where they are not of the kind that the config says."""
    if not config.gates:
        return None
    gates = weights.read_gates(config.gates)
    gate_files.check_kind(gates, config.gate)
    return gates


def fresh_state(params: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return _on_mesh(lambda params: TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32)), params)


def _on_mesh(make: Callable[..., Any], *args: Any) -> Any:
    """What `make` returns, laid out by the table."""
    mesh = sharding.entered()
    layout = mesh and sharding.of_tree(mesh, jax.eval_shape(make, *args))
    return jax.jit(make, out_shardings=layout)(*args)


def shapes_of_step(
    config: TrainConfig, model: ModelConfig
) -> tuple[TrainState, nnx.State, dict[str, Any], nnx.GraphDef]:
    """What `train_step` takes, state, frozen weights, batch and graph, as shapes laid out on the mesh that was entered.

    With them a step can be compiled where neither the weights nor the devices are.
    """
    decoder = nnx.eval_shape(lambda: Decoder(model, config.gate, rngs=nnx.Rngs(config.seed)))
    graphdef, params, frozen = nnx.split(decoder, trained_kind(config), ...)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = jax.eval_shape(lambda p: TrainState(p, optimizer.init(p), jnp.zeros((), jnp.int32)), params)
    row = lambda dtype: jax.ShapeDtypeStruct((config.data.batch_size, config.data.length), dtype)
    batch = {"tokens": row(jnp.int32), "segment_ids": row(jnp.int32), "label_mask": row(jnp.bool_)}
    mesh = sharding.entered()
    if mesh is None:
        return state, frozen, batch, graphdef
    laid_out = lambda s, layout: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout)
    state, frozen = (jax.tree.map(laid_out, tree, sharding.of_tree(mesh, tree)) for tree in (state, frozen))
    by_row = lambda s: laid_out(s, NamedSharding(mesh, sharding.of_activation(mesh, "batch", s.shape)))
    return state, frozen, jax.tree.map(by_row, batch), graphdef


def lower_step(config: TrainConfig, model: ModelConfig) -> jax.stages.Lowered:
    """The training step of a model on the mesh that was entered, lowered from shapes alone."""
    state, frozen, batch, graphdef = shapes_of_step(config, model)
    optimizer = make_optimizer(config.optimizer, config.steps)
    return train_step.lower(state, frozen, batch, graphdef=graphdef, optimizer=optimizer, config=config)


def put_batch(batch: Mapping[str, Any]) -> dict[str, Array]:
    """A batch on the devices, each with its rows. All processes have the same batch."""
    mesh = sharding.entered()
    if mesh is None:
        return {name: jnp.asarray(a) for name, a in batch.items()}
    layout = lambda a: NamedSharding(mesh, sharding.of_activation(mesh, "batch", a.shape))
    return {n: jax.make_array_from_callback(a.shape, layout(a), a.__getitem__) for n, a in batch.items()}


def train(config: TrainConfig, workdir: pathlib.Path) -> Decoder:
    """Runs or continues a training run; leaves `workdir/gates` or `workdir/backbone` and returns the trained model.

    `workdir/gates` is there from the first checkpoint on and has the gates of the newest. The run is on the mesh that
    was entered, or on the default device.

    Raises:
      ValueError: when the configuration does not fit the mesh, the workdir belongs to a run of another configuration,
        of other documents, of another backbone or of other gates, or another process trains in it; when backbone,
        gates, data or checkpoint are unusable, or processes do not share the workdir or see different inputs.
      SystemExit: after SIGTERM or SIGINT, with 128 and the signal's number, when the step that ran then is saved.
      FloatingPointError: when a loss is not finite; names the step.
    """
    backbone = architecture(config)
    if (mesh := sharding.ambient()) is not None:
        config.check_mesh(dict(mesh.shape), backbone)
    digests = distributed.together(lambda: pipeline.digests(config.resolved_data, config.seed))
    inputs = {f"documents of {name}": digest for name, digest in digests.items()}
    if gates := distributed.together(lambda: _gates_to_start_from(config)):
        digest = {f"gates of {config.gates}": gate_files.digest(gates)}
        distributed.agree_on("gates to start from", digest)
        inputs |= digest
    checkpoint.check_workdir(workdir, config, inputs)  # before documents are made and weights are loaded
    data = pipeline.train_iterator(config.resolved_data, vocab_size=backbone.vocab_size, seed=config.seed)
    if jax.process_count() > 1:
        distributed.share_folder(workdir)
    model = make_model(config)
    graphdef, params, frozen = nnx.split(model, trained_kind(config), ...)
    if config.stage == "gates":
        inputs[f"weights of {config.backbone}"] = checksum.of(frozen, "")
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = fresh_state(params, optimizer)
    merged = lambda state: nnx.merge(graphdef, state.params, frozen)
    trained, all_of_them = (sum(a.size for a in jax.tree.leaves(s)) for s in (params, (params, frozen)))
    metrics.say(f"training {config.stage}: {trained:,} of {all_of_them:,} parameters, {config.steps:,} steps")
    if config.steps <= (warmup := config.optimizer.warmup_steps):
        metrics.say(f"all of them are warm-up: optimizer.warmup_steps is {warmup:,}")
    with (
        checkpoint.claimed(workdir, config, inputs),
        checkpoint.open_manager(workdir, keep=config.checkpoint_keep) as manager,
    ):
        if restored := checkpoint.restore_latest(manager, state):
            state, data_state = restored
            data.set_state(data_state)
            _export(config, merged(state), workdir)
            metrics.say(f"continuing after step {int(state.step)}")
        static = {"graphdef": graphdef, "optimizer": optimizer, "config": config}
        step_fn = functools.partial(train_step, frozen=frozen, **static)
        state = _loop(config, workdir, state, step_fn, merged, data, manager)
    model = merged(state)
    if config.stage == "backbone":
        weights.save_backbone(model, workdir / "backbone")
    return model


def _export(config: TrainConfig, model: Decoder, workdir: pathlib.Path) -> None:
    """Writes the gates as they are now, in place of earlier ones."""
    if config.stage == "gates":
        gate_files.save_gates(model, workdir / "gates", base_model=config.backbone, loss=config.loss)


def _tokenizer(config: TrainConfig) -> tokenizer.Tokenizer | None:
    """The backbone's, where the evaluation needs it."""
    needed = config.backbone and any(map(plan.needs_tokenizer, config.eval.tasks))
    return tokenizer.load(hub.resolve(config.backbone)) if needed else None


def _loop(
    config: TrainConfig,
    workdir: pathlib.Path,
    state: TrainState,
    step_fn: Callable[..., tuple[TrainState, StepMetrics]],
    merged: Callable[[TrainState], Decoder],
    data: Any,
    manager: Any,
) -> TrainState:
    """Steps from `state.step` to the end. While one runs, the host writes the metrics of the one before, and reads.

    No step is queued behind the one that runs, so that a signal has to wait for that one only.
    """
    first, tokens = int(state.step), _tokenizer(config) if config.eval_every else None
    batches: Iterator[pipeline.Batch] = iter(data)
    with (
        metrics.MetricWriter(workdir, first_step=first, steps=config.steps, label=config.stage) as writer,
        interrupts.Stop() as stop,
        metrics.profiler(workdir / "profile", config.profile_start, config.profile_steps) as profile,
    ):
        meter, pending = metrics.Meter(config.data.batch_size * config.data.length), None
        batch, data_state = put_batch(next(batches)), data.get_state()

        def scored(resumed: bool) -> int:
            """Scores the newest checkpoint if that is due; the signal that came meanwhile. It may come at any moment:
            what is done is on disk."""
            if not curves.due(config, int(state.step)):
                return 0
            manager.wait_until_finished()
            at, started = int(state.step), time.perf_counter()
            # Of several processes none leaves, since the others wait for its part.
            with stop.at_once() if jax.process_count() == 1 else contextlib.nullcontext():
                if scores := curves.evaluate(merged(state), config, workdir, at, tokens, resumed=resumed):
                    writer.write(at, scores)
            meter.skip(time.perf_counter() - started)
            return distributed.largest(stop.requested)

        stopped = scored(resumed=True)
        for step in range(first + 1, config.steps + 1):
            if stopped:
                break
            profile(step)
            state, result = step_fn(state, batch=batch)
            if pending is not None:
                metrics.report(writer, meter, config, *pending)
            pending, position = (step, result), data_state
            batch, data_state = put_batch(next(batches)), data.get_state()
            jax.block_until_ready(result)
            stopped = distributed.largest(stop.requested)  # the same on all processes, so all save the same step
            if step % config.checkpoint_every == 0 or step == config.steps or stopped:
                metrics.report(writer, meter, config, *pending)  # so that a state after a NaN is never saved
                pending = None
                checkpoint.save(manager, state, position)
                _export(config, merged(state), workdir)
                stopped = stopped or scored(resumed=False)
        manager.wait_until_finished()
        if stopped := stopped or distributed.largest(stop.requested):  # it may come while the last step is saved
            name = signal.Signals(stopped).name
            metrics.say(f"stopped by {name} after step {int(state.step)}; the same command goes on from there")
            raise SystemExit(128 + stopped)
    return state


def run(config: TrainConfig, workdir: pathlib.Path) -> None:
    """Everything a config asks for: the backbone if it trains one, the gates, and the evaluation.

    Raises:
      ValueError: before anything is done, where the evaluation cannot be; and as `train` and `plan.run` do.
    """
    if config.eval.tasks:
        plan.check(config.eval, config.data)
        plan.check_sources(config.eval, config.data, _tokenizer(config))
    if config.stage == "gates" and config.backbone_steps:
        backbone = dataclasses.replace(
            config,
            stage="backbone",
            steps=config.backbone_steps,
            eval_every=0,
            optimizer=config.backbone_optimizer,
            backbone_steps=0,
        )
        weights.save_backbone(train(backbone, workdir / "backbone_run"), workdir / "backbone")
        distributed.gather("")  # process 0 wrote it, all read it
        config = dataclasses.replace(config, backbone=str(workdir / "backbone"), backbone_steps=0, model=None)
    model = train(config, workdir)
    if config.eval.tasks and not config.eval_every:
        plan.run(model, config.eval, config.data, workdir / "eval", _tokenizer(config))


def define_flags(values: flags.FlagValues) -> None:
    """Not at import: programs that import this module have a --config of their own."""
    config_flags.DEFINE_config_file(
        "config", None, "The run's configuration, a file in configs/.", lock_config=True, flag_values=values
    )
    where = "Where checkpoints, metrics, gates and the evaluation go."
    flags.DEFINE_string("workdir", None, where, flag_values=values)
    flags.mark_flags_as_required(["config", "workdir"], flag_values=values)
    distributed.define_flags(values)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if not values["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax writes a lot at INFO
    workdir = pathlib.Path(values.workdir).expanduser()
    with distributed.joined(values):
        # First of all: what one process refuses the others must refuse too, and not wait for it.
        distributed.agree_on("configurations", values.config.to_dict())
        config = conversion.from_config_dict(TrainConfig, values.config)
        mesh = sharding.make_mesh(**config.mesh.over(jax.device_count()))
        if jax.process_index() == 0:
            print(json.dumps(conversion.to_dict(config), indent=2), flush=True)
        with jax.set_mesh(mesh):
            run(config, workdir)


if __name__ == "__main__":
    command.run(main, define_flags)
