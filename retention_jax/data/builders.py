"""TFDS builders of the training documents: array_record files of numpy arrays, made and read without TensorFlow.

Every example is one document:

    tokens      uint16 [length]  or uint32, where a tokenizer has more ids than that
    label_mask  bool [length]    True at the tokens that are predicted and scored, never at a document's first

Both are stored as raw bytes: as lists of integers the same example is several times larger and slower to read. A
dataset's metadata tells `vocab_size`, which is more than any of its tokens, and `left_out`, what was cut and why.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tokenizers
from jaxtyping import Bool, Int32, UInt8

from retention_jax.config import DataConfig
from retention_jax.data import conversations, recall, sources
from retention_jax.data.conversations import Sample
from retention_jax.runtime import hub
from retention_jax.runtime.files import first_problems
from retention_jax.text import chat, tokenizer
from retention_jax.text.tokenizer import Tokenizer

TEXT_VOCAB_SIZE = 257  # byte + 1, so that 0 stays the padding

# Last word of the training documents' seeds: an evaluation that draws from default_rng((seed, index)) never meets one.
# Not 0, because numpy pads seeds with zeros.
_TRAIN = 1
_PROBES = 16  # documents that go into the name of a recall dataset

Examples = Iterator[tuple[int, dict[str, np.ndarray]]]


@dataclasses.dataclass(kw_only=True)
class RecallConfig(tfds.core.BuilderConfig):
    data: DataConfig = dataclasses.field(repr=False)  # TFDS logs the repr; the description says it shorter
    seed: int = dataclasses.field(repr=False)


@dataclasses.dataclass(kw_only=True)
class TextConfig(tfds.core.BuilderConfig):
    length: int = dataclasses.field(repr=False)  # tokens of a document, at most
    train_bytes: UInt8[np.ndarray, " train"] = dataclasses.field(repr=False)
    heldout_bytes: UInt8[np.ndarray, " heldout"] = dataclasses.field(repr=False)


@dataclasses.dataclass(kw_only=True)
class ChatConfig(tfds.core.BuilderConfig):
    data: DataConfig = dataclasses.field(repr=False)
    source: str = dataclasses.field(repr=False)  # one of data.files
    paths: list[pathlib.Path] = dataclasses.field(repr=False)  # what it stands for
    tokenizer: Tokenizer = dataclasses.field(repr=False)


class Recall(tfds.core.GeneratorBasedBuilder):
    """`config.documents` streams of `data/recall.py`, one rng each; split `train`."""

    VERSION = tfds.core.Version("1.1.0")
    builder_config: RecallConfig

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, recall.VOCAB_SIZE)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Examples:
        data, seed = self.builder_config.data, self.builder_config.seed
        for index in range(data.documents):
            document = recall_document(data, seed, index)
            yield index, _example(document.tokens, document.label_mask, recall.VOCAB_SIZE)


class Text(tfds.core.GeneratorBasedBuilder):
    """A file's bytes as tokens (byte + 1), cut into documents of consecutive bytes: simple, and the same every time.

    Documents have `length` tokens but for a split's last one, which is what remains. Split `train` is the head of the
    file and `heldout` its tail.
    """

    VERSION = tfds.core.Version("1.1.0")
    builder_config: TextConfig

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, TEXT_VOCAB_SIZE)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        config = self.builder_config
        return {
            "train": self._generate_examples(config.train_bytes),
            "heldout": self._generate_examples(config.heldout_bytes),
        }

    def _generate_examples(self, data: UInt8[np.ndarray, " bytes"]) -> Examples:
        length = self.builder_config.length
        for index, start in enumerate(range(0, len(data), length)):
            tokens = data[start : start + length].astype(np.int32) + 1
            yield index, _example(tokens, np.arange(len(tokens)) > 0, TEXT_VOCAB_SIZE)


class Chat(tfds.core.GeneratorBasedBuilder):
    """Conversations under a model's chat template, labelled where the assistant speaks, and texts, labelled everywhere.

    Documents of more than `config.length` tokens are cut or dropped, and dropped are those with fewer than
    `config.min_length` or with no label left. Split `train`.
    """

    VERSION = tfds.core.Version("1.1.0")  # part of the dataset's name: to be raised with whatever changes the tokens
    builder_config: ChatConfig

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, self.builder_config.tokenizer.vocab_size)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        # A mistake in the last line must not show after hours.
        check_rows(self.builder_config.tokenizer, self.builder_config.paths)
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Examples:
        config, data = self.builder_config, self.builder_config.data
        lost = dict.fromkeys(("cut", "cut_tokens", "too_long", "too_short", "without_labels"), 0)
        kept, largest, vocab_size = 0, 0, config.tokenizer.vocab_size
        for sample in conversations.read(config.paths):
            tokens, label_mask = encode(config.tokenizer, sample)
            over = max(len(tokens) - data.length, 0)
            tokens, label_mask = tokens[: data.length], label_mask[: data.length]
            if over and data.too_long == "drop":
                lost["too_long"] += 1
            elif not label_mask.any():
                lost["without_labels"] += 1
            elif len(tokens) < data.min_length:
                lost["too_short"] += 1
            else:
                yield kept, _example(tokens, label_mask, vocab_size)
                kept, largest = kept + 1, max(largest, int(tokens.max()))
                lost["cut"], lost["cut_tokens"] = lost["cut"] + bool(over), lost["cut_tokens"] + over
        if not kept:
            raise ValueError(f"{config.source}: no document is left to train on: {json.dumps(lost)}")
        metadata(self).update(vocab_size=largest + 1, documents=kept, left_out=lost)


def check_rows(tokenizer: Tokenizer, paths: Sequence[pathlib.Path]) -> None:
    """Reads all rows, and encodes one conversation of each shape: what a template refuses, it mostly refuses by roles.

    Raises:
      ValueError: as `conversations.read` does, and with the rows of refused shapes: the first ten, and how many more.
    """
    refused: dict[Any, bool] = {}
    problems = []
    for sample in conversations.read(paths):
        if isinstance(sample.content, str):
            continue
        shape = bool(sample.tools), *((m["role"], *sorted(m)) for m in sample.content)
        if refused.get(shape, True):  # a new shape, or one that was refused before
            try:
                encode(tokenizer, sample)
                refused.setdefault(shape, False)
            except ValueError as error:
                refused[shape] = True
                problems.append(str(error))
    if problems:
        raise ValueError(first_problems(problems))


def encode(tokenizer: Tokenizer, sample: Sample) -> tuple[Int32[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
    """Tokens and labels of a row, none for an empty one. Raises ValueError, naming it, where the template fails."""
    if isinstance(sample.content, str):
        tokens = np.asarray(tokenizer.encode(sample.content, bos=True) if sample.content else [], np.int32)
        return tokens, np.arange(len(tokens)) > 0
    if not sample.content:
        return np.zeros(0, np.int32), np.zeros(0, bool)
    try:
        tokens, label_mask = chat.encode_chat(tokenizer, sample.content, tools=sample.tools)
    except ValueError as error:
        raise ValueError(f"{sample.where}: {error}") from error
    return tokens, label_mask & (np.arange(len(tokens)) > 0)


def recall_document(config: DataConfig, seed: int, index: int) -> recall.Stream:
    """Document `index` of the dataset of `seed`: a copy or a stream.

    Copies come first, as long as the first length; then the lengths follow one another in blocks, not in turns, so that
    every n-th document, a process's share, still has all of them, and reading in order is a curriculum.
    """
    lengths, copies = config.document_lengths, round(config.copies * config.documents)
    rng = np.random.default_rng((seed, index, _TRAIN))
    if index < copies:
        return recall.copy(rng, lengths[0])
    length = lengths[(index - copies) * len(lengths) // (config.documents - copies)]
    return recall.stream(rng, length, config.decoys)


def recall_config(config: DataConfig, seed: int) -> RecallConfig:
    """Names the dataset by all that its documents depend on: fields, seed and, by a few documents, the task's code."""
    fields = {n: getattr(config, n) for n in ("documents", "document_lengths", "decoys", "copies")} | {"seed": seed}
    probes = range(0, config.documents, math.ceil(config.documents / _PROBES))
    documents = [recall_document(config, seed, i).tokens.tobytes() for i in probes]
    return RecallConfig(name=_name(fields, *documents), description=json.dumps(fields), data=config, seed=seed)


