"""What an evaluation can be asked for."""

import dataclasses

from retention_jax.config.cache import CacheConfig
from retention_jax.config.checks import check_types, require
from retention_jax.policies.table import FULL


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is evaluated: every task x length x policy x budget.

    Tasks are of three kinds. Sequences (recall, text, perplexity) are read token by token, over several seeds, and each
    next token is predicted. Faithfulness compares predictions along the full cache's own answers to prompts. All other
    tasks have questions, and the model writes answers.

    Options of the cache have the names that they have in CacheConfig. Each applies to the policies that honour it.
    """

    tasks: tuple[str, ...] = ("recall",)  # () evaluates nothing
    policies: tuple[str, ...] = (FULL, CacheConfig.policy)  # names as in `evaluation/buffers.py`
    budgets: tuple[int, ...] = (16, 32, 48)
    lengths: tuple[int, ...] = (192, 768)
    recent: int = 8  # cache: tokens between two evictions
    prefill_chunk: int | None = CacheConfig.prefill_chunk  # cache, for answers: prompt tokens read at a time
    protect_first: int = CacheConfig.protect_first  # cache
    protect_last: int = CacheConfig.protect_last  # cache
    min_per_head: int = CacheConfig.min_per_head  # cache
    threshold: float | None = CacheConfig.threshold  # cache
    horizon: int = CacheConfig.horizon  # cache
    observe: int = CacheConfig.observe  # cache
    pool_width: int = CacheConfig.pool_width  # cache
    examples: int = 32  # sequences: how many for each seed
    seeds: int = 5  # sequences: how many seeds, one after another from `seed`
    # The first of `seeds` for sequences, and what draws start from for answers. A random policy uses `seed` alone for
    # all sequences. So intervals over seeds do not show how much such a policy's own draws vary.
    seed: int = 0
    decoys: float = 0.4  # recall: share of slots that are decoys
    sources: tuple[str, ...] = ()  # TASK=SOURCE: where a task's questions are, see `tasks/load.py`
    limit: int | None = None  # answers: the task's first so many problems; None for all, 100 of `conversation`
    samples: int = 1  # answers: to each question
    temperature: float = 0.0  # answers: 0 is greedy
    top_p: float = 1.0  # answers: draw from the fewest likeliest tokens of this probability together
    max_new_tokens: int | None = None  # answers: in place of what the task says
    query_aware: bool = False  # answers: False evicts from the context before the question is read
    context: int | None = None  # answers: tokens of prompt and answers; None: as many as the model was made to read
    batch_size: int = 8  # answers: problems read together, by all devices of a mesh
    enable_thinking: bool | None = None  # answers: given to the chat template; None leaves it to the template
    judge_url: str = ""  # longmemeval: OpenAI-compatible endpoint of the model that grades
    judge_model: str = ""  # longmemeval
    judge_tokens: int = 10  # longmemeval: of a verdict, as published; a judge that thinks first needs more

    def __post_init__(self) -> None:
        check_types(self)
        parts = [(text, *text.partition("=")[::2]) for text in self.sources]
        require(
            self,
            (bool(self.policies and self.budgets and self.lengths), "no list but tasks may be empty"),
            (min(self.budgets, default=1) >= 1, f"budgets must be at least 1, got {self.budgets}"),
            (min(self.lengths, default=2) >= 2, f"lengths must be at least 2, got {self.lengths}"),
            (self.recent >= 1, f"recent must be at least 1, got {self.recent}"),
            (self.examples >= 1, f"examples must be at least 1, got {self.examples}"),
            (self.seeds >= 1, f"seeds must be at least 1, got {self.seeds}"),
            *[
                (value is None or value >= 1, f"{name} must be at least 1, got {value}")
                for name in (
                    "limit",
                    "samples",
                    "max_new_tokens",
                    "context",
                    "batch_size",
                    "prefill_chunk",
                    "judge_tokens",
                )
                for value in [getattr(self, name)]
            ],
            (self.temperature >= 0, f"temperature must not be negative, got {self.temperature}"),
            (0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}"),
            (
                self.samples == 1 or self.temperature > 0,
                f"samples={self.samples} would all be equal: they need a temperature above 0",
            ),
            *[(bool(name and source), f"sources must be TASK=SOURCE, got {text!r}") for text, name, source in parts],
            (len({name for _, name, _ in parts}) == len(parts), f"sources must differ in task, got {self.sources}"),
        )

    @property
    def source_of(self) -> dict[str, str]:
        """`sources` by task."""
        return {name: source for name, _, source in (text.partition("=") for text in self.sources)}
