"""Flags of commands that write text: one for each field of CacheConfig."""

import dataclasses
import typing
from typing import Any

from absl import flags

from retention_jax.config import CacheConfig, checks, conversion
from retention_jax.policies.table import POLICIES

HELP = {
    "budget": "Average kept entries per layer and head.",
    "recent": "Tokens between two evictions.",
    "policy": f"What chooses the entries to keep: {', '.join(POLICIES)}.",
    "prefill_chunk": "Prompt tokens read at a time; all by default.",
    "protect_first": "First tokens that stay in every head.",
    "protect_last": "Last tokens that stay in every head.",
    "min_per_head": "Best entries that every head keeps.",
    "threshold": "Keep only scores of at least the log of this.",
    "horizon": "Steps of future use that the retention score counts.",
    "local": "The budget for each layer and head, not for all together.",
    "seed": "Of the draws, and of random policies.",
    "observe": "Newest queries that vote, in policies of SnapKV's kind.",
    "pool_width": "Neighbouring entries that share a vote, in the same policies.",
}


def define(values: flags.FlagValues, **defaults: Any) -> None:
    """Defines them; `defaults` are in place of the fields' own."""
    kinds = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool, str: flags.DEFINE_string}
    hints = checks.hints_of(CacheConfig)
    for field in dataclasses.fields(CacheConfig):
        kind = next((k for k in kinds if k in (hints[field.name], *typing.get_args(hints[field.name]))), str)
        default = None if field.default is dataclasses.MISSING else field.default
        told = HELP.get(field.name, "A field of CacheConfig.")
        kinds[kind](field.name, defaults.get(field.name, default), told, flag_values=values)


def read(values: flags.FlagValues) -> CacheConfig:
    """What they say.

    Raises:
      ValueError: as CacheConfig does, and for a policy that needs gates where --gates names none.
    """
    given = {field.name: values[field.name].value for field in dataclasses.fields(CacheConfig)}
    cache = conversion.from_dict(CacheConfig, given, "flags")
    if POLICIES[cache.policy].uses_gates and not values.gates:
        free = [name for name, policy in POLICIES.items() if not policy.uses_gates]
        raise ValueError(f"policy {cache.policy!r} needs --gates; {', '.join(free)} do not")
    return cache
