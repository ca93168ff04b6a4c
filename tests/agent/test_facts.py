"""The machine is looked at again: what is gone leaves the offer, is not leased, and is not held
against the job that ran on it. The pure core, in looks and leases."""

import random
from dataclasses import replace
from typing import Any

import pytest

from sublet_agent.core import effects, events
from sublet_agent.core.agent import LOOK_WAIT_MS, AgentCore
from sublet_agent.core.effects import Step
from sublet_agent.core.exit_reasons import ExitEvidence
from sublet_agent.core.records import Saved
from sublet_agent.core.supply import DeviceSeen, Facts, Missing
from sublet_contracts.documents import Device, Offer, read_document
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import Announce, LeaseAnswer, Order, RunChanged, Withdraw
from tests.agent.test_core import NOW, PROVIDER, World, only, said, terms, wanted

GB = 10**9
LOST = "GPU is lost"


def card(number: int, **changes: Any) -> Device:
    facts = {
        "id": f"gpu-{number}",
        "kind": "gpu",
        "name": "RTX 4090",
        "memory_bytes": 24 * GB,
        "hardware_class": "nvidia-rtx-4090",
        "driver": "580.10",
    }
    return Device.model_validate(facts | changes)


FACTS = Facts(
    devices=(DeviceSeen(card(0)), DeviceSeen(card(1))),
    cpu_millis=8_000,
    memory_bytes=64 * GB,
    memory_free_bytes=64 * GB,
    disk_free_bytes=102 * GB,
)


class Watched(World):
    """An agent of a machine with two GPUs that is looked at."""

    def __init__(self, saved: Saved | None = None, **changes: Any) -> None:
        super().__init__(saved, **({"devices": (card(0), card(1))} | changes))
        self.facts = FACTS
        self.look()

    def look(self, after_ms: int = 3_000, **changes: Any) -> Step:
        """Some time later: this has changed, and is seen."""
        self.now += after_ms
        self.facts = replace(self.facts, **changes)
        return self.do(events.FactsRead(self.facts, self.now))

    def uses(self, *used_bytes: int, **changes: Any) -> Step:
        """Look: this much of each GPU's memory is in use."""
        seen = zip(self.facts.devices, used_bytes, strict=True)
        return self.look(devices=tuple(replace(d, used_bytes=u) for d, u in seen), **changes)

    def loses(
        self, number: int, says: str = LOST, certain_after_ms: int | None = 0, **changes: Any
    ) -> Step:
        left = tuple(d for d in FACTS.devices if d.device.id != f"gpu-{number}")
        missing = (Missing(f"gpu-{number}", says, certain_after_ms),)
        return self.look(devices=left, missing=missing, **changes)

    def regains(self, **changes: Any) -> Step:
        return self.look(devices=FACTS.devices, missing=(), **changes)

    def assigned(self, number: int = 0, **resources: Any) -> tuple[str, Step]:
        """Assign a job on this GPU."""
        needs = {"devices": 1, "device_kind": "gpu", "memory_bytes": 1, "disk_bytes": 1000}
        job = self.job(resources=needs | resources, nonce=f"{len(self.steps):032x}")
        return self.assign(job, device_ids=(f"gpu-{number}",))

    def runs_on(self, number: int) -> str:
        lease_id, _ = self.assigned(number)
        self.look(0)
        self.do(events.ImageReady(lease_id))
        self.do(events.Restored(lease_id))
        self.do(events.Observed(lease_id, True, self.now, 0))
        return lease_id

    def exits(self, lease_id: str, code: int) -> Step:
        self.now += 1_000
        end = ExitEvidence(code, returned=True)
        return self.do(events.Observed(lease_id, False, NOW, 1_000, end))

    def ended(self, lease_id: str) -> RunChanged:
        """Read its folder; return what the broker is told of its end."""
        return only(self.scanned(lease_id), RunChanged)


def restarted(world: Watched) -> AgentCore:
    """Return what an agent has in mind that starts on the same journal."""
    saved = Saved.model_validate_json(world.core.saved.model_dump_json())
    core = AgentCore(terms(devices=()), PROVIDER, saved)
    core.started(list(saved.runs), world.now)
    return core


def announced(step: Step) -> Offer | None:
    sent = [effect.message for effect in wanted(step, effects.Send)]
    offers = [message.offer for message in sent if isinstance(message, Announce)]
    return read_document(offers[-1], Offer) if offers else None


def offered(step: Step) -> list[str]:
    offer = announced(step)
    assert offer is not None
    return [device.id for device in offer.devices]


