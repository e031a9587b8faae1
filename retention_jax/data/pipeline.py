"""From a `DataConfig` to batches: prepare the documents once, then shuffle, pack and batch them with Grain.

    documents of each source -> shuffled anew each epoch (or in order), for ever
    -> mixed by weight -> packed into rows -> batches

An iterator's state is a few integers (which document comes next, which packed row), so a checkpoint of it is small and
resuming is exact.
"""

import collections
import contextlib
import io
import math
import pathlib
import sys
import tempfile
from typing import Any, TypedDict

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from jaxtyping import Bool, Int32

from retention_jax.config import DataConfig
from retention_jax.data import builders
from retention_jax.parallel import distributed

# Rows that are filled side by side. More rows leave less padding; resuming fills them again, so not too many.
_OPEN_ROWS = 64


class Batch(TypedDict):
    tokens: Int32[np.ndarray, "B T"]  # 0 is padding
    segment_ids: Int32[np.ndarray, "B T"]  # 1, 2, ... for the documents of a row; 0 is padding
    label_mask: Bool[np.ndarray, "B T"]  # True at the tokens that are predicted and scored


def prepare(config: DataConfig, seed: int) -> list[tfds.core.DatasetBuilder]:
    """The builders of the config's documents, one for each source; chat alone may have several.

    Documents are made first where `cache_dir` does not have them, in a folder of their own that is renamed when it is
    whole: what an interrupted process leaves is never read, and of several processes at once the first to finish wins
    and all go on with the same files. (TFDS renames too, but it draws the temporary name from `random`, which processes
    started alike have often seeded alike.)

    Args:
      config: which documents.
      seed: of the recall documents, in [0, 2**32); text and chat do not depend on it.

    Raises:
      ValueError: on another seed, and when a file is missing, unreadable, too short or not understood.
    """
    return [_prepared(config, *wanted) for wanted in _wanted(config, seed)]


def digests(config: DataConfig, seed: int) -> dict[str, str]:
    """For each source a name of its documents, which changes with whatever they are made from; nothing is made.

    Raises:
      ValueError: as `prepare` does, but for what only shows when a file is read whole.
    """
    names = config.files or (config.path or config.task,)
    return {name: wanted.name for name, (_, wanted) in zip(names, _wanted(config, seed), strict=True)}


