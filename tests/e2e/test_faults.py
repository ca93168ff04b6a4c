"""kill -9, SIGSTOP, reclaim, restart: the job finishes, and nothing is lost that was promised.

All scenarios run at once on one market, but for the broker's own restart, which has another beside
it; each test then looks at one outcome. What must hold of every one of them stands in `holds`.
"""

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from sublet.client import Client
from sublet.demo.local import LocalMarket
from tests.e2e.scenario import EVERY, Outcome, Scenario, sha256, undisturbed_weights
from tests.services import require

FUNDS = 50
SUSPENSION_S = 45.0
"""more than twice the silence after which a machine is lost"""


def kill_agent_and_restart(scenario: Scenario) -> Outcome:
    """The agent dies and comes back within its patience: its run is adopted again."""
    scenario.begin()
    index = scenario.holder(scenario.until_durable())
    scenario.kill_agent(index)
    time.sleep(5)  # an absence that is noticed (9 s is unknown at the latest) and forgiven (20 s)
    scenario.start_agent(index)
    return scenario.finish()


def kill_run(scenario: Scenario) -> Outcome:
    """The run alone is killed."""
    scenario.begin(hold=True)
    index = scenario.holder(scenario.until_durable())
    assert scenario.kill_run(index) > 0
    return scenario.finish()


def kill_agent_for_good(scenario: Scenario) -> Outcome:
    """The agent dies for good; its run computes on, a zombie that nobody hears."""
    scenario.begin(hold=True)
    view = scenario.until_durable()
    scenario.kill_agent(scenario.holder(view))
    return scenario.finish(step_at_fault=view.step)


def kill_both(scenario: Scenario) -> Outcome:
    """The machine dies: agent and run at once."""
    scenario.begin(hold=True)
    view = scenario.until_durable()
    index = scenario.holder(view)
    scenario.kill_agent(index)
    assert scenario.kill_run(index) > 0
    return scenario.finish(step_at_fault=view.step)


def suspend_agent(scenario: Scenario) -> Outcome:
    """The agent is stopped until it is lost, and wakes as a zombie, its run still computing."""
    scenario.begin()
    index = scenario.holder(scenario.until_durable())
    agent = scenario.market.agents[scenario.agent_name(index)]
    agent.signal(signal.SIGSTOP)
    time.sleep(SUSPENSION_S)  # the fault itself
    agent.signal(signal.SIGCONT)
    outcome = scenario.finish()
    outcome.notes["left_running"] = len(scenario.market.run_processes(scenario.submitted.id)) + len(
        scenario.market.containers(scenario.submitted.id)
    )
    return outcome


def reclaim(scenario: Scenario) -> Outcome:
    """The owner takes the machine back, with notice."""
    scenario.begin(hold=True)
    view = scenario.until_durable()
    index = scenario.holder(view)
    scenario.market.command(
        "provider",
        "reclaim",
        "--grace",
        "60s",
        "--state",
        str(scenario.market.root / scenario.agent_name(index)),
    )
    return scenario.finish()


def restart_broker(scenario: Scenario) -> Outcome:
    """The broker is killed and started again. It has a market of its own: nobody else's is lost."""
    scenario.begin(agents=1)
    scenario.until_durable()
    assert scenario.market.broker is not None
    scenario.market.broker.kill()
    scenario.market.restart_broker()
    return scenario.finish()


SCENARIOS: dict[str, Callable[[Scenario], Outcome]] = {
    "killagent": kill_agent_and_restart,
    "killrun": kill_run,
    "gone": kill_agent_for_good,
    "killboth": kill_both,
    "suspend": suspend_agent,
    "reclaim": reclaim,
}


