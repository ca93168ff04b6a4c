"""What an owner's `reclaim` and `drain` come to in the pure core: a reclaim holds until he offers
again, and a drain has an end whatever the broker does, and says what it waits for."""

from sublet_agent.core import effects, events
from sublet_agent.core.agent import AgentCore
from sublet_agent.core.draining import WAIT_MS
from sublet_agent.core.effects import Step
from sublet_agent.core.records import Saved
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import HeldLease, LeaseAnswer, Welcome, Withdraw
from tests.agent.test_core import BROKER, PROVIDER, World, only, said, terms, wanted
from tests.agent.test_facts import announced
from tests.contracts.samples import INDEX

DRAIN = events.DrainAsked(Reason.PROVIDER_DRAINED, 20_000)
RECLAIM = events.DrainAsked(Reason.RECLAIMED, 20_000, then_stop=False)


def lines(*steps: Step) -> list[str]:
    return [effect.text for step in steps for effect in wanted(step, effects.Say)]


class Owned(World):
    """An agent whose owner wants his machine."""

    def waits(self, time_ms: int) -> Step:
        """Some time passes, second by second; return the step that ends the agent, or the last."""
        step = self.steps[-1]
        for _ in range(time_ms // 1_000):
            self.now += 1_000
            step = self.do(events.Tick())
            if wanted(step, effects.Done):
                break
        return step

    def restarted(self) -> Step:
        """The agent starts again on what is on its disk, and is welcomed with what it holds."""
        saved = Saved.model_validate_json(self.core.saved.model_dump_json())
        self.core = AgentCore(terms(), PROVIDER, saved)
        self.steps.append(self.core.started(list(saved.runs), self.now)[0])
        self.do(events.Joined(BROKER.party))
        held = [HeldLease(lease=id, epoch=record.lease.epoch) for id, record in saved.runs.items()]
        message = Welcome(heartbeat_ms=3000, fee_bps=500, leases=tuple(held))
        return self.do(events.MessageArrived(message))

    def moves(self, lease_id: str) -> None:
        """The job has saved and left, and its checkpoint goes off."""
        self.do(events.CheckpointFound(lease_id, 5))
        self.ran(lease_id, 1_000, running=False, exit_code=75)
        self.scanned(lease_id, 5)


def test_a_reclaim_holds_over_restarts_until_the_owner_offers_again() -> None:
    world = Owned()
    only(world.do(RECLAIM), Withdraw)
    for _ in range(2):
        assert announced(world.restarted()) is None
        assert "reclaimed: nothing is offered until `sublet provider offer`" in lines(*world.steps)
        assert world.core.draining == events.DrainAsked(Reason.RECLAIMED, 60_000, then_stop=False)
    _, step = world.assign(world.job())
    assert "drained" in only(step, LeaseAnswer).refusal
    assert announced(world.waits(600_000)) is None
    assert announced(world.do(events.OfferAgain())) is not None
    assert announced(world.restarted()) is not None


def test_a_drain_is_for_this_life_of_the_agent_and_takes_no_reclaim_back() -> None:
    """The machine is switched off after a reclaim: a drain on the way is no offer."""
    world = Owned()
    world.do(DRAIN)
    assert announced(world.restarted()) is not None
    world.do(RECLAIM)
    world.do(DRAIN)
    assert announced(world.restarted()) is None


def test_a_drain_with_nothing_to_hand_back_ends_at_once() -> None:
    assert wanted(Owned().do(DRAIN), effects.Done)


def test_a_drain_says_what_it_waits_for() -> None:
    world = Owned()
    lease_id = world.running()
    job = world.core.runs[lease_id].record.job_id[:10]
    assert f"draining: waiting for job {job}: it saves and stops" in lines(world.do(DRAIN))
    assert world.core.waits_for() == (f"job {job}: it saves and stops",)
    world.moves(lease_id)
    assert world.core.waits_for() == (f"job {job}: its checkpoint of step 5 goes off",)
    step = world.do(events.Uploaded(lease_id, "checkpoint", 5, INDEX, 10))
    assert world.core.waits_for() == (f"job {job}: its outputs go off",)
    world.wrote_nothing(step)
    assert world.core.waits_for() == (f"job {job}: what it has made is handed over",)
    world.waits(21_000)
    assert world.core.waits_for() == (f"job {job}: its settlement",)
    world.do(events.Disconnected())
    assert "the broker, which is away" in world.core.waits_for()[-1]
    # Each is said once.
    said_lines = [line for line in lines(*world.steps) if line.startswith("draining")]
    assert len(said_lines) == len(set(said_lines)) == 6


def test_a_drain_ends_though_the_broker_is_away() -> None:
    world = Owned()
    lease_id = world.running()
    world.do(events.Disconnected())
    began = world.now
    world.do(DRAIN)
    assert wanted(world.waits(20_000), effects.Kill)
    world.moves(lease_id)
    assert wanted(world.waits(300_000), effects.Done)
    assert world.now - began <= 20_000 + WAIT_MS + 2_000
    # It is all there for the next start.
    step = world.restarted()
    assert world.core.runs[lease_id].record.stop is not None
    assert wanted(world.steps[-3], effects.Upload)
    assert announced(step) is not None


def test_a_broker_that_comes_back_gets_its_time() -> None:
    world = Owned()
    lease_id = world.running()
    world.do(events.Disconnected())
    world.do(DRAIN)
    world.moves(lease_id)
    assert not wanted(world.waits(WAIT_MS - 1_000), effects.Done)
    world.do(events.Joined(BROKER.party))
    held = (HeldLease(lease=lease_id, epoch=1),)
    world.do(events.MessageArrived(Welcome(heartbeat_ms=3000, fee_bps=500, leases=held)))
    # As long as something goes off it may take its time.
    assert not wanted(world.waits(20 * WAIT_MS), effects.Done)
    world.do(events.Uploaded(lease_id, "checkpoint", 5, INDEX, 10))
    # And one that settles nothing is not waited for for ever.
    assert wanted(world.waits(20_000 + 2 * WAIT_MS), effects.Done)
    assert world.core.runs[lease_id].record.is_over


def test_a_drain_ends_though_the_engine_lets_nothing_go() -> None:
    world = Owned()
    world.running()
    world.do(DRAIN)
    step = world.waits(20_000 + WAIT_MS + 2_000)
    assert wanted(step, effects.Done)


def test_the_fee_is_said_with_the_welcome_and_again_when_it_changes() -> None:
    world = Owned()
    says = "the broker keeps 5 % of each charge: of 0.40 credits per device-hour you earn 0.38"
    assert says in lines(*world.steps)
    assert not lines(world.welcome())
    message = Welcome(heartbeat_ms=3000, fee_bps=1_250, leases=())
    assert "keeps 12.5 %" in lines(world.do(events.MessageArrived(message)))[0]
    assert not said(world.steps[-1], Withdraw)
