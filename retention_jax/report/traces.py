"""What became of every entry of a sequence: its retention score, and when each layer and head evicted it."""

import functools
import io
import pathlib
import zipfile
from typing import NamedTuple

import jax
import numpy as np
import tqdm
from jaxtyping import Array, Bool, Float, Int

from retention_jax.cache import empty
from retention_jax.cache.buffer import Buffer
from retention_jax.config import CacheConfig, TrainConfig
from retention_jax.data import recall
from retention_jax.generation.decoding import read_chunk
from retention_jax.models.decoder import Decoder
from retention_jax.models.inputs import Inputs, chunk_of
from retention_jax.parallel import sharding
from retention_jax.policies.table import POLICIES
from retention_jax.runtime import files, hub
from retention_jax.text import tokenizer

NEVER = 0  # as a time of eviction: still kept when the sequence ended


class Trace(NamedTuple):
    """One sequence on its way through the buffer. Times count tokens read until then."""

    title: str  # what was read
    policy: str
    budget: int  # M, kept entries per layer and head on average
    recent: int  # R, tokens between two evictions
    names: list[str]  # text of every token
    log_beta: Float[np.ndarray, "L K T"] | None  # None for a policy that does not rank by the gates' scores
    evicted: Int[np.ndarray, "L K T"]  # when the entry was evicted: a multiple of R, or T; NEVER if it was not

    @property
    def length(self) -> int:
        return len(self.names)


def kept_at(trace: Trace, seen: int) -> Bool[np.ndarray, "L K T"]:
    """Which entries are in the buffer once `seen` tokens are read, and what was to go by then is gone."""
    arrived = np.arange(trace.length) < seen
    return arrived & ((trace.evicted == NEVER) | (trace.evicted > seen))


def half_life(log_beta: Float[np.ndarray, "*axes"]) -> Float[np.ndarray, "*axes"]:
    """Tokens after which an entry's weight beta^age is one half: log(1/2) / log(beta); inf where it never decays."""
    with np.errstate(divide="ignore"):
        return np.log(np.float32(0.5)) / np.minimum(log_beta, -np.float32(0.0))


@functools.partial(jax.jit, donate_argnames="buffer")
def _read(model: Decoder, inputs: Inputs, buffer: Buffer) -> tuple[Float[Array, "B L K C"], Buffer]:
    """log_beta of the new entries, and the buffer that took them in."""
    read, buffer = read_chunk(model, inputs, buffer, prompt=False)
    return read.entries.stat, buffer


def record(
    model: Decoder, tokens: Int[np.ndarray, " T"], cache: CacheConfig, *, names: list[str], title: str, policy: str
) -> Trace:
    """Reads one sequence in chunks of R tokens, evicting after each, as `scoring.score_stream` does.

    Args:
      model: backbone and gates.
      tokens: at least one.
      cache: what is kept.
      names: text of each token.
      title: what was read.
      policy: the name of `cache` in tables.

    Raises:
      ValueError: on no tokens, tokens outside the vocabulary, or another number of names.
    """
    T, R, V = len(tokens), cache.recent, model.config.vocab_size
    problems = [] if T else ["there is no token to read"]
    if bad := [int(t) for t in tokens if not 0 <= t < V]:
        problems.append(f"token {bad[0]} is outside the model's vocabulary, [0, {V})")
    if len(names) != T:
        problems.append(f"{len(names)} names for {T} tokens")
    if problems:
        raise ValueError(f"trace of {title!r}: " + "; ".join(problems))
    heads = model.config.num_layers * model.config.num_kv_heads
    log_beta, evicted = np.zeros((heads, T), np.float32), np.full(heads * T, NEVER, np.int32)
    stays = np.zeros(heads * T, bool)  # all False between two chunks, so that a chunk costs what it holds, not T
    held = np.zeros(0, np.int64)  # entries, each as head * T + position
    whole = Inputs(tokens[None], np.ones((1, T), bool))
    with sharding.enter_mesh_of(model):
        buffer = empty(model.config, cache, 1)
        for start in tqdm.trange(0, T, R, unit="chunk", desc=title, leave=False, disable=None):
            seen = min(start + R, T)
            scores, buffer = _read(model, chunk_of(whole, start, R), buffer)
            log_beta[:, start:seen] = sharding.on_host(scores)[0].reshape(heads, R)[:, : seen - start]
            new = (np.arange(heads)[:, None] * T + np.arange(start, seen)[None]).reshape(-1)
            candidates, held = np.concatenate([held, new]), _held(buffer, heads, T)
            stays[held] = True
            evicted[candidates[~stays[candidates]]] = seen
            stays[held] = False
    shape = (model.config.num_layers, model.config.num_kv_heads, T)
    return Trace(
        title=title,
        policy=policy,
        budget=cache.budget,
        recent=R,
        names=names,
        log_beta=log_beta.reshape(shape) if POLICIES[cache.policy].uses_gates else None,
        evicted=evicted.reshape(shape),
    )


def _held(buffer: Buffer, heads: int, length: int) -> Int[np.ndarray, " entries"]:
    """What the pool of the only row holds, each entry as head * length + position."""
    offset, pos = sharding.on_host(buffer.offset)[0], sharding.on_host(buffer.pool.pos)[0]
    found = []
    for begin, of_shard in zip(offset.reshape(-1, heads + 1), pos.reshape(buffer.shards, -1), strict=True):
        found.append(np.repeat(np.arange(heads), np.diff(begin)) * length + of_shard[: begin[-1]])
    return np.concatenate(found)


