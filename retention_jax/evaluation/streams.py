"""Scores of sequences that the model reads token by token, each token predicted from what was kept until then."""

import concurrent.futures
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from retention_jax.config import CacheConfig, DataConfig, EvalConfig
from retention_jax.data import perplexity, pipeline, recall
from retention_jax.evaluation import devices
from retention_jax.evaluation.journal import Result, Unit
from retention_jax.evaluation.rows import Row, interval
from retention_jax.generation import scoring
from retention_jax.generation.scoring import Scores, StreamPrograms
from retention_jax.models.decoder import Decoder
from retention_jax.parallel import sharding
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

    recall: `config.examples` new streams a seed. text: rows of the held-out tail, shuffled by the first seed and dealt
    out, so that no two seeds share a row; fewer than `config.examples` each where the tail is short. perplexity: the
    same from the first rows of a text under a tokenizer, which it needs.

    Raises:
      ValueError: when the text has fewer rows than there are seeds, and as `perplexity.rows` and `heldout_rows` do.
    """
    seeds = range(config.seed, config.seed + config.seeds)
    if task == "recall":
        # Training streams end their seeds in a third word (data/builders.py): these are never among them.
        streams = [
            [recall.stream(np.random.default_rng((seed, i)), length, config.decoys) for i in range(config.examples)]
            for seed in seeds
        ]
        tokens, label_mask = (np.array([[s[field] for s in group] for group in streams]) for field in (0, 1))
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

    score: Callable[[Int[np.ndarray, "n T"]], tuple[Scores, int]]  # also tells the bytes held for one sequence
    peak_bytes: int | None  # as in `Row`


_Compiled = tuple[StreamPrograms, list[jax.stages.Compiled]]
CompileStream = Callable[[int, CacheConfig, int], _Compiled]  # of a batch, a buffer and a length


def remembering(model: Decoder) -> CompileStream:
    """`scoring.compile_stream` of a model, which compiles once what it is asked for again.

    The first programs are kept, not the latest: cells come in the same order at every length.
    """
    kept: dict[tuple[int, CacheConfig, int], _Compiled] = {}

    def compile_stream(batch: int, cache: CacheConfig, length: int) -> _Compiled:
        key = batch, cache, length
        if key in kept:
            return kept[key]
        made = scoring.compile_stream(model, *key)
        if len(kept) < _PROGRAMS:
            kept[key] = made
        return made

    return compile_stream


def compile_scorer(
    model: Decoder, tokens: Int[np.ndarray, "n T"], cache: CacheConfig | None, compile_stream: CompileStream
) -> Scorer:
    """What scores such sequences. No cache: the full one.

    The last sequence is repeated where the mesh that the model is on needs more of them.
    """
    n, T = tokens.shape
    batch = n + -n % devices.row_parts(model)
    filled = lambda rows: np.concatenate([rows, np.repeat(rows[-1:], batch - n, axis=0)])
    if cache is None:
        with sharding.enter_mesh_of(model):
            full = scoring.score_full.lower(model, filled(tokens)).compile()
        asked = lambda scores: jax.tree.map(lambda a: sharding.on_host(a)[:n], scores)
        read_whole = lambda rows: (asked(full(model, filled(rows))), full_kv_bytes(model, T))
        return Scorer(read_whole, devices.program_bytes(full.memory_analysis()))
    # Only the oracle's programs are of one length.
    programs, compiled = compile_stream(batch, cache, T if cache.policy == "oracle" else cache.recent)

    def score(rows: Int[np.ndarray, "n T"]) -> tuple[Scores, int]:
        with sharding.enter_mesh_of(model):
            chunks, buffer = programs.read(model, filled(rows), np.full(batch, T, np.int32))
        together = lambda parts: np.concatenate([sharding.on_host(part)[:n] for part in parts], axis=1)[:, : T - 1]
        return Scores(*map(together, zip(*chunks, strict=True))), buffer.nbytes // batch

    return Scorer(score, devices.most(devices.program_bytes(program.memory_analysis()) for program in compiled))


def full_kv_bytes(model: Decoder, length: int) -> int:
    """Bytes of the keys and values of one sequence in all layers and heads."""
    cfg = model.config
    return cfg.num_layers * cfg.num_kv_heads * length * 2 * cfg.head_size * jnp.dtype(cfg.dtype).itemsize


class Streams:
    """One task at one length, ready to be scored."""

    def __init__(
        self,
        model: Decoder,
        config: EvalConfig,
        data: DataConfig,
        task: str,
        length: int,
        tokenizer: Tokenizer | None,
        compile_stream: CompileStream,
    ) -> None:
        """Raises ValueError as `examples` does, and when the model's vocabulary is too small."""
        self.compile_stream = compile_stream
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

    def of(self, unit: Unit) -> str:
        """A short name of the sequences that a unit's results are of."""
        return hashlib.sha256(self.tokens[unit.seed - self.config.seed].tobytes()).hexdigest()[:16]

    def results(
        self, units: Sequence[Unit], cache_of: Callable[[str, int, int], CacheConfig]
    ) -> Iterator[tuple[Unit, Result]]:
        """Scores the units, cell by cell (policy and budget), each unit when it is asked for."""
        cells: dict[tuple[str, int], list[Unit]] = {}
        for unit in units:
            cells.setdefault((unit.policy, unit.budget), []).append(unit)

        def compiled(cell: tuple[str, int]) -> Scorer:
            cache = None if cell[0] == "full" else cache_of(*cell, self.length)
            return compile_scorer(self.model, self.tokens[0], cache, self.compile_stream)

        # Compiling takes longer than running for a small model, and uses one core: as many cells as there are cores
        # compile at once, and then run by themselves, so that their speed is their own.
        cores = os.cpu_count() or 1
        with concurrent.futures.ThreadPoolExecutor(cores) as pool:
            for first in range(0, len(cells), cores):
                jax.clear_caches()  # of what was compiled on the way
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
        """Of seeds with equally many tokens. Perplexity's is of its log, so that its mean is that of all tokens."""
        if _METRICS[self.task] != "perplexity":
            return interval(scores)
        mean, low, high = map(math.exp, interval([math.log(score) for score in scores]))
        return mean, low, high

    def row(self, results: dict[Unit, Result]) -> Row:
        """The row of one policy and budget, whose units' results are given."""
        unit, seconds = next(iter(results)), sum(r["seconds"] for r in results.values())
        score, low, high = self._interval([r["scores"][0] for r in results.values()])
        return Row(
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
            full_kv_bytes=full_kv_bytes(self.model, self.length),
            seconds=seconds,
            tokens_per_second=self.tokens.size / seconds,
            peak_bytes=devices.most(r["peak_bytes"] for r in results.values()),
            groups={},
            cut=0,
            made_by=sorted({r["made_by"] for r in results.values()}),
        )
