"""Files that are whole or not there."""

import os
import pathlib
import tempfile
from collections.abc import Callable


def write_atomically(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Lets `write` make the file under a temporary name and renames it: no crash or full disk leaves half a file."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = pathlib.Path(folder, path.name)
        write(temporary)
        temporary.chmod(0o644)  # safetensors writes files that only their owner can read
        os.replace(temporary, path)
