"""Tokenizers of Hugging Face checkpoint folders.

tokenizer.json              vocabulary and rules, read by the `tokenizers` library
tokenizer_config.json       special tokens, chat template
special_tokens_map.json     special tokens, where the file above does not name them
chat_template.jinja         chat template, in place of the one above
generation_config.json      stop tokens, sampling defaults
config.json                 more stop tokens
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import tokenizers

from retention_jax.runtime import files

# What chat templates know the special tokens by.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token that stands for one byte of a character
_ANCHORS = ("1", "a", "\ue000")  # texts that few tokens join to what follows them; see `encode_more`


class Tokenizer(NamedTuple):
    """Text to token ids and back, and what the folder says about generation."""

    backend: tokenizers.Tokenizer
    where: pathlib.Path  # the folder, for messages
    special_tokens: dict[str, str]  # by the names of `_SPECIAL`, those that the folder has
    bos: int | None  # what plain text begins with; None where it is given no such token
    stop_tokens: tuple[int, ...]  # each ends a reply; all that the folder's files name
    chat_templates: dict[str, str]  # Jinja source by name: `default`, perhaps `tool_use`; empty without templates
    generation: dict[str, Any]  # generation_config.json, {} without one

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id. A model may have more rows than that, for padding."""
        return max(self.backend.get_vocab().values()) + 1

    def encoding(self, text: str) -> tokenizers.Encoding:
        """What the `tokenizers` library makes of a text: token ids, and where in the text each token lies.

        All text becomes tokens here. Raises ValueError as `check_text` does.
        """
        check_text(text)
        return self.backend.encode(text, add_special_tokens=False)

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Token ids of a text; special tokens that are written out in it become themselves.

        `bos` puts the beginning-of-sequence token before plain text, if this tokenizer does so and the text does not
        begin with it already. A rendered chat template writes its own: there, it must be False.

        Raises:
          ValueError: as `check_text` does.
        """
        ids = self.encoding(text).ids
        return [self.bos, *ids] if bos and self.bos is not None and ids[:1] != [self.bos] else ids

    def encode_more(self, text: str) -> list[int]:
        """Token ids of a text that goes on from an earlier one, as they are in both texts together.

        Some tokenizers put something before every text (Llama 2 a space), which belongs before the earlier one only. So
        the text is read behind a short one, whose tokens are then taken off.

        Raises:
          ValueError: as `check_text` does, and when the tokenizer joins the text to anything that stands before it.
        """
        for anchor in _ANCHORS:
            before, both = self.encoding(anchor).ids, self.encoding(anchor + text).ids
            if both[: len(before)] == before:
                return both[len(before) :]
        raise ValueError(f"{self.where}: the tokenizer does not tell the tokens of {text[:40]!r} from those before it")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def stream(self) -> Callable[..., str]:
        """A function to call with the next token ids again and again: what more can be shown, in whole characters.

        `more(ids)` holds back what later ids can still change: the first bytes of a character, and the bytes of
        `<0x0A>`'s kind, which the `tokenizers` library reads together with all the bytes after them. `more(ids,
        end=True)` gives that too. The pieces together are `decode` of all ids.
        """
        special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        recent: list[int] = []  # enough tokens that the next one's text does not depend on those before
        shown, read = "", 0  # how much of their text was given, and the number of tokens that it is of

        def more(ids: Iterable[int], end: bool = False) -> str:
            nonlocal recent, shown, read
            pieces = []
            for token in ids:
                name = self.backend.id_to_token(token)
                if name is None or token in special:  # `decode` leaves them out
                    continue
                recent.append(token)
                text = self.decode(recent)
                if text.endswith("\ufffd") or _BYTE.fullmatch(name):
                    continue
                pieces.append(text[len(shown) :])
                newest = recent[read:]
                alone = self.decode(newest)
                recent, shown = (newest, alone) if alone else (recent, text)
                read = len(recent)
            if end:
                text = self.decode(recent)
                pieces.append(text[len(shown) :])
                shown, read = text, len(recent)
            return "".join(pieces)

        return more

    def special_strings(self) -> frozenset[str]:
        """Text of every special token."""
        return frozenset(t.content for t in self.backend.get_added_tokens_decoder().values() if t.special)


def check_text(text: str) -> None:
    """Raises ValueError, saying where, when a text has a character that UTF-8 cannot hold: half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at, around = error.start, text[max(error.start - 20, 0) : error.start + 20]
        raise ValueError(
            f"cannot be read as text: character {at + 1} is {ascii(text[at])}, half a surrogate pair or a byte that is "
            f"not UTF-8, in {ascii(around)}"
        ) from None


def load(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Raises:
      ValueError: when the folder has no tokenizer.json, a file is damaged, or stop tokens are not in the vocabulary.
    """
    folder = pathlib.Path(folder)
    config = _read_json(folder / "tokenizer_config.json")
    backend = _backend(folder)
    special = _special_tokens(config, _read_json(folder / "special_tokens_map.json"))
    _add_missing(backend, config, special)
    generation = _read_json(folder / "generation_config.json")
    bos = backend.token_to_id(special.get("bos_token", ""))
    adds_bos = config.get("add_bos_token")
    if adds_bos is None:  # then tokenizer.json's own post-processor says
        adds_bos = backend.encode("").ids[:1] == [bos]
    return Tokenizer(
        backend=backend,
        where=folder,
        special_tokens=special,
        bos=bos if adds_bos else None,
        stop_tokens=_stop_tokens(folder, backend, special),
        chat_templates=_chat_templates(folder, config),
        generation=generation,
    )


def _backend(folder: pathlib.Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        others = [n for n in ("tokenizer.model", "spiece.model", "vocab.json") if (folder / n).is_file()]
        hint = (
            f"; {', '.join(others)} can be converted with transformers: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
        raise ValueError(f"{folder}: has no tokenizer.json, which text needs{hint if others else ''}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file}: not a tokenizer of the `tokenizers` library: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _special_tokens(config: dict[str, Any], special_map: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL:
        value = config.get(name) or special_map.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            found[name] = text
    return found


def _add_missing(backend: tokenizers.Tokenizer, config: dict[str, Any], special: dict[str, str]) -> None:
    """Tokens that only tokenizer_config.json has go behind tokenizer.json's vocabulary, in the order of their ids."""
    listed = config.get("added_tokens_decoder") or {}
    flags = ("special", "single_word", "lstrip", "rstrip", "normalized")
    wanted = [
        tokenizers.AddedToken(entry["content"], **{k: bool(entry[k]) for k in flags if k in entry})
        for _, entry in sorted(listed.items(), key=lambda item: int(item[0]))
    ]
    wanted += [tokenizers.AddedToken(text, special=True) for text in special.values()]
    for token in wanted:
        if backend.token_to_id(token.content) is None:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def _stop_tokens(folder: pathlib.Path, backend: tokenizers.Tokenizer, special: dict[str, str]) -> tuple[int, ...]:
    """Every end that the folder names: `eos_token_id` of two files, and the tokenizer's end-of-sequence token.

    The sources often disagree, since the end of a turn and the end of a document are two tokens, and each file may name
    one of them. None of them may be written within a reply.
    """
    found, problems = [], []
    for file in (folder / "generation_config.json", folder / "config.json"):
        given = _read_json(file).get("eos_token_id")
        for value in given if isinstance(given, list) else [given] * (given is not None):
            token = backend.token_to_id(value) if isinstance(value, str) else value
            if type(token) is int and token >= 0 and backend.id_to_token(token) is not None:
                found.append(token)
            else:
                problems.append(f"{file}: eos_token_id {value!r} is no token of tokenizer.json")
    if problems:
        raise ValueError(files.first_problems(problems))
    end = backend.token_to_id(special.get("eos_token", ""))
    return tuple(dict.fromkeys(found if end is None else [*found, end]))


def _chat_templates(folder: pathlib.Path, config: dict[str, Any]) -> dict[str, str]:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return {"default": file.read_text(encoding="utf-8")}
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return {"default": template} if template else {}


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file, {} without one."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must hold a JSON object, got {type(values).__name__}")
    return values
