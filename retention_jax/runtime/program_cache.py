"""Compiled programs kept on disk, so that a second start of the same command does not compile again."""

import os
import pathlib

import jax


def keep_programs() -> None:
    """Turns JAX's persistent compilation cache on; called once, where a command starts.

    In `~/.cache/retention_jax/programs`, or below `$XDG_CACHE_HOME`. `JAX_COMPILATION_CACHE_DIR` names another folder
    and `JAX_ENABLE_COMPILATION_CACHE=false` turns it off, as JAX has it.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "retention_jax" / "programs"))
