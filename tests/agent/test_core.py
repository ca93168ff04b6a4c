"""The pure core in events and effects: what is signed, what is refused, what ends how."""

from typing import Any

import pytest

from sublet_agent.core import effects, events
from sublet_agent.core.agent import AgentCore
from sublet_agent.core.effects import Step
from sublet_agent.core.exit_reasons import ExitEvidence, exit_text, reason_of_exit
from sublet_agent.core.offers import Terms
from sublet_agent.core.records import Saved, Stop
from sublet_contracts.documents import (
    Device,
    Job,
    Lease,
    Offer,
    Receipt,
    Signed,
    read_document,
    sign_document,
)
from sublet_contracts.keys import SigningKey
from sublet_contracts.reasons import Reason
from sublet_contracts.rules import charge_ucr
from sublet_contracts.wire import (
    Announce,
    Assign,
    CheckpointUploaded,
    CheckpointVerdict,
    Heartbeat,
    HeldLease,
    LeaseAnswer,
    Order,
    ReceiptIssued,
    RunChanged,
    Welcome,
)
from tests.contracts.samples import INDEX

BROKER = SigningKey.from_seed(b"b" * 32)
PROVIDER = SigningKey.from_seed(b"p" * 32)
RENTER = SigningKey.from_seed(b"r" * 32)
OTHER = SigningKey.from_seed(b"o" * 32)
NOW = 1_800_000_000_000
GPU = Device(id="gpu-0", kind="gpu", name="A100", memory_bytes=2**34, hardware_class="nvidia-a100")
PRICE = 400_000


def terms(**changes: Any) -> Terms:
    values: dict[str, Any] = {
        "name": "box",
        "devices": (GPU,),
        "price_ucr_per_device_hour": PRICE,
        "cpu_millis": 4000,
        "memory_bytes": 2**34,
        "disk_bytes": 2**34,
        "region": "local",
        "runner": "docker",
        "image_policy": "any",
        "egress": False,
        "accepts": (),
        "grace_ms": 60_000,
    }
    return Terms(**(values | changes))


class World:
    """An agent core that has joined, and what came out of it."""

    def __init__(self, saved: Saved | None = None, **changes: Any) -> None:
        self.core = AgentCore(terms(**changes), PROVIDER, saved or Saved())
        self.now = NOW
        self.steps: list[Step] = []
        self.do(events.Joined(BROKER.party))
        self.welcome()

    def do(self, event: events.Event) -> Step:
        step = self.core.handle(event, self.now)
        assert not wanted(step, effects.Unexpected)
        self.steps.append(step)
        return step

    def welcome(self, *leases: HeldLease) -> Step:
        return self.do(
            events.MessageArrived(Welcome(heartbeat_ms=3000, fee_bps=500, leases=leases))
        )

    @property
    def offer(self) -> Signed[Offer]:
        envelope = self.core.saved.offers[-1].envelope
        return Signed(read_document(envelope, Offer), envelope)

    def job(self, **changes: Any) -> Signed[Job]:
        values: dict[str, Any] = {
            "renter": RENTER.party,
            "broker": BROKER.party,
            "nonce": "0" * 32,
            "name": "ft",
            "image": "img@sha256:" + "1" * 64,
            "command": ("true",),
            "env": {},
            "resources": {
                "devices": 1,
                "device_kind": "any",
                "memory_bytes": 1,
                "disk_bytes": 1000,
            },
            "max_price_ucr_per_device_hour": PRICE,
            "budget_ucr": 1_000_000,
            "checkpoint_interval_ms": 60_000,
            "patience_ms": 20_000,
            "inputs": (),
            "accept_receipts_up_to_ucr": 0,
            "issued_ms": NOW,
            "expires_ms": NOW + 10**9,
        }
        return sign_document(Job.model_validate(values | changes), RENTER)

    def assign(
        self,
        job: Signed[Job],
        signer: SigningKey = BROKER,
        *,
        loss_every_ms: int = 0,
        **changes: Any,
    ) -> tuple[str, Step]:
        values: dict[str, Any] = {
            "broker": BROKER.party,
            "provider": PROVIDER.party,
            "renter": RENTER.party,
            "job": job.id,
            "offer": self.offer.id,
            "epoch": 1,
            "device_ids": ("gpu-0",),
            "price_ucr_per_device_hour": PRICE,
            "fee_bps": 500,
            "hold_ucr": 1_000_000,
            "start_step": 0,
            "issued_ms": self.now,
            "answer_by_ms": self.now + 10_000,
        }
        lease = sign_document(Lease.model_validate(values | changes), signer)
        message = Assign(
            lease=lease.envelope,
            job=job.envelope,
            checkpoint=None,
            loss_every_ms=loss_every_ms,
        )
        return lease.id, self.do(events.MessageArrived(message))

    def running(self, **changes: Any) -> str:
        lease_id, _ = self.assign(self.job(**changes))
        self.do(events.ImageReady(lease_id))
        self.do(events.Restored(lease_id))
        self.ran(lease_id, 0)
        return lease_id

    def ran(self, lease_id: str, ran_ms: int, **changes: Any) -> Step:
        self.now = max(self.now, NOW + ran_ms)
        values: dict[str, Any] = {"running": True, "started_ms": NOW, "ran_ms": ran_ms}
        if "exit_code" in changes:
            values["end"] = ExitEvidence(changes.pop("exit_code"))
        return self.do(events.Observed(lease_id, **(values | changes)))

    def scanned(self, lease_id: str, *steps: int, finished: bool = True) -> Step:
        """Its folders were looked at; it has written nothing that is brought back."""
        return self.wrote_nothing(self.do(events.FolderScanned(lease_id, steps, finished=finished)))

    def wrote_nothing(self, step: Step) -> Step:
        """Answer that there are no outputs, if they are asked for."""
        for upload in wanted(step, effects.Upload):
            if upload.kind != "checkpoint":
                lease_id, kind = upload.lease_id, upload.kind
                return self.do(events.UploadFailed(lease_id, kind, upload.step, "", nothing=True))
        return step

    def durable(self, lease_id: str, step: int) -> Step:
        self.do(events.CheckpointFound(lease_id, step))
        uploaded = self.do(events.Uploaded(lease_id, "checkpoint", step, INDEX, 10))
        message = only(uploaded, CheckpointUploaded)
        return self.do(
            events.MessageArrived(
                CheckpointVerdict(
                    lease=lease_id,
                    epoch=1,
                    checkpoint=message.checkpoint.id,
                    kind="checkpoint",
                    step=step,
                    durable=True,
                )
            )
        )


