"""How a command starts and ends: its flags, and one line for an error that its user can mend.

This file imports nothing of the package at its top, so that `launch/local.py`, which only starts other programs, can
load it without waiting for jax.
"""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from absl import app, flags

USER_ERROR = 2  # exit status of an error that the user can mend, as of argparse and of shells
INTERRUPTED = 130  # 128 + SIGINT
CLOSED_PIPE = 141  # 128 + SIGPIPE


class ElsewhereError(RuntimeError):
    """Another process of the same run has failed, and says why; this one ends with it."""


# Errors that tell of the input, not of a mistake in the program.
EXPECTED = (ValueError, OSError, ModuleNotFoundError, FloatingPointError, app.UsageError, flags.Error, ElsewhereError)


def run(main: Callable[[list[str]], Any], define_flags: Callable[[flags.FlagValues], None] | None = None) -> NoReturn:
    """Runs a command and ends the process; the last line of every file that is one.

    It has jax's flags, compiled programs are kept on disk, and `--debug` shows the traceback of an error.

    Args:
      main: gets the arguments that are no flags, the program's name first. What it returns is the exit status; None
        is 0.
      define_flags: defines the command's own flags; None where they are defined already.
    """
    import jax

    from retention_jax.runtime import program_cache

    jax.config.config_with_absl()
    program_cache.keep_programs()
    run_without_jax(main, define_flags)


def run_without_jax(
    main: Callable[[list[str]], Any], define_flags: Callable[[flags.FlagValues], None] | None = None
) -> NoReturn:
    """`run` without what concerns jax."""
    if define_flags is not None:
        define_flags(flags.FLAGS)
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a character that a terminal lacks must not end a run

    def parse(arguments: list[str]) -> list[str]:
        with one_line_errors(_debug_is_asked(arguments), (Exception,)):  # a config file may raise anything
            return flags.FLAGS(arguments)

    def guarded(arguments: list[str]) -> Any:
        with one_line_errors(flags.FLAGS.debug):
            status = main(arguments)
            sys.stdout.flush()  # here, so that a closed pipe is met here
        return status

    app.run(guarded, flags_parser=parse)
    raise AssertionError("app.run ends the process")


def _debug_is_asked(arguments: list[str]) -> bool:
    """Whether there is a --debug, before flags can be parsed."""
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return any(argument in ("--debug", "-debug", "--debug=true") for argument in before)


@contextlib.contextmanager
def one_line_errors(debug: bool, expected: tuple[type[BaseException], ...] = EXPECTED) -> Iterator[None]:
    """Turns an expected error in the block into a line on standard error and SystemExit.

    Args:
      debug: shows the traceback too.
      expected: which errors; all others pass.
    """
    try:
        yield
    except (KeyboardInterrupt, *expected) as error:
        raise SystemExit(report(error, debug)) from None


def report(error: BaseException, debug: bool) -> int:
    """Says in one line on standard error what went wrong, with the traceback on `debug`; the exit status."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has gone. What Python still wants to write when it ends goes nowhere.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    if isinstance(error, KeyboardInterrupt):
        _say("interrupted")
        return INTERRUPTED
    _say(f"error: {message(error)}")
    return USER_ERROR


def message(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    else:
        text = str(error)
    lines = [line.strip() for line in text.splitlines()]
    text = "; ".join(line for line in lines if line)
    plain = isinstance(error, (ValueError, OSError, app.UsageError, flags.Error, ElsewhereError))
    return text if plain and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # standard error may be closed too
        print(text, file=sys.stderr, flush=True)
