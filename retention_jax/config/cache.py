"""What the buffer of one run keeps."""

import dataclasses
from typing import Literal

from retention_jax.config.checks import check_types, require

Policy = Literal[
    "retention",
    "streaming",
    "random",
    "random_keep_prompt",
    "key_norm",
    "key_diff",
    "tova",
    "h2o",
    "snapkv",
    "pyramidkv",
    "adakv",
    "rkv",
    "expected_attention",
    "oracle",
]
# Policies that rank the entries of all layers and heads together; the others fix what each head or layer gets.
GLOBAL = ("retention", "streaming", "random", "random_keep_prompt", "oracle")
OBSERVING = ("snapkv", "pyramidkv", "adakv", "rkv")  # the newest queries vote
PYRAMID = 20  # PyramidKV's beta: the last layer gets a 20th of the mean (arXiv 2406.02069)


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """The global key/value buffer of one run: how much is kept, and by which score (`policies.py` says how)."""

    budget: int  # M
    recent: int = 128  # R: tokens between two evictions
    policy: Policy = "retention"
    prefill_chunk: int | None = None  # tokens of the prompt read at a time; None reads it in one pass, then evicts
    protect_first: int = 0  # the first tokens of the sequence stay in every head
    protect_last: int = 0  # the last tokens of the sequence stay in every head
    min_per_head: int = 0  # every head keeps its best few; the rest of the budget is ranked globally
    threshold: float | None = None  # keep only score >= log(threshold), still capped by the budget
    horizon: int = 1  # steps of future use that the retention score counts
    local: bool = False  # M for each layer and head, in place of L*K*M for all together
    seed: int = 0  # of the random policies
    # snapkv, pyramidkv, adakv, rkv: how many of the newest queries vote. Their entries stay, as far as half the budget.
    observe: int = 32
    pool_width: int = 7  # neighbouring entries that share the best vote among them, in the same policies

    def __post_init__(self) -> None:
        check_types(self)
        reserved = max(self.protect_first + self.protect_last, self.min_per_head)
        least = self.newest + (self.budget - self.newest) // PYRAMID
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
            (self.horizon >= 1, f"horizon must be at least 1, got {self.horizon}"),
            (
                self.policy == "retention" or (self.horizon == 1 and self.threshold is None),
                f"horizon and threshold belong to policy='retention', got policy={self.policy!r}",
            ),
            (
                self.policy in GLOBAL or not self.local,
                f"local=True goes with the policies {', '.join(GLOBAL)}; {self.policy!r} says itself what a head gets",
            ),
            (self.observe >= 1, f"observe must be at least 1, got {self.observe}"),
            (
                self.pool_width >= 1 and self.pool_width % 2 == 1,
                f"pool_width must be odd and at least 1, got {self.pool_width}",
            ),
            (
                self.policy in OBSERVING or (self.observe, self.pool_width) == (32, 7),
                f"observe and pool_width belong to the policies {', '.join(OBSERVING)}, got policy={self.policy!r}",
            ),
            (
                self.policy != "pyramidkv" or reserved <= least,
                f"what is protected or kept in every head must fit in pyramidkv's smallest layer, {least} entries a "
                f"head, got {reserved}",
            ),
        )

    @property
    def newest(self) -> int:
        """The newest tokens that the policy itself keeps in every head; at most half the budget."""
        if self.policy == "h2o":
            return self.budget // 2
        return min(self.observe, self.budget // 2) if self.policy in OBSERVING else 0
