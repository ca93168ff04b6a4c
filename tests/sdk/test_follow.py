"""What is told of a job while it is followed, from views alone."""

from typing import Any

from sublet.terminal.follow import Changes, sparkline
from sublet.terminal.next_steps import status_text
from sublet_contracts.api import JobView, NextStep, RunView
from sublet_contracts.documents import Resources
from sublet_contracts.envelope import sign_payload
from sublet_contracts.keys import SigningKey
from sublet_contracts.reasons import Fault, Reason
from sublet_contracts.states import JobState, LeaseState, RunState

ENVELOPE = sign_payload("application/vnd.sublet.test+json", b"{}", [SigningKey.generate()])


def run(epoch: int, name: str, **changes: Any) -> RunView:
    values: dict[str, Any] = {
        **{"lease": str(epoch), "epoch": epoch, "offer": "", "provider": f"ed25519-{epoch}"},
        **{"provider_name": name, "device_ids": ("cpu",), "hardware_class": "x"},
        **{"price_ucr_per_device_hour": 400_000, "lease_state": LeaseState.ACTIVE},
        **{"run_state": RunState.RUNNING, "reason": None, "fault": None, "detail": ""},
        **{"start_step": 0, "step": 0, "total_steps": 60, "metrics": {}, "durable_step": 0},
        **{"cum_device_ms": 0, "payable_device_ms": 0, "charge_ucr": 0, "started_ms": 1},
        **{"last_seen_ms": 1, "ended_ms": None},
    }
    return RunView.model_validate({**values, **changes})


def job(state: JobState, *runs: RunView, **changes: Any) -> JobView:
    values: dict[str, Any] = {
        **{"id": "0" * 64, "name": "ft", "renter": "", "state": state, "reason": None},
        **{"says": "so it is", "image": "i", "command": (), "budget_ucr": 1_000_000},
        **{"resources": Resources(devices=1, device_kind="cpu", memory_bytes=1, disk_bytes=1)},
        **{"max_price_ucr_per_device_hour": 1, "held_ucr": 0, "charged_ucr": 0, "settled_ucr": 0},
        **{"submitted_ms": 1, "started_ms": None, "ended_ms": None, "step": 0, "total_steps": 60},
        **{"metrics": {}, "durable_step": 0, "recoveries": 0, "lost_device_ms": 0},
        **{"outputs": None, "outputs_index_digest": None, "document": ENVELOPE, "runs": runs},
    }
    return JobView.model_validate({**values, **changes})


def test_a_recovery_is_told_in_words_and_once() -> None:
    changes = Changes()
    healthy = job(JobState.RUNNING, run(1, "alice", step=40), durable_step=36)
    assert list(changes.since_last(healthy)) == [
        "alice takes the job at 0.40 per device-hour",
        "step 36 is durable",
    ]
    silent = run(1, "alice", step=40, run_state=RunState.UNKNOWN)
    assert list(changes.since_last(job(JobState.RUNNING, silent, durable_step=36))) == [
        "alice has gone silent at step 40; a successor is made ready"
    ]
    lost = run(
        1,
        "alice",
        step=40,
        run_state=RunState.LOST,
        reason=Reason.PROVIDER_LOST,
        fault=Fault.PROVIDER,
        cum_device_ms=40_000,
        payable_device_ms=36_000,
    )
    told = list(changes.since_last(job(JobState.RECOVERING, lost, durable_step=36)))
    assert told[0].startswith("alice is lost at step 40: nothing was heard")
    assert told[1:] == ["recovering: so it is"]
    back = job(JobState.RUNNING, lost, run(2, "bob", start_step=36), durable_step=36)
    assert list(changes.since_last(back)) == [
        "bob goes on from step 36 at 0.40 per device-hour; the lost work (4.0 s) costs nothing"
    ]
    assert list(changes.since_last(back)) == []


def test_a_pause_is_not_a_loss_and_costs_what_was_used() -> None:
    changes = Changes()
    first = run(
        1,
        "alice",
        step=8,
        reason=Reason.YIELDED,
        fault=Fault.RENTER,
        cum_device_ms=9,
        payable_device_ms=9,
    )
    told = " ".join(
        changes.since_last(job(JobState.RUNNING, first, run(2, "al\x1bice", start_step=8)))
    )
    assert "costs nothing" not in told
    assert "\x1b" not in told


def test_what_a_job_waits_for_is_told_as_a_command() -> None:
    paused = job(JobState.PAUSED, says="paused: 0.02 of the budget are left")
    assert status_text(paused) == "paused: 0.02 of the budget are left"
    poor = paused.model_copy(update={"next_step": NextStep.RAISE_BUDGET})
    assert status_text(poor) == (
        "paused: 0.02 of the budget are left; sublet resume --budget TOTAL raises it and goes on"
    )
    assert list(Changes().since_last(poor)) == [f"paused: {status_text(poor)}"]
    # A broker that is newer may wait for something that this client has no words for.
    newer = JobView.model_validate({**paused.model_dump(), "next_step": "visit_us"})
    assert newer.next_step == "visit_us"
    assert status_text(newer) == paused.says


def test_sparklines_leave_out_what_is_no_number() -> None:
    assert sparkline([1.0]) == ""
    assert sparkline([0.0, float("nan"), 7.0, float("inf")]) == "▁█"
    assert len(sparkline([float(i) for i in range(500)], width=30)) == 30
    assert sparkline([2.0, 2.0]) == "▁▁"
