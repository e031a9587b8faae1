"""What was read before need not be read again: snapshots of rows, by the exact tokens that they have read.

A snapshot is a row of the buffer in NumPy arrays, and never changes: any number of requests may continue one. Its key
is the tokens it has read (`Request.key`: a picture's say its pixels), under a fingerprint of model, gates and cache
configuration. A request takes up the longest one whose tokens are a whole prefix of its prompt. Never a part of one:
what was evicted cannot come back.

Two kinds are kept. One is made while a prompt is read, at the end of a whole chunk. Whoever takes it up goes on with
whole chunks, and so reads the rest exactly as if it had read everything. (Longrope turns long prompts otherwise than
short ones: they do not share.) The other is made where an answer ends, and continues a conversation, as `generate` does
with `buffer`.

Snapshots lie in host memory. The least recently used move on to files, and from there out. Both places have a limit in
bytes. Files are written and read in a thread of their own. A file is whole or not there, and its bytes are checked
before it is used.
"""

import contextlib
import hashlib
import math
import os
import pathlib
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from retention_jax.cache import shapes, snapshot
from retention_jax.cache.buffer import Buffer
from retention_jax.config import CacheConfig
from retention_jax.models.decoder import Decoder
from retention_jax.parallel import checksum, sharding
from retention_jax.runtime import files

_MOST_MOVING = 4  # snapshots on their way to files, beside the host's limit; more are forgotten
_MOST_REMEMBERED = 16384  # beginnings of prompts, to see which are shared
_ANSWER, _PROMPT, _LONG = b"answer", b"prompt", b"long prompt"  # where in its request a snapshot was made
_NAME = re.compile(r"[0-9a-f]{16}-\d+-[0-9a-f]{64}\.safetensors")  # fingerprint, tokens read, their hash


class Held(NamedTuple):
    """A snapshot."""

    length: int  # tokens read
    buffer: Buffer  # of NumPy arrays, batch 1


class SessionStats(NamedTuple):
    """Totals since the start, and what is there now."""

    hits_host: int
    hits_disk: int
    misses: int
    host_count: int
    host_bytes: int
    disk_count: int  # of this model and configuration
    disk_bytes: int  # of all snapshots in the folder
    damaged: int  # files that were found damaged, and removed
    dropped: int  # snapshots that found no place any more