def said(step: Step, kind: type[Any]) -> list[Any]:
    return [q.message for q in step.save.queue if isinstance(q.message, kind)]


def only(step: Step, kind: type[Any]) -> Any:
    (message,) = said(step, kind)
    return message


def wanted(step: Step, kind: type[Any]) -> list[Any]:
    return [effect for effect in step.effects if isinstance(effect, kind)]


def receipts_of(world: World) -> list[Receipt]:
    return [
        read_document(message.receipt, Receipt, signed_by=(PROVIDER.party,))
        for step in world.steps
        for message in said(step, ReceiptIssued)
    ]


def test_it_offers_after_the_welcome() -> None:
    world = World()
    sends = [s.message for s in wanted(world.steps[-1], effects.Send)]
    assert any(isinstance(message, Announce) for message in sends)
    assert world.steps[-1].save.offers


def test_signature_and_record_are_saved_together() -> None:
    world = World()
    lease_id, step = world.assign(world.job())
    answer = only(step, LeaseAnswer)
    assert answer.signed.signers == (BROKER.party, PROVIDER.party)
    assert lease_id in step.save.runs
    assert wanted(step, effects.Pull)


@pytest.mark.parametrize(
    ("job", "lease", "why"),
    [
        ({}, {"price_ucr_per_device_hour": PRICE - 1}, "price"),
        ({}, {"device_ids": ("gpu-1",)}, "device_ids"),
        ({}, {"offer": "f" * 64}, "offer"),
        ({}, {"provider": OTHER.party}, "provider"),
        ({}, {"answer_by_ms": NOW - 1, "issued_ms": NOW - 2}, "answer_by_ms"),
        ({}, {"renter": OTHER.party}, "job"),
        ({"max_price_ucr_per_device_hour": PRICE - 1}, {}, "price"),
        (
            {
                "resources": {
                    "devices": 1,
                    "device_kind": "any",
                    "memory_bytes": 1,
                    "disk_bytes": 1,
                    "egress": True,
                }
            },
            {},
            "egress",
        ),
    ],
)
def test_a_lease_outside_the_offer_is_refused(
    job: dict[str, Any], lease: dict[str, Any], why: str
) -> None:
    world = World()
    _, step = world.assign(world.job(**job), **lease)
    answer = only(step, LeaseAnswer)
    assert answer.signed is None
    assert why in answer.refusal
    assert not world.core.saved.runs


