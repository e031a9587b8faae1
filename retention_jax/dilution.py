"""Attention dilution: how much attention falls on tokens that are of no use, with a full cache and with what was kept.

    python -m retention_jax.dilution --config=configs/recall.py --checkpoint=runs/recall --output=runs/recall/dilution

With U the tokens useful to a query and a its attention weights, dilution is 1 - sum_{i in U} a_i (arXiv 2605.09649).
A query of the recall task asks for one fact: U is the six tokens that tell of it, `recall.facts_at` says which.
Dilution is measured where the answer is predicted, in every layer and query head; where all of U is evicted it is 1.
`off_facts` is the same with the tokens of any fact for U. Heads that do other work than to look facts up, as all of the
shipped backbone's first layer, are diluted whatever is kept.

The paper's propositions are known to us by one-line descriptions only: 3.1, distractors that nearly tie with useful
tokens force dilution; 3.2, keeping useful tokens by preference lowers it. `least_dilution`, `needed_margin` and
`dilution_after` are statements of that kind, reconstructed and proved by ourselves: not quotations. So are
`expected_use` and `age_of_equal_use`, on its geometric retention, which is what chooses the tokens to keep.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import tqdm
from absl import app, flags, logging
from jaxtyping import Array, Bool, Float, Int

from retention_jax import cache as cache_lib
from retention_jax import dilution_plots, evaluate
from retention_jax.cache.buffer import Buffer, Entries
from retention_jax.config import CacheConfig, DataConfig, EvalConfig, TrainConfig
from retention_jax.config.conversion import from_config_dict
from retention_jax.data import recall
from retention_jax.dilution_plots import Result
from retention_jax.evaluation import streams
from retention_jax.evaluation.rows import interval
from retention_jax.kernels import ops
from retention_jax.models import decoder, weights
from retention_jax.models.decoder import Decoder
from retention_jax.models.inputs import Inputs
from retention_jax.runtime import files
from retention_jax.runtime.arrays import AnyArray


def least_dilution(
    useful: Float[np.ndarray, "..."], distractors: Float[np.ndarray, "..."], gap: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """Dilution is at least m e^-gap / (u + m e^-gap) where no distractor's logit is more than `gap` below the best one.

    Reconstructed by us. Proof: with z the largest useful logit, u useful tokens weigh at most u e^z, and m distractors
    at least m e^(z - gap). So dilution tends to 1 as m grows while u and the gap stay; it is an equality where all
    useful logits are equal and all distractors lie exactly `gap` below.
    """
    weight = distractors * np.exp(-gap)
    return weight / (useful + weight)


def needed_margin(
    useful: Float[np.ndarray, "..."], distractors: Float[np.ndarray, "..."], dilution: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """The margin at which u useful tokens and m distractors have this dilution d: log(m (1 - d) / (u d)).

    Reconstructed by us. The margin is the log of mean_U e^z / mean_D e^z, z the logits; where useful logits are all
    equal, and distractors' too, it is their difference. Since d = m / (m + u e^margin), a dilution of at most d needs
    at least this margin: it must grow like log m.
    """
    return np.log(distractors * (1 - dilution) / (useful * dilution))


def dilution_after(
    dilution: Float[np.ndarray, "..."],
    kept_useful: Float[np.ndarray, "..."],
    kept_distractors: Float[np.ndarray, "..."],
) -> Float[np.ndarray, "..."]:
    """Dilution once only these shares of the useful and of the other attention mass are kept: r d / (r d + s (1 - d)).

    Reconstructed by us; s = `kept_useful`, r = `kept_distractors`, one of them above 0. Softmax over what is kept is
    the old one rescaled. For 0 < d < 1 dilution falls exactly where s > r, where the useful are kept by preference.
    """
    rest = kept_distractors * dilution
    return rest / (rest + kept_useful * (1 - dilution))


def expected_use(
    beta: Float[np.ndarray, "..."], age: Float[np.ndarray, "..."], horizon: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """Of the next n steps, those in which a token is still of use: beta^(age + 1) (1 - beta^n) / (1 - beta).

    Reconstructed by us. Let a token's use end at each step with probability 1 - beta, whatever was before. Then it
    lasts to age a with probability beta^a, and no other law is memoryless: P(a + b) = P(a) P(b) for whole a, b gives
    P(a) = P(1)^a. The expected number is sum_{s=1..n} beta^(age + s), for 0 < beta < 1 and an age in steps. Its log is
    `policies.retention` with a horizon n above 1; with horizon 1 that is the log of beta^age, of one step before.
    """
    return beta ** (age + 1) * (1 - beta**horizon) / (1 - beta)


def age_of_equal_use(
    beta: Float[np.ndarray, "..."], fresh_beta: Float[np.ndarray, "..."], horizon: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """The age up to which a token is of more use in the next n steps than a fresh one, of age 0, whose beta is lower.

    Reconstructed by us, by solving `expected_use` for the age: log(b g(b) / (beta g(beta))) / log beta, where b is the
    fresh token's and g(x) = (1 - x^n) / (1 - x) is what looking n steps ahead multiplies the use by. At n = 1 g is 1,
    and the order that of beta^(age + 1). g lies between 1 and n, and as n grows it grows faster the nearer x
    is to 1: so the age grows too, and a token evicted first at n = 1 may be kept at a larger n. As n grows without
    bound, g tends to 1 / (1 - x), and the age to a limit.
    """
    gain = lambda x: (1 - x**horizon) / (1 - x)
    return np.log(fresh_beta * gain(fresh_beta) / (beta * gain(beta))) / np.log(beta)


class Measured(NamedTuple):
    """Where the attention of every token falls, by layer and query head. Means nothing at tokens that ask nothing."""

    asked: Float[Array, "B T L N"]  # share of attention on tokens that tell of the fact asked for; the rest is dilution
    any_fact: Float[Array, "B T L N"]  # share on tokens that tell of some fact
    useful: Float[Array, "B T L N"]  # tokens seen that tell of the fact asked for
    seen: Float[Array, "B T L N"]  # all tokens seen, this one included
    best: Int[Array, "B T"]  # the likeliest next token


@functools.partial(jax.jit, static_argnames="cache")
def measure(
    model: Decoder,
    tokens: Int[AnyArray, "B T"],
    facts: Bool[AnyArray, "B T facts"],
    asked: Int[AnyArray, "B T"],
    cache: CacheConfig,
) -> Measured:
    """Feeds sequences through the buffer as `scoring.score_stream` does, and weighs what each token attends to.

    Args:
      model: the decoder.
      tokens: sequences of equal length.
      facts: which facts each token tells of.
      asked: the fact that the prediction at each token needs, an index of the last axis of `facts`; any where it needs
        none.
      cache: what is kept. With `recent` of at least T nothing is evicted before the last token: the full cache.
    """
    B, T = tokens.shape
    R = min(cache.recent, T)
    chunks = -(-T // R)
    valid = jnp.broadcast_to(jnp.arange(chunks * R)[None] < T, (B, chunks * R))
    pad = lambda a: jnp.pad(jnp.asarray(a), ((0, 0), (0, chunks * R - T)))
    by_chunk = lambda a: a.reshape(B, chunks, R).swapaxes(0, 1)
    marks = jnp.concatenate([facts.any(axis=-1, keepdims=True), facts], axis=-1).astype(model.config.dtype)

    def one_chunk(buffer, chunk):
        tokens, asked, valid = chunk
        hidden, entries, queries = decoder.extend(model, Inputs(tokens, valid), buffer, queries=R)
        assert queries is not None
        best = jnp.argmax(decoder.unembed(model, hidden), axis=-1).astype(jnp.int32)
        found = _masses(buffer, entries, queries, marks, asked)
        # The newest queries of a whole chunk are its last ones; behind a padded one nothing is measured.
        wanted = cache_lib.queries_wanted(cache, R)
        newest = queries[:, :, R - wanted :] if wanted else None
        return cache_lib.take_in(buffer, entries, valid, newest, prompt=False), (*found, best)

    chunked = (by_chunk(pad(tokens)), by_chunk(pad(asked)), by_chunk(valid))
    _, found = jax.lax.scan(one_chunk, cache_lib.empty(model.config, cache, B), chunked)
    return Measured(*(a.swapaxes(0, 1).reshape(B, chunks * R, *a.shape[3:])[:, :T] for a in found))


def _masses(
    buffer: Buffer,
    new: Entries,
    queries: Float[Array, "B L T N H"],
    marks: Float[Array, "B all any_and_facts"],
    asked: Int[Array, "B T"],
) -> tuple[Float[Array, "B T L N"], ...]:
    """The masses of `Measured` for new tokens, from their queries, over the buffer and themselves.

    Attention over 0 and 1 in place of values is the share of attention on the ones, by the very operations of
    `decoder.extend`. With queries of 0 it is the share of the tokens seen, and the log-sum-exp is the log of their
    number.
    """
    _, L, T, _, H = queries.shape
    # Values are H wide, so marks go through attention so many at a time.
    blocks = -(-marks.shape[-1] // H)
    marks = jnp.pad(marks, ((0, 0), (0, 0), (0, blocks * H - marks.shape[-1])))
    at = lambda pos: jnp.take_along_axis(marks, jnp.clip(pos, 0, marks.shape[1] - 1)[..., None], axis=1)
    pos = buffer.seen[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    pairs = [jnp.split(a, blocks, axis=-1) for a in (at(buffer.pool.pos), at(pos))]

    def of_layer(scanned):
        q, k, index, window = scanned
        k = k.swapaxes(1, 2)

        def attend(q, pool_v, v):
            held = buffer._replace(pool=buffer.pool._replace(v=pool_v))
            every_head = jnp.broadcast_to(v[:, :, None], k.shape)
            return ops.merge([cache_lib.attend(held, q, index), ops.causal_attention(q, k, every_head, window)])

        def share(q):
            """Attention on the fact asked for and on any fact, and the log-sum-exp of the logits."""
            parts = [attend(q, pool, v) for pool, v in zip(*pairs, strict=True)]
            out = jnp.concatenate([part.out for part in parts], axis=-1)
            return jnp.take_along_axis(out, asked[:, :, None, None] + 1, axis=-1)[..., 0], out[..., 0], parts[0].lse

        on_asked, on_any, _ = share(q)
        useful, _, log_seen = share(jnp.zeros_like(q))
        seen = jnp.exp(log_seen)
        return on_asked, on_any, useful * seen, seen

    windows = None if buffer.windows is None else jnp.asarray(buffer.windows, jnp.int32)
    by_layer = lambda a: a.swapaxes(0, 1)
    found = jax.lax.map(of_layer, (by_layer(queries), by_layer(new.k), jnp.arange(L), windows))
    return tuple(jnp.moveaxis(a, 0, 2) for a in found)


def evaluated(model: Decoder, config: EvalConfig, data: DataConfig, length: int, policy: str, budget: int) -> Result:
    """Dilution and accuracy of one policy and budget on the recall streams of all seeds, at one length."""
    tokens, label_mask = streams.examples("recall", config, data, length)
    # All in one chunk is the full cache: nothing is evicted before the last token has been read.
    recent = length if policy == "full" else config.recent
    cache = evaluate.buffer_of(dataclasses.replace(config, recent=recent), policy, budget, length)
    accuracy, dilution, off_facts, margins, crowds = [], [], [], [], []
    for rows, labels in zip(tokens, label_mask, strict=True):  # a seed at a time: the full cache needs the memory
        asked = np.clip(rows - recall.FIRST_KEY, 0, recall.NUM_KEYS - 1)
        found = jax.tree.map(np.asarray, measure(model, rows, recall.facts_at(rows), asked, cache))
        queries = np.pad(labels[:, 1:], ((0, 0), (0, 1)))  # the key, after which the answer is predicted
        at_queries = (a[queries].astype(np.float64) for a in found[:4])
        on_asked, on_any, useful, seen = at_queries
        accuracy.append(streams.accuracy(found.best[:, :-1], rows, labels))
        dilution.append(1 - on_asked.mean(axis=0))
        off_facts.append(1 - on_any.mean(axis=0))
        useful, seen = np.rint(useful), np.rint(seen)
        both = (useful > 0) & (useful < seen)
        crowd = np.where(both, (seen - useful) / np.maximum(useful, 1), np.nan)
        crowds.append(crowd)
        margins.append(scipy.special.logit(on_asked) + np.log(crowd))
    return Result(
        length=length,
        policy=policy,
        budget=budget,
        accuracy=np.array(accuracy),
        dilution=np.array(dilution),
        off_facts=np.array(off_facts),
        margin=_median(np.concatenate(margins)),
        crowd=_median(np.concatenate(crowds)),
        queries=int(label_mask.sum()),
    )


def _median(x: Float[np.ndarray, "queries L N"]) -> Float[np.ndarray, "L N"]:
    """Of what is not nan; nan where all is."""
    columns = x.reshape(len(x), -1).T
    return np.array([np.median(c[~np.isnan(c)]) if not np.isnan(c).all() else np.nan for c in columns]).reshape(
        x.shape[1:]
    )


def table(results: Sequence[Result]) -> str:
    """The results of one length as text: accuracy, and the mean dilution of each layer's heads."""
    layers, seeds = results[0].margin.shape[0], len(results[0].accuracy)
    lines: list[tuple[str, ...]] = [
        ("", "accuracy %", *(f"dilution, layer {i}" for i in range(layers)), f"off all facts, layer {layers - 1}")
    ]
    for r in results:
        name = "full cache" if r.policy == "full" else f"{r.policy.replace('_', ' ')}, {r.budget} kept"
        by_layer = [r.dilution[:, i].mean(axis=-1) for i in range(layers)] + [r.off_facts[:, -1].mean(axis=-1)]
        lines.append((name, _shown(100 * r.accuracy, 1), *(_shown(d, 3) for d in by_layer)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    spread = f"; mean ± half the 95 % interval over {seeds} seeds" if seeds > 1 else ""
    text = [f"recall, {results[0].length} tokens, {results[0].queries} queries{spread}"]
    text += ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join(text)


def _shown(by_seed: Float[np.ndarray, " seeds"], digits: int) -> str:
    mean, low, high = interval(by_seed.tolist())
    return f"{mean:.{digits}f} ± {(high - low) / 2:.{digits}f}" if len(by_seed) > 1 else f"{mean:.{digits}f}"


def save(results: Sequence[Result], path: pathlib.Path) -> None:
    """Writes results as a JSON list of objects whose arrays are nested lists; what is not finite is null."""

    def plain(value: object) -> object:
        if isinstance(value, np.ndarray):
            return np.where(np.isfinite(value), value.astype(object), None).tolist()  # pyright: ignore
        return value

    rows = [{name: plain(value) for name, value in r._asdict().items()} for r in results]
    text = "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in rows) + "\n]\n"
    files.write_atomically(path, lambda temporary: temporary.write_text(text))


def run(model: Decoder, config: EvalConfig, data: DataConfig, output: pathlib.Path | None) -> list[Result]:
    """Measures every length, policy and budget and prints a table for each length as soon as it is known.

    Args:
      model: backbone and gates.
      config: lengths, policies, budgets, seeds; the task must be recall alone, which knows its useful tokens.
      data: the config's, for `streams.examples`.
      output: folder for `dilution.json` and `dilution.png`; None writes nothing. Only process 0 writes.

    Raises:
      ValueError: on another task, as `evaluate.check` does, and when the vocabulary is too small for the task.
    """
    evaluate.check(config, data)
    if "oracle" in config.policies:
        raise ValueError("dilution: policy 'oracle' is for scores alone")
    if config.tasks != ("recall",):
        raise ValueError(f"dilution: only the task 'recall' knows its useful tokens, got {', '.join(config.tasks)}")
    if model.config.vocab_size < recall.VOCAB_SIZE:
        raise ValueError(f"task 'recall' needs a vocabulary of {recall.VOCAB_SIZE}, got {model.config.vocab_size}")
    first_process, results = jax.process_index() == 0, []
    if output is not None and first_process:
        output.mkdir(parents=True, exist_ok=True)  # before the work, so that a bad path costs no time
    cells = {length: evaluate.cells(config, length) for length in config.lengths}
    with tqdm.tqdm(total=sum(map(len, cells.values())), leave=False, disable=None if first_process else True) as bar:
        for length, here in cells.items():
            for policy, budget in here:
                bar.set_description(f"{length} tokens: {policy} {budget}")
                results.append(evaluated(model, config, data, length, policy, budget))
                bar.update()
            if first_process:
                tqdm.tqdm.write(table([r for r in results if r.length == length]) + "\n")
                if output is not None:
                    save(results, output / "dilution.json")
    if output is not None and first_process:
        dilution_plots.figure(results, output / "dilution.png")
    return results


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if not values["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    config = from_config_dict(TrainConfig, values.config)
    given = {name: values[name].value for name in ("tasks", "policies", "budgets", "lengths", "seed")}
    chosen = evaluate.override(config.eval, **given)
    evaluate.check(chosen, config.data)
    backbone, gates = evaluate.checkpoint_folders(values.checkpoint, config.backbone, chosen.policies)
    model = weights.load(backbone, gates, config.dtype)
    run(model, chosen, config.data, pathlib.Path(values.output).expanduser() if values.output else None)


if __name__ == "__main__":
    jax.config.config_with_absl()
    evaluate.define_flags(flags.FLAGS)
    app.run(main)
