"""Prints packed rows of a chat as text, with what is trained on marked, and how full the rows are.

python -m retention_jax.data.show --config=configs/chat.py --config.backbone=MODEL --config.data.files=FILE --rows=1
"""

import sys
from collections.abc import Sequence

import numpy as np
from absl import app, flags, logging
from jaxtyping import Bool, Int32
from ml_collections import config_flags

from retention_jax.config import TrainConfig
from retention_jax.config.conversion import from_config_dict
from retention_jax.data import builders, pipeline
from retention_jax.runtime import command
from retention_jax.text.tokenizer import Tokenizer

_MEASURED = 64  # rows that the last line speaks of, at least


def show(config: TrainConfig, rows: int, marks: tuple[str, str]) -> str:
    """The first rows that training in one process reads, and of more rows, how full they are.

    Args:
      config: the run's; its data are made where the cache does not have them.
      rows: how many are printed.
      marks: what is put before and after the tokens that are trained on.

    Raises:
      ValueError: when the data are no chat, and as `pipeline.train_iterator` does.
    """
    data = config.resolved_data
    if data.task != "chat":
        raise ValueError(f"data.task='chat' has text to show, got {data.task!r}")
    known = builders.load_tokenizer(data)
    batches = pipeline.train_iterator(data, vocab_size=known.vocab_size, seed=config.seed)
    read = [next(batches) for _ in range(-(-max(rows, _MEASURED) // data.batch_size))]
    tokens, ids, labels = (np.concatenate([b[name] for b in read]) for name in ("tokens", "segment_ids", "label_mask"))
    lines = []
    for row in range(rows):
        for document in range(1, ids[row].max() + 1):
            own = ids[row] == document
            counts = f"{own.sum()} tokens, {labels[row, own].sum()} trained on"
            lines += [
                f"--- row {row + 1}, document {document}: {counts}",
                _marked(known, tokens[row, own], labels[row, own], marks),
            ]
    lines.append(
        f"{len(ids)} rows of {data.length} tokens: {np.mean(ids > 0):.1%} filled, {labels.mean():.1%} trained on, "
        f"{ids.max(axis=1).mean():.1f} documents a row"
    )
    return "\n".join(lines)


def _marked(
    known: Tokenizer, tokens: Int32[np.ndarray, " T"], labels: Bool[np.ndarray, " T"], marks: tuple[str, str]
) -> str:
    changes, text = np.flatnonzero(np.diff(labels)) + 1, ""
    for run, trained in zip(np.split(tokens, changes), np.split(labels, changes), strict=True):
        part = known.backend.decode(run.tolist(), skip_special_tokens=False)
        text += f"{marks[0]}{part}{marks[1]}" if trained[0] else part
    return text


def define_flags(values: flags.FlagValues) -> None:
    """Not at import, so that tests can have flags of their own."""
    config_flags.DEFINE_config_file("config", None, "The run's config file.", lock_config=True, flag_values=values)
    flags.DEFINE_integer("rows", 1, "Rows to print.", lower_bound=0, flag_values=values)
    flags.mark_flag_as_required("config", flag_values=values)


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if not values["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # TFDS writes a lot at INFO
    config = from_config_dict(TrainConfig, values.config)
    print(show(config, values.rows, ("\033[7m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")))


if __name__ == "__main__":
    command.run(main, define_flags)
