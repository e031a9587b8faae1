"""Files of data: on this machine, or on the Hugging Face hub.

A source is a file, a glob of files, or `hf://datasets/ORG/NAME/FILE` (also a glob, NAME@REVISION pins it):

    *.jsonl    an object a line          *.json    a list of objects, or an object a line          *.parquet

Long text may also lie in a local file with any other ending, as it is.
"""

import glob
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import huggingface_hub
import pyarrow
import pyarrow.parquet

from retention_jax.runtime import files
from retention_jax.text.tokenizer import check_text

_ENDINGS = (".jsonl", ".json", ".parquet")


def files_of(source: str) -> list[pathlib.Path]:
    """The files of one source, sorted by name; those of the hub are downloaded once.

    Raises:
      ValueError: when there are none, one has an unknown ending, or the download fails.
    """
    pattern = _download(source) if source.startswith("hf://") else pathlib.Path(source).expanduser()
    found = [pattern] if pattern.is_file() else sorted(map(pathlib.Path, glob.glob(str(pattern), recursive=True)))
    found = [path for path in found if path.is_file()]
    if not found:
        hint = f"; it is a folder, {source}/* would be its files" if pattern.is_dir() else ""
        raise ValueError(f"{source!r} names no file{hint}")
    if unknown := [str(path) for path in found if path.suffix not in _ENDINGS]:
        raise ValueError(f"{unknown[0]!r} must end in one of {', '.join(_ENDINGS)}")
    return found


def beside(source: str, name: str) -> pathlib.Path:
    """A file in the folder of a source's first file, which need not be there; that of the hub is downloaded too."""
    if source.startswith("hf://"):
        return _download(f"{source.rpartition('/')[0]}/{name}")
    return files_of(source)[0].with_name(name)


def _download(source: str) -> pathlib.Path:
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", source)
    if match is None:
        raise ValueError(f"{source!r} must be hf://datasets/ORG/NAME/FILE")
    repository, revision, inside = match.groups()
    try:
        folder = huggingface_hub.snapshot_download(
            repository, repo_type="dataset", revision=revision, allow_patterns=[inside]
        )
    except Exception as error:  # of the hub's own, of HTTP and of the file system
        raise ValueError(f"{source!r} cannot be downloaded: {error}") from error
    return pathlib.Path(folder, inside)


def objects(source: str) -> list[dict[str, Any]]:
    """All rows of all files of a source, which must be objects.

    Raises:
      ValueError: as `files_of` does, and when rows are none, by file and line or row, the first ten at once.
    """
    found, problems = [], []
    for path in files_of(source):
        for place, row in rows(path):
            if isinstance(row, dict):
                found.append(row)
            else:
                problems.append(f"{path}, {place}: {row if isinstance(row, ValueError) else 'must be an object'}")
    if problems or not found:
        raise ValueError(files.first_problems(problems) or f"{source}: has no rows")
    return found


def text(source: str) -> str:
    """The text of a local plain file, or of a source's rows: their field `text`, with an empty line between two.

    Raises:
      ValueError: when there is none or it is not UTF-8, and as `objects` does.
    """
    path = pathlib.Path(source).expanduser()
    if path.is_file() and path.suffix not in _ENDINGS:
        try:
            found = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8: {error}") from error
    else:
        texts = [row.get("text") for row in objects(source)]
        if bad := [number for number, value in enumerate(texts, 1) if not isinstance(value, str)]:
            raise ValueError(f"{source}, row {bad[0]}: has no field `text` that is a text; {len(bad)} rows have none")
        found = "\n\n".join(map(str, texts))
    if not found.strip():
        raise ValueError(f"{source}: has no text")
    return found


def rows(
    path: pathlib.Path, needed: Callable[[Sequence[str]], list[str] | None] = lambda columns: None
) -> Iterator[tuple[str, Any]]:
    """The place and value of every row of one file, or a ValueError in the value's place.

    `needed` says which of a Parquet file's columns are read, None for all; JSON has to be read whole.
    """
    match path.suffix:
        case ".jsonl":
            return _json_lines(path)
        case ".json":
            return _json(path)
        case ".parquet":
            return _parquet(path, needed)
        case _:
            raise ValueError(f"{path}: must end in one of {', '.join(_ENDINGS)}")


def _json_lines(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", _parsed(line)


def _json(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        is_list = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not is_list:
        yield from _json_lines(path)
        return
    rows = _parsed(path.read_bytes())
    if isinstance(rows, ValueError):
        yield "list", rows
    else:
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _parsed(text: bytes) -> Any:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        return ValueError(f"not valid JSON: {error.msg} at {at}")
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON: {error}")
    try:
        if re.search(rb"\\u[dD][89a-fA-F]", text):  # else there is no half of a surrogate pair
            check_text(json.dumps(found, ensure_ascii=False))
    except ValueError as error:
        return error
    return found


def _parquet(path: pathlib.Path, needed: Callable[[Sequence[str]], list[str] | None]) -> Iterator[tuple[str, Any]]:
    done = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256, columns=needed(file.schema_arrow.names)):
                yield from ((f"row {number}", row) for number, row in enumerate(batch.to_pylist(), done + 1))
                done += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        yield f"after row {done}", ValueError(f"not valid Parquet: {error}")
