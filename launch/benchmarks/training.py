"""A training step of the gates, and what of it is retention mass."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from retention_jax import train
from retention_jax.config import DataConfig, EvalConfig, LossConfig, TrainConfig
from retention_jax.training.checkpoint import TrainState

from . import operations
from .programs import Case, Ceilings, Row, measure
from .settings import Settings, new_model, training_work


def train_cases(settings: Settings) -> Iterator[Case]:
    """A step over full rows, each one document."""
    for batch, tokens in settings.cells:
        config = TrainConfig(
            stage="gates",
            backbone="random weights",
            data=DataConfig(length=tokens, document_lengths=(tokens,), batch_size=batch),
            eval=EvalConfig(tasks=()),
            gate=settings.gate,
            loss=LossConfig(budget=settings.budgets[0]),
            dtype=settings.model.dtype,
            remat=settings.remat,
        )
        optimizer = train.make_optimizer(config.optimizer, config.steps)
        shapes = jax.eval_shape(lambda: new_model(settings))
        graphdef = nnx.split(shapes, train.trained_kind(config), ...)[0]

        def make(batch=batch, tokens=tokens, config=config, optimizer=optimizer) -> tuple:
            _, params, frozen = nnx.split(new_model(settings), train.trained_kind(config), ...)
            data = {
                "tokens": jax.random.randint(jax.random.key(1), (batch, tokens), 0, settings.model.vocab_size),
                "segment_ids": jnp.ones((batch, tokens), jnp.int32),
                "label_mask": jax.random.uniform(jax.random.key(2), (batch, tokens)) < settings.labels,
            }
            return TrainState(params, optimizer.init(params), jnp.int32(0)), frozen, data

        def step(state, frozen, data, graphdef=graphdef, optimizer=optimizer, config=config) -> Any:
            return train.train_step(state, frozen, data, graphdef=graphdef, optimizer=optimizer, config=config)

        labels: Row = {"batch": batch, "context": tokens, "what": "gate step"}
        work = training_work(settings, batch, tokens)
        yield Case(labels, step, make, batch * tokens, work, donates=True)


def steps(settings: Settings, ceilings: Ceilings) -> Iterator[Row]:
    """Times of a step, and of the retention mass of all its layers and heads, forward and backward."""
    for batch, tokens in settings.cells:
        cell = settings._replace(batches=(batch,), contexts=(tokens,))
        (step,) = measure(train_cases(cell), ceilings, settings.repeats)
        mass = [case for case in operations.mass_cases(cell) if case.labels["what"] == "retention_mass"][-1]
        (part,) = measure([mass._replace(versus=())], ceilings, settings.repeats)
        if "milliseconds" in step:
            step["of_mass"] = float(part["milliseconds"] or 0) / float(step["milliseconds"] or 1)
        yield step
