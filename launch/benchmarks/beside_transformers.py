"""The same checkpoint and prompts through `transformers.generate` with its dynamic cache, on the CPU."""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

import retention_jax as rj
from retention_jax.models.decoder import Decoder
from retention_jax.models.weights import load_backbone

from .programs import Ceilings, Row, random_prompts, rates
from .settings import Settings, decoding_work, new_model


class Timing(NamedTuple):
    """One call of `generate`."""

    prefill: float  # seconds
    token: float  # seconds of a token after the first, of all rows together
    kv_bytes: float
    tokens: list[list[int]]


def _ours(settings: Settings, model: Decoder, prompts: list, cache: rj.CacheConfig) -> Timing:
    out = rj.generate(model, prompts, cache, max_new_tokens=settings.new_tokens)
    seconds = out.stats["decode_seconds"] / (settings.new_tokens - 1)
    return Timing(out.stats["prefill_seconds"], seconds, out.stats["kv_bytes"], out.tokens)


def _theirs(settings: Settings, model: Any, prompts: Any) -> Timing:
    import torch

    class Clock:
        """`generate` hands it the prompt, then every step's tokens."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None: ...

    clock, count = Clock(), settings.new_tokens
    with torch.no_grad():
        options = dict(max_new_tokens=count, do_sample=False, eos_token_id=None, streamer=clock)
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    started, first, *_, last = clock.times
    nbytes = prompts.shape[0] * (out.shape[1] - 1) * settings.heads * settings.entry_bytes
    return Timing(first - started, (last - first) / (count - 1), nbytes, out[:, prompts.shape[1] :].tolist())


def compare(settings: Settings, ceilings: Ceilings) -> Iterator[Row]:
    """transformers, the full cache, which has to write the same tokens, and the budgets, in turn in every repeat."""
    import torch  # a benchmark's alternative, not a dependency
    from transformers import AutoModelForCausalLM

    dtype, count = settings.model.dtype, settings.new_tokens
    with contextlib.ExitStack() as stack:
        folder = settings.checkpoint or stack.enter_context(tempfile.TemporaryDirectory())
        if not settings.checkpoint:
            rj.save_backbone(jax.jit(lambda: new_model(settings))(), folder)
        theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        model = load_backbone(folder, settings.gate, dtype, seed=0, mesh=None)
    print(f"{sum(p.numel() for p in theirs.parameters()) / 1e6:.0f} million parameters")
    for batch, context in settings.cells:
        prompts = random_prompts(settings.model.vocab_size, batch, context)
        room, chunk = context + count, min(context, settings.chunk)
        budgets = {
            f"budget {m}": rj.CacheConfig(m, recent=settings.recent, prefill_chunk=chunk) for m in settings.budgets
        }
        caches = {"full": rj.CacheConfig.full(room, recent=settings.recent, prefill_chunk=chunk), **budgets}
        runs = {"transformers": lambda prompts=prompts: _theirs(settings, theirs, torch.from_numpy(prompts))}
        runs |= {
            name: lambda prompts=prompts, cache=cache: _ours(settings, model, prompts.tolist(), cache)
            for name, cache in caches.items()
        }
        timings: dict[str, list[Timing]] = {name: [] for name in runs}
        for _ in range(settings.repeats + 1):  # the first compiles
            for name, run in runs.items():
                timings[name].append(run())
        for name, found in timings.items():
            prefill, one_token = _medians(found)
            kept = min(context, caches[name].budget) + settings.recent / 2 if name in budgets else context + count / 2
            row: Row = {"batch": batch, "context": context, "what": name, "prefill_seconds": prefill}
            row |= rates(one_token, batch, decoding_work(settings, batch, kept), ceilings)
            row["kv_bytes"] = found[0].kv_bytes
            if name in caches:
                theirs_prefill, theirs_token = _medians(timings["transformers"])
                row["note"] = f"prompt {theirs_prefill / prefill:.2f} x, token {theirs_token / one_token:.2f} x"
            if name == "full":
                same = found[-1].tokens == timings["transformers"][-1].tokens
                row["note"] = f"{row['note']}, {'same tokens' if same else 'OTHER TOKENS'}"
            yield row


def _medians(found: list[Timing]) -> tuple[float, float]:
    """Of the seconds of a prompt and of a token, without those of the first call."""
    return statistics.median(t.prefill for t in found[1:]), statistics.median(t.token for t in found[1:])