class Sessions:
    """Snapshots of one model under one cache configuration. All methods may be called from any thread."""

    def __init__(
        self,
        model: Decoder,
        cache: CacheConfig,
        *,
        host_bytes: int,
        folder: pathlib.Path | None = None,
        disk_bytes: int = 0,
    ) -> None:
        """Takes up what is in the folder, which belongs to this process until `close`.

        Args:
          model: the decoder.
          cache: the configuration of its buffers.
          host_bytes: limit of the snapshots in memory.
          folder: for those that move to disk; None: they are forgotten. It is made where it is missing. Files of other
            models or configurations in it are never read, but count, and are removed as any others.
          disk_bytes: limit of the files.

        Raises:
          ValueError: where another process holds the folder, or a limit is negative.
          OSError: where the folder cannot be made or read.
        """
        if min(host_bytes, disk_bytes) < 0:
            raise ValueError(f"limits of snapshots must not be negative, got {host_bytes} and {disk_bytes} bytes")
        self._fingerprint = checksum.of(model, f"{snapshot.FORMAT} {model.config} {model.gate_config} {cache}")
        with sharding.enter_mesh_of(model):
            self._wanted = shapes(model.config, cache, 1)
        self._nbytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self._wanted))  # of every snapshot
        scaling = model.config.rope_scaling
        self._long = scaling.original_length if scaling and scaling.kind == "longrope" else math.inf
        self._host_limit, self._disk_limit = host_bytes, disk_bytes
        self._lock = threading.Lock()
        self._host: OrderedDict[str, Held] = OrderedDict()  # by the names of their files; least recently used first
        self._moving: dict[str, Held] = {}
        self._disk: OrderedDict[str, int] = OrderedDict()  # bytes; only the worker changes it
        self._remembered: OrderedDict[bytes, None] = OrderedDict()
        self._counts = {name: 0 for name in ("hits_host", "hits_disk", "misses", "damaged", "dropped")}
        self._worker = ThreadPoolExecutor(1, "snapshots")
        self._held = contextlib.ExitStack()
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(files.locked(folder / "lock"))
            self._index(folder)

    def _index(self, folder: pathlib.Path) -> None:
        """Notes whose files are there, and removes what a process that was killed left half-written."""
        for half in folder.glob(".*.safetensors.*"):
            shutil.rmtree(half, ignore_errors=True)
        found = [(path.stat(), path.name) for path in folder.iterdir() if _NAME.fullmatch(path.name)]
        self._disk.update((name, of.st_size) for of, name in sorted(found, key=lambda x: (x[0].st_mtime_ns, x[1])))
        self._trim_disk()

    def find(self, tokens: Sequence[int]) -> "Future[Held | None]":
        """The longest snapshot whose tokens begin the prompt and leave at least one of it to read.

        What lies in memory is there at once; a file is read in the worker's thread, and is in memory from then on.
        """
        found: Future[Held | None] = Future()
        with self._lock:
            name = self._longest(tokens)
            held = None if name is None else self._host.get(name) or self._moving.get(name)
            if name in self._host:
                self._host.move_to_end(name)
            if name is None or held is not None:
                self._counts["misses" if held is None else "hits_host"] += 1
                found.set_result(held)
                return found
        return self._worker.submit(self._read, tokens)

    def _longest(self, tokens: Sequence[int]) -> str | None:
        """The name of the snapshot to take up; to be called under the lock."""
        there = self._host.keys() | self._moving.keys() | self._disk.keys()
        lengths = {int(name.split("-")[1]) for name in there if name.startswith(self._fingerprint)}
        shorter = sorted(length for length in lengths if length < len(tokens))
        kinds = [self._names(tokens, shorter, kind) for kind in (_ANSWER, self._kind_of(tokens))]
        return next((name for pair in reversed(list(zip(*kinds, strict=True))) for name in pair if name in there), None)

    def _names(self, tokens: Sequence[int], lengths: Sequence[int], kind: bytes) -> list[str]:
        """Names of snapshots of the first tokens, for ascending numbers of them."""
        pairs = zip(lengths, _digests(kind, tokens, lengths), strict=True)
        return [f"{self._fingerprint}-{length}-{digest.hex()}.safetensors" for length, digest in pairs]

    def _kind_of(self, prompt: Sequence[int]) -> bytes:
        return _LONG if len(prompt) > self._long else _PROMPT

    def keep_answer(self, tokens: Sequence[int], buffer: Buffer) -> None:
        """Holds a row, in NumPy arrays, that has read a prompt and the answer to it: these tokens."""
        self._keep(tokens, len(tokens), _ANSWER, buffer)

    def keep_prompt(self, prompt: Sequence[int], length: int, buffer: Buffer) -> None:
        """Holds a row, in NumPy arrays, that has read so many tokens of a prompt, in whole chunks."""
        self._keep(prompt, length, self._kind_of(prompt), buffer)

    def _keep(self, tokens: Sequence[int], length: int, kind: bytes, buffer: Buffer) -> None:
        [name] = self._names(tokens, [length], kind)
        with self._lock:
            self._host[name] = Held(length, buffer)
            self._host.move_to_end(name)
            self._trim_host()

    def worth_keeping(self, tokens: Sequence[int], start: int, chunk: int) -> set[int]:
        """After how many of a prompt's tokens, read in chunks from `start` on, a snapshot will be of use.

        At the last whole chunk: for another answer to the same prompt, and for templates that write an answer anew in
        the next turn. And where the prompt parts from all earlier ones, since what two requests share, a third may too.
        """
        whole = (len(tokens) - 1 - start) // chunk
        ends = [start + chunk * (i + 1) for i in range(whole)]
        shared = 0
        with self._lock:
            for end, digest in zip(ends, _digests(self._kind_of(tokens), tokens, ends), strict=True):
                shared = end if digest in self._remembered else shared
                self._remembered[digest] = None
                self._remembered.move_to_end(digest)
            while len(self._remembered) > _MOST_REMEMBERED:
                self._remembered.popitem(last=False)
        return {end for end in (shared, *ends[-1:]) if end}

    def stats(self) -> SessionStats:
        with self._lock:
            return SessionStats(
                **self._counts,
                host_count=len(self._host),
                host_bytes=len(self._host) * self._nbytes,
                disk_count=sum(name.startswith(self._fingerprint) for name in self._disk),
                disk_bytes=sum(self._disk.values()),
            )

    def close(self) -> None:
        """Parks what is in memory in files, as far as there is a folder, and gives the folder back."""
        with self._lock:
            left, self._host = self._host, OrderedDict()
            if self._folder is not None:
                self._moving |= left
        for name in left if self._folder is not None else ():
            self._worker.submit(self._write, name)
        self._worker.shutdown(wait=True)
        self._held.close()

    def _trim_host(self) -> None:
        """To be called under the lock."""
        while len(self._host) * self._nbytes > self._host_limit:
            name, held = self._host.popitem(last=False)
            if name in self._disk or name in self._moving:
                continue
            if self._folder is None or len(self._moving) >= _MOST_MOVING:
                self._counts["dropped"] += 1
                continue
            self._moving[name] = held
            self._worker.submit(self._write, name)

    def _write(self, name: str) -> None:
        """Makes the file of a snapshot that is moving; in the worker's thread."""
        assert self._folder is not None
        path, held = self._folder / name, self._moving.get(name)
        if held is None:
            return  # it moved twice, and is there
        try:
            if name not in self._disk and self._nbytes <= self._disk_limit:
                snapshot.write(path, held.buffer, {"name": name})
            size = path.stat().st_size if path.exists() else None
        except OSError as error:  # no space: what is served does not depend on it
            logging.warning("%s: the snapshot is not kept: %s", path, error)
            size = None
        with self._lock:
            del self._moving[name]
            if size is None:
                self._counts["dropped"] += 1
                return
            self._disk[name] = size
            self._disk.move_to_end(name)
            self._trim_disk()

    def _trim_disk(self) -> None:
        assert self._folder is not None
        total = sum(self._disk.values())
        while total > self._disk_limit:
            name, size = self._disk.popitem(last=False)
            total -= size
            (self._folder / name).unlink(missing_ok=True)

    def _read(self, tokens: Sequence[int]) -> Held | None:
        """The longest snapshot, from its file where it is in one; in the worker's thread."""
        assert self._folder is not None
        while True:
            with self._lock:
                name = self._longest(tokens)
                held = None if name is None else self._host.get(name) or self._moving.get(name)
                if name is None or held is not None:
                    self._counts["misses" if held is None else "hits_host"] += 1
                    return held
            path = self._folder / name
            try:
                found = snapshot.read(path)
                if found.told != {"name": name}:
                    raise ValueError(f"{path}: a snapshot of something else, renamed")
                held = Held(int(name.split("-")[1]), snapshot.assemble(found, self._wanted))
                os.utime(path)  # the next process sees what was used last
            except (OSError, ValueError) as error:
                logging.warning("a snapshot is removed: %s", error)
                with self._lock:
                    del self._disk[name]
                    self._counts["damaged"] += 1
                path.unlink(missing_ok=True)
                continue
            with self._lock:
                self._counts["hits_disk"] += 1
                self._disk.move_to_end(name)
                self._host[name] = held
                self._trim_host()
            return held


def _digests(kind: bytes, tokens: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """Of the first tokens, for ascending numbers of them."""
    data, so_far, done, found = np.asarray(tokens, np.int64), hashlib.sha256(kind + b":"), 0, []
    for length in lengths:
        so_far.update(data[done:length].tobytes())
        done = length
        found.append(so_far.digest())
    return found
