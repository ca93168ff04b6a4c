"""How often a run is asked for a checkpoint where its renter left that to the agent."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sublet_agent.core import cadence, effects, events
from sublet_agent.core.agent import AgentCore
from sublet_agent.core.checkpoints import Stall
from sublet_agent.core.records import RunRecord, Saved
from sublet_contracts.documents import (
    AUTO_FIRST_INTERVAL_MS,
    AUTO_LEAST_INTERVAL_MS,
    AUTO_MOST_INTERVAL_MS,
)
from sublet_contracts.wire import (
    CheckpointUploaded,
    CheckpointVerdict,
    Heartbeat,
    RunCadence,
)
from tests.agent.test_core import PROVIDER, World, only, terms, wanted
from tests.contracts.samples import INDEX

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


class Town(World):
    """A machine with one run that was asked for no interval."""

    def begin(self, loss_every_ms: int = 0, **changes: Any) -> str:
        job = self.job(**{"checkpoint_interval_ms": 0, **changes})
        lease_id, _ = self.assign(job, loss_every_ms=loss_every_ms)
        self.do(events.ImageReady(lease_id))
        self.do(events.Restored(lease_id))
        self.ran(lease_id, 0)
        return lease_id

    @property
    def record(self) -> RunRecord:
        return next(iter(self.core.runs.values())).record

    @property
    def told(self) -> RunCadence:
        """What the next heartbeat says of it."""
        self.now += 3_000
        step = self.do(events.Tick())
        sent = [e.message for e in wanted(step, effects.Send) if isinstance(e.message, Heartbeat)]
        said = sent[-1].runs[0].cadence
        assert said is not None
        return said

    def asked_by(self, lease_id: str, until_ms: int) -> int | None:
        """Let it run on; return when it was asked for a checkpoint, by its own time."""
        ran_ms = self.record.cum_device_ms
        while ran_ms < until_ms:
            ran_ms += 1_000
            self.ran(lease_id, ran_ms)
            if wanted(self.do(events.Tick()), effects.AskSave):
                return ran_ms
        return None

    def save(self, lease_id: str, step: int, *, durable_after_ms: int, stall_ms: int) -> None:
        """It saves now, and says so; that is durable after so long."""
        self.do(events.CheckpointFound(lease_id, step))
        ran_ms = self.record.cum_device_ms + durable_after_ms
        self.ran(lease_id, ran_ms)
        self.do(events.StallTold(lease_id, Stall(step, stall_ms * step, stall_ms, stall_ms)))
        uploaded = self.do(events.Uploaded(lease_id, "checkpoint", step, INDEX, 10))
        verdict = CheckpointVerdict(
            lease=lease_id,
            epoch=1,
            checkpoint=only(uploaded, CheckpointUploaded).checkpoint.id,
            kind="checkpoint",
            step=step,
            durable=True,
        )
        self.do(events.MessageArrived(verdict))


# -- the arithmetic ------------------------------------------------------------------------------


@pytest.mark.parametrize("cost_ms", [50, 1_000, 30_000, 600_000])
@pytest.mark.parametrize("loss_every_ms", [HOUR_MS, DAY_MS, 90 * DAY_MS])
def test_no_other_interval_loses_less(cost_ms: int, loss_every_ms: int) -> None:
    """Daly's own model of the time that it takes in all, of which the interval is the minimum."""

    def time_for_each_ms(interval_ms: float) -> float:
        grows = math.expm1((interval_ms + cost_ms) / loss_every_ms)
        return loss_every_ms * grows / interval_ms

    best = cadence.best_interval_ms(cost_ms, loss_every_ms)
    least = min(time_for_each_ms(best * (1 + part / 50)) for part in range(-45, 200))
    assert time_for_each_ms(best) <= least * 1.0005


def test_where_a_checkpoint_costs_little_it_is_youngs() -> None:
    assert cadence.best_interval_ms(100, DAY_MS) == pytest.approx(
        math.sqrt(2 * 100 * DAY_MS), rel=0.01
    )