def test_a_lease_not_signed_by_the_broker_is_refused() -> None:
    world = World()
    _, step = world.assign(world.job(), signer=OTHER)
    assert only(step, LeaseAnswer).signed is None


def test_strangers_and_unpinned_images_are_refused_where_the_owner_says_so() -> None:
    world = World(accepts=(OTHER.party,), image_policy="digest")
    _, step = world.assign(world.job())
    assert "accepts: " in only(step, LeaseAnswer).refusal
    world = World(image_policy="digest")
    _, step = world.assign(world.job(image="img:1"))
    assert "image: " in only(step, LeaseAnswer).refusal


def test_devices_are_never_leased_twice() -> None:
    world = World()
    world.assign(world.job())
    _, step = world.assign(world.job(nonce="1" * 32))
    assert "is leased under" in only(step, LeaseAnswer).refusal


def test_an_assign_that_comes_twice_is_answered_once() -> None:
    world = World()
    job = world.job()
    lease_id, _ = world.assign(job)
    _, again = world.assign(job)
    assert not again.save.queue
    assert list(world.core.saved.runs) == [lease_id]


def test_an_echo_of_an_old_epoch_is_refused() -> None:
    world = World()
    lease_id = world.running()
    world.welcome()
    world.do(events.Removed(lease_id))
    _, step = world.assign(world.job(), issued_ms=NOW + 1)
    assert "epoch" in only(step, LeaseAnswer).refusal


def test_a_lease_that_went_elsewhere_is_stopped_in_silence() -> None:
    world = World()
    lease_id = world.running()
    step = world.welcome()
    assert wanted(step, effects.Remove) == [effects.Remove(lease_id)]
    assert lease_id in step.save.drop_messages_of
    assert not step.save.queue
    assert not world.ran(lease_id, 50_000).save.queue


def test_a_held_lease_goes_on_over_a_reconnect() -> None:
    world = World()
    lease_id = world.running()
    world.do(events.Disconnected())
    step = world.welcome(HeldLease(lease=lease_id, epoch=1))
    assert not wanted(step, effects.Remove)


@pytest.mark.parametrize("step_ms", [-3_600_000, 3_600_000])
def test_a_clock_that_is_set_back_or_ahead_neither_holds_receipts_up_nor_hurries_them(
    step_ms: int,
) -> None:
    world = World()
    lease_id = world.running()
    issued = []
    for ran_ms in range(3_000, 93_000, 3_000):
        world.ran(lease_id, ran_ms)
        world.now = NOW + ran_ms + (step_ms if ran_ms > 20_000 else 0)
        world.do(events.Tick())
        issued = [receipt.cum_device_ms for receipt in receipts_of(world)]
    assert issued == [30_000, 60_000, 90_000]


def test_receipts_are_chained_cumulative_and_end_with_the_reason() -> None:
    world = World()
    lease_id = world.running()
    world.ran(lease_id, 10_000)
    world.durable(lease_id, 5)
    world.ran(lease_id, 45_000)
    world.do(events.Tick())
    world.ran(lease_id, 50_000, running=False, exit_code=0)
    world.scanned(lease_id, 5)
    first, second, last = receipts_of(world)
    assert first.previous is None
    assert (first.durable_step, first.durable_device_ms) == (5, 10_000)
    assert [r.sequence for r in (first, second, last)] == [1, 2, 3]
    assert [r.cum_device_ms for r in (first, second, last)] == [10_000, 45_000, 50_000]
    assert last.final
    assert last.reason is Reason.SUCCEEDED
    assert last.charge_ucr == PRICE * 50_000 // 3_600_000


def test_the_first_new_step_is_told_at_once_and_the_others_with_the_heartbeat() -> None:
    world = World()
    lease_id, _ = world.assign(world.job(), start_step=10)
    world.do(events.ImageReady(lease_id))
    world.do(events.Restored(lease_id))
    world.ran(lease_id, 0)

    def beats(step: int) -> list[int]:
        sent = wanted(world.do(events.Progressed(lease_id, step, 50)), effects.Send)
        return [send.message.runs[0].step for send in sent if isinstance(send.message, Heartbeat)]

    assert beats(10) == []
    assert beats(11) == [11]
    assert beats(12) == []
    world.do(events.Disconnected())
    assert beats(13) == []