def refusal(step: Step) -> str:
    answer = only(step, LeaseAnswer)
    assert answer.signed is None
    return str(answer.refusal)


# -- the offer -------------------------------------------------------------------------------------


def test_a_lost_gpu_leaves_the_offer_with_the_look_that_misses_it_and_comes_back() -> None:
    world = Watched()
    assert offered(world.loses(1)) == ["gpu-0"]
    assert announced(world.look()) is None
    world.regains()
    assert offered(world.look()) == ["gpu-0", "gpu-1"]


def test_when_all_are_gone_the_offer_is_taken_back_and_made_again() -> None:
    world = Watched()
    gone = tuple(Missing(f"gpu-{n}", "no answer", None) for n in (0, 1))
    step = world.look(devices=(), missing=gone)
    only(step, Withdraw)
    assert announced(step) is None
    assert not world.look().save.queue
    world.regains()
    assert offered(world.look()) == ["gpu-0", "gpu-1"]


def test_a_loose_contact_is_believed_less_each_time() -> None:
    world = Watched()
    waited = []
    for _ in range(3):
        world.loses(1)
        world.regains()
        looks = 1
        while not announced(world.look()):
            looks += 1
        waited.append(3 * looks)
    assert waited == [3, 12, 102]
    # The owner's word is believed at once.
    world.loses(1)
    world.regains()
    world.do(events.OfferAgain())
    assert offered(world.look()) == ["gpu-0", "gpu-1"]


def test_what_others_use_of_a_gpu_is_not_offered() -> None:
    world = Watched()
    offer = announced(world.uses(0, 19 * GB))
    assert offer is not None
    assert [device.memory_bytes for device in offer.devices] == [24 * GB, 5 * GB]
    # A screen's few pages are no news, and no less memory.
    assert announced(world.uses(300_000_000, 19 * GB)) is None
    assert announced(world.uses(300_000_000, 19 * GB + 200_000_000)) is None
    offer = announced(world.uses(0, 0))
    assert offer is not None
    assert [device.memory_bytes for device in offer.devices] == [24 * GB, 24 * GB]


def test_what_our_own_runs_use_is_not_others_use() -> None:
    world = Watched()
    world.uses(0, 4 * GB)
    lease_id = world.runs_on(1)
    assert announced(world.uses(0, 23 * GB)) is None
    # An agent that is started meanwhile remembers what it offered last.
    again = restarted(world)
    again.handle(events.FactsRead(world.facts, world.now), world.now)
    assert [device.memory_bytes for device in again.terms.devices] == [24 * GB, 20 * GB]
    world.exits(lease_id, 0)
    world.ended(lease_id)
    # It takes a moment until a driver has cleared up.
    assert announced(world.look()) is None
    offer = None
    while offer is None:
        offer = announced(world.uses(0, 8 * GB))
    assert [device.memory_bytes for device in offer.devices] == [24 * GB, 16 * GB]


@pytest.mark.parametrize(
    ("change", "field", "before", "after"),
    [
        ({"cpu_millis": 4_000}, "cpu_millis", 4_000, 2_000),
        ({"memory_bytes": 32 * GB, "memory_free_bytes": 32 * GB}, "memory_bytes", 28.8, 14.4),
        ({"memory_free_bytes": 20 * GB}, "memory_bytes", 28.8, 10),
        ({"disk_free_bytes": 12 * GB}, "disk_bytes", 49.926258176, 4.926258176),
    ],
)
def test_less_of_the_machine_is_told_at_once_and_more_soon(
    change: dict[str, int], field: str, before: float, after: float
) -> None:
    world = Watched()
    scale = 1 if field == "cpu_millis" else GB
    offer = announced(world.look(**change))
    assert offer is not None
    assert getattr(offer, field) == round(after * scale)
    offer = announced(world.look(**{key: getattr(FACTS, key) for key in change}))
    assert offer is not None
    assert getattr(offer, field) == round(before * scale)


