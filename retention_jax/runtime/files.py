"""Files that are whole or not there, and files of JSON lines that a crash can only cut short."""

import contextlib
import fcntl
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple

_MOST_PROBLEMS = 10


def write_atomically(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Lets `write` make the file under a temporary name and renames it: no crash or full disk leaves half a file."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = pathlib.Path(folder, path.name)
        write(temporary)
        temporary.chmod(0o644)  # safetensors writes files that only their owner can read
        os.replace(temporary, path)


def write_folder_atomically(folder: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Lets `write` fill a folder under a temporary name and renames it. There must be no such folder yet."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as around:
        temporary = pathlib.Path(around, folder.name)
        temporary.mkdir()
        write(temporary)
        os.rename(temporary, folder)


def json_line(value: Any) -> bytes:
    """The line of a file that stands for `value`, in UTF-8, without its end.

    Raises:
      ValueError: on NaN and infinities, and on half a surrogate pair, which UTF-8 cannot hold.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


class JsonLines(NamedTuple):
    """What a file of JSON lines holds."""

    values: list[Any]  # of every whole line; a ValueError in place of one that is no JSON
    torn: bytes  # what follows the last line break: the start of a line that a crash cut off


def read_json_lines(path: pathlib.Path) -> JsonLines:
    """All lines of a file that `append_json_line` wrote; none when there is no such file."""
    *whole, torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return JsonLines([_parsed(line) for line in whole], torn)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"not valid JSON: {error}")


def open_json_lines(path: pathlib.Path) -> IO[bytes]:
    """The file, to be appended to; made with its folder where it is not there, and without a torn last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+b")
    end = file.seek(0, os.SEEK_END)
    whole = end
    while whole and not (file.seek(whole - 1), file.read(1))[1] == b"\n":
        whole -= 1
    if whole < end:
        file.truncate(whole)
    return file


def append_json_line(target: pathlib.Path | IO[bytes], *values: Any) -> None:
    """Appends a line for each value, all at once, and returns when they are on disk.

    Args:
      target: a file that `open_json_lines` has opened, or its path.
      values: what the lines stand for, as in `json_line`.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_json_lines(target)) if isinstance(target, pathlib.Path) else target
        file.write(b"".join(json_line(value) + b"\n" for value in values))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Holds a file for this process alone, and makes it where it is not there.

    The file is given back at the end of the block, and when the process dies, whatever kills it.

    Raises:
      ValueError: when another process holds it.
    """
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: in use by another process; wait until it ends") from None
        yield


def first_problems(problems: Sequence[str], most: int = _MOST_PROBLEMS) -> str:
    """A message of the first few problems, a line each, and how many there are beside them."""
    more = [f"and {len(problems) - most:,} more"] if len(problems) > most else []
    return "\n".join([*problems[:most], *more])
