"""A small tokenizer, a chat template with all the quirks of Qwen3's, and data files."""

import json
import pathlib
from typing import Any

import pyarrow
import pyarrow.parquet
import tokenizers

from retention_jax.text import tokenizer

TEXT = ("the quick brown fox jumps over the lazy dog", "what is two plus two? two plus two is four.")

# Like Qwen3's: the last turn has thinking, empty or not; earlier ones lose it; thinking can be switched off.
TEMPLATE = """
{%- set ns = namespace(query=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.query = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
    {%- set content, thought = m.content, m.reasoning_content or '' -%}
    {%- if m.role == 'assistant' and '</think>' in content -%}
        {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|start|>' + m.role + '\\n' -}}
    {%- if m.role == 'assistant' and loop.index0 > ns.query -%}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}
    {%- endif -%}
    {{- content + '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start|>assistant\\n' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""


def save_tokenizer(folder: pathlib.Path, **config: Any) -> tokenizers.Tokenizer:
    """A byte-level tokenizer of a few words with TEMPLATE in a folder; special tokens are ids 0 to 2."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|start|>", "<|end|>", "<|bos|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.save(str(folder / "tokenizer.json"))
    values = {"eos_token": "<|end|>", "chat_template": TEMPLATE, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return backend


def make_tokenizer(folder: pathlib.Path, **config: Any) -> tokenizer.Tokenizer:
    """The tokenizer that `save_tokenizer` saves, loaded from its folder."""
    save_tokenizer(folder, **config)
    return tokenizer.load(folder)


def write_rows(path: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    """A file of rows, of the kind its ending says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text)
    return path
