"""What the buffer of one run keeps."""

import dataclasses

from retention_jax.config.checks import ConfigError, check_types, require
from retention_jax.policies import table
from retention_jax.policies.table import POLICIES, Policy


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """The global key/value buffer of one run: how much is kept, and by which score (`policies/table.py` lists them)."""

    budget: int  # M
    recent: int = 128  # R: tokens between two evictions
    policy: str = table.DEFAULT
    prefill_chunk: int | None = None  # tokens of the prompt read at a time; None reads it in one pass, then evicts
    protect_first: int = 0  # the first tokens of the sequence stay in every head
    protect_last: int = 0  # the last tokens of the sequence stay in every head
    min_per_head: int = 0  # every head keeps its best few; the rest of the budget is ranked globally
    threshold: float | None = None  # keep only score >= log(threshold), still capped by the budget
    horizon: int = 1  # steps of future use that the score counts
    local: bool = False  # M for each layer and head, in place of L*K*M for all together
    seed: int = 0  # of random draws; said of a run, whether or not its policy draws
    observe: int = 32  # how many of the newest queries vote. Their entries stay, as far as half the budget.
    pool_width: int = 7  # neighbouring entries that share the best vote among them

    def __post_init__(self) -> None:
        check_types(self)
        if self.policy not in POLICIES:
            full = "; for a cache that keeps everything, use CacheConfig.full(tokens)" * (self.policy == table.FULL)
            raise ConfigError("CacheConfig", [table.unknown(self.policy) + full])
        reserved = max(self.protect_first + self.protect_last, self.min_per_head)
        least = self.row.least_in_a_head(self.budget, self.newest)
        default = {field.name: field.default for field in dataclasses.fields(self)}
        ranking_all = ", ".join(row.name for row in POLICIES.values() if row.scope == "all")
        honour = lambda option: ", ".join(row.name for row in POLICIES.values() if option in row.options)
        require(
            self,
            (self.budget >= 1, f"budget must be at least 1, got {self.budget}"),
            (self.recent >= 1, f"recent must be at least 1, got {self.recent}"),
            (
                self.prefill_chunk is None or self.prefill_chunk >= 1,
                f"prefill_chunk must be None or at least 1, got {self.prefill_chunk}",
            ),
            *[
                (getattr(self, n) >= 0, f"{n} must not be negative, got {getattr(self, n)}")
                for n in ("protect_first", "protect_last", "min_per_head")
            ],
            (
                reserved <= self.budget,
                f"protect_first + protect_last ({self.protect_first} + {self.protect_last}) and min_per_head "
                f"({self.min_per_head}) must each fit in the budget of {self.budget} entries a head",
            ),
            (
                self.threshold is None or 0 < self.threshold <= 1,
                f"threshold must be None or in (0, 1], got {self.threshold}",
            ),
            (
                self.threshold != 1 or reserved > 0,
                "threshold=1 keeps nothing but what is protected, and nothing is: lower it, or set min_per_head, "
                "protect_first or protect_last",
            ),
            (self.horizon >= 1, f"horizon must be at least 1, got {self.horizon}"),
            (self.observe >= 1, f"observe must be at least 1, got {self.observe}"),
            (
                self.pool_width >= 1 and self.pool_width % 2 == 1,
                f"pool_width must be odd and at least 1, got {self.pool_width}",
            ),
            *[
                (
                    option in self.row.options or getattr(self, option) == default[option],
                    f"{option} belongs to the policies {honour(option)}; got {option}={getattr(self, option)} with "
                    f"policy={self.policy!r}",
                )
                for option in table.special_options()
            ],
            (
                self.row.scope == "all" or not self.local,
                f"local=True goes with the policies {ranking_all}; {self.policy!r} says itself what a head gets",
            ),
            (
                reserved <= max(least, 0) or reserved > self.budget,
                f"what is protected or kept in every head must fit in the smallest head that {self.policy!r} makes, "
                f"{least} entries, got {reserved}",
            ),
        )

    @classmethod
    def full(cls, tokens: int, *, recent: int = 128, prefill_chunk: int | None = None) -> "CacheConfig":
        """A cache that keeps everything of a sequence of up to `tokens` tokens, prompt and answer together."""
        return cls(budget=tokens, recent=recent, policy=table.OF_FULL, prefill_chunk=prefill_chunk)

    @property
    def row(self) -> Policy:
        """The policy's row of the table."""
        return POLICIES[self.policy]

    @property
    def newest(self) -> int:
        """The newest tokens that the policy itself keeps in every head; at most half the budget."""
        return self.row.newest(self.budget, self.observe)

    @property
    def options(self) -> table.Options:
        """What the policy's score function is told."""
        return table.Options(self.budget, self.horizon, self.seed, self.observe, self.pool_width, self.newest)