def save(trace: Trace, path: pathlib.Path) -> None:
    """Writes a trace as .npz: arrays only, token text as UTF-8 bytes with the end of each token."""
    text = [name.encode() for name in trace.names]
    arrays = {
        "title": np.array(trace.title),
        "policy": np.array(trace.policy),
        "budget": np.array(trace.budget),
        "recent": np.array(trace.recent),
        "text": np.frombuffer(b"".join(text), np.uint8),
        "ends": np.cumsum([len(name) for name in text], dtype=np.int64),
        "evicted": trace.evicted,
    }
    if trace.log_beta is not None:
        arrays["log_beta"] = trace.log_beta
    files.write_atomically(path, lambda temporary: np.savez_compressed(temporary, allow_pickle=False, **arrays))


def load(path: pathlib.Path) -> Trace:
    """Reads what `save` wrote.

    Raises:
      ValueError: when the file is no trace, or its arrays do not go together.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:  # a bad file stays open otherwise
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a trace: {error}") from error
    needed = {"title": 0, "policy": 0, "budget": 0, "recent": 0, "text": 1, "ends": 1, "evicted": 3}
    if missing := [name for name in needed if name not in found]:
        raise ValueError(f"{path}: not a trace: it lacks {', '.join(missing)}")
    problems = [f"{n} has {found[n].ndim} axes, not {axes}" for n, axes in needed.items() if found[n].ndim != axes]
    for name, kind in (("budget", "i"), ("recent", "i"), ("text", "u"), ("ends", "i"), ("evicted", "i")):
        if found[name].dtype.kind != kind:
            problems.append(f"{name} is of type {found[name].dtype}")
    log_beta, evicted, ends = found.get("log_beta"), found["evicted"], found["ends"]
    if not problems:
        if evicted.shape[-1:] != ends.shape:
            problems.append(f"evicted has shape {evicted.shape}, but there are {ends.size} tokens")
        if log_beta is not None and log_beta.shape != evicted.shape:
            problems.append(f"log_beta has shape {log_beta.shape}, evicted {evicted.shape}")
        if np.any(np.diff(ends, prepend=0) < 0) or ends[-1:].sum() != found["text"].size:
            problems.append("the ends of tokens are not those of its text")
        if found["recent"] < 1:
            problems.append(f"recent is {found['recent']}")
    if problems:
        raise ValueError(f"{path}: not a trace: " + "; ".join(problems))
    text = found["text"].astype(np.uint8).tobytes()
    names = [text[a:b].decode(errors="replace") for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return Trace(
        title=str(found["title"]),
        policy=str(found["policy"]),
        budget=int(found["budget"]),
        recent=int(found["recent"]),
        names=names,
        log_beta=None if log_beta is None else log_beta.astype(np.float32),
        evicted=evicted.astype(np.int32),
    )


class Text(NamedTuple):
    """A sequence to read."""

    title: str
    tokens: Int[np.ndarray, " T"]
    names: list[str]


def recall_texts(length: int, count: int, decoys: float, seed: int) -> list[Text]:
    """The first sequences of an evaluation with the same seed, each token named by what it is."""
    kinds = (("noise", recall.FIRST_NOISE, recall.NUM_NOISE), ("key", recall.FIRST_KEY, recall.NUM_KEYS))
    kinds += (("value", recall.FIRST_VALUE, recall.NUM_VALUES),)
    names = ["PAD", "MARK", "ASK", *(f"{name} {i}" for name, _, many in kinds for i in range(many))]
    made = [recall.stream(np.random.default_rng((seed, i)), length, decoys).tokens for i in range(count)]
    return [Text(f"recall stream {i}", tokens, [names[t] for t in tokens]) for i, tokens in enumerate(made)]


def file_texts(path: pathlib.Path, config: TrainConfig, length: int, count: int) -> list[Text]:
    """The first pieces of a text file, `length` tokens each: bytes for a model of bytes, else the model's tokens.

    Raises:
      ValueError: when the file has fewer tokens than one piece.
    """
    if config.data.task == "text":
        raw = path.read_bytes()[: length * count]
        tokens = np.frombuffer(raw, np.uint8).astype(np.int32) + 1  # as `data/builders.py` stores bytes
        name = lambda token: bytes([token - 1]).decode("ascii", "backslashreplace")
    else:
        found = tokenizer.load(hub.resolve(config.data.tokenizer or config.backbone))
        tokens = np.array(found.encode(path.read_text(encoding="utf-8"), bos=True), np.int32)
        name = lambda token: found.backend.decode([token], skip_special_tokens=False)
    if len(tokens) < length:
        raise ValueError(f"{path}: has {len(tokens)} tokens, fewer than --length={length}")
    known = {int(token): name(int(token)) for token in np.unique(tokens)}
    pieces = tokens[: len(tokens) // length * length].reshape(-1, length)[:count]
    return [Text(f"{path.name}, piece {i}", piece, [known[int(t)] for t in piece]) for i, piece in enumerate(pieces)]