def test_the_charge_never_passes_the_hold() -> None:
    world = World()
    lease_id, _ = world.assign(world.job(), hold_ucr=100)
    world.do(events.ImageReady(lease_id))
    world.do(events.Restored(lease_id))
    world.ran(lease_id, 3_600_000, running=False, exit_code=0)
    world.scanned(lease_id)
    assert receipts_of(world)[-1].charge_ucr == 100


def test_a_job_that_takes_long_to_stop_has_half_of_its_lease_for_its_work() -> None:
    """Found by the simulator: such a job was asked to stop as soon as it had started."""
    world = World()
    job = world.job(stop_grace_ms=3_600_000)
    lease_id, _ = world.assign(job, hold_ucr=charge_ucr(PRICE, 600_000))
    world.do(events.ImageReady(lease_id))
    world.do(events.Restored(lease_id))
    asked = []
    for ran_ms in (0, 299_000, 301_000):
        world.ran(lease_id, ran_ms)
        asked.append(bool(wanted(world.do(events.Tick()), effects.AskStop)))
    assert asked == [False, False, True]


def test_device_time_never_goes_back() -> None:
    world = World()
    lease_id = world.running()
    world.ran(lease_id, 20_000)
    world.ran(lease_id, 5_000)
    assert world.core.saved.runs[lease_id].cum_device_ms == 20_000


def test_a_drain_waits_for_the_last_checkpoint_to_be_durable() -> None:
    world = World()
    lease_id = world.running()
    order = Order(lease=lease_id, epoch=1, desired="drain", reason=Reason.RECLAIMED, grace_ms=9000)
    assert wanted(world.do(events.MessageArrived(order)), effects.AskStop)
    world.ran(lease_id, 3_000, running=False, exit_code=75)
    step = world.do(events.FolderScanned(lease_id, (7,)))
    assert wanted(step, effects.Upload)
    step = world.do(events.Uploaded(lease_id, "checkpoint", 7, INDEX, 10))
    assert not said(step, RunChanged)
    assert not said(world.wrote_nothing(step), RunChanged)
    verdict = CheckpointVerdict(
        lease=lease_id,
        epoch=1,
        checkpoint=only(step, CheckpointUploaded).checkpoint.id,
        kind="checkpoint",
        step=7,
        durable=True,
    )
    step = world.do(events.MessageArrived(verdict))
    assert only(step, RunChanged).reason is Reason.RECLAIMED
    assert receipts_of(world)[-1].durable_device_ms == 3_000


def test_a_script_that_ends_with_0_because_it_was_asked_to_has_not_finished() -> None:
    world = World()
    lease_id = world.running(outputs="/out")
    order = Order(lease=lease_id, epoch=1, desired="drain", reason=Reason.RECLAIMED, grace_ms=9000)
    world.do(events.MessageArrived(order))
    world.ran(lease_id, 3_000, running=False, exit_code=0)
    step = world.do(events.FolderScanned(lease_id, (), finished=False))
    assert [u.kind for u in wanted(step, effects.Upload)] == ["partial-outputs"]
    step = world.do(events.UploadFailed(lease_id, "partial-outputs", 0, "", nothing=True))
    assert only(step, RunChanged).reason is Reason.RECLAIMED


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (Reason.RECLAIMED, "had finished: it is to go on"),
        (Reason.PAUSED_BY_RENTER, "had finished: a resume goes on with it"),
        (Reason.CANCELLED, "had finished"),
    ],
)
def test_what_is_said_of_a_0_fits_what_follows(asked: Reason, says: str) -> None:
    world = World()
    lease_id = world.running()
    order = Order(lease=lease_id, epoch=1, desired="drain", reason=asked, grace_ms=9000)
    world.do(events.MessageArrived(order))
    world.ran(lease_id, 3_000, running=False, exit_code=0)
    step = world.do(events.FolderScanned(lease_id, (), finished=False))
    assert [line.text.endswith(says) for line in wanted(step, effects.AddLogLine)] == [True]


def test_a_script_that_ends_with_0_unasked_has_finished() -> None:
    world = World()
    lease_id = world.running()
    world.ran(lease_id, 3_000, running=False, exit_code=0)
    step = world.scanned(lease_id, finished=False)
    assert only(step, RunChanged).reason is Reason.SUCCEEDED


def test_a_job_that_ignores_the_drain_is_killed_at_its_deadline() -> None:
    world = World()
    lease_id = world.running()
    order = Order(lease=lease_id, epoch=1, desired="drain", reason=Reason.RECLAIMED, grace_ms=9000)
    world.do(events.MessageArrived(order))
    world.now += 8_999
    assert not wanted(world.do(events.Tick()), effects.Kill)
    world.now += 1
    assert wanted(world.do(events.Tick()), effects.Kill) == [effects.Kill(lease_id)]


