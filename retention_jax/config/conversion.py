"""Config dataclasses from and to plain values and the ConfigDicts that absl flags override."""

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict, config_dict

C = TypeVar("C")


def from_dict(cls: type[C], values: dict[str, Any], where: str = "config") -> C:
    """Builds a config dataclass from plain values.

    Raises:
      ValueError: on fields that are unknown (naming the nearest known one), missing or of another type (all listed),
        and whatever the dataclass itself refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # C is always a dataclass
    problems, kept = [], {}
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)[0]
            problems.append(f"{where}.{name} is not a field of {cls.__name__}; the nearest is {near!r}")
        elif isinstance(value, dict) and (nested := _dataclass_in(hints[name])):
            try:
                kept[name] = from_dict(nested, value, f"{where}.{name}")
            except ValueError as error:
                problems.append(str(error))
        else:
            converted = _convert(value, hints[name])
            if converted is _MISMATCH:
                wanted = getattr(hints[name], "__name__", str(hints[name])).replace("typing.", "")
                problems.append(
                    f"{where}.{name} must be {hints[name] if 'Literal' in wanted else wanted}, got {value!r}"
                )
            else:
                kept[name] = converted
    required = [
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    problems += [f"{where}.{n} is missing" for n in required if n not in values]
    if problems:
        raise ValueError("\n".join(problems))
    return cls(**kept)


def _dataclass_in(hint: Any) -> type | None:
    return next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)  # type: ignore[arg-type]  # a class: hints hold no instance


_MISMATCH = object()


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, or `_MISMATCH`. Whole numbers stand for floats and lists for tuples; nothing else."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value if value in args else _MISMATCH
    if origin is types.UnionType:
        return next((v for a in args if (v := _convert(value, a)) is not _MISMATCH), _MISMATCH)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return _MISMATCH
        items = tuple(_convert(v, args[0]) for v in value)
        return _MISMATCH if _MISMATCH in items else items
    if hint is types.NoneType:
        return None if value is None else _MISMATCH
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    return _MISMATCH


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested values of a config dataclass, the inverse of `from_dict`."""
    return dataclasses.asdict(config)


def to_config_dict(config: Any) -> ConfigDict:
    """The locked ConfigDict that absl's `--config.field=value` flags override.

    A number, text or switch that is None by default knows its type, so that a flag can set it.
    """
    return config_dict.create(**_typed(type(config), to_dict(config))).lock()


def _typed(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values with a typed placeholder for each None that stands for a number, text or switch."""
    hints = typing.get_type_hints(cls)

    def typed(name: str, value: Any) -> Any:
        if isinstance(value, dict) and (nested := _dataclass_in(hints[name])):
            return _typed(nested, value)
        kind = next((kind for kind in (bool, int, float, str) if kind in typing.get_args(hints[name])), None)
        return config_dict.placeholder(kind) if value is None and kind else value

    return {name: typed(name, value) for name, value in values.items()}


def from_config_dict(cls: type[C], values: ConfigDict) -> C:
    """The dataclass of an (overridden) ConfigDict; raises like `from_dict`."""
    return from_dict(cls, values.to_dict())
