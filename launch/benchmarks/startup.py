"""Seconds from the start of a process to its first token: without compiled programs on disk, and with those of a run
before."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import jax

import retention_jax as rj

from .programs import Row
from .settings import Settings, new_model

# A process of its own, since a second import or compilation in one process costs nothing. It prints seconds.
_CHILD = """
import json, sys, time
times = [time.perf_counter()]
import numpy as np
import retention_jax as rj
folder, dtype, cache, batch, context = json.loads(sys.argv[1])
times.append(time.perf_counter())
model = rj.load(folder, dtype=dtype)
times.append(time.perf_counter())
for seed in (0, 1):
    prompts = np.random.default_rng(seed).integers(model.config.vocab_size, size=(batch, context)).tolist()
    rj.generate(model, prompts, rj.CacheConfig(**cache), max_new_tokens=1)
    times.append(time.perf_counter())
print(json.dumps(np.diff(times).tolist()))
"""


def first_token(settings: Settings) -> Iterator[Row]:
    """What importing, loading and the first prompt take, and what another prompt takes in the same process."""
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as programs:
        folder = settings.checkpoint or made
        if not settings.checkpoint:
            rj.save_backbone(jax.jit(lambda: new_model(settings))(), folder)
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": programs}
        for batch, context in settings.cells:
            cache = {"budget": settings.budgets[0], "recent": settings.recent, "prefill_chunk": settings.chunk}
            given = json.dumps([folder, settings.model.dtype, cache, batch, context])
            for what in ("no programs on disk", "programs on disk"):
                command = [sys.executable, "-c", _CHILD, given]
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                imported, loaded, first, second = json.loads(done.stdout)
                row: Row = {"batch": batch, "context": context, "what": what, "import_seconds": imported}
                row |= {"load_seconds": loaded, "first_seconds": first, "second_seconds": second}
                yield row