def test_a_little_more_or_less_waits_for_the_next_refresh() -> None:
    world = Watched()
    assert announced(world.look(disk_free_bytes=FACTS.disk_free_bytes - GB // 2)) is None
    assert announced(world.look(memory_free_bytes=58 * GB)) is None
    world.look(300_000)
    offer = announced(world.do(events.Tick())) or announced(world.steps[-2])
    assert offer is not None
    assert offer.disk_bytes == (FACTS.disk_free_bytes - GB // 2 - 2 * 2**30) // 2


def test_the_owners_bounds_hold_where_there_is_more() -> None:
    world = Watched(asked_memory_bytes=10 * GB, asked_disk_bytes=20 * GB)
    assert (world.core.terms.memory_bytes, world.core.terms.disk_bytes) == (5 * GB, 10 * GB)
    offer = announced(world.look(disk_free_bytes=8 * GB))
    assert offer is not None
    assert offer.disk_bytes == 4 * GB


def test_what_our_own_runs_hold_of_memory_and_disk_counts_as_there() -> None:
    world = Watched()
    lease_id, _ = world.assigned(0, memory_bytes=40 * GB // 2, disk_bytes=40 * GB)
    world.look(0)
    world.do(events.ImageReady(lease_id))
    world.do(events.Restored(lease_id))
    world.do(events.Observed(lease_id, True, world.now, 0))
    world.do(events.DiskUsed(lease_id, 30 * GB))
    step = world.look(disk_free_bytes=72 * GB, memory_free_bytes=44 * GB)
    assert announced(step) is None


def test_another_driver_is_another_offer() -> None:
    world = Watched()
    seen = tuple(DeviceSeen(card(n, driver="590.1")) for n in (0, 1))
    offer = announced(world.look(devices=seen))
    assert offer is not None
    assert {device.driver for device in offer.devices} == {"590.1"}


def test_nothing_is_offered_while_the_engine_is_silent() -> None:
    world = Watched()
    only(world.look(engine="no answer within 2 s"), Withdraw)
    _, step = world.assigned()
    assert "engine does not answer: no answer within 2 s" in refusal(step)
    assert offered(world.look(engine="")) == ["gpu-0", "gpu-1"]


def test_a_gpu_that_shares_the_machines_memory_has_its_share_of_it() -> None:
    world = Watched(asked_memory_bytes=40 * GB)
    unified = DeviceSeen(card(0, memory_bytes=0), shares_main_memory=True)
    offer = announced(world.look(devices=(unified,)))
    assert offer is not None
    assert (offer.devices[0].memory_bytes, offer.memory_bytes) == (40 * GB, 40 * GB)


def test_an_agent_without_devices_takes_back_what_one_before_it_offered() -> None:
    """`--devices none` after a crash: the offer of before would stand for a quarter of an hour."""
    saved = Watched().core.saved
    world = World(saved, devices=())
    only(world.steps[-1], Withdraw)


# -- leases ----------------------------------------------------------------------------------------


def test_a_lease_waits_for_a_look_that_began_after_it() -> None:
    world = Watched()
    world.now += 1_000
    lease_id, step = world.assigned()
    assert wanted(step, effects.ReadFacts)
    assert not step.save.queue
    # One that was under way already says nothing of now.
    assert not world.do(events.FactsRead(world.facts, world.now - 500)).save.queue
    step = world.look(50)
    assert only(step, LeaseAnswer).signed is not None
    assert lease_id in step.save.runs


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        ({"devices": FACTS.devices[1:], "missing": (Missing("gpu-0", LOST),)}, "gpu-0 can't be"),
        ({"devices": FACTS.devices[1:]}, "gpu-0 is no longer here"),
        ({"devices": (DeviceSeen(card(0), 19 * GB),)}, "device_memory: 5 GB there, 24 GB"),
        ({"memory_free_bytes": 2 * GB}, "memory: 1 GB there, 20 GB asked for"),
        ({"disk_free_bytes": 3 * GB}, "disk: 426.2 MB there, 20 GB asked for"),
        ({"engine": "gone"}, "engine does not answer: gone"),
    ],
)
def test_what_has_gone_since_the_offer_is_not_signed_for(seen: dict[str, Any], why: str) -> None:
    world = Watched()
    world.now += 1_000
    _, step = world.assigned(
        0, device_memory_bytes=24 * GB, memory_bytes=20 * GB, disk_bytes=20 * GB
    )
    assert not step.save.queue
    assert why in refusal(world.look(100, **seen))
    assert not world.core.saved.runs


def test_a_look_that_does_not_come_holds_no_lease_up() -> None:
    world = Watched()
    world.now += 1_000
    world.assigned()
    world.now += LOOK_WAIT_MS
    assert not world.do(events.Tick()).save.queue
    world.now += 1
    assert only(world.do(events.Tick()), LeaseAnswer).signed is not None


def test_an_order_to_stop_what_is_not_signed_yet_is_an_answer() -> None:
    world = Watched()
    world.now += 1_000
    lease_id, _ = world.assigned()
    order = Order(lease=lease_id, epoch=1, desired="stop", reason=Reason.CANCELLED, grace_ms=0)
    assert "before it was signed" in refusal(world.do(events.MessageArrived(order)))
    assert not said(world.look(10), LeaseAnswer)


def test_a_job_without_a_wish_gets_the_cores_that_come_with_its_devices() -> None:
    """A machine with fewer cores than GPUs serves as well."""
    world = Watched()
    world.look(cpu_millis=1_000)
    lease_id, _ = world.assigned()
    world.look(0)
    assert world.core.runs[lease_id].record.cpu_millis == 500
    world.assigned(1, cpu_millis=1_000)
    assert "cpu: 0.5 cores there, 1 core" in refusal(world.look(0))


# -- runs ------------------------------------------------------------------------------------------


def test_who_fails_on_a_lost_gpu_has_not_failed() -> None:
    world = Watched()
    lost, other = world.runs_on(1), world.runs_on(0)
    # The job notices first, as jobs do: nothing is judged until the GPU was looked at.
    step = world.exits(lost, 1)
    assert wanted(step, effects.ReadFacts)
    assert not wanted(step, effects.ScanFolder)
    world.loses(1, after_ms=100)
    told = world.ended(lost)
    assert (told.reason, told.exit_code) == (Reason.DEVICE_FAILED, 1)
    assert told.detail == f"gpu-1: {LOST}"
    # The other GPU is well, and so its job has failed by itself.
    world.exits(other, 1)
    world.look(100)
    assert world.ended(other).reason is Reason.JOB_FAILED


def test_what_was_done_is_done_whatever_the_gpu_does() -> None:
    world = Watched()
    lease_id = world.runs_on(1)
    world.loses(1)
    step = world.exits(lease_id, 0)
    assert wanted(step, effects.ScanFolder)
    assert world.ended(lease_id).reason is Reason.SUCCEEDED


def test_a_run_that_does_not_notice_is_asked_and_then_killed() -> None:
    world = Watched()
    lease_id = world.runs_on(1)
    world.loses(1)
    for _ in range(9):
        world.now += 1_000
        assert not wanted(world.do(events.Tick()), effects.AskStop)
    world.now += 1_000
    assert wanted(world.do(events.Tick()), effects.AskStop)
    world.now += 10_000
    assert wanted(world.do(events.Tick()), effects.Kill)
    world.exits(lease_id, 137)
    world.look(100)
    told = world.ended(lease_id)
    assert (told.reason, told.detail) == (Reason.DEVICE_FAILED, f"gpu-1: {LOST}")


def test_what_has_not_started_on_a_lost_gpu_ends_at_once() -> None:
    world = Watched()
    lease_id, _ = world.assigned(1)
    world.look(0)
    step = world.loses(1)
    told = [m for m in said(step, RunChanged) if m.state == "exited"]
    assert [(m.lease, m.reason) for m in told] == [(lease_id, Reason.DEVICE_FAILED)]


def test_a_start_that_fails_because_the_gpu_has_gone_is_the_gpus() -> None:
    world = Watched()
    lease_id, _ = world.assigned(1)
    world.look(0)
    world.do(events.ImageReady(lease_id))
    world.do(events.Restored(lease_id))
    world.now += 1_000
    failed = events.PreparationFailed(lease_id, Reason.START_FAILED, "nvidia-container-cli: error")
    assert not world.do(failed).save.queue
    assert only(world.loses(1, after_ms=50), RunChanged).reason is Reason.DEVICE_FAILED


@pytest.mark.parametrize(
    ("certain_after_ms", "stopped"), [(60_000, True), (None, False)], ids=["silent", "upgraded"]
)
def test_a_driver_that_gives_no_answer_is_a_doubt(
    certain_after_ms: int | None, stopped: bool
) -> None:
    """What runs may run on well; who fails meanwhile is believed."""
    world = Watched()
    failing, going_on = world.runs_on(0), world.runs_on(1)

    def silence() -> Step:
        gone = tuple(Missing(f"gpu-{n}", "no answer", certain_after_ms) for n in (0, 1))
        return world.look(devices=(), missing=gone)

    silence()
    world.exits(failing, 1)
    silence()
    assert world.ended(failing).reason is Reason.DEVICE_FAILED
    for _ in range(40):
        silence()
        world.do(events.Tick())
    stop = world.core.runs[going_on].record.stop
    assert (stop is not None) is stopped


def test_a_doubt_that_has_passed_accuses_nobody() -> None:
    world = Watched()
    lease_id = world.runs_on(1)
    world.loses(1, says="no answer", certain_after_ms=60_000)
    world.regains()
    # Offered again it isn't yet; it answers, and that is what counts here.
    world.look()
    world.exits(lease_id, 1)
    world.look(100)
    assert world.ended(lease_id).reason is Reason.JOB_FAILED


@pytest.mark.parametrize(
    ("answering", "reason"),
    [
        (frozenset({"gpu-1"}), Reason.JOB_FAILED),
        (frozenset({"gpu-0"}), Reason.DEVICE_FAILED),
        (None, Reason.JOB_FAILED),
    ],
    ids=["it answers", "it doesn't", "not asked (--devices none)"],
)
def test_a_run_on_a_gpu_that_was_gone_when_the_agent_started(
    answering: frozenset[str] | None, reason: Reason
) -> None:
    """Nothing is known of the GPU then but whether it is there: it may be offered, or not."""
    world = Watched()
    lease_id = world.runs_on(1)
    world.core = restarted(world)
    only_first = FACTS.devices[:1]
    world.look(devices=only_first, answering=answering)
    world.exits(lease_id, 1)
    world.look(100)
    assert world.ended(lease_id).reason is reason


def test_a_recorded_fault_is_evidence_and_keeps_the_gpu_off_the_market() -> None:
    world = Watched()
    lease_id = world.runs_on(1)
    step = world.do(events.DeviceFailed("gpu-1", "the driver recorded Xid 94"))
    assert offered(step) == ["gpu-0"]
    assert announced(world.look()) is None
    world.exits(lease_id, 1)
    world.look(100)
    told = world.ended(lease_id)
    assert (told.reason, told.detail) == (Reason.DEVICE_FAILED, "gpu-1: the driver recorded Xid 94")
    world.look(290_000)
    assert world.core.supply.missing["gpu-1"].says.startswith("the driver recorded Xid 94; it is")
    world.look(10_000)
    assert "gpu-1" not in world.core.supply.missing


def test_evidence_outlives_the_agent() -> None:
    world = Watched()
    lease_id = world.runs_on(1)
    world.do(events.DeviceFailed("gpu-1", "Xid 79"))
    world.core = restarted(world)
    world.exits(lease_id, 1)
    assert world.ended(lease_id).reason is Reason.DEVICE_FAILED


def test_a_clock_that_goes_back_holds_nothing_for_ever() -> None:
    world = Watched()
    world.loses(1)
    world.regains()
    world.now -= 10_000_000
    world.look(0)
    assert [device.id for device in world.core.terms.devices] == ["gpu-0", "gpu-1"]


# -- whatever is seen, in whatever order -----------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_offered_that_is_not_there(seed: int) -> None:
    """GPUs come and go, memory, disk and clocks jump, runs come and go: what the broker has been
    told never holds a GPU that the last look missed, nor more than the last look found."""
    draw = random.Random(seed)
    world = Watched(asked_disk_bytes=draw.choice((0, 30 * GB)))
    offer = announced(world.steps[-1])
    for _ in range(60):
        there = [n for n in range(3) if draw.random() < 0.7]
        seen = tuple(DeviceSeen(card(n), draw.choice((0, GB // 4, 9 * GB))) for n in there)
        gone = tuple(
            Missing(f"gpu-{n}", "gone", draw.choice((0, 60_000, None)))
            for n in range(3)
            if n not in there
        )
        step = world.look(
            draw.choice((0, 500, 3_000, 40_000, -5_000)),
            devices=seen,
            missing=gone,
            memory_free_bytes=draw.choice((1, 8, 64)) * GB,
            disk_free_bytes=draw.choice((0, 10, 102)) * GB,
            engine=draw.choice(("", "", "", "silent")),
        )
        offer = announced(step) or (None if said(step, Withdraw) else offer)
        for device in offer.devices if offer else ():
            assert device.id in {one.device.id for one in seen}
            assert device.memory_bytes <= 24 * GB
        if offer is not None:
            assert not world.facts.engine
            most = world.facts.disk_free_bytes + GB
            assert offer.disk_bytes * 3 <= most + 3 * (most // 50 + 2**28)
            assert offer.memory_bytes * 3 <= world.facts.memory_free_bytes * 1.03 + 3 * 2**28
        if draw.random() < 0.2 and world.core.terms.devices and not world.core.saved.runs:
            lease_id, _ = world.assigned(int(world.core.terms.devices[0].id[-1]))
            world.look(0)
            if lease_id in world.core.runs:
                world.do(events.PreparationFailed(lease_id, Reason.PULL_FAILED, "no"))
                world.do(events.Removed(lease_id))
        tick = world.do(events.Tick())
        offer = announced(tick) or (None if said(tick, Withdraw) else offer)
