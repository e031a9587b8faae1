"""The same checkpoint and prompts through `transformers.generate` with its dynamic cache, on the CPU."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax

import retention_jax as rj
from retention_jax.models.decoder import Decoder

from .programs import Row, random_prompts
from .settings import Settings, new_model


def _ours(settings: Settings, model: Decoder, batch: int, context: int, budget: int | None) -> tuple[Row, list]:
    """Median speed and the tokens; a budget of None is the full cache."""
    kept = budget or context + settings.new_tokens
    cache = rj.CacheConfig(budget=kept, recent=settings.recent, prefill_chunk=min(context, settings.chunk))
    prompts = random_prompts(settings.model.vocab_size, batch, context).tolist()
    # The first run compiles.
    runs = range(settings.repeats + 1)
    outs = [rj.generate(model, prompts, cache, max_new_tokens=settings.new_tokens) for _ in runs]
    median = lambda name: statistics.median(out.stats[name] for out in outs[1:])
    row: Row = {
        "batch": batch,
        "context": context,
        "what": "full" if budget is None else f"budget {budget}",
        "prefill_seconds": median("prefill_seconds"),
        "tokens_per_second": median("tokens_per_second"),
        "kv_bytes": outs[0].stats["kv_bytes"],
    }
    return row, outs[0].tokens


def compare(settings: Settings) -> Iterator[Row]:
    """transformers, the full cache, which has to write the same tokens, and the budgets."""
    import torch  # a benchmark's alternative, not a dependency
    from transformers import AutoModelForCausalLM

    dtype, count = settings.model.dtype, settings.new_tokens
    with tempfile.TemporaryDirectory() as folder:
        rj.save_backbone(jax.jit(lambda: new_model(settings))(), folder)
        theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        model = rj.load(folder, dtype=dtype)
    print(f"{sum(p.numel() for p in theirs.parameters()) / 1e6:.0f} million parameters")
    for batch, context in settings.cells:
        ids = torch.from_numpy(random_prompts(settings.model.vocab_size, batch, context))

        def run(new_tokens: int, ids: torch.Tensor = ids) -> tuple[float, torch.Tensor]:
            started = time.perf_counter()
            with torch.no_grad():
                mask = torch.ones_like(ids)
                options = dict(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
                out = theirs.generate(ids, attention_mask=mask, **options)
            return time.perf_counter() - started, out[:, ids.shape[1] :]

        run(1)  # warms up
        # Its first token comes out of the prefill; what the others take is decoding.
        prefill = statistics.median(run(1)[0] for _ in range(settings.repeats))
        seconds, tokens = zip(*(run(count) for _ in range(settings.repeats)), strict=True)
        speed = batch * (count - 1) / (statistics.median(seconds) - prefill)
        yield {
            "batch": batch,
            "context": context,
            "what": "transformers",
            "prefill_seconds": prefill,
            "tokens_per_second": speed,
            "kv_bytes": batch * (context + count - 1) * settings.heads * settings.entry_bytes,
        }
        for budget in (None, *settings.budgets):
            row, new = _ours(settings, model, batch, context, budget)
            note = f"{float(row['tokens_per_second'] or 0) / speed:.2f} x transformers"
            if budget is None:
                note += ", same tokens" if new == tokens[0].tolist() else ", OTHER TOKENS"
            yield row | {"note": note}
