"""/metrics as Prometheus reads it: each metric that is declared is there, with its type."""

from __future__ import annotations

import subprocess

from prometheus_client.parser import text_string_to_metric_families

from sublet_broker.adapters.http import metrics as edge_metrics
from sublet_broker.service.queries import metrics as market_metrics
from sublet_broker.service.unit_of_work import tallies
from sublet_broker.service.unit_of_work.metrics import Metric, MetricType
from sublet_broker.service.unit_of_work.tallies import TALLIES, Tally, TallyMetric
from tests.http.fake_agent import FakeAgent
from tests.http.world import World
from tests.services import require


def declared() -> dict[str, Metric]:
    """Return every metric that the code declares, by its name."""
    found = [metric for metric in TALLIES if isinstance(metric, TallyMetric)]
    for module in (edge_metrics, market_metrics, tallies):
        found += [value for value in vars(module).values() if isinstance(value, Metric)]
    return {metric.name: metric for metric in found}


async def scrape(world: World) -> str:
    """Return /metrics of a broker whose every edge has been used."""
    renter = await world.renter()
    async with FakeAgent(world, world.party()) as agent:
        await agent.party.introduce()
        await agent.join()
        await agent.offer()
        assert (await renter.get("/v1/jobs")).status_code == 200
        assert (await world.http.get(world.url + "/nothing-here")).status_code == 404
        answer = await world.http.get(world.url + "/metrics")
    assert answer.status_code == 200
    return answer.text


async def test_each_declared_metric_is_shown_with_its_type(world: World) -> None:
    shown = {}
    for family in text_string_to_metric_families(await scrape(world)):
        # The parser takes _total off a counter's name.
        name = f"{family.name}_total" if family.type == "counter" else family.name
        shown[name] = (family.type, family.documentation)
    for name in list(shown):
        # When a counter began: the client library adds it.
        if name.endswith("_created"):
            del shown[name]
    assert shown == {name: (metric.type, metric.help) for name, metric in declared().items()}


async def test_every_label_value_is_there_before_anything_has_happened(world: World) -> None:
    text = await scrape(world)
    for metric in TALLIES:
        if isinstance(metric, TallyMetric):
            for group in metric.groups:
                labels = f'{{{metric.labels[0]}="{group}"}}' if metric.labels else ""
                assert f"\n{metric.name}{labels} " in text


def promtool(text: str) -> tuple[int, str]:
    """Return promtool's exit status and what it says of the page."""
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60
    )
    return checked.returncode, checked.stdout + checked.stderr


async def test_promtool_finds_nothing_to_complain_of(world: World) -> None:
    require("promtool")
    text = await scrape(world)
    assert promtool(text) == (0, "")
    status, said = promtool(f"{text}# TYPE sublet_broken_ms counter\nsublet_broken_ms 1\n")
    assert status != 0
    assert "sublet_broken_ms" in said


def test_each_declared_tally_is_kept_and_audited() -> None:
    named = [value for value in vars(tallies).values() if isinstance(value, Tally)]
    assert [tally.name for tally in named if tally not in TALLIES] == []
    names = [tally.name for tally in TALLIES]
    assert len(set(names)) == len(names)


def test_declarations_are_whole() -> None:
    for metric in declared().values():
        assert bool(metric.buckets) == (metric.type is MetricType.HISTOGRAM), metric
        if isinstance(metric, TallyMetric):
            assert len(metric.labels) == (metric.group is not None), metric
            assert (metric.groups != ("",)) == bool(metric.labels), metric