def test_a_checkpoint_that_costs_more_than_machines_last_is_asked_for_once_in_their_life() -> None:
    assert cadence.best_interval_ms(3 * HOUR_MS, HOUR_MS) == HOUR_MS


# -- a run ---------------------------------------------------------------------------------------


def test_it_is_asked_early_for_the_first() -> None:
    town = Town()
    lease_id = town.begin()
    assert town.asked_by(lease_id, 10 * AUTO_FIRST_INTERVAL_MS) == AUTO_FIRST_INTERVAL_MS
    said = town.told
    assert (said.rests_on, said.interval_ms) == ("first", AUTO_FIRST_INTERVAL_MS)
    assert (said.cost_ms, said.durable_after_ms, said.spacing_ms) == (0, 0, 0)


def test_then_by_what_saving_costs_and_how_often_machines_are_lost() -> None:
    town = Town()
    lease_id = town.begin(loss_every_ms=DAY_MS)
    town.ran(lease_id, 60_000)
    town.save(lease_id, 1, durable_after_ms=5_000, stall_ms=400)
    cost_ms = 400 + 5_000 // cadence.SENDING_PART
    best_ms = cadence.best_interval_ms(cost_ms, DAY_MS)
    said = town.told
    assert (said.rests_on, said.cost_ms, said.interval_ms) == ("measured", cost_ms, best_ms)
    assert (said.durable_after_ms, said.spacing_ms) == (5_000, 60_000)
    assert said.most_lost_ms == best_ms + 5_000
    asked_ms = town.asked_by(lease_id, HOUR_MS)
    assert asked_ms is not None
    assert 0 <= asked_ms - (60_000 + best_ms) <= 1_000


def test_a_market_that_loses_machines_often_is_saved_from_more_often() -> None:
    intervals = []
    for loss_every_ms in (HOUR_MS, DAY_MS, 0, 30 * DAY_MS):
        town = Town()
        lease_id = town.begin(loss_every_ms=loss_every_ms)
        town.ran(lease_id, 60_000)
        town.save(lease_id, 1, durable_after_ms=5_000, stall_ms=400)
        intervals.append(town.told.interval_ms)
    hourly, daily, unknown, monthly = intervals
    assert hourly < daily == unknown < monthly


@pytest.mark.parametrize("said_ms", [1, HOUR_MS, 2**53 - 1])
def test_what_comes_with_the_lease_of_losses_is_taken_and_bounded(said_ms: int) -> None:
    town = Town()
    lease_id = town.begin(loss_every_ms=said_ms)
    assert town.record.loss_every_ms == said_ms
    town.ran(lease_id, 60_000)
    town.save(lease_id, 1, durable_after_ms=5_000, stall_ms=400)
    assert AUTO_LEAST_INTERVAL_MS <= town.told.interval_ms <= AUTO_MOST_INTERVAL_MS


def test_it_is_never_asked_before_the_last_one_can_be_durable() -> None:
    town = Town()
    lease_id = town.begin(loss_every_ms=HOUR_MS)
    town.ran(lease_id, 60_000)
    town.save(lease_id, 1, durable_after_ms=400_000, stall_ms=10)
    said = town.told
    assert (said.rests_on, said.interval_ms) == ("link", 400_000)
    assert said.most_lost_ms == 800_000, "the interval, and until the newer one is durable"


def test_while_one_is_on_its_way_it_is_not_asked_for_the_next() -> None:
    town = Town()
    lease_id = town.begin(loss_every_ms=HOUR_MS)
    town.ran(lease_id, 60_000)
    town.save(lease_id, 1, durable_after_ms=1_000, stall_ms=10)
    town.do(events.CheckpointFound(lease_id, 2))
    begun_ms = town.record.cum_device_ms
    asked_ms = town.asked_by(lease_id, begun_ms + 2 * AUTO_MOST_INTERVAL_MS)
    assert asked_ms == begun_ms + AUTO_MOST_INTERVAL_MS, "the link is gone: a newer one may do"
    assert town.told.rests_on == "most"


