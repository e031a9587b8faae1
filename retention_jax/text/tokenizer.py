"""Tokenizers of Hugging Face checkpoint folders.

tokenizer.json              vocabulary and rules, read by the `tokenizers` library
tokenizer_config.json       special tokens, chat template
special_tokens_map.json     special tokens, where the file above does not name them
chat_template.jinja         chat template, in place of the one above
generation_config.json      stop tokens, sampling defaults
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers.decoders import DecodeStream

# What chat templates know the special tokens by.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer(NamedTuple):
    """Text to token ids and back, and what the folder says about generation."""

    backend: tokenizers.Tokenizer
    where: pathlib.Path  # the folder, for messages
    special_tokens: dict[str, str]  # by the names of `_SPECIAL`, those that the folder has
    bos: int | None  # what plain text begins with; None where it is given no such token
    stop_tokens: tuple[int, ...]  # each ends a reply
    chat_templates: dict[str, str]  # Jinja source by name: `default`, perhaps `tool_use`; empty without templates
    generation: dict[str, Any]  # generation_config.json, {} without one

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id. A model may have more rows than that, for padding."""
        return max(self.backend.get_vocab().values()) + 1

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Token ids of a text; special tokens that are written out in it become themselves.

        `bos` puts the beginning-of-sequence token before plain text, if this tokenizer does so and the text does not
        begin with it already. A rendered chat template writes its own: there, it must be False.
        """
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos, *ids] if bos and self.bos is not None and ids[:1] != [self.bos] else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def stream(self) -> Callable[[Iterable[int]], str]:
        """A function to call with the next token ids again and again: what more can be shown, in whole characters.

        What is still incomplete when the ids end is never shown.
        """
        state = DecodeStream(skip_special_tokens=True)
        return lambda ids: "".join(state.step(self.backend, token) or "" for token in ids)

    def special_strings(self) -> frozenset[str]:
        """Text of every special token."""
        return frozenset(t.content for t in self.backend.get_added_tokens_decoder().values() if t.special)


def load(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Raises:
      ValueError: when the folder has no tokenizer.json, a file is damaged, or a stop token is not in the vocabulary.
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
        stop_tokens=_stop_tokens(folder, backend, generation, special),
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


def _stop_tokens(
    folder: pathlib.Path, backend: tokenizers.Tokenizer, generation: dict[str, Any], special: dict[str, str]
) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, one id or several, else the tokenizer's end-of-sequence token."""
    ids = generation.get("eos_token_id")
    if ids is None:
        eos = backend.token_to_id(special.get("eos_token", ""))
        return () if eos is None else (eos,)
    ids = ids if isinstance(ids, list) else [ids]
    if bad := [i for i in ids if not isinstance(i, int) or backend.id_to_token(i) is None]:
        raise ValueError(f"{folder / 'generation_config.json'}: eos_token_id {bad[0]!r} is no token of tokenizer.json")
    return tuple(ids)


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
