"""The log only grows: a broker that drops, changes or reorders what it logged is caught."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from sublet.client import Job
from sublet.demo.local import LocalMarketError
from sublet.log_head import LogRewritten, head_of
from sublet_contracts.api import ReceiptsPage
from sublet_contracts.envelope import Envelope
from sublet_contracts.merkle import extends
from tests.sdk.market import SmallMarket, small_market


@pytest.fixture
def market(tmp_path: Path) -> Iterator[SmallMarket]:
    with small_market(tmp_path / "market") as running:
        yield running


def rewritten(market: SmallMarket, *statements: str) -> None:
    """Let the broker's operator change the log behind everybody's back."""
    assert market.local.broker is not None
    market.local.broker.stop()
    with sqlite3.connect(market.local.root / "broker" / "sublet.sqlite") as database:
        guards = database.execute(
            "SELECT name FROM sqlite_master WHERE type = 'trigger' AND name LIKE 'log_entry%'"
        ).fetchall()
        assert guards
        for (guard,) in guards:
            database.execute(f"DROP TRIGGER {guard}")
        for statement in statements:
            database.execute(statement)
    market.local.restart_broker()


def signed_by_renter(market: SmallMarket, job: Job) -> int:
    """Return how many receipts the renter has signed; there is at least one that it could."""
    page = market.client.link.call("GET", f"/v1/jobs/{job.id}/receipts", ReceiptsPage)
    return sum(market.client.party in receipt.signers for receipt in page.receipts)


def test_a_log_that_grows_is_believed_and_one_that_was_rewritten_is_not(
    market: SmallMarket,
) -> None:
    client = market.client
    first = head_of(client.check_log(), client.broker)
    job = client.run(
        image="local/python",
        command=["python3", "-c", "import time; time.sleep(10)"],
        gpus="cpu",
        max_price=1,
        budget=1,
        memory="256MB",
        disk="256MB",
    )
    market.local.wait_for(lambda: job.view().state == "running", "the run")
    assert job.export()
    seen = head_of(client.check_log(), client.broker)
    assert seen.size > first.size

    # Two entries change places; nothing else does, and every document is still in the log.
    last = seen.size - 1
    rewritten(
        market,
        f"UPDATE log_entry SET id = -1 WHERE id = {last}",
        f"UPDATE log_entry SET id = {last} WHERE id = 1",
        "UPDATE log_entry SET id = 1 WHERE id = -1",
    )
    # From here on this renter signs nothing, and says why.
    signed = signed_by_renter(market, job)
    with pytest.warns(UserWarning, match="not the one it signed before"):
        assert job.wait().state == "succeeded"
    assert signed_by_renter(market, job) == signed
    with pytest.raises(LogRewritten, match="not the one it signed before") as caught:
        client.check_log()
    with pytest.raises(LogRewritten):
        job.export()
    with pytest.raises(LocalMarketError, match="not the one it signed before"):
        market.local.command("receipts", "export", job.id)
    kept = client.profile.seen_head(client.broker)
    assert kept is not None
    assert head_of(kept, client.broker) == seen

    # The evidence speaks for itself: two heads, both signed by the broker, that can't both be.
    (note,) = caught.value.__notes__
    older, newer = (
        head_of(Envelope.model_validate_json(json.dumps(value)), client.broker)
        for value in json.loads(Path(note.removeprefix("both heads are in ")).read_text())
    )
    assert older == seen
    assert newer.size >= older.size
    assert not extends(older.size, older.root_sha256, newer.size, newer.root_sha256, ())
