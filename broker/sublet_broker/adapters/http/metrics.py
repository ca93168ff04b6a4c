"""Prometheus metrics: what the edges count, and what is read at each scrape."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from sublet_broker.service.unit_of_work.metrics import Metric, MetricType, Sample

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
KEEP_S = 1.0

HTTP_REQUEST_DURATION = Metric(
    name="sublet_http_request_duration_seconds",
    type=MetricType.HISTOGRAM,
    help="Time to answer a request.",
    labels=("method", "route", "status"),
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
)
JOB_QUEUE_WAIT = Metric(
    name="sublet_job_queue_wait_seconds",
    type=MetricType.HISTOGRAM,
    help="Time from standing in the queue to a lease.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 600, 3600),
)
AGENT_MESSAGES = Metric(
    name="sublet_agent_messages_total",
    type=MetricType.COUNTER,
    help="Messages received from agents.",
    labels=("type",),
)
AGENT_CONNECTIONS = Metric(
    name="sublet_agent_connections",
    type=MetricType.GAUGE,
    help="Agents' connections that are open.",
)
LOG_STREAMS = Metric(
    name="sublet_log_streams", type=MetricType.GAUGE, help="Log streams that are open."
)
REQUESTS_IN_FLIGHT = Metric(
    name="sublet_requests_in_flight",
    type=MetricType.GAUGE,
    help="Use-cases running or waiting for a thread.",
)
LOOP_ROUNDS = Metric(
    name="sublet_loop_rounds_total",
    type=MetricType.COUNTER,
    help="Rounds of the broker's own loops.",
    labels=("loop",),
)
LOOP_FAILURES = Metric(
    name="sublet_loop_failures_total",
    type=MetricType.COUNTER,
    help="Rounds of the broker's own loops that failed.",
    labels=("loop",),
)
LOOP_IN_TROUBLE = Metric(
    name="sublet_loop_in_trouble",
    type=MetricType.GAUGE,
    help="Whether a loop is failing, waiting or stuck (1), or not (0).",
    labels=("loop",),
)
LEDGER_AUDITS = Metric(
    name="sublet_ledger_audits_total",
    type=MetricType.COUNTER,
    help="Audits of the whole ledger.",
)
LEDGER_BREACHES = Metric(
    name="sublet_ledger_breaches",
    type=MetricType.GAUGE,
    help="Breaches that the last audit found; 0, or the ledger is wrong.",
)


class Metrics:
    """The registry and what is counted here. Any thread may count."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._histogram(HTTP_REQUEST_DURATION)
        self._queue_waits = self._histogram(JOB_QUEUE_WAIT)
        self._messages = self._counter(AGENT_MESSAGES)
        self._rendered: tuple[float, bytes] = (0.0, b"")
        self._lock = threading.Lock()

    def _histogram(self, metric: Metric) -> Histogram:
        return Histogram(
            metric.name,
            metric.help,
            metric.labels,
            registry=self.registry,
            buckets=metric.buckets,
        )

    def _counter(self, metric: Metric) -> Counter:
        return Counter(metric.name, metric.help, metric.labels, registry=self.registry)

    def request(self, method: str, route: str, status: int, took_s: float) -> None:
        """Count a request. `route` is the pattern, never the address: labels stay few."""
        known = method if method in ("GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE") else "other"
        self._requests.labels(known, route, str(status)).observe(took_s)

    def message(self, kind: str) -> None:
        """Count a message of an agent."""
        self._messages.labels(kind).inc()

    def matched(self, waited_ms: int) -> None:
        """Count a lease whose job had waited so long."""
        self._queue_waits.observe(waited_ms / 1000)

    def add_source(self, read: Callable[[], Sequence[Sample]]) -> None:
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
    def __init__(self, read: Callable[[], Sequence[Sample]]) -> None:
        self._read = read

    def describe(self) -> Iterable[Family]:
        """Nothing in advance: registering must not read the database."""
        return ()

    def collect(self) -> Iterable[Family]:
        """See prometheus_client."""
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for sample in self._read():
            family = families.get(sample.metric.name)
            if family is None:
                family = families[sample.metric.name] = _family(sample.metric)
            family.add_metric(sample.labels, sample.value)
        return families.values()


def _family(metric: Metric) -> CounterMetricFamily | GaugeMetricFamily:
    match metric.type:
        case MetricType.COUNTER:
            return CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
        case MetricType.GAUGE:
            return GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
        case MetricType.HISTOGRAM:
            raise TypeError(f"{metric.name}: a histogram is counted, never read at a scrape")
