"""Nested objects, as configurations and journals are written."""

from typing import Any


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Names and both values of what differs in two nested objects."""
    a, b = _flat(before), _flat(now)
    return [(name, a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
