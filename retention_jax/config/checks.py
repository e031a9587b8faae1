"""How a configuration says everything that is wrong with it at once."""

import dataclasses
import difflib
import functools
import numbers
import types
import typing
from typing import Any, Literal


class ConfigError(ValueError):
    """What is wrong with one configuration: `problems`, each beginning with a field's name."""

    def __init__(self, where: str, problems: list[str]) -> None:
        super().__init__(f"{where}: " + "; ".join(problems))
        self.problems = problems


def require(owner: object, *checks: tuple[bool, str]) -> None:
    """Raises ConfigError with the text of every check that does not hold."""
    problems = [text for ok, text in checks if not ok]
    if problems:
        raise ConfigError(type(owner).__name__, problems)


def check_types(config: Any) -> None:
    """Raises ConfigError naming every field of a frozen dataclass that has not the type of its annotation.

    The first line of every `__post_init__`, so that the checks of values behind it can rely on types. Whole numbers
    stand for floats, NumPy's numbers for Python's, and lists for tuples; they are converted.
    """
    problems = []
    for name, hint in hints_of(type(config)).items():
        converted = convert(value := getattr(config, name), hint)
        if converted is MISMATCH:
            problems.append(mismatch(name, value, hint))
        elif converted is not value:
            object.__setattr__(config, name, converted)
    if problems:
        raise ConfigError(type(config).__name__, problems)


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


MISMATCH = object()


def convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, or `MISMATCH`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value if any(type(value) is type(arg) and value == arg for arg in args) else MISMATCH
    if origin is types.UnionType:
        return next((v for arg in args if (v := convert(value, arg)) is not MISMATCH), MISMATCH)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return MISMATCH
        items = tuple(convert(v, args[0]) for v in value)
        if MISMATCH in items:
            return MISMATCH
        return value if isinstance(value, tuple) and all(a is b for a, b in zip(items, value, strict=True)) else items
    if hint is types.NoneType:
        return None if value is None else MISMATCH
    if hint in (int, float) and type(value) is not hint:
        wanted = numbers.Integral if hint is int else numbers.Real
        return hint(typing.cast(Any, value)) if isinstance(value, wanted) and not isinstance(value, bool) else MISMATCH
    return value if isinstance(value, hint) else MISMATCH


def mismatch(name: str, value: Any, hint: Any) -> str:
    """Says that a field has another type than it must have."""
    choices = [arg for arg in typing.get_args(hint) if isinstance(arg, str)]
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.0) if isinstance(value, str) and choices else []
    return f"{name} must be {_spoken(hint)}, got {value!r}" + (f"; the nearest is {near[0]!r}" if near else "")


_SPOKEN = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", types.NoneType: "None"}


def _spoken(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(repr, args))
    if origin is types.UnionType:
        return " or ".join(_spoken(arg) for arg in args)
    if origin is tuple:
        return f"a tuple, each {_spoken(args[0])}"
    return _SPOKEN.get(hint, f"a {hint.__name__}")
