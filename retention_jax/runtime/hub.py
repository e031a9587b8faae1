"""Where a checkpoint's files are: a folder, the package itself, or the Hugging Face hub."""

import os
import pathlib
import re

import huggingface_hub

DOWNLOADED = ("*.json", "*.jinja", "model*.safetensors")  # nothing that could carry code
BUILTIN = pathlib.Path(__file__).parent.parent / "checkpoints"


def resolve(name: str | os.PathLike, revision: str | None = None, files: tuple[str, ...] = DOWNLOADED) -> pathlib.Path:
    """The folder a name stands for: a folder, `builtin:NAME` for one shipped with the package, or a hub repository.

    A repository's `files` are downloaded into the cache of huggingface_hub, which goes by its own environment variables
    (HF_HUB_OFFLINE, HF_HOME, HF_TOKEN).

    Raises:
      ValueError: when it is none of these, or cannot be had.
    """
    text = os.fspath(name)
    path = BUILTIN / text.removeprefix("builtin:") if text.startswith("builtin:") else pathlib.Path(text).expanduser()
    if path.is_dir():
        return path
    if text.startswith("builtin:"):
        known = ", ".join(f"builtin:{folder.name}" for folder in sorted(BUILTIN.iterdir()) if folder.is_dir())
        raise ValueError(f"{name}: not shipped with the package, which has {known}")
    if isinstance(name, os.PathLike) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text):
        raise ValueError(f"{name}: no such checkpoint folder")
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(text, revision=revision, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name}: no such checkpoint folder, and not to be had from the hub: {reason}") from error