def text_config(config: DataConfig) -> TextConfig:
    """Reads the file once and names the dataset by its bytes and by how they are cut.

    Raises:
      ValueError: when the file is missing, unreadable or too short.
    """
    path = pathlib.Path(config.path).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"DataConfig.path must name a readable text file, got {str(path)!r}: {reason}") from error
    needed = math.ceil(max(config.length / (1 - config.heldout), 2 / config.heldout))
    if len(content) < needed:
        raise ValueError(
            f"{str(path)!r} (DataConfig.path) has {len(content)} bytes; at least {needed} are needed for one training "
            f"row of length={config.length} and two held-out bytes with heldout={config.heldout}"
        )
    fields = {"length": config.length, "heldout": config.heldout}
    data = np.frombuffer(content, np.uint8)
    cut = len(data) - int(len(data) * config.heldout)
    return TextConfig(
        name=_name(fields, content),
        description=json.dumps(fields | {"path": str(path)}),
        length=config.length,
        train_bytes=data[:cut],
        heldout_bytes=data[cut:],
    )


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer of a chat, with the template that is used.

    Raises:
      ValueError: when either is missing or damaged.
    """
    found = tokenizer.load(hub.resolve(config.tokenizer))
    if not config.chat_template:
        return found
    path = pathlib.Path(config.chat_template).expanduser()
    try:
        return found._replace(chat_templates={"default": path.read_text(encoding="utf-8")})
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"DataConfig.chat_template must name a readable text file: {error}") from error


def chat_configs(config: DataConfig) -> list[ChatConfig]:
    """One for each source, named by its files' bytes and by all that turns them into tokens.

    Raises:
      ValueError: as `load_tokenizer` and `sources.files_of` do.
    """
    known = load_tokenizer(config)
    fields: dict[str, Any] = {name: getattr(config, name) for name in ("length", "min_length", "too_long")}
    encoding = (known.backend.to_str(), known.special_tokens, known.bos, known.chat_templates)
    fields |= {"tokenizers": tokenizers.__version__}
    made = []
    for source in config.files:
        paths = sources.files_of(source)
        name = _name(fields, json.dumps(encoding).encode(), *map(_digest, paths))
        description = json.dumps(fields | {"source": source})
        made.append(
            ChatConfig(name=name, description=description, data=config, source=source, paths=paths, tokenizer=known)
        )
    return made


def _digest(path: pathlib.Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _info(builder: tfds.core.GeneratorBasedBuilder, vocab_size: int) -> tfds.core.DatasetInfo:
    features = {
        "tokens": tfds.features.Tensor(shape=(None,), dtype=_dtype(vocab_size), encoding="bytes"),
        "label_mask": tfds.features.Tensor(shape=(None,), dtype=np.bool_, encoding="bytes"),
    }
    # Grain shuffles; the files keep the order of the documents, so that the held-out tail can be read as one text.
    return tfds.core.DatasetInfo(
        builder=builder,
        description=builder.__doc__,
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,
        metadata=tfds.core.MetadataDict(vocab_size=vocab_size, left_out={}),
    )


def _dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def _example(
    tokens: Int32[np.ndarray, " length"], label_mask: Bool[np.ndarray, " length"], vocab_size: int
) -> dict[str, np.ndarray]:
    return {"tokens": tokens.astype(_dtype(vocab_size)), "label_mask": label_mask}


def metadata(builder: tfds.core.DatasetBuilder) -> tfds.core.Metadata:
    assert builder.info.metadata is not None  # every builder here has some
    return builder.info.metadata


def _name(fields: dict[str, Any], *contents: bytes) -> str:
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:20]