class Results:
    """The outcomes of all scenarios of one runner, played at once."""

    def __init__(self, folder: Path, runner: str, image: str) -> None:
        self.folder = folder
        self.runner, self.image = runner, image
        self.market, self.client = self._market("market")
        self.other_market, self.other_client = self._market("other-market")
        self.reference = undisturbed_weights(_made(folder / "reference"))
        self.pool = ThreadPoolExecutor(len(SCENARIOS) + 1)
        self.outcomes: dict[str, Future[Outcome]] = {
            name: self.pool.submit(play, self._scenario(name, self.market))
            for name, play in SCENARIOS.items()
        }
        alone = self._scenario("broker", self.other_market)
        self.outcomes["broker"] = self.pool.submit(restart_broker, alone)

    def _market(self, name: str) -> tuple[LocalMarket, Client]:
        market = LocalMarket(self.folder / name)
        market.start_broker()
        client = Client(broker=market.url, config_dir=_config(market))
        client.fund(client.party, FUNDS, operator_key=market.operator_key)
        return market, client

    def _scenario(self, name: str, market: LocalMarket) -> Scenario:
        return Scenario(
            name,
            market,
            Client(broker=market.url, config_dir=_config(market)),
            self.runner,
            self.image,
            _made(self.folder / name),
        )

    def outcome(self, name: str) -> Outcome:
        """Return how a scenario ended; raises what it raised."""
        return self.outcomes[name].result()

    def holds(self, outcome: Outcome) -> None:
        """Assert what every outcome must satisfy."""
        view, statement = outcome.view, outcome.statement
        assert view.state == "succeeded", view.says
        assert outcome.weights is not None
        assert sha256(outcome.weights) == sha256(self.reference)
        assert outcome.verdict.holds, outcome.verdict.problems
        assert statement.lost_work_charged_ucr == 0
        assert statement.charged_ucr <= view.budget_ucr
        assert statement.charged_ucr == sum(charge.charged_ucr for charge in statement.charges)
        assert len({charge.epoch for charge in statement.charges}) == len(statement.charges)
        for before, after in zip(view.runs, view.runs[1:], strict=False):
            assert after.start_step >= before.durable_step
            assert before.step - after.start_step <= EVERY

    def close(self) -> None:
        """Stop everything."""
        self.pool.shutdown(cancel_futures=True)
        for client, market in (
            (self.client, self.market),
            (self.other_client, self.other_market),
        ):
            client.close()
            market.stop()


@pytest.fixture(
    scope="module",
    params=["process", pytest.param("docker", marks=[pytest.mark.docker, pytest.mark.slow])],
)
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Results]:
    """All scenarios on one runner."""
    image = "local/python"
    if request.param == "docker":
        require("docker")
        from tests.images import base_image

        image = base_image()
    played = Results(tmp_path_factory.mktemp(request.param), request.param, image)
    yield played
    played.close()


def test_an_agent_that_comes_back_keeps_its_run(results: Results) -> None:
    outcome = results.outcome("killagent")
    results.holds(outcome)
    assert outcome.epochs == 1


def test_a_killed_run_goes_on_from_its_last_checkpoint(results: Results) -> None:
    outcome = results.outcome("killrun")
    results.holds(outcome)
    assert outcome.epochs == 2
    # The engine tells of what it was asked; of a plain kill -9 nobody can tell whose it was.
    seen = {"process": "killed_unattributed", "docker": "engine_stopped"}
    assert outcome.view.runs[0].reason == seen[results.runner]


def test_a_machine_that_never_comes_back_is_replaced(results: Results) -> None:
    for name in ("gone", "killboth"):
        outcome = results.outcome(name)
        results.holds(outcome)
        assert outcome.epochs == 2
        assert outcome.view.runs[0].reason == "provider_lost"
        assert outcome.view.runs[0].provider != outcome.view.runs[1].provider
        assert outcome.notes["step_at_fault"] - outcome.view.runs[1].start_step <= EVERY


def test_a_zombie_is_refused_and_only_one_is_paid(results: Results) -> None:
    outcome = results.outcome("suspend")
    results.holds(outcome)
    assert outcome.epochs == 2
    lost = outcome.statement.charges[0]
    assert lost.payable_device_ms <= lost.cum_device_ms
    assert outcome.notes["left_running"] == 0


def test_a_reclaim_with_notice_loses_nothing(results: Results) -> None:
    outcome = results.outcome("reclaim")
    results.holds(outcome)
    assert outcome.epochs == 2
    first, second = outcome.view.runs
    assert first.reason == "reclaimed"
    assert second.start_step == first.step
    assert first.charge_ucr > 0


def test_a_broker_that_is_killed_and_restarted_preempts_nobody(results: Results) -> None:
    outcome = results.outcome("broker")
    results.holds(outcome)
    assert outcome.epochs == 1


def test_the_ledger_balances_when_all_is_over(results: Results) -> None:
    for name in SCENARIOS:
        results.outcome(name)
    balance = results.client.balance()
    charged = sum(job.settled_ucr for job in results.client.jobs().jobs)
    assert balance.held_ucr == 0
    assert balance.available_ucr + charged == FUNDS * 1_000_000


def _config(market: LocalMarket) -> Path:
    return market.root / "renter"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
