"""Programs of two releases on one market, as real processes: receipts, the one kind of document
that has two versions, pass between them, and an export with both of them verifies.

The older release is tests/e2e/old_release.py: today's program, without version 2 of the receipt.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sublet.client import Client
from sublet.demo.local import LocalMarket
from sublet_contracts.documents import Receipt
from sublet_contracts.export import Verdict, parse_export, verify_export
from sublet_contracts.versions import ReceiptV1
from tests.e2e.scenario import EVERY, Outcome, Scenario

pytestmark = pytest.mark.slow

V1, V2 = ReceiptV1.payload_type(), Receipt.payload_type()
OLD = (sys.executable, "-m", "tests.e2e.old_release")
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class MixedMarket(LocalMarket):
    """A market where some programs are of the older release."""

    old: set[str] = field(default_factory=set)

    def within(self, name: str) -> Sequence[str]:
        """See LocalMarket."""
        return OLD if name in self.old else ()

    @property
    def environment(self) -> dict[str, str]:
        """See LocalMarket; the older release is found in the tests."""
        return {**super().environment, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def market(tmp_path: Path) -> Iterator[MixedMarket]:
    market = MixedMarket(tmp_path / "market")
    yield market
    market.stop()


def scenario(market: MixedMarket, name: str, folder: Path) -> Scenario:
    client = Client(broker=market.url, config_dir=folder / "config")
    client.fund(client.party, 5, operator_key=market.operator_key)
    return Scenario(name, market, client, "process", "local/python", folder)


def receipts_in(folder: Path) -> tuple[set[str], set[str]]:
    """Return the types of an export's receipts, and of those that the renter has signed too."""
    receipts = parse_export((folder / "export.json").read_bytes()).receipts
    by_both = {envelope.payloadType for envelope in receipts if len(envelope.signers) == 2}
    return {envelope.payloadType for envelope in receipts}, by_both


def verified_by_old_release(market: MixedMarket, export: Path) -> str:
    """Let the older release verify an export; return what it prints."""
    command = [*OLD, sys.executable, "-m", "sublet.cli.main", "receipts", "verify", str(export)]
    done = subprocess.run(
        command,
        env={**os.environ, **market.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def check(outcome: Outcome, leases: int) -> None:
    verdict: Verdict = outcome.verdict
    assert outcome.view.state == "succeeded", outcome.view.says
    assert (verdict.problems, verdict.leases) == ([], leases)
    assert verdict.charged_ucr == outcome.view.charged_ucr > 0


def test_an_old_agent_with_a_new_broker_and_both_versions_in_one_export(
    market: MixedMarket, tmp_path: Path
) -> None:
    market.old = {"moves-0"}
    market.start_broker()
    moves = scenario(market, "moves", tmp_path)
    moves.begin(agents=1, hold=True)
    moves.until_durable(2 * EVERY)
    moves.start_agent(1)
    # The old agent's owner wants the machine back: the job goes on at a new agent.
    market.agents["moves-0"].stop()
    outcome = moves.finish()
    check(outcome, leases=2)
    assert [run.provider_name for run in outcome.view.runs] == ["moves-0", "moves-1"]
    # The renter, who is of the new release, has signed both versions too.
    assert receipts_in(tmp_path) == ({V1, V2}, {V1, V2})
    # The older release is as strict as it was: of version 2 it has never heard.
    assert f"expected {V1}, got {V2}" in verified_by_old_release(market, tmp_path / "export.json")


def test_a_new_agent_with_an_old_broker_which_is_then_updated(
    market: MixedMarket, tmp_path: Path
) -> None:
    market.old = {"broker"}
    market.start_broker()
    first = scenario(market, "first", tmp_path / "first")
    first.folder.mkdir(exist_ok=True)
    first.begin(agents=1)
    check(outcome := first.finish(), leases=1)
    assert receipts_in(first.folder) == ({V1}, {V1})
    assert "It holds." in verified_by_old_release(market, first.folder / "export.json")

    market.old = set()
    assert market.broker is not None
    market.broker.stop()
    market.restart_broker()
    # What it kept as the older release it reads, and the agent now writes the newer version.
    again = first.client.job(outcome.view.id)
    assert verify_export(again.export(), broker=market.broker_id).problems == []
    later = Scenario("later", market, first.client, "process", "local/python", tmp_path / "later")
    later.folder.mkdir()
    later.begin(agents=1)
    check(later.finish(), leases=1)
    assert receipts_in(later.folder) == ({V2}, {V2})
