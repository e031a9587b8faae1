"""Config dataclasses from and to plain values and the ConfigDicts that absl flags override."""

import dataclasses
import difflib
import typing
from typing import Any, TypeVar

from ml_collections import ConfigDict, config_dict

from retention_jax.config import checks

C = TypeVar("C")


def from_dict(cls: type[C], values: dict[str, Any], where: str = "config") -> C:
    """Builds a config dataclass from plain values.

    Raises:
      ValueError: on fields that are unknown (naming the nearest known one), missing or of another type (all listed),
        and whatever the dataclass itself refuses.
    """
    hints = checks.hints_of(cls)
    problems, kept = [], {}
    for name, value in values.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1, cutoff=0.0)[0]
            problems.append(f"{where}.{name} is not a field of {cls.__name__}; the nearest is {near!r}")
        elif isinstance(value, dict) and (nested := _dataclass_in(hints[name])):
            try:
                kept[name] = from_dict(nested, value, f"{where}.{name}")
            except ValueError as error:
                problems.append(str(error))
        elif (converted := checks.convert(value, hints[name])) is checks.MISMATCH:
            problems.append(checks.mismatch(f"{where}.{name}", value, hints[name]))
        else:
            kept[name] = converted
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]  # C is always a dataclass
    nothing = dataclasses.MISSING
    required = [f.name for f in fields if f.default is nothing and f.default_factory is nothing]
    problems += [f"{where}.{name} is missing" for name in required if name not in values]
    if problems:
        raise ValueError("\n".join(problems))
    try:
        return cls(**kept)
    except checks.ConfigError as error:
        raise checks.ConfigError(where, error.problems) from None


def _dataclass_in(hint: Any) -> type | None:
    return next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)  # type: ignore[arg-type]  # a class: hints hold no instance


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
    hints = checks.hints_of(cls)

    def typed(name: str, value: Any) -> Any:
        if isinstance(value, dict) and (nested := _dataclass_in(hints[name])):
            return _typed(nested, value)
        kind = next((kind for kind in (bool, int, float, str) if kind in typing.get_args(hints[name])), None)
        return config_dict.placeholder(kind) if value is None and kind else value

    return {name: typed(name, value) for name, value in values.items()}


def from_config_dict(cls: type[C], values: ConfigDict) -> C:
    """The dataclass of an (overridden) ConfigDict; raises like `from_dict`."""
    return from_dict(cls, values.to_dict())
