"""Numbers for Prometheus: what the engine counts, read when they are asked for, and times that only clients feel."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from retention_jax.serving.requests import EngineStats

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
_GAUGES = {
    "rows": "Rows of the buffer.",
    "rows_in_use": "Rows that a request has.",
    "queued": "Requests that wait for a row.",
    "tokens_per_second": "New tokens a second, over the last 10 seconds.",
}
_COUNTERS = {
    "requests": "Requests that have ended.",
    "prompt_tokens": "Prompt tokens of ended requests, with those that snapshots held.",
    "cached_tokens": "Prompt tokens that snapshots held.",
    "new_tokens": "Tokens that were written.",
    "evicted_entries": "Entries that were evicted, of all layers and heads.",
}
_SNAPSHOT_GAUGES = ("host_count", "host_bytes", "disk_count", "disk_bytes")


class Metrics:
    """A registry of its own, so that a process may hold several."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(stats))
        name = "retention_jax_"
        self._responses = Counter(
            name + "http_responses", "Responses by path and status.", ("path", "status"), registry=self._registry
        )
        self._first = Histogram(
            name + "time_to_first_token_seconds",
            "From a request's arrival to the first token of a sequence.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._between = Histogram(
            name + "time_between_tokens_seconds",
            "Between two tokens of a sequence; of tokens that come together, their mean.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def response(self, path: str, status: int) -> None:
        self._responses.labels(path, str(status)).inc()

    def tokens(self, count: int, seconds: float, *, first: bool) -> None:
        """So many tokens of a sequence came at once, so many seconds after the ones before or the request."""
        if first:
            self._first.observe(seconds)
            return
        for _ in range(count):
            self._between.observe(seconds / count)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _OfEngine(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def describe(self) -> list[Metric]:
        return []  # registering must not ask an engine that has not started

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        values = stats._asdict()
        for name, told in _GAUGES.items():
            yield GaugeMetricFamily(f"retention_jax_{name}", told, values[name])
        for name, told in _COUNTERS.items():
            yield CounterMetricFamily(f"retention_jax_{name}", told, values[name])
        if stats.snapshots is not None:
            for name, value in stats.snapshots._asdict().items():
                family = GaugeMetricFamily if name in _SNAPSHOT_GAUGES else CounterMetricFamily
                yield family(f"retention_jax_snapshot_{name}", f"Snapshots: {name.replace('_', ' ')}.", value)