def test_too_much_on_disk_ends_the_run() -> None:
    world = World()
    lease_id = world.running()
    assert wanted(world.do(events.DiskUsed(lease_id, 1_001)), effects.Kill)
    world.ran(lease_id, 1_000, running=False, exit_code=137)
    step = world.scanned(lease_id)
    assert only(step, RunChanged).reason is Reason.DISK_LIMIT


def test_after_a_kill_the_journal_brings_back_every_effect() -> None:
    world = World()
    lease_id = world.running()
    world.do(events.CheckpointFound(lease_id, 5))
    text = world.core.saved.model_dump_json()
    again = AgentCore(terms(), PROVIDER, Saved.model_validate_json(text))
    step, strangers = again.started([lease_id, "f" * 64], NOW)
    assert wanted(step, effects.Upload) == [effects.Upload(lease_id, "checkpoint", 5)]
    assert strangers == ["f" * 64]


def test_a_stale_epoch_ends_the_run_in_silence() -> None:
    world = World()
    lease_id = world.running()
    world.do(events.CheckpointFound(lease_id, 5))
    step = world.do(events.UploadFailed(lease_id, "checkpoint", 5, "gone", stale=True))
    assert wanted(step, effects.Remove)
    assert not step.save.queue


SEEN = {
    "0": ExitEvidence(0, returned=True),
    "1": ExitEvidence(1, returned=True),
    "75": ExitEvidence(75, returned=True),
    "137 by itself": ExitEvidence(137, returned=True),
    "143 by itself": ExitEvidence(143, returned=True),
    "137, by itself or not": ExitEvidence(137),
    "139, by itself or not": ExitEvidence(139),
    "KILL": ExitEvidence(137, signal=9),
    "SEGV": ExitEvidence(139, signal=11),
    "nobody knows": ExitEvidence(None),
    "out of memory": ExitEvidence(137, out_of_memory=True),
    "too many processes": ExitEvidence(137, signal=9, limit_exceeded="more than 64 processes"),
    "docker stop, 0": ExitEvidence(0, engine_stopped="the engine stopped it"),
    "docker stop, 143": ExitEvidence(143, engine_stopped="the engine stopped it"),
    "kill -TERM by a shell, 0": ExitEvidence(0, returned=True, outside_signal="TERM, from bash"),
    "kill -TERM by a shell": ExitEvidence(143, signal=15, outside_signal="TERM, from bash"),
    "TERM by nobody knows whom, 0": ExitEvidence(0, returned=True, unknown_signal="TERM"),
    "TERM by nobody knows whom, 1": ExitEvidence(1, returned=True, unknown_signal="TERM"),
    "137 passed on": ExitEvidence(137, returned=True, worker_signal=9),
    "139 passed on": ExitEvidence(139, returned=True, worker_signal=11),
    "the GPU fell off": ExitEvidence(1, returned=True, device_failed="GPU 1 does not answer"),
    "the GPU fell off at the end": ExitEvidence(0, returned=True, device_failed="GPU 1 is lost"),
}


