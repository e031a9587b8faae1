"""Tiny models, and the buffer written a second time as plain loops and sorts, to compare the package with."""

import math
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from retention_jax.config import CacheConfig, GateConfig, ModelConfig
from retention_jax.evaluation.rows import Row
from retention_jax.models import gate_files
from retention_jax.models.decoder import Decoder
from retention_jax.models.gate import GateParam


def same(a, b) -> bool:
    """Whether the arrays of two trees are equal, one by one."""
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def environment(**changes: str) -> dict[str, str]:
    """For commands that tests start: with one device, unlike the tests themselves, and as quick to compile."""
    kept = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return {**os.environ, "XLA_FLAGS": " ".join(kept), **changes}


def environment_for_tpu_compiler() -> dict[str, str]:
    """For commands that compile for TPU: without flags, since its library dies of those that only CPUs have."""
    return {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1]), "XLA_FLAGS": ""}


def tiny_config(**changes: Any) -> ModelConfig:
    sizes = dict(vocab_size=32, num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_size=8, mlp_width=24)
    return ModelConfig(**{**sizes, **changes})


TINY_GATE = GateConfig(width=16, offset_init=1.0)


def tiny_model(gate: GateConfig = TINY_GATE, seed: int = 0, **changes: Any) -> Decoder:
    """Random weights, biases and norms too; log_beta from about -3 to -0.01, far apart, so that no eviction is close.

    Filled in from NumPy, since compiling the initialisation takes longer than most tests.
    """
    model = nnx.eval_shape(lambda: Decoder(tiny_config(**changes), gate, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    filled = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name, noise = str(path[-1]), rng.normal(size=variable.shape)
        if "norm" in name:
            value = 1 + 0.1 * noise
        elif isinstance(variable, GateParam):
            value = (gate.offset_init if name == "offset" else 0) + 0.5 * noise
        else:
            value = noise * (1 if name == "embedding" else 0.25)
        filled.append((path, variable.replace(jnp.asarray(value.astype(variable.dtype)))))
    nnx.update(model, nnx.from_flat_state(filled))
    return model


def tokens_of(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 32, shape).astype(np.int32)


def assert_close(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    """Within `tolerance` of the largest wanted number, or of 1 where all are smaller."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{got.shape} is not {want.shape}"
    scale = max(1.0, float(np.abs(want).max(initial=0.0)))
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)


class Kept(NamedTuple):
    """What one row remembers: positions in the pool, of each head l*K + h, and in recent, the same for all heads."""

    pool: list[list[int]]
    recent: list[int]

    def positions(self, head: int) -> list[int]:
        return self.pool[head] + self.recent


Step = tuple[Literal["read", "token"], int]  # a chunk of so many tokens; or one decoded token (0: the row sits out)


def simulate(
    log_beta: np.ndarray, steps: Sequence[Step], cfg: CacheConfig, windows: Sequence[int] | None = None
) -> list[Kept]:
    """What one row remembers after every step, from design.md section 3 and nothing of the package.

    Args:
      log_beta: [L, K, T], of every token that arrives.
      steps: how they arrive. After a chunk, and when recent is full, one eviction merges everything.
      cfg: what is kept.
      windows: tokens that each layer sees; an eviction drops what the next token will not see.
    """
    heads = log_beta.shape[1]
    by_head = log_beta.reshape(-1, log_beta.shape[-1])
    pool, recent, seen, history = [[] for _ in by_head], [], 0, []
    for kind, count in steps:
        recent, seen = recent + list(range(seen, seen + count)), seen + count
        if count and (kind == "read" or len(recent) == cfg.recent):
            entries = [
                (head, pos)
                for head, kept in enumerate(pool)
                for pos in kept + recent
                if windows is None or pos > seen - windows[head // heads]
            ]
            stay = survivors(by_head, entries, seen, cfg)
            pool = [sorted(pos for h, pos in stay if h == head) for head in range(len(by_head))]
            recent = []
        history.append(Kept(pool, recent))
    return history


def survivors(
    log_beta: np.ndarray, entries: list[tuple[int, int]], seen: int, cfg: CacheConfig
) -> list[tuple[int, int]]:
    """The (head, pos) that one eviction leaves."""
    heads = len(log_beta)
    score = {}
    for head, pos in entries:
        protected = pos < cfg.protect_first or pos >= seen - cfg.protect_last
        score[head, pos] = math.inf if protected else score_of(float(log_beta[head, pos]), head, pos, seen, cfg)

    def best(candidates: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
        return sorted(candidates, key=lambda e: (-score[e], -e[1], e[0]))[:count]

    def of_head(candidates: list[tuple[int, int]], head: int) -> list[tuple[int, int]]:
        return [e for e in candidates if e[0] == head]

    for head in range(heads):
        for entry in best(of_head(entries, head), cfg.min_per_head):
            score[entry] = math.inf
    if cfg.threshold is not None:
        entries = [e for e in entries if score[e] >= math.log(cfg.threshold)]
    if cfg.local:
        return [e for head in range(heads) for e in best(of_head(entries, head), cfg.budget)]
    return best(entries, cfg.budget * heads)


def score_of(log_beta: float, head: int, pos: int, seen: int, cfg: CacheConfig) -> float:
    age, n = seen + 1 - pos, cfg.horizon
    match cfg.policy:
        case "streaming":
            return 1e30 if pos < 4 else float(pos)
        case "random":
            return hashed(pos, head, cfg.seed)
        case "retention" if n == 1:
            return float(np.float32(age) * np.float32(log_beta))  # one rounding, the same on every machine
        case "retention":
            steps = n if log_beta == 0 else math.expm1(n * log_beta) / math.expm1(log_beta)
            return (age + 1) * log_beta + math.log(steps)
        case _:
            raise ValueError(f"the loops here know no policy {cfg.policy!r}; test_baselines.py has the others")


def hashed(pos: int, head: int, seed: int) -> float:
    """The random policy's draw, in Python integers."""
    word = 2**32 - 1
    x = (pos * 0x9E3779B1 & word) ^ (head * 0x85EBCA77 & word) ^ (seed * 0xC2B2AE3D & word)
    x = (x ^ x >> 16) * 0x7FEB352D & word
    x = (x ^ x >> 15) * 0x846CA68B & word
    return ((x ^ x >> 16) >> 8) / 2**24


def gate_tensors(model: Decoder) -> dict[str, np.ndarray]:
    """A model's gate variables under the names of the released format, by way of a file."""
    with tempfile.TemporaryDirectory() as folder:
        gate_files.save_gates(model, folder)
        return load_file(pathlib.Path(folder) / "gates.safetensors")


def row(**changes: Any) -> Row:
    """A result of an evaluation, made up."""
    numbers = (0.75, 0.73, 0.77, 90, 5, 1, 1, 1, 1.0, 9.0)
    return Row("recall", 768, "retention", 48, "accuracy", *numbers, None, {}, 0, {}, [])._replace(**changes)


def untimed(results: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """A journal without what differs from run to run."""
    slow = ("seconds", "tokens_per_second", "made_by")
    return {unit: {k: v for k, v in result.items() if k not in slow} for unit, result in results.items()}
