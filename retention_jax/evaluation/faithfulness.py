"""How close a policy stays to the full cache, along the answers that the model gives with the full cache.

With everything kept, the model answers each prompt, greedily. Under a policy it reads the same prompt and the same
answer, token by token as if it had written it, and its prediction of each of the answer's tokens is compared with the
full cache's:

    faithfulness/kl         KL(full || policy) in nats
    faithfulness/agreement  whether the likeliest token is the same

Both are means over a prompt's answer, then over prompts. There are no labels, and no answer counts as right.
"""

import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from retention_jax.cache import full_nbytes
from retention_jax.cache.buffer import Buffer
from retention_jax.config import CacheConfig, EvalConfig
from retention_jax.corpus.answers import read_prompts
from retention_jax.evaluation import buffers, devices
from retention_jax.evaluation.journal import Result, Unit
from retention_jax.evaluation.rows import Row, interval
from retention_jax.generation import decoding, runs
from retention_jax.models import decoder
from retention_jax.models.decoder import Decoder
from retention_jax.models.inputs import Inputs, chunk_of, padded
from retention_jax.parallel import sharding
from retention_jax.policies.table import FULL
from retention_jax.text import chat
from retention_jax.text.tokenizer import Tokenizer

TASK = "faithfulness"
_NEW_TOKENS = 256  # of an answer, at most
_STEP = 256  # tokens: a full cache is made a multiple of it, so that few sizes are compiled
_BLOCK = 1024  # tokens whose vocabulary logits exist at one time


class Along(NamedTuple):
    """What predicts the tokens of some answers: the first by logits, the others by final hidden states."""

    logits: Float[Array, "B V"]
    hidden: Float[Array, "B n D"]