@pytest.mark.parametrize(
    ("seen", "stop", "finished", "reason"),
    [
        ("0", None, False, Reason.SUCCEEDED),
        ("1", None, True, Reason.JOB_FAILED),
        ("75", None, True, Reason.YIELDED),
        ("137 by itself", None, True, Reason.JOB_FAILED),
        ("143 by itself", None, True, Reason.JOB_FAILED),
        ("137, by itself or not", None, True, Reason.KILLED_UNATTRIBUTED),
        ("139, by itself or not", None, True, Reason.JOB_FAILED),
        ("KILL", None, True, Reason.KILLED_UNATTRIBUTED),
        ("SEGV", None, True, Reason.JOB_FAILED),
        ("nobody knows", None, True, Reason.KILLED_UNATTRIBUTED),
        ("out of memory", None, True, Reason.OUT_OF_MEMORY),
        ("too many processes", None, True, Reason.JOB_FAILED),
        ("docker stop, 0", None, True, Reason.SUCCEEDED),
        ("docker stop, 0", None, False, Reason.ENGINE_STOPPED),
        ("docker stop, 143", None, True, Reason.ENGINE_STOPPED),
        ("kill -TERM by a shell, 0", None, True, Reason.SUCCEEDED),
        ("kill -TERM by a shell, 0", None, False, Reason.RUN_KILLED),
        ("kill -TERM by a shell", None, True, Reason.RUN_KILLED),
        ("TERM by nobody knows whom, 0", None, True, Reason.SUCCEEDED),
        ("TERM by nobody knows whom, 0", None, False, Reason.KILLED_UNATTRIBUTED),
        ("TERM by nobody knows whom, 1", None, True, Reason.KILLED_UNATTRIBUTED),
        ("137 passed on", None, True, Reason.KILLED_UNATTRIBUTED),
        ("137 passed on", "drain", True, Reason.RECLAIMED),
        ("139 passed on", None, True, Reason.JOB_FAILED),
        ("the GPU fell off", None, True, Reason.DEVICE_FAILED),
        ("the GPU fell off at the end", None, True, Reason.SUCCEEDED),
        ("0", "drain", True, Reason.SUCCEEDED),
        ("0", "drain", False, Reason.RECLAIMED),
        ("75", "drain", True, Reason.RECLAIMED),
        ("KILL", "drain", True, Reason.RECLAIMED),
        ("0", "stop", True, Reason.RECLAIMED),
    ],
)
def test_why_a_run_ended(seen: str, stop: Any, finished: bool, reason: Reason) -> None:
    asked = Stop(desired=stop, reason=Reason.RECLAIMED, deadline_ms=0) if stop else None
    assert reason_of_exit(SEEN[seen], asked, finished=finished) is reason


@pytest.mark.parametrize("seen", SEEN)
def test_every_end_has_words(seen: str) -> None:
    assert exit_text(SEEN[seen], reason_of_exit(SEEN[seen], None)), seen


def test_what_the_renter_is_told_of_a_kill_that_nobody_owns_to() -> None:
    says = exit_text(SEEN["KILL"], Reason.KILLED_UNATTRIBUTED)
    assert says == "killed by SIGKILL; nothing that was seen says who sent it"
    assert exit_text(SEEN["KILL"], Reason.RECLAIMED) == "killed by SIGKILL"
    assert "nobody saw" in exit_text(SEEN["nobody knows"], Reason.KILLED_UNATTRIBUTED)


@pytest.mark.parametrize("ahead_ms", [-250_000, 250_000])
def test_the_time_to_answer_counts_on_the_brokers_clock(ahead_ms: int) -> None:
    """A clock that is off by minutes is let in; then its leases must not seem to have passed.

    Found by the simulator, seed 6: every agent refused every lease, a hundred times a job.
    """
    world = World()
    world.do(events.Joined(BROKER.party, broker_ahead_ms=ahead_ms))
    broker_now = world.now + ahead_ms
    _, late = world.assign(world.job(), issued_ms=broker_now - 10_000, answer_by_ms=broker_now)
    assert only(late, LeaseAnswer).refusal.startswith("answer_by_ms")
    _, step = world.assign(world.job(), issued_ms=broker_now, answer_by_ms=broker_now + 10_000)
    assert only(step, LeaseAnswer).signed is not None


def test_a_broker_whose_clock_went_slower_since_is_still_answered() -> None:
    """Its clock was ahead, and is held back until it is right. Found by the simulator."""
    world = World()
    world.do(events.Joined(BROKER.party))
    broker_now = world.now + 300_000
    world.now += 600_000
    _, step = world.assign(world.job(), issued_ms=broker_now, answer_by_ms=broker_now + 10_000)
    assert only(step, LeaseAnswer).signed is not None


def test_a_kill_that_came_before_its_run_had_started_comes_again() -> None:
    """Else a job that hears no TERM would run for good: an odd job that stops itself did."""
    world = World()
    lease_id, _ = world.assign(world.job())
    world.do(events.ImageReady(lease_id))
    world.do(events.Restored(lease_id))
    stop = Order(lease=lease_id, epoch=1, desired="stop", reason=Reason.CANCELLED, grace_ms=0)
    assert wanted(world.do(events.MessageArrived(stop)), effects.Kill)  # there is nothing to kill
    world.ran(lease_id, 0)
    kills = 0
    for _ in range(100):
        world.now += 200
        kills += len(wanted(world.do(events.Tick()), effects.Kill))
    assert 5 <= kills <= 10
    world.ran(lease_id, 20_000, running=False, exit_code=137)
    world.now += 60_000
    assert not wanted(world.do(events.Tick()), effects.Kill)