def _wanted(config: DataConfig, seed: int) -> list[tuple[Any, tfds.core.BuilderConfig]]:
    """Builder and its settings for each source."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    match config.task:
        case "recall":
            return [(builders.Recall, builders.recall_config(config, seed))]
        case "text":
            return [(builders.Text, builders.text_config(config))]
        case "chat":
            return [(builders.Chat, wanted) for wanted in builders.chat_configs(config)]


def _prepared(config: DataConfig, builder_class: Any, builder_config: tfds.core.BuilderConfig) -> Any:
    cache = pathlib.Path(config.cache_dir).expanduser()
    dataset = pathlib.Path(builder_class.name, builder_config.name, str(builder_class.VERSION))  # TFDS's own layout
    if not (cache / dataset).exists():
        logging.info("data: preparing %s", cache / dataset)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".preparing-") as folder:
            _write(builder_class(config=builder_config, data_dir=folder, file_format="array_record"))
            _move(folder / dataset, cache / dataset)
    return tfds.builder_from_directory(cache / dataset)


def _write(builder: tfds.core.DatasetBuilder) -> None:
    tfds.display_progress_bar(sys.stderr.isatty())
    # TFDS prints to stdout, where a program's results go, and names the temporary folder.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()


def _move(source: pathlib.Path, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(target)
    except OSError:
        if not target.exists():  # else another process was first
            raise


def documents(builder: tfds.core.DatasetBuilder, split: str) -> grain.sources.RandomAccessDataSource:
    """The prepared documents of a split, in order, by index: dicts as in `builders`."""
    # TFDS's logging decorator hides the signature from pyright.
    return builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]


def train_iterator(config: DataConfig, *, vocab_size: int, seed: int) -> grain.DatasetIterator[Batch]:
    """Endless batches of `batch_size` rows of `length` tokens, numpy arrays as `Batch` says.

    A document lies in one row, whole. What comes depends on config and seed only. Of several processes each makes every
    batch whole, nine bytes a token, and puts the rows that its devices hold on them: so the order is the same for any
    number of processes, and one state is the state of all. Sources are mixed in a fixed order by their weights, each
    begun anew as often as that takes. Process 0 warns of documents that were cut or left out.

    `get_state()` is a dict for JSON; `set_state` of it on a new iterator of the same arguments continues bitwise.

    Raises:
      ValueError: when a source has tokens that the vocabulary lacks, when processes found other documents under the
        same names, and as `prepare` does; RuntimeError in processes other than the one that cannot prepare them.
    """
    made = distributed.together(lambda: prepare(config, seed))
    names = config.files or (config.task,)
    # A dataset's name has a digest of its documents.
    distributed.agree_on("documents", {n: builder.info.full_name for n, builder in zip(names, made, strict=True)})
    if jax.process_index() == 0 and (warning := _left_out(config, made)):
        logging.warning("%s", warning)
    sources = [documents(builder, "train") for builder in made]
    for name, builder in zip(names, made, strict=True):
        if (needed := builders.metadata(builder)["vocab_size"]) > vocab_size:
            raise ValueError(f"{name} has token {needed - 1}; the model's vocabulary is {vocab_size}")
    seeded = [grain.MapDataset.source(source).seed(seed) for source in sources]
    endless = [(source.shuffle() if config.shuffle else source).repeat() for source in seeded]
    ordered = grain.MapDataset.mix(endless, config.weights or [len(source) for source in sources])
    # No threads. Reading is Python, so they pass the interpreter lock around (measured: 2 to 3 times slower), and one
    # that still runs when the interpreter ends can abort the process. Asynchronous dispatch of steps hides the reading.
    stream = ordered.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    rows = grain.experimental.FirstFitPackIterDataset(
        stream,
        length_struct={"tokens": config.length, "label_mask": config.length},
        num_packing_bins=_OPEN_ROWS,
        seed=seed,
    )
    batches = rows.batch(config.batch_size, drop_remainder=True).map(_to_batch)
    return iter(batches)


def _left_out(config: DataConfig, made: list[tfds.core.DatasetBuilder]) -> str:
    """What of the sources is not trained on, in words; "" for nothing."""
    lost = collections.Counter()
    for builder in made:
        lost.update(builders.metadata(builder)["left_out"])
    told = {
        "cut": f"{{}} documents were cut at length={config.length}, {lost['cut_tokens']} tokens in all",
        "too_long": f"{{}} left out with more than length={config.length} tokens",
        "too_short": f"{{}} left out with fewer than min_length={config.min_length} tokens",
        "without_labels": "{} left out with no token to learn from",
    }
    return "; ".join(text.format(lost[name]) for name, text in told.items() if lost[name])


def _to_batch(packed: dict[str, np.ndarray]) -> Batch:
    return {
        "tokens": packed["tokens"].astype(np.int32),
        "segment_ids": packed["tokens_segment_ids"],
        "label_mask": packed["label_mask"],
    }


def heldout_rows(config: DataConfig, *, length: int, limit: int | None) -> Int32[np.ndarray, "B T"]:
    """Consecutive rows of the text's held-out tail, at most `limit`; a remainder shorter than a row is left out.

    The tail is the same for every `length` and `config.length`.

    Raises:
      ValueError: when task is not "text", length or limit is not positive, the tail is shorter than one row, and as
        `prepare` does.
    """
    if config.task != "text":
        raise ValueError(f"held-out rows exist for DataConfig.task='text', got {config.task!r}")
    if length < 1 or (limit is not None and limit < 1):
        raise ValueError(f"length and limit must be at least 1, got length={length} and limit={limit}")
    [builder] = prepare(config, 0)
    source = documents(builder, "heldout")
    wanted = len(source) if limit is None else min(len(source), math.ceil(limit * length / config.length))
    tokens = np.concatenate([source[i]["tokens"] for i in range(wanted)]).astype(np.int32)
    rows = min(len(tokens) // length, limit or len(tokens))
    if not rows:
        raise ValueError(
            f"the held-out tail of {config.path!r} has {len(tokens)} tokens with heldout={config.heldout}; one row of "
            f"length={length} is needed"
        )
    return tokens[: rows * length].reshape(rows, length)