class Faithfulness:
    """Prompts, ready to be answered and compared."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, config: EvalConfig) -> None:
        """Reads the prompts of `config.source_of`; of a row with several turns the first.

        Raises:
          ValueError: as `read_prompts` does, and when prompts with their answers can be longer than the context.
        """
        self.model, self.tokenizer, self.config, self.task = model, tokenizer, config, TASK
        self.new_tokens = config.max_new_tokens or _NEW_TOKENS
        texts = [turns[0] for turns in read_prompts(config.source_of[TASK])][: config.limit]
        self.prompts = [self._tokens(text) for text in texts]
        context, self.length = config.context or model.config.context, max(map(len, self.prompts))
        if self.length + self.new_tokens > context:
            raise ValueError(
                f"task {TASK!r}: the longest of {len(texts)} prompts has {self.length} tokens and an answer of up to "
                f"{self.new_tokens}, the context {context}; --config.eval.max_new_tokens sets the answers' length"
            )
        order = sorted(range(len(texts)), key=lambda i: (-len(self.prompts[i]), i))
        self.batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
        self._full: dict[int, tuple[list[list[int]], Along]] = {}

    def _tokens(self, text: str) -> list[int]:
        if "default" not in self.tokenizer.chat_templates:
            return self.tokenizer.encode(text, bos=True)
        kwargs = {} if self.config.enable_thinking is None else {"enable_thinking": self.config.enable_thinking}
        messages = [{"role": "user", "content": text}]
        written = chat.render(self.tokenizer, messages, add_generation_prompt=True, template_kwargs=kwargs)
        return self.tokenizer.encode(written, bos=False)

    def units(self, policy: str, budget: int) -> list[Unit]:
        """One for each batch."""
        return [Unit(self.task, self.length, policy, budget, 0, batch) for batch in range(len(self.batches))]

    def digest(self, unit: Unit) -> str:
        """A short name of the unit's prompts."""
        tokens = [self.prompts[i] for i in self.batches[unit.batch]]
        return hashlib.sha256(repr((tokens, self.new_tokens)).encode()).hexdigest()[:16]

    def results(
        self, units: Sequence[Unit], cache_of: Callable[[str, int, int], CacheConfig]
    ) -> Iterator[tuple[Unit, Result]]:
        """Compares the units, in order. A unit is compared when the iterator reaches it."""
        cell = None
        for unit in units:
            if (unit.policy, unit.budget) != cell:
                cell = (unit.policy, unit.budget)
                jax.clear_caches()  # programs map memory, and after some hundred XLA dies in mmap
            most = max(len(self.prompts[i]) for i in self.batches[unit.batch]) + self.new_tokens
            full, cache = (cache_of(name, unit.budget, -(-most // _STEP) * _STEP) for name in (FULL, unit.policy))
            yield unit, self._compared(unit, full, cache)

    def _compared(self, unit: Unit, full: CacheConfig, cache: CacheConfig) -> Result:
        batch = [self.prompts[i] for i in self.batches[unit.batch]]
        count, size = len(batch), min(self.config.batch_size, len(self.prompts))
        batch += batch[-1:] * (-(-size // (parts := sharding.row_parts(self.model))) * parts - count)
        if unit.batch not in self._full:
            answers = self._answers(batch, full)
            self._full[unit.batch] = answers, self._along(batch, answers, full)[0]
        answers, wanted = self._full[unit.batch]
        compiled, started = devices.compile_seconds(), time.perf_counter()
        found, kv_bytes = self._along(batch, answers, cache)
        with sharding.enter_mesh_of(self.model):
            kl, same = map(sharding.on_host, _compare(self.model, wanted, found))
        seconds = time.perf_counter() - started - (devices.compile_seconds() - compiled)
        lengths = [len(answer) for answer in answers[:count]]
        full_kv_bytes = full_nbytes(self.model.config, max(map(len, map(list.__add__, batch, answers))))
        return {
            "scores": [float(row[:n].mean(dtype=np.float64)) for row, n in zip(kl, lengths, strict=False)],
            "agreement": [float(row[:n].mean()) for row, n in zip(same, lengths, strict=False)],
            "tokens": sum(lengths),
            "kv_bytes": full_kv_bytes if unit.policy == FULL else kv_bytes,
            "full_kv_bytes": full_kv_bytes,
            "seconds": seconds,
            "peak_bytes": devices.largest_program(),
        }

    def _answers(self, batch: list[list[int]], full: CacheConfig) -> list[list[int]]:
        stops = self.tokenizer.stop_tokens
        return runs.generate(self.model, batch, full, max_new_tokens=self.new_tokens, stop_tokens=stops).tokens

    def _along(self, batch: list[list[int]], answers: list[list[int]], cache: CacheConfig) -> tuple[Along, int]:
        """The predictions of the answers' tokens, and the bytes held for one sequence.

        Answers are read in chunks of R tokens with an eviction behind each, which is what decoding them comes to.
        """
        lengths = [len(prompt) for prompt in batch]
        tokens = padded(batch, decoding.bucket(max(lengths), cache.prefill_chunk))
        logits, buffer = decoding.prefill(self.model, tokens, cache, lengths=lengths)
        read, hidden = padded(answers, max(map(len, answers))), []
        count = np.array([len(answer) - 1 for answer in answers])  # after its last token nothing is predicted
        whole = Inputs(read, np.arange(read.shape[1])[None] < count[:, None])
        with sharding.enter_mesh_of(self.model):
            for start in range(0, max(int(count.max()), 1), cache.recent):
                states, buffer = _read(self.model, chunk_of(whole, start, cache.recent), buffer)
                hidden.append(states)
            return Along(logits, jnp.concatenate(hidden, axis=1)), buffer.nbytes // len(batch)

    def rows(self, results: dict[Unit, Result]) -> list[Row]:
        """The two rows of one policy and budget, from the results of its units."""
        unit, seconds = next(iter(results)), sum(r["seconds"] for r in results.values())
        rows = []
        for metric, field in (("kl", "scores"), ("agreement", "agreement")):
            score, low, high = interval([x for r in results.values() for x in r[field]])
            row = Row(
                task=f"{self.task}/{metric}",
                length=self.length,
                policy=unit.policy,
                budget=unit.budget,
                metric=metric,
                score=score,
                low=low,
                high=high,
                n=len(self.prompts),
                seeds=1,
                samples=1,
                kv_bytes=max(r["kv_bytes"] for r in results.values()),
                full_kv_bytes=max(r["full_kv_bytes"] for r in results.values()),
                seconds=seconds,
                tokens_per_second=sum(r["tokens"] for r in results.values()) / seconds,
                peak_bytes=devices.most(r["peak_bytes"] for r in results.values()),
                groups={},
                cut=0,
                options=buffers.options(self.config, unit.policy),
                made_by=sorted({r["made_by"] for r in results.values()}),
            )
            rows.append(row)
        return rows


@functools.partial(jax.jit, donate_argnames="buffer")
def _read(model: Decoder, inputs: Inputs, buffer: Buffer) -> tuple[Float[Array, "B C D"], Buffer]:
    read, buffer = decoding.read_chunk(model, inputs, buffer, prompt=False)
    return read.hidden, buffer


@jax.jit
def _compare(model: Decoder, full: Along, other: Along) -> tuple[Float[Array, "B tokens"], Bool[Array, "B tokens"]]:
    """KL(full || other) of each token's prediction, and whether the likeliest token is the same."""

    def of_hidden(states: tuple[Float[Array, " D"], Float[Array, " D"]]) -> tuple[Array, Array]:
        return divergence(*(decoder.unembed(model, state) for state in states))

    B, n, D = full.hidden.shape
    flat = (full.hidden.reshape(B * n, D), other.hidden.reshape(B * n, D))
    later = jax.lax.map(of_hidden, flat, batch_size=_BLOCK)
    first = divergence(full.logits, other.logits)
    kl, same = (jnp.concatenate([a[:, None], b.reshape(B, n)], 1) for a, b in zip(first, later, strict=True))
    return kl, same


def divergence(
    full: Float[Array, "*axes V"], other: Float[Array, "*axes V"]
) -> tuple[Float[Array, "*axes"], Bool[Array, "*axes"]]:
    """KL(full || other) in nats of what logits stand for, and whether the largest is the same."""
    log_p, log_q = jax.nn.log_softmax(full, axis=-1), jax.nn.log_softmax(other, axis=-1)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return kl, jnp.argmax(full, axis=-1) == jnp.argmax(other, axis=-1)
