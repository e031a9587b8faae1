"""The buffer that a policy's name in an evaluation stands for, and the options that it runs with.

A name is `full`, the cache that keeps everything, a policy of the table, or `NAME_local` for a policy that ranks all
layers and heads together: the same score, but each head has a budget of its own.
"""

import dataclasses
from typing import Any

from retention_jax.config import CacheConfig, EvalConfig
from retention_jax.policies.table import FULL, POLICIES, Policy, special_options

_LOCAL = "_local"

# Options of the cache that an EvalConfig holds. The seed is not among them: it also says which sequences there are.
OPTIONS = tuple(
    field.name
    for field in dataclasses.fields(CacheConfig)
    if field.name in EvalConfig.__dataclass_fields__ and field.name != "seed"
)


def names() -> tuple[str, ...]:
    """All names that an evaluation knows."""
    of_policy = lambda row: (row.name, row.name + _LOCAL) if row.scope == "all" else (row.name,)
    return (FULL, *(name for row in POLICIES.values() for name in of_policy(row)))


def policy_of(name: str) -> Policy | None:
    """The row of the table behind a name; None for the full cache.

    Raises:
      ValueError: on an unknown name.
    """
    if name not in names():
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(names())}")
    return None if name == FULL else POLICIES[name if name in POLICIES else name.removesuffix(_LOCAL)]


def uses_gates(name: str) -> bool:
    """Whether what a name keeps depends on gates; raises as `policy_of` does."""
    policy = policy_of(name)
    return policy is not None and policy.uses_gates


def options(config: EvalConfig, name: str) -> dict[str, Any]:
    """The fields of CacheConfig, beside policy and budget, that a policy runs with in this evaluation.

    Only options that the policy honours: a policy without gates has no horizon. One seed serves all of the
    evaluation's seeds, since the buffer's configuration is compiled in.
    """
    policy = policy_of(name)
    found = {option: getattr(config, option) for option in OPTIONS if _honours(policy, option)}
    if policy is None:
        return found
    return found | {"local": name not in POLICIES} | ({"seed": config.seed} if policy.seeded else {})


def buffer_of(config: EvalConfig, name: str, budget: int, length: int) -> CacheConfig:
    """The buffer that a name stands for, with the options of the evaluation that its policy honours.

    Args:
      config: holds the options.
      name: one of `names()`.
      budget: kept entries per layer and head.
      length: tokens of the longest sequence. The full cache has room for so many, whatever the budget.

    Raises:
      ValueError: on an unknown name, and as `CacheConfig` does.
    """
    policy, found = policy_of(name), options(config, name)
    if policy is None:
        return CacheConfig.full(length, **found)
    return CacheConfig(budget=budget, policy=policy.name, **found)


def cells(config: EvalConfig, length: int) -> list[tuple[str, int]]:
    """Name and budget of every row of one task and length. The full cache is one row, and its budget the length."""
    full = [(FULL, length)] if FULL in config.policies else []
    return full + [(name, budget) for name in config.policies if name != FULL for budget in config.budgets]


def problems(config: EvalConfig) -> list[str]:
    """What is wrong with the policies, budgets and options of an evaluation, in words."""
    known = [name for name in config.policies if name in names()]
    found = [f"unknown policy {n!r}; known: {', '.join(names())}" for n in config.policies if n not in known]
    for option in OPTIONS:
        value, default = getattr(config, option), EvalConfig.__dataclass_fields__[option].default
        if value != default and known and not any(_honours(policy_of(name), option) for name in known):
            honour = [name for name in names() if _honours(policy_of(name), option)]
            found.append(f"{option}={value} changes nothing for {', '.join(known)}; it goes with {', '.join(honour)}")
    longest = max(config.lengths)
    for name, budget in cells(config, longest):
        try:
            if name in known:
                buffer_of(config, name, budget, longest)
        except ValueError as error:
            found.append(f"{name} with {budget} entries: {error}")
    return found


def _honours(policy: Policy | None, option: str) -> bool:
    """Whether an option can change what a policy keeps; None is the full cache."""
    if policy is None:
        return option in ("recent", "prefill_chunk")
    return option in policy.options or option not in special_options()
