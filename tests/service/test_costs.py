"""What a use-case asks of the database doesn't grow with the number of offers on the market."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, cast

import pytest

from sublet_broker.adapters.memory.store import MemoryStore
from sublet_broker.service.errors import Refusal
from sublet_broker.service.ports import Store, Transaction
from sublet_contracts.api import MatchRequest
from sublet_contracts.documents import Resources
from tests.service.world import PRICE, AgentDouble, RenterDouble, World

FEW, MANY = 10, 1_000
QUESTIONS = ("get", "find", "count", "put", "add", "delete", "next")


class Counted:
    """A store that counts the questions it is asked, and the rows that it answers."""

    def __init__(self) -> None:
        self._store = MemoryStore()
        self.asked: Counter[str] = Counter()

    def transaction(self) -> AbstractContextManager[Transaction]:
        return _Transaction(self._store.transaction(), self.asked)

    def snapshot(self) -> AbstractContextManager[Transaction]:
        return _Transaction(self._store.snapshot(), self.asked)


class _Transaction:
    def __init__(
        self, transaction: AbstractContextManager[Transaction], asked: Counter[str]
    ) -> None:
        self._transaction = transaction
        self._asked = asked

    def __enter__(self) -> Transaction:
        self._tx = self._transaction.__enter__()
        return cast(Transaction, self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return self._transaction.__exit__(kind, error, traceback)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._tx, name)
        if name not in QUESTIONS:
            return method

        def counted(kind: Any, *args: Any, **named: Any) -> Any:
            answer = method(kind, *args, **named)
            self._asked["questions"] += 1
            self._asked["rows"] += len(answer) if name == "find" else 1
            return answer

        return counted


class Town:
    """A market with so many providers, all at rest."""

    def __init__(self, providers: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = Counted()
        monkeypatch.setattr(World, "new_store", staticmethod(lambda: cast(Store, self.store)))
        self.world = World()
        self.agents: list[AgentDouble] = [
            self.world.agent(f"agent-{number}") for number in range(providers)
        ]
        self.renter: RenterDouble = self.world.renter()
        self.world.settle_down(3)
        self.world.broker.market.offers()  # what has changed until now is taken up

    def costs(self, act: Callable[[Town], object]) -> dict[str, int]:
        """Return what an act asks of the database."""
        self.store.asked.clear()
        act(self)
        return dict(self.store.asked)


def _submit(town: Town) -> object:
    return town.renter.submit(name="one more")


def _refused(town: Town) -> object:
    resources = _resources(device_memory_bytes=2**50)
    with pytest.raises(Refusal) as caught:
        town.renter.submit(name="too big", resources=resources, wait_for_offer=False)
    assert caught.value.code == "no_match"
    return None


def _match(town: Town) -> object:
    request = MatchRequest(
        resources=_resources(), image="image", max_price_ucr_per_device_hour=10**9, budget_ucr=0
    )
    return town.world.broker.market.match(town.renter.party, request)


def _offers(town: Town) -> object:
    page = town.world.broker.market.offers()
    assert len(page.offers) == len(town.agents)
    return page


def _announce(town: Town) -> object:
    """Dearer than before: who is cheapest, and takes the job, mustn't depend on an offer's id."""
    return town.agents[3].announce(price_ucr_per_device_hour=2 * PRICE)


def _lease(town: Town) -> object:
    """Propose, commit, sign, start."""
    town.world.step()
    (job,) = town.world.broker.views.jobs(town.renter.party).jobs
    agent = next(agent for agent in town.agents if agent.party == job.runs[0].provider)
    agent.pump()
    town.world.step()
    agent.pump()
    assert agent.the_run.job_id == job.id
    return None


def _lose(town: Town) -> object:
    """Its agent's connection breaks: a successor is chosen and told."""
    agent = next(agent for agent in town.agents if agent.runs)
    town.world.broker.sessions.left(agent.party, agent.instance)
    (run,) = town.world.broker.views.jobs(town.renter.party).jobs[0].runs
    assert run.run_state == "unknown"
    events = town.world.broker.views.events(town.renter.party, "one more").events
    assert any(event.kind == "successor" for event in events)
    return None


def _sweep(town: Town) -> object:
    return town.world.broker.supervision.sweep()


def _scrape(town: Town) -> object:
    return town.world.broker.metrics.samples()


ACTS = (_submit, _refused, _match, _offers, _announce, _lease, _sweep, _lose, _scrape)


def test_no_use_case_asks_all_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other in a small market and in a large one: the same questions, the same
    number of rows."""
    few, many = Town(FEW, monkeypatch), Town(MANY, monkeypatch)
    for act in ACTS:
        small, large = few.costs(act), many.costs(act)
        assert small == large, f"{act.__name__}: {small} with {FEW} offers, {large} with {MANY}"


def _resources(**changes: Any) -> Resources:
    fields: dict[str, Any] = {
        "devices": 1,
        "device_kind": "gpu",
        "memory_bytes": 10**9,
        "disk_bytes": 10**9,
    }
    return Resources(**(fields | changes))


def _reading_a_log(lines: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return what it costs to find where to begin in a log of so many lines."""
    town = Town(1, monkeypatch)
    town.renter.submit(name="talks")
    town.world.settle_down(3)
    [agent] = town.agents
    for first in range(0, lines, 20):
        agent.log(agent.the_run, first, *(f"line {first + n}" for n in range(20)))
        town.world.pass_ms(100)
    views, party, now_ms = town.world.broker.views, town.renter.party, town.world.now_ms

    def costs(ask: Callable[[], object]) -> int:
        return sum(town.costs(lambda _: ask()).values())

    return {
        "tail": costs(lambda: views.log_start(party, "talks", tail=5)),
        "run": costs(lambda: views.log_start(party, "talks", tail=5, epoch=1)),
        "since": costs(lambda: views.log_start(party, "talks", since_ms=now_ms)),
        "page": costs(lambda: views.logs(party, "talks", lines - 5, 100, epoch=1)),
    }


def test_where_a_log_begins_is_found_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail, a time and a run: as many questions and rows for a log of 20 lines as for one that
    is fifty times as long, but for the halving."""
    few, many = _reading_a_log(20, monkeypatch), _reading_a_log(1_000, monkeypatch)
    assert {**few, "since": 0} == {**many, "since": 0}
    assert many["since"] <= few["since"] + 4 * 6  # 6 more halvings
