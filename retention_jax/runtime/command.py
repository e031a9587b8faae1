"""How a command starts and ends: its flags, and one line for an error that its user can mend.

This file imports nothing of the package at its top, so that `launch/local.py`, which only starts other programs, can
load it without waiting for jax.
"""

import contextlib
import io
import os
import re
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

    def parsed(arguments: list[str]) -> list[str]:
        with one_line_errors(_debug_is_asked(arguments)):
            return parse(flags.FLAGS, arguments)

    def guarded(arguments: list[str]) -> Any:
        with one_line_errors(flags.FLAGS.debug):
            status = main(arguments)
            sys.stdout.flush()  # here, so that a closed pipe is met here
        return status

    app.run(guarded, flags_parser=parsed)
    raise AssertionError("app.run ends the process")


def parse(values: flags.FlagValues, arguments: list[str]) -> list[str]:
    """Sets the flags and returns the arguments that are none.

    Raises:
      flags.Error: on a flag that is wrong.
      ValueError: when a `--config` file cannot be read or raises, or lacks a field that a flag is to override. Such a
        file is a program, which may raise anything, and ml_collections passes most of that on.
    """
    try:
        rest = values(arguments)
        if "config" in values and values.config is not None:
            values.config.to_dict()  # ml_collections raises for a file that is not there only where it is used
        return rest
    except (KeyError, AttributeError) as error:
        name = re.sub(r"\W*(\w*).*", r"\1", str(error), flags=re.DOTALL)
        asked = [text.partition("=")[0] for text in arguments if name in re.split(r"[-.=]+", text)]
        hint = re.search(r'Did you mean "(\w+)"', str(error))
        nearest = f"; the nearest is {hint[1]!r}" if hint else ""
        where = asked[0] if asked else _raised_in(error)
        raise ValueError(f"{where}: the configuration has no field {name!r}{nearest}") from error
    except Exception as error:
        if isinstance(error, EXPECTED) and "Traceback" not in str(error):
            raise
        cause = _root(error)
        if isinstance(cause, ValueError):
            raise ValueError(str(cause)) from error
        raise ValueError(f"{_raised_in(cause)}: {type(cause).__name__}: {cause}") from error


def _root(error: BaseException) -> BaseException:
    """What an error came from in the first place."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def _raised_in(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def _debug_is_asked(arguments: list[str]) -> bool:
    """Whether there is a --debug, before flags can be parsed."""
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return any(argument in ("--debug", "-debug", "--debug=true") for argument in before)


@contextlib.contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Turns an expected error in the block into a line on standard error and SystemExit. `debug` adds a traceback."""
    try:
        yield
    except (KeyboardInterrupt, *EXPECTED) as error:
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
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    elif "failure to load" in text and (missing := re.search(r"\[Errno \d+\] ([^:]+): '(.+)'", text)):
        text = f"--config={missing[2]}: {missing[1]}"
    text = re.sub(r"flag --(\w+)=None: Flag --\1 must have a value other than None\.", r"--\1 is needed", text)
    lines = [line.strip() for line in text.splitlines()]
    text = "; ".join(line for line in lines if line)
    plain = isinstance(error, (ValueError, OSError, app.UsageError, flags.Error, ElsewhereError))
    return text if plain and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # standard error may be closed too
        print(text, file=sys.stderr, flush=True)
