"""Prometheus metrics: what the edges count, and what the use-cases know (views.gauges)."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sublet_broker.service.queries.gauges import Gauge

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
KEEP_S = 1.0


class Metrics:
    """The registry and what is counted here. Any thread may count."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Histogram(
            "sublet_http_request_seconds",
            "Time to answer a request.",
            ("method", "route", "status"),
            registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
        )
        self._messages = Counter(
            "sublet_agent_messages",
            "Messages received from agents.",
            ("type",),
            registry=self.registry,
        )
        self._matches = Histogram(
            "sublet_match_seconds",
            "From standing in line to a lease.",
            registry=self.registry,
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 600, 3600),
        )
        self._rendered: tuple[float, bytes] = (0.0, b"")
        self._lock = threading.Lock()

    def request(self, method: str, route: str, status: int, took_s: float) -> None:
        """Count a request. `route` is the pattern, never the address: labels stay few."""
        known = method if method in ("GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE") else "other"
        self._requests.labels(known, route, str(status)).observe(took_s)

    def message(self, kind: str) -> None:
        """Count a message of an agent."""
        self._messages.labels(kind).inc()

    def matched(self, waited_ms: int) -> None:
        """Count a lease whose job had waited so long."""
        self._matches.observe(waited_ms / 1000)

    def add_source(self, read: Callable[[], Sequence[Gauge]]) -> None:
        """Ask `read` at each scrape."""
        self.registry.register(_Source(read))

    def render(self) -> bytes:
        """Return all metrics as text; not made anew more than once in KEEP_S."""
        with self._lock:
            at, text = self._rendered
            if not text or time.monotonic() - at > KEEP_S:
                text = generate_latest(self.registry)
                self._rendered = (time.monotonic(), text)
            return text


class _Source(Collector):
    def __init__(self, read: Callable[[], Sequence[Gauge]]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance: registering must not read the database."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        families: dict[str, GaugeMetricFamily] = {}
        for reading in self._read():
            name = f"sublet_{reading.name.removeprefix('sublet_')}"
            family = families.get(name)
            if family is None:
                names = [label for label, _ in reading.labels]
                family = families[name] = GaugeMetricFamily(name, reading.help, labels=names)
            family.add_metric([value for _, value in reading.labels], reading.value)
        return families.values()
