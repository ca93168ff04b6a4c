"""What a metric of /metrics is. Each is declared once, as a Metric, in the file of what knows its
value: tallies.py for what the database keeps, adapters/http/metrics.py for what the edges see."""

from dataclasses import dataclass
from enum import StrEnum


class MetricType(StrEnum):
    """How Prometheus reads it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric, by Prometheus' conventions.

    The unit stands in the name, in full and in base units (seconds, bytes; amounts are in
    microcredits, which are exact). Counters end in _total. `labels` have few values, which nobody
    outside can choose. `buckets` are a histogram's upper bounds, in the metric's unit.
    """

    name: str
    type: MetricType
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A metric's value at one scrape, in its unit. `labels` are the values of Metric.labels."""

    metric: Metric
    value: float
    labels: tuple[str, ...] = ()
