"""Scores of sequences that are read token by token: each next token is predicted from what was kept until then.

The model reads the sequence's own tokens (teacher forcing); it writes nothing. `answers.py` scores what it writes.
"""

import concurrent.futures
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from retention_jax.cache import full_nbytes
from retention_jax.config import CacheConfig, DataConfig, EvalConfig
from retention_jax.data import perplexity, pipeline, recall
from retention_jax.evaluation import buffers, devices
from retention_jax.evaluation.journal import Result, Unit
from retention_jax.evaluation.rows import Row, interval
from retention_jax.generation import scoring
from retention_jax.generation.scoring import Scores, StreamPrograms
from retention_jax.models.decoder import Decoder
from retention_jax.parallel import sharding
from retention_jax.policies.table import FULL, POLICIES
from retention_jax.text.tokenizer import Tokenizer

TASKS = ("recall", "text", "perplexity")
_METRICS = {"recall": "accuracy", "text": "bits_per_byte", "perplexity": "perplexity"}

# Kinds of buffer whose programs are kept. Each maps some 650 pieces of memory on a CPU, and a process that has 65,530
# dies in XLA's mmap.
_PROGRAMS = 64


def examples(
    task: str, config: EvalConfig, data: DataConfig, length: int, tokenizer: Tokenizer | None = None
) -> tuple[Int[np.ndarray, "seeds n T"], Bool[np.ndarray, "seeds n T"]]:
    """Sequences of `length` tokens for each seed, and which of their tokens are scored.

    recall: `config.examples` new sequences for each seed. text: rows of the held-out tail, shuffled by the first seed
    and dealt out, so that no two seeds share a row; fewer than `config.examples` for each where the tail is short.
    perplexity: the same, from the first rows of a text. It needs a tokenizer.

    Raises:
      ValueError: when the text has fewer rows than there are seeds, and as `perplexity.rows` and `heldout_rows` do.
    """
    seeds = range(config.seed, config.seed + config.seeds)
    if task == "recall":
        # Training documents have a third word in their seeds (data/builders.py), so none of these is among them.
        made = [
            [recall.stream(np.random.default_rng((seed, i)), length, config.decoys) for i in range(config.examples)]
            for seed in seeds
        ]
        tokens, label_mask = (np.array([[s[field] for s in group] for group in made]) for field in (0, 1))
        return tokens, label_mask
    if task == "perplexity":
        if tokenizer is None:
            raise ValueError("task 'perplexity' needs the model's tokenizer")
        path, encode = config.source_of[task], perplexity.by_tokenizer(tokenizer)
        rows = perplexity.rows(path, encode, length=length, limit=config.seeds * config.examples).tokens
    else:
        path, rows = data.path, pipeline.heldout_rows(data, length=length, limit=None)
    n = min(config.examples, len(rows) // config.seeds)
    if n == 0:
        kind = "held-out " * (task == "text")
        raise ValueError(f"{path}: {len(rows)} {kind}rows of {length} tokens, too few for {config.seeds} seeds")
    chosen = np.random.default_rng(config.seed).permutation(len(rows))[: config.seeds * n]
    tokens = rows[chosen].reshape(config.seeds, n, length)
    return tokens, np.ones_like(tokens, bool)


def accuracy(
    best: Int[np.ndarray, "n T_less_1"], tokens: Int[np.ndarray, "n T"], label_mask: Bool[np.ndarray, "n T"]
) -> float:
    """Share of the labelled tokens that were predicted. Column t of `best` predicts token t + 1."""
    return float(np.mean((best == tokens[:, 1:])[label_mask[:, 1:]]))


def bits_per_byte(log_prob: Float[np.ndarray, "n T_less_1"], label_mask: Bool[np.ndarray, "n T"]) -> float:
    """Mean -log2 of the labelled tokens' probabilities, whose natural logs are given; a token is a byte."""
    return float(np.mean(-log_prob[label_mask[:, 1:]], dtype=np.float64) / np.log(2))


class Scorer(NamedTuple):
    """A compiled program for sequences of one shape."""

    score: Callable[[Int[np.ndarray, "n T"]], tuple[Scores, int]]  # also returns the bytes held for one sequence
    peak_bytes: int | None  # as in `Row`


_Compiled = tuple[StreamPrograms, list[jax.stages.Compiled]]
Compile = Callable[[int, CacheConfig, int], _Compiled]  # takes batch size, buffer and length


def compile_once(model: Decoder) -> Compile:
    """`scoring.compile_stream` for one model. The same arguments are compiled once, and the programs kept.

    The first programs are kept, not the latest: policies and budgets come in the same order at every length.
    """
    kept: dict[tuple[int, CacheConfig, int], _Compiled] = {}

    def compile_programs(batch: int, cache: CacheConfig, length: int) -> _Compiled:
        key = batch, cache, length
        if key in kept:
            return kept[key]
        made = scoring.compile_stream(model, *key)
        if len(kept) < _PROGRAMS:
            kept[key] = made
        return made

    return compile_programs


def compile_scorer(
    model: Decoder, tokens: Int[np.ndarray, "n T"], cache: CacheConfig | None, compile_programs: Compile
) -> Scorer:
    """Compiles what scores sequences of this shape. Without a `cache` nothing is evicted.

    Where the mesh of the model needs more sequences than there are, the last one is repeated.
    """
    n, T = tokens.shape
    batch = n + -n % sharding.row_parts(model)
    filled = lambda rows: np.concatenate([rows, np.repeat(rows[-1:], batch - n, axis=0)])
    if cache is None:
        with sharding.enter_mesh_of(model):
            full = scoring.score_full.lower(model, filled(tokens)).compile()
        unfilled = lambda scores: jax.tree.map(lambda a: sharding.on_host(a)[:n], scores)
        read_whole = lambda rows: (unfilled(full(model, filled(rows))), full_nbytes(model.config, T))
        return Scorer(read_whole, devices.program_bytes(full.memory_analysis()))
    # A policy that must know the future has programs for one length only; all others read any length.
    programs, compiled = compile_programs(batch, cache, T if POLICIES[cache.policy].needs_future else cache.recent)

    def score(rows: Int[np.ndarray, "n T"]) -> tuple[Scores, int]:
        with sharding.enter_mesh_of(model):
            chunks, buffer = programs.read(model, filled(rows), np.full(batch, T, np.int32))
        together = lambda parts: np.concatenate([sharding.on_host(part)[:n] for part in parts], axis=1)[:, : T - 1]
        return Scores(*map(together, zip(*chunks, strict=True))), buffer.nbytes // batch

    return Scorer(score, devices.most(devices.program_bytes(program.memory_analysis()) for program in compiled))


class Sequences:
    """One task at one length, ready to be scored."""

    def __init__(
        self,
        model: Decoder,
        config: EvalConfig,
        data: DataConfig,
        task: str,
        length: int,
        tokenizer: Tokenizer | None,
        compile_programs: Compile,
    ) -> None:
        """Raises ValueError as `examples` does, and when the model's vocabulary is too small."""
        self.compile_programs = compile_programs
        self.task, self.length, self.config, self.model = task, length, config, model
        self.tokens, self.label_mask = examples(task, config, data, length, tokenizer)
        if self.tokens.max() >= model.config.vocab_size:
            raise ValueError(
                f"task {task!r} has token {self.tokens.max()}; the model's vocabulary is {model.config.vocab_size}"
            )

    def units(self, policy: str, budget: int) -> list[Unit]:
        """One for each seed."""
        first = self.config.seed
        return [Unit(self.task, self.length, policy, budget, first + i, 0) for i in range(self.config.seeds)]

    def digest(self, unit: Unit) -> str:
        """A short name of the unit's sequences."""
        return hashlib.sha256(self.tokens[unit.seed - self.config.seed].tobytes()).hexdigest()[:16]

    def results(
        self, units: Sequence[Unit], cache_of: Callable[[str, int, int], CacheConfig]
    ) -> Iterator[tuple[Unit, Result]]:
        """Scores the units, one policy and budget after the other. A unit is scored when the iterator reaches it."""
        cells: dict[tuple[str, int], list[Unit]] = {}
        for unit in units:
            cells.setdefault((unit.policy, unit.budget), []).append(unit)

        def compiled(cell: tuple[str, int]) -> Scorer:
            cache = None if cell[0] == FULL else cache_of(*cell, self.length)
            return compile_scorer(self.model, self.tokens[0], cache, self.compile_programs)

        # A small model compiles longer than it runs, and compiling uses one core. So one cell for each core compiles at
        # the same time. Then the cells run one after the other, so that none slows another down.
        cores = os.cpu_count() or 1
        with concurrent.futures.ThreadPoolExecutor(cores) as pool:
            for first in range(0, len(cells), cores):
                jax.clear_caches()  # frees what was compiled besides
                group = list(cells)[first : first + cores]
                for cell, scorer in zip(group, list(pool.map(compiled, group)), strict=True):
                    for unit in cells[cell]:
                        yield unit, self._result(scorer, unit)

    def _result(self, scorer: Scorer, unit: Unit) -> Result:
        tokens, label_mask = (a[unit.seed - self.config.seed] for a in (self.tokens, self.label_mask))
        started = time.perf_counter()
        scores, kv_bytes = scorer.score(tokens)
        seconds = time.perf_counter() - started
        score = self._score(np.asarray(scores.best), np.asarray(scores.log_prob), tokens, label_mask)
        return {"scores": [score], "kv_bytes": kv_bytes, "seconds": seconds, "peak_bytes": scorer.peak_bytes}

    def _score(
        self,
        best: Int[np.ndarray, "n T_less_1"],
        log_prob: Float[np.ndarray, "n T_less_1"],
        tokens: Int[np.ndarray, "n T"],
        label_mask: Bool[np.ndarray, "n T"],
    ) -> float:
        match _METRICS[self.task]:
            case "accuracy":
                return accuracy(best, tokens, label_mask)
            case "bits_per_byte":
                return bits_per_byte(log_prob, label_mask)
            case _:
                return perplexity.perplexity(log_prob)

    def _interval(self, scores: list[float]) -> tuple[float, float, float]:
        """Mean and 95 % interval over seeds, which have equally many tokens.

        For perplexity both are taken of its log, so that the mean is the perplexity of all tokens together.
        """
        if _METRICS[self.task] != "perplexity":
            return interval(scores)
        mean, low, high = map(math.exp, interval([math.log(score) for score in scores]))
        return mean, low, high

    def rows(self, results: dict[Unit, Result]) -> list[Row]:
        """The row of one policy and budget, from the results of its units."""
        unit, seconds = next(iter(results)), sum(r["seconds"] for r in results.values())
        score, low, high = self._interval([r["scores"][0] for r in results.values()])
        row = Row(
            task=self.task,
            length=self.length,
            policy=unit.policy,
            budget=unit.budget,
            metric=_METRICS[self.task],
            score=score,
            low=low,
            high=high,
            n=int(self.label_mask[..., 1:].sum()),
            seeds=len(results),
            samples=1,
            kv_bytes=max(r["kv_bytes"] for r in results.values()),
            full_kv_bytes=full_nbytes(self.model.config, self.length),
            seconds=seconds,
            tokens_per_second=self.tokens.size / seconds,
            peak_bytes=devices.most(r["peak_bytes"] for r in results.values()),
            groups={},
            cut=0,
            options=buffers.options(self.config, unit.policy),
            made_by=sorted({r["made_by"] for r in results.values()}),
        )
        return [row]
