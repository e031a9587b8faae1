"""Configs: every check, every message, and the way through a ConfigDict and back."""

import dataclasses
import itertools
import re
import typing
from typing import Any

import jaxtyping
import numpy as np
import pytest

from retention_jax.config import (
    CacheConfig,
    DataConfig,
    EvalConfig,
    GateConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScaling,
    TrainConfig,
)
from retention_jax.config.conversion import from_config_dict, from_dict, to_config_dict, to_dict

MODEL = ModelConfig(vocab_size=32, num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_size=8, mlp_width=24)
LONGROPE = RopeScaling("longrope", original_length=8, short_factor=(1.0, 1.0), long_factor=(2.0, 3.0))
TRAIN = TrainConfig(stage="backbone", model=MODEL, data=DataConfig(), eval=EvalConfig())
GATES = dataclasses.replace(TRAIN, stage="gates", model=None, backbone="builtin:recall")
VALID = (
    MODEL,
    LONGROPE,
    GateConfig(),
    CacheConfig(budget=4),
    LossConfig(),
    OptimizerConfig(),
    DataConfig(),
    EvalConfig(),
    TRAIN,
    GATES,
)

MODEL_SIZES = ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_size", "mlp_width")
REFUSED = [
    *[(MODEL, {size: 0}, f"{size} must be positive, got 0") for size in MODEL_SIZES],
    (MODEL, dict(num_kv_heads=3), "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
    (MODEL, dict(head_size=7), "head_size must be even for RoPE, got 7"),
    *[(MODEL, dict(partial_rotary_factor=value), f"got {value}") for value in (0.0, 1.5, 0.375)],
    (MODEL, dict(rope_scaling=LONGROPE), "short_factor and long_factor must have 4 numbers each"),
    (MODEL, dict(sliding_window=0, sliding_layers=(0,)), "sliding_window must be None or positive, got 0"),
    *[
        (MODEL, dict(sliding_window=window, sliding_layers=layers), f"got {layers} and {window}")
        for window, layers in ((4, ()), (None, (0,)), (4, (2,)), (4, (1, 0)), (4, (0, 0)), (4, (-1,)))
    ],
    (LONGROPE, dict(factor=0.0), "factor must be positive, got 0.0"),
    (LONGROPE, dict(attention_factor=0.0), "attention_factor must be positive, got 0.0"),
    *[
        (LONGROPE, dict(kind=kind, original_length=0), f"original_length must be positive for {kind}, got 0")
        for kind in ("llama3", "yarn", "longrope")
    ],
    (LONGROPE, dict(high_freq_factor=1.0), "high_freq_factor must exceed low_freq_factor, got 1.0, 1.0"),
    (LONGROPE, dict(beta_fast=0.5), "beta_fast must not be below beta_slow, got 0.5 and 1.0"),
    (LONGROPE, dict(long_factor=(1.0, 0.0)), "short_factor and long_factor must be positive"),
    (GateConfig(), dict(width=0), "width must be positive, got 0"),
    (GateConfig(), dict(init_std=0.0), "init_std must be positive, got 0.0"),
    *[
        (
            GateConfig(),
            dict(tie_offset=False, share=share),
            f"tie_offset=False goes with share='layers' only, got share='{share}'",
        )
        for share in ("layers_and_heads", "none")
    ],
    (GateConfig(), dict(hidden_layers=1, share="layers_and_heads"), "share='layers_and_heads' needs hidden_layers=2"),
    *[
        (CacheConfig(budget=4), {field: 0}, f"{field} must be at least 1, got 0")
        for field in ("budget", "recent", "horizon")
    ],
    (CacheConfig(budget=4), dict(prefill_chunk=0), "prefill_chunk must be None or at least 1, got 0"),
    *[
        (CacheConfig(budget=4), {field: -1}, f"{field} must not be negative, got -1")
        for field in ("protect_first", "protect_last", "min_per_head")
    ],
    (CacheConfig(budget=4), dict(protect_first=2, protect_last=3), "(2 + 3)"),
    (CacheConfig(budget=4), dict(min_per_head=5), "min_per_head (5) must each fit in the budget of 4"),
    *[
        (CacheConfig(budget=4), dict(threshold=value), f"threshold must be None or in (0, 1], got {value}")
        for value in (0.0, -0.5, 1.5)
    ],
    *[
        (CacheConfig(budget=4), {"policy": policy, **option}, "belongs to the policies retention; got ")
        for policy, option in itertools.product(("streaming", "random"), (dict(horizon=2), dict(threshold=0.5)))
    ],
    *[
        (LossConfig(), {field: -1.0}, f"{field} must not be negative, got -1.0")
        for field in ("kl_weight", "ce_weight", "capacity_weight")
    ],
    *[(LossConfig(), {field: 0}, f"{field} must be at least 1, got 0") for field in ("budget", "vocab_block")],
    (LossConfig(labels="released"), dict(released_block=1), "released_block must be None or at least 2"),
    (LossConfig(), dict(released_block=8), "labels='released' only, got 8 and labels='next'"),
    *[
        (OptimizerConfig(), {field: 0.0}, f"{field} must be positive, got 0.0")
        for field in ("learning_rate", "clip_norm")
    ],
    (OptimizerConfig(), dict(warmup_steps=-1), "warmup_steps must not be negative, got -1"),
    (OptimizerConfig(), dict(accumulation=0), "accumulation must be at least 1, got 0"),
    (DataConfig(), dict(length=1, document_lengths=()), "length must be at least 2, got 1"),
    (DataConfig(), dict(task="text"), "path must name a text file for task='text'"),
    *[(DataConfig(), dict(heldout=value), f"heldout must be in (0, 1), got {value}") for value in (0.0, 1.0)],
    *[(DataConfig(), {field: 0}, f"{field} must be at least 1, got 0") for field in ("batch_size", "documents")],
    *[
        (DataConfig(), dict(document_lengths=value), "document_lengths must be")
        for value in ((), (2,), (193,), (192, 2))
    ],
    *[(DataConfig(), dict(decoys=value), f"decoys must be in [0, 0.6], got {value}") for value in (-0.1, 0.7)],
    *[(DataConfig(), dict(copies=value), f"copies must be in [0, 1], got {value}") for value in (-0.1, 1.1)],
    (DataConfig(), dict(task="chat"), "files must name the conversations for task='chat'"),
    *[
        (DataConfig(files=("a", "b")), dict(weights=value), f"positive number for each of files, got {value}")
        for value in ((1.0,), (1.0, 0.0))
    ],
    *[
        (DataConfig(), dict(min_length=value), f"min_length must be from 2 to length=192, got {value}")
        for value in (1, 193)
    ],
    *[(EvalConfig(), {field: ()}, "no list but tasks may be empty") for field in ("policies", "budgets", "lengths")],
    (EvalConfig(), dict(budgets=(4, 0)), "budgets must be at least 1, got (4, 0)"),
    (EvalConfig(), dict(lengths=(4, 1)), "lengths must be at least 2, got (4, 1)"),
    *[(EvalConfig(), {field: 0}, f"{field} must be at least 1, got 0") for field in ("recent", "examples", "seeds")],
    *[
        (TRAIN, {field: 0}, f"{field} must be at least 1, got 0")
        for field in ("steps", "checkpoint_every", "checkpoint_keep", "log_every")
    ],
    (TRAIN, dict(optimizer=OptimizerConfig(accumulation=3)), "multiple of optimizer.accumulation, got 32 and 3"),
    (TRAIN, dict(stage="gates"), "needs either backbone"),
    (GATES, dict(backbone_steps=10), "needs either backbone"),
    (TRAIN, dict(backbone_steps=10), "go with stage='gates' only"),
    (GATES, dict(stage="backbone"), "go with stage='gates' only"),
    (TRAIN, dict(model=None), "model is needed to train a backbone"),
    (GATES, dict(model=MODEL), "must be None where `backbone` names one"),
    (TRAIN, dict(data=DataConfig(task="chat", files=("a",))), "data.tokenizer is needed for data.task='chat'"),
    (TRAIN, dict(model=dataclasses.replace(MODEL, dtype="bfloat16")), "trained in float32"),
]


@pytest.mark.parametrize("valid, changes, message", REFUSED)
def test_refuses(valid, changes, message):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(valid, **changes)
    assert str(error.value).startswith(f"{type(valid).__name__}: ") and message in str(error.value)


def test_all_problems_are_listed():
    with pytest.raises(
        ValueError, match="budget must be at least 1, got 0; recent must be at least 1, got -3; .*horizon"
    ):
        CacheConfig(budget=0, recent=-3, horizon=0)


@pytest.mark.parametrize("config", VALID, ids=lambda c: type(c).__name__)
def test_round_trips(config):
    assert from_dict(type(config), to_dict(config)) == config
    assert from_config_dict(type(config), to_config_dict(config)) == config


def test_overrides_reach_the_dataclass():
    values: Any = to_config_dict(TRAIN)
    values.optimizer.learning_rate = 1  # as a flag would leave it: a whole number for a float
    values.data.document_lengths = (3, 64)
    got = from_config_dict(TrainConfig, values)
    assert got.optimizer.learning_rate == 1.0 and isinstance(got.optimizer.learning_rate, float)
    assert got.data.document_lengths == (3, 64)
    assert dataclasses.replace(got, optimizer=TRAIN.optimizer, data=TRAIN.data) == TRAIN
    with pytest.raises(AttributeError):
        values.optimizer.learning_rat = 1.0


@pytest.mark.parametrize(
    "wrong, nearest",
    (("learning_rat", "learning_rate"), ("warmup", "warmup_steps"), ("clip", "clip_norm"), ("zzz", "")),
)
def test_an_unknown_field_names_the_nearest(wrong, nearest):
    with pytest.raises(
        ValueError, match=f"config.optimizer.{wrong} is not a field of OptimizerConfig; the nearest is '{nearest}"
    ):
        from_dict(TrainConfig, to_dict(TRAIN) | {"optimizer": {wrong: 1}})


def test_wrong_types_are_all_listed():
    with pytest.raises(ValueError) as error:
        from_dict(
            CacheConfig,
            dict(budget="4", recent=True, policy=3, threshold="x", local=1, seed=1.5, horizn=2),
            "cache",
        )
    lines = str(error.value).splitlines()
    assert len(lines) == 7
    for part in (
        "cache.budget must be a whole number, got '4'",
        "cache.recent must be a whole number, got True",
        "cache.policy must be",
        "cache.threshold must be",
        "cache.local must be True or False, got 1",
        "cache.seed must be a whole number, got 1.5",
        "cache.horizn is not a field of CacheConfig; the nearest is 'horizon'",
    ):
        assert sum(part in line for line in lines) == 1, part


@pytest.fixture
def unchecked():
    """Without the type checks that tests have and users do not."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


CHOICES = [
    (config, field.name, value)
    for config in VALID
    for field in dataclasses.fields(config)
    for value in typing.get_args(typing.get_type_hints(type(config))[field.name])
    if typing.get_origin(typing.get_type_hints(type(config))[field.name]) is typing.Literal and isinstance(value, str)
]


@pytest.mark.parametrize("config, name, value", CHOICES, ids=lambda value: value if isinstance(value, str) else "")
def test_python_callers_are_told_the_nearest_choice(unchecked, config, name, value):
    """As flags are, and by the dataclass itself: not by a trace far behind it."""
    with pytest.raises(ValueError) as error:
        dataclasses.replace(config, **{name: value[:-1]})
    told = str(error.value)
    assert told.startswith(f"{type(config).__name__}: {name} must be one of ") and f"got {value[:-1]!r}" in told
    assert told.endswith(f"; the nearest is {value!r}") and "Literal" not in told


@pytest.mark.parametrize(
    "make, message",
    (  # of types that a checker refuses: what a caller without one would give
        (lambda: CacheConfig(budget="64"), "budget must be a whole number, got '64'"),  # type: ignore[arg-type]
        (lambda: CacheConfig(budget=64.5), "budget must be a whole number, got 64.5"),  # type: ignore[arg-type]
        (lambda: CacheConfig(4, local="no"), "local must be True or False, got 'no'"),  # type: ignore[arg-type]
        (lambda: CacheConfig(4, prefill_chunk="a"), "prefill_chunk must be a whole number or None, got 'a'"),  # type: ignore[arg-type]
        (lambda: EvalConfig(tasks="recall"), "tasks must be a tuple, each a text, got 'recall'"),  # type: ignore[arg-type]
        (lambda: GateConfig(hidden_layers=3), "hidden_layers must be one of 1, 2, got 3"),  # type: ignore[arg-type]
        (lambda: dataclasses.replace(TRAIN, data={"task": "recall"}), "data must be a DataConfig, got {'task'"),
        (lambda: OptimizerConfig(b1="x", b2=None), "b1 must be a number, got 'x'; b2 must be a number, got None"),  # type: ignore[arg-type]
    ),
)
def test_python_callers_are_told_of_wrong_types(unchecked, make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_numbers_of_numpy_and_lists_are_taken_as_their_types(unchecked):
    cache = CacheConfig(budget=np.int64(4), threshold=np.float32(0.5))  # type: ignore[arg-type]
    assert type(cache.budget) is int and type(cache.threshold) is float and cache == CacheConfig(4, threshold=0.5)
    assert EvalConfig(budgets=[4, 5]).budgets == (4, 5)  # type: ignore[arg-type]
    assert type(OptimizerConfig(learning_rate=1).learning_rate) is float


def test_messages_name_the_field_as_it_is_written():
    values = to_dict(TRAIN)
    values["loss"]["budget"] = 0
    with pytest.raises(ValueError, match="^config.loss: budget must be at least 1, got 0$"):
        from_dict(TrainConfig, values)


@pytest.mark.parametrize("value", ("abc", [3, "x"], 3, {"a": 1}))
def test_tuples_hold_one_type(value):
    with pytest.raises(ValueError, match="config.document_lengths must be"):
        from_dict(DataConfig, {"document_lengths": value})


def test_missing_fields_are_all_listed():
    with pytest.raises(ValueError, match="config.stage is missing\nconfig.data is missing\nconfig.eval is missing"):
        from_dict(TrainConfig, {})


def test_configs_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODEL.width = 3  # type: ignore[misc]  # this is the point
