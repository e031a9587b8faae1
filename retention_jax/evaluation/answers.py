"""Scores of what a model answers to a task's questions, with the cache evicted while it reads and writes."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from retention_jax.cache import full_nbytes
from retention_jax.cache.buffer import Buffer
from retention_jax.config import CacheConfig, EvalConfig
from retention_jax.evaluation import buffers, devices, prompts
from retention_jax.evaluation.journal import Result, Unit
from retention_jax.evaluation.prompts import Prompt, num_tokens
from retention_jax.evaluation.rows import Row, interval
from retention_jax.generation import decoding, runs
from retention_jax.models.decoder import Decoder
from retention_jax.models.inputs import padded
from retention_jax.parallel import sharding
from retention_jax.policies.table import FULL
from retention_jax.tasks.example import Task
from retention_jax.text import chat
from retention_jax.text.tokenizer import Tokenizer

_STEP = 256  # tokens: a full cache is made a multiple of it, so that few sizes are compiled


class Answers:
    """One task, perhaps made for one length, ready to be answered."""

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, config: EvalConfig, name: str, task: Task, length: int | None
    ) -> None:
        """`length` is what the task was made for; None: the longest prompt's.

        Raises:
          ValueError: as `of_task` does, and when prompts with their answers can be longer than the context and the task
            does not cut them.
        """
        if jax.process_index() == 0:
            templated = task.chat and "default" in tokenizer.chat_templates
            for warning in chat.reply_warnings(tokenizer, templated=templated):
                logging.warning("%s", warning)
        kwargs = {} if config.enable_thinking is None else {"enable_thinking": config.enable_thinking}
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.task, self.definition = name, task
        self.new_tokens = [
            tuple(turn.max_new_tokens and (config.max_new_tokens or turn.max_new_tokens) for turn in example.turns)
            for example in task.examples[: config.limit]
        ]
        context = config.context or model.config.context
        found = prompts.of_task(
            task,
            tokenizer,
            limit=config.limit,
            query_aware=config.query_aware,
            template_kwargs=kwargs,
            room=[context - sum(new) for new in self.new_tokens],
        )
        total = lambda p: num_tokens(p) + sum(self.new_tokens[p.index])
        if too_long := [p for p in found if total(p) > context]:
            most, fits = max(too_long, key=total), min((context - num_tokens(p)) // len(p.turns) for p in found)
            raise ValueError(
                f"task {name!r}: {len(too_long)} of {len(found)} prompts can be longer, with their answers, than the "
                f"context of {context} tokens: {task.examples[most.index].name!r} has {num_tokens(most)} and answers "
                f"of up to {sum(self.new_tokens[most.index])}. Its authors cut nothing; another --config.eval.context "
                "lets them pass" + (f", or answers of --config.eval.max_new_tokens={fits}" if fits >= 1 else "")
            )
        self.cut = sum(prompt.cut for prompt in found)
        self.batches = prompts.batches(found, self.new_tokens, config.batch_size)
        longest = max(len(p.context) + len(p.turns[0]) for p in found)
        self.length = longest if length is None else length
        self.problems = len(found)

    def units(self, policy: str, budget: int) -> list[Unit]:
        """One for each sample and batch."""
        return [
            Unit(self.task, self.length, policy, budget, sample, batch)
            for sample in range(self.config.samples)
            for batch in range(len(self.batches))
        ]

    def digest(self, unit: Unit) -> str:
        """A short name of the unit's prompts and examples."""
        texts = [(prompt, self.definition.examples[prompt.index]) for prompt in self.batches[unit.batch]]
        return hashlib.sha256(repr(texts).encode()).hexdigest()[:16]

    def results(
        self, units: Sequence[Unit], cache_of: Callable[[str, int, int], CacheConfig]
    ) -> Iterator[tuple[Unit, Result]]:
        """Answers the units, in order. A unit is answered when the iterator reaches it; `scores` scores it later."""
        cell = None
        for unit in units:
            if (unit.policy, unit.budget) != cell:
                cell = (unit.policy, unit.budget)
                jax.clear_caches()  # programs map memory, and after some hundred XLA dies in mmap
            batch = self.batches[unit.batch]
            most = max(_most_tokens(prompt, self.new_tokens[prompt.index]) for prompt in batch)
            cache = cache_of(unit.policy, unit.budget, -(-most // _STEP) * _STEP)
            result = self._answered(batch, cache, unit.seed)
            if unit.policy == FULL:
                result["kv_bytes"] = result["full_kv_bytes"]
            yield unit, result

    def _answered(self, batch: list[Prompt], cache: CacheConfig, sample: int) -> Result:
        batch = batch + batch[-1:] * (-len(batch) % sharding.row_parts(self.model))
        compiled, started = devices.compile_seconds(), time.perf_counter()
        buffer, last, done, stats = None, [], [], {}
        if batch[0].context:
            buffer = self._read([prompt.context for prompt in batch], cache, None)
        for turn, max_new_tokens in enumerate(self.new_tokens[batch[0].index]):
            asked = [self._asked(prompt, turn, last[i] if last else None) for i, prompt in enumerate(batch)]
            if not max_new_tokens:
                buffer, last = self._read(asked, cache, buffer), []
                done.append([[] for _ in batch])
                continue
            # Where the next turn has a given text in place of the answer, the answer must leave no trace. So the
            # question is read once more, into a copy of the buffer.
            untouched = self._read(asked, cache, jax.tree.map(jnp.copy, buffer)) if batch[0].told[turn] else None
            out = runs.generate(
                self.model,
                asked,
                cache,
                max_new_tokens=max_new_tokens,
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                seed=seed_of(self.config.seed, sample),
                stop_tokens=self.tokenizer.stop_tokens,
                row_ids=[prompt.first_turn + turn for prompt in batch],
                buffer=buffer,
            )
            stats = out.stats
            done.append(out.tokens)
            buffer, last = (out.buffer, [row[-1] for row in out.tokens]) if untouched is None else (untouched, [])
        seconds = time.perf_counter() - started - (devices.compile_seconds() - compiled)
        answers = {prompt.index: (prompt, [turn[i] for turn in done]) for i, prompt in enumerate(batch)}
        return {
            "answers": [
                self._answer(prompt, turn, new)
                for prompt, new_tokens in answers.values()
                for turn, new in enumerate(new_tokens)
                if new
            ],
            "kv_bytes": int(stats["kv_bytes"]) // len(batch),
            "full_kv_bytes": full_nbytes(self.model.config, max(map(_tokens_seen, batch, zip(*done, strict=True)))),
            "seconds": seconds,
            "peak_bytes": devices.largest_program(),
        }

    def _read(self, texts: list[list[int]], cache: CacheConfig, buffer: Buffer | None) -> Buffer:
        """The buffer after one more text in each row."""
        lengths = [len(text) for text in texts]
        tokens = padded(texts, decoding.bucket(max(lengths), cache.prefill_chunk))
        return decoding.prefill(self.model, tokens, cache, lengths=lengths, buffer=buffer)[1]

    def _asked(self, prompt: Prompt, turn: int, last: int | None) -> list[int]:
        """A turn's tokens. Before them goes the answer's last one, not yet read, unless the closing stands for it."""
        tokens = prompt.turns[turn]
        return tokens if last is None or (prompt.closing and last in self.tokenizer.stop_tokens) else [last, *tokens]

    def _answer(self, prompt: Prompt, turn: int, new: list[int]) -> dict[str, Any]:
        """One answer as it stands in the journal."""
        name, text = self.definition.examples[prompt.index].name, self.tokenizer.decode(new)
        stopped = new[-1] in self.tokenizer.stop_tokens
        return {"example": name, "turn": turn, "text": text, "tokens": len(new), "stopped": stopped}

    def scores(self, unit: Unit, result: Result) -> list[float]:
        """The score of each of a unit's answers, in order. What the model thinks before it answers is left out."""
        asked = {self.definition.examples[prompt.index].name: prompt for prompt in self.batches[unit.batch]}

        def score(answer: dict[str, Any]) -> float:
            prompt, turn = asked[answer["example"]], answer["turn"]
            said = behind_thoughts(self.tokenizer.decode(prompt.turns[turn]), answer["text"])
            if not answer["stopped"] and self.definition.of_unended is not None:
                said = self.definition.of_unended(said)
            return float(self.definition.score(self.definition.examples[prompt.index], turn, said))

        return [score(answer) for answer in result["answers"]]

    def rows(self, results: dict[Unit, Result]) -> list[Row]:
        """The row of one policy and budget, from the results of its units."""
        unit, seconds = next(iter(results)), sum(r["seconds"] for r in results.values())
        answers = [answer for result in results.values() for answer in result["answers"]]
        turns = {example.name: example.turns for example in self.definition.examples}
        scores: dict[str, list[float]] = {}
        of_groups: dict[str, dict[str, list[float]]] = {}
        for answer, score in zip(answers, (x for r in results.values() for x in r["scores"]), strict=True):
            problem, group = answer["example"], turns[answer["example"]][answer["turn"]].group
            scores.setdefault(problem, []).append(score)
            if group:
                of_groups.setdefault(group, {}).setdefault(problem, []).append(score)
        score, low, high = interval(_means(scores))
        row = Row(
            task=self.task,
            length=self.length,
            policy=unit.policy,
            budget=unit.budget,
            metric=self.definition.metric,
            score=score,
            low=low,
            high=high,
            n=self.problems,
            seeds=1,
            samples=self.config.samples,
            kv_bytes=max(r["kv_bytes"] for r in results.values()),
            full_kv_bytes=max(r["full_kv_bytes"] for r in results.values()),
            seconds=seconds,
            tokens_per_second=sum(answer["tokens"] for answer in answers) / seconds,
            peak_bytes=devices.most(r["peak_bytes"] for r in results.values()),
            groups={name: float(np.mean(_means(found))) for name, found in sorted(of_groups.items())},
            cut=self.cut,
            options=buffers.options(self.config, unit.policy),
            made_by=sorted({r["made_by"] for r in results.values()}),
        )
        return [row]


def behind_thoughts(asked: str, text: str) -> str:
    """What a model says when it has thought; "" where its thinking, begun by itself or by the prompt, was cut off."""
    said = text.rpartition("</think>")[2]
    begun = "<think>" in said or ("</think>" not in text and asked.rstrip().endswith("<think>"))
    return "" if begun else said


def seed_of(seed: int, sample: int) -> int:
    """The seed of one sample's draws. `seed + sample` would give runs with different seeds some equal samples."""
    return int(np.random.SeedSequence((seed, sample)).generate_state(1)[0])


def _means(scores: dict[str, list[float]]) -> list[float]:
    return [float(np.mean(of_problem)) for of_problem in scores.values()]


def _most_tokens(prompt: Prompt, new_tokens: tuple[int, ...]) -> int:
    """Tokens that a prompt with all its answers can have."""
    return num_tokens(prompt) + sum(new_tokens) + len(new_tokens)


def _tokens_seen(prompt: Prompt, answers: Sequence[Sequence[int]]) -> int:
    """Tokens that a prompt with its answers had; those between turns that one may stand for are counted twice."""
    return num_tokens(prompt) + sum(len(new) for new, told in zip(answers, prompt.told, strict=True) if not told)
