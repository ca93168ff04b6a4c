"""A market of real processes for jobs and requests that go wrong, and what must be true afterwards.

Each job has a region, so that it meets only the agents that were started for it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from sublet.client import Client, Job
from sublet.demo.local import LocalMarket, LocalProcess
from sublet.errors import SubletError
from sublet_broker.adapters.sql.store import SqlStore
from sublet_broker.service.queries.ledger_audit import audit
from sublet_contracts.api import JobView, Problem
from sublet_contracts.export import verify_export
from sublet_contracts.rules import charge_ucr
from tests.images import base_image

FUNDS_CREDITS = 50
LIMIT_S = 300.0
POLL_S = 0.2
ENDED = ("succeeded", "failed", "cancelled", "paused")


@dataclass
class BadMarket:
    """A broker, a renter with money, and agents by region."""

    root: Path
    broker_arguments: Sequence[str] = ()
    jobs: list[Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.market = LocalMarket(self.root / "market", self.broker_arguments, ray="off")

    def start(self) -> None:
        """Start the broker and fund the renter."""
        self.market.start_broker()
        self.client = Client(broker=self.market.url, config_dir=self.root / "config")
        self.client.fund(self.client.party, FUNDS_CREDITS, operator_key=self.market.operator_key)

    def agent(
        self, name: str, *arguments: str, runner: str = "process", region: str = ""
    ) -> LocalProcess:
        """Start an agent (again, with the same state), in a region of its name unless told so. With
        Docker it lets renters use the tests' own image."""
        where = ("--region", region or name)
        trust = ("--trust", self.client.party)
        if runner == "docker":
            arguments = ("--allow-image", base_image(), *arguments)
        return self.market.start_agent(name, "--runner", runner, *where, *trust, *arguments)

    def offered(self, *names: str) -> None:
        """Wait until these agents are on the market."""
        wanted = set(names)
        self.market.wait_for(
            lambda: wanted <= {offer.name for offer in self.client.offers().offers},
            f"the offers of {', '.join(sorted(wanted))}",
            self.market.agents[names[0]],
        )

    def options(self, region: str, command: Sequence[str], **changes: object) -> dict[str, object]:
        """Return the options of a small job."""
        return {
            "image": "local/python",
            "command": list(command),
            "gpus": "cpu",
            "max_price": "1.00",
            "budget": "1",
            "name": region,
            "region": region,
            "memory": "256MB",
            "disk": "64MB",
            "cpus": 0.5,
            **changes,
        }

    def submit(self, region: str, command: Sequence[str], **changes: object) -> Job:
        """Submit a small job."""
        job = self.client.run(**self.options(region, command, **changes))  # type: ignore[arg-type]
        self.jobs.append(job)
        return job

    def python(self, region: str, code: str, **changes: object) -> Job:
        """Submit a job that runs this Python."""
        return self.submit(region, ["python3", "-u", "-c", code], **changes)

    def refused(self, region: str, **changes: object) -> Problem:
        """Submit a job that the broker must refuse: no money moves and there is no new job."""
        before = self.client.balance().available_ucr, len(self.client.jobs().jobs)
        with pytest.raises(SubletError) as caught:
            self.python(region, "pass", wait_for_offer=False, **changes)
        assert (self.client.balance().available_ucr, len(self.client.jobs().jobs)) == before
        assert caught.value.fix
        return caught.value.problem

    def until(
        self,
        job: Job,
        condition: Callable[[JobView], object],
        what: str,
        limit_s: float = LIMIT_S,
    ) -> JobView:
        """Look at a job until `condition` holds."""
        deadline = time.monotonic() + limit_s
        while True:
            view = job.view()
            if condition(view):
                return view
            assert view.state not in ENDED, f"{view.name}: {view.state} ({view.says}), not {what}"
            assert time.monotonic() < deadline, f"{view.name}: {what} did not come; {view.says}"
            time.sleep(POLL_S)

    def ended(self, job: Job, limit_s: float = LIMIT_S) -> JobView:
        """Wait for a job's end, then check what holds of every end: the money is right to the
        micro-credit, its evidence verifies offline, and nothing of it is left on this machine."""
        view = self.until(job, lambda found: found.state in ENDED, "its end", limit_s)
        statement = job.statement()
        assert statement.charged_ucr == sum(charge.charged_ucr for charge in statement.charges)
        for charge in statement.charges:
            price = charge.price_ucr_per_device_hour
            assert charge.charged_ucr == charge_ucr(price, charge.payable_device_ms)
            assert charge.payable_device_ms <= charge.cum_device_ms
        assert statement.lost_work_charged_ucr == 0
        assert view.charged_ucr == statement.charged_ucr <= view.budget_ucr
        assert view.held_ucr == 0
        verdict = verify_export(job.export(), broker=self.market.broker_id)
        assert verdict.holds, verdict.problems
        self.soon(lambda: not self.left_of(job), f"nothing of {view.name} to be left running")
        return view

    def left_of(self, job: Job) -> list[object]:
        """Return the processes and containers (running or not) of a job on this machine."""
        market = self.market
        return [*market.run_processes(job.id), *market.containers(job.id, stopped=True)]

    def soon(self, condition: Callable[[], object], what: str, limit_s: float = 180.0) -> None:
        """Wait until `condition` holds."""
        self.market.wait_for(condition, what, limit_s=limit_s)

    def log(self, job: Job, stream: str = "") -> list[str]:
        """Return a job's output, of one stream if it is named."""
        return [line.text for line in job.logs() if stream in ("", line.stream)]

    def said_by_us(self, job: Job, text: str) -> str:
        """Return the line of ours in a job's log that holds `text`, once it is there: a job's
        state may be told before the last lines of its log."""

        def found() -> list[str]:
            return [line for line in self.log(job, "sublet") if text in line]

        self.soon(found, f"a line of ours that says {text!r}")
        return found()[0]

    def balanced(self) -> None:
        """Check the renter's account against all of its jobs, and the broker's own audit."""
        balance = self.client.balance()
        jobs = self.client.jobs(limit=500).jobs
        assert balance.held_ucr == sum(job.held_ucr for job in jobs)
        spent = sum(job.settled_ucr for job in jobs)
        assert balance.available_ucr + balance.held_ucr + spent == FUNDS_CREDITS * 1_000_000
        assert not self.breaches()
        gauges = self.gauges()
        assert gauges["sublet_ledger_discrepancy_microcredits"] == 0

    def breaches(self) -> list[str]:
        """Audit the ledger, as the broker does now and then, on the database as it is now."""
        store = SqlStore(f"sqlite:///{self.root}/market/broker/sublet.sqlite", read_only=True)
        try:
            with store.snapshot() as tx:
                return audit(tx)
        finally:
            store.close()

    def gauges(self) -> Mapping[str, float]:
        """Return the broker's metrics that have no labels."""
        text = httpx.get(f"{self.market.url}/metrics", timeout=120).text
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in pairs if "{" not in name}

    def stop(self) -> None:
        """Stop everything; nothing is left running."""
        if hasattr(self, "client"):
            self.client.close()
        self.market.stop()
        assert self.market.run_processes() == []
        assert self.market.containers(stopped=True) == []