def test_a_clock_that_is_set_asks_no_sooner() -> None:
    """It was asked at each tick then, and nothing else was done by the run."""
    town = Town()
    lease_id = town.begin(checkpoint_interval_ms=60_000)
    assert town.asked_by(lease_id, 100_000) == 60_000
    town.now += HOUR_MS
    town.do(events.CheckpointFound(lease_id, 1))
    assert town.asked_by(lease_id, 200_000) == 120_000
    town.do(events.CheckpointFound(lease_id, 2))
    assert town.asked_by(lease_id, 200_000) == 180_000


def test_a_job_that_says_it_stalls_for_ever_is_still_asked() -> None:
    town = Town()
    lease_id = town.begin()
    town.ran(lease_id, 600_000)
    town.save(lease_id, 1, durable_after_ms=1_000, stall_ms=2**50)
    said = town.told
    assert (said.rests_on, said.interval_ms) == ("most", AUTO_MOST_INTERVAL_MS)


def test_a_save_that_costs_nothing_is_not_asked_for_all_the_time() -> None:
    town = Town()
    lease_id = town.begin(loss_every_ms=1)
    town.ran(lease_id, 60_000)
    town.save(lease_id, 1, durable_after_ms=0, stall_ms=0)
    said = town.told
    assert (said.rests_on, said.interval_ms) == ("least", AUTO_LEAST_INTERVAL_MS)


def test_one_slow_save_changes_little() -> None:
    town = Town()
    lease_id = town.begin(loss_every_ms=DAY_MS)
    for step, stall_ms in enumerate((400, 400, 90_000, 400, 400), start=1):
        town.ran(lease_id, town.record.cum_device_ms + 100_000)
        town.save(lease_id, step, durable_after_ms=1_000, stall_ms=stall_ms)
    assert town.told.cost_ms == 400 + 1_000 // cadence.SENDING_PART


def test_what_the_renter_asked_for_holds_and_its_cost_is_told_too() -> None:
    town = Town()
    lease_id = town.begin(checkpoint_interval_ms=30_000)
    town.ran(lease_id, 30_000)
    town.save(lease_id, 1, durable_after_ms=90_000, stall_ms=10)
    said = town.told
    assert (said.rests_on, said.interval_ms, said.durable_after_ms) == ("job", 30_000, 90_000)
    assert said.most_lost_ms == 120_000


def test_a_job_that_saves_at_times_of_its_own_is_told_by_those() -> None:
    town = Town()
    lease_id = town.begin()
    town.ran(lease_id, 900_000)
    town.save(lease_id, 1, durable_after_ms=2_000, stall_ms=10)
    said = town.told
    assert said.spacing_ms == 900_000
    assert said.most_lost_ms == 902_000


# -- asked, and no answer ------------------------------------------------------------------------


def test_it_is_told_for_how_long_it_was_asked_in_vain_until_one_comes() -> None:
    town = Town()
    lease_id = town.begin()
    assert town.told.unanswered_ms == 0
    asked_ms = town.asked_by(lease_id, HOUR_MS)
    assert asked_ms is not None
    town.ran(lease_id, asked_ms + 150_000)
    assert town.told.unanswered_ms == 150_000, "since it was asked first, however often"
    town.do(events.CheckpointFound(lease_id, 1))
    assert town.told.unanswered_ms == 0


def test_an_agent_that_was_killed_goes_on_with_what_it_had_measured() -> None:
    town = Town()
    lease_id = town.begin(loss_every_ms=DAY_MS)
    town.ran(lease_id, 60_000)
    town.save(lease_id, 1, durable_after_ms=5_000, stall_ms=400)
    asked_ms = town.asked_by(lease_id, HOUR_MS)
    assert asked_ms is not None
    before = cadence.told(town.record)
    saved = Saved.model_validate_json(town.core.saved.model_dump_json())
    town.core = AgentCore(terms(), PROVIDER, saved, boot="")
    town.core.started(list(saved.runs), town.now)
    assert cadence.told(town.record) == before
