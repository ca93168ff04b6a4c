"""Resuming: what becomes of a job when its lease has ended: retry budget, back-off, money."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet_broker.market.facts import JobFact, LeaseFact
from sublet_broker.market.resuming import (
    MAX_AVOIDED,
    Ending,
    Patience,
    after,
    ended_by_renter,
    resumed,
    wants_machine,
)
from sublet_contracts.documents import sign_document
from sublet_contracts.reasons import IMAGE_REASONS, MEANINGS, Fault, Next, Reason
from sublet_contracts.states import JOB, ForbiddenTransition, JobState, LeaseState, is_terminal
from tests.contracts.samples import KEYS, RENTER
from tests.contracts.samples import job as job_document
from tests.market.test_metering import lease

NOW_MS = 2_000_000_000_000
PATIENCE = Patience(fruitless_limit=5, backoff_ms=2_000, backoff_max_ms=60_000)

PRICE_UCR = 600_001
MINUTE_UCR = 10_001  # of one device at that price: 10,000.02, rounded up
SIGNED = sign_document(
    job_document().model_copy(update={"max_price_ucr_per_device_hour": PRICE_UCR}), KEYS["renter"]
)
FREE = sign_document(
    job_document().model_copy(update={"max_price_ucr_per_device_hour": 0}), KEYS["renter"]
)

RETRIED = [reason for reason, meaning in MEANINGS.items() if meaning.next is Next.RETRY]
BLAMED = [reason for reason in RETRIED if reason is not Reason.YIELDED]


def running(**changes: Any) -> JobFact:
    """A job whose lease is about to end, with a budget for more."""
    fact = JobFact(
        id=SIGNED.id,
        renter=RENTER,
        name="ft",
        state=JobState.RUNNING,
        envelope=SIGNED.envelope,
        budget_ucr=5_000_000,
        accept_ucr=5_000_000,
        submitted_ms=0,
        epoch=1,
        started_ms=1,
    )
    return replace(fact, **changes)


def ending(reason: Reason = Reason.PROVIDER_LOST, **changes: Any) -> Ending:
    fields: dict[str, Any] = {
        "detail": "what the agent said",
        "provider": "p0",
        "signed": True,
        "progressed": False,
        **changes,
    }
    return Ending(reason=reason, **fields)


def after_all(job: JobFact, *endings: Ending) -> JobFact:
    """The job after these lease endings, each followed by another run."""
    for one in endings:
        job = after(replace(job, state=JobState.RUNNING), one, PATIENCE, NOW_MS)
    return job


# ------------------------------------------------------------------ which rule counts
ENDS = {
    Next.FINISH: JobState.SUCCEEDED,
    Next.FAIL: JobState.FAILED,
    Next.CANCEL: JobState.CANCELLED,
    Next.PAUSE: JobState.PAUSED,
    Next.RETRY: JobState.RECOVERING,
}


@pytest.mark.parametrize("reason", Reason)
def test_a_reason_means_what_its_table_says(reason: Reason) -> None:
    wanted = "pause" if reason is Reason.PAUSED_BY_RENTER else ""
    job = after(running(wanted=wanted), ending(reason), PATIENCE, NOW_MS)
    assert job.state is ENDS[MEANINGS[reason].next]
    assert (job.reason, job.detail) == (reason, "what the agent said")
    assert job.ended_ms == (NOW_MS if is_terminal(JOB, job.state) else None)


@pytest.mark.parametrize("wanted", ["", "pause", "cancel"])
def test_success_counts_whatever_was_wished_meanwhile(wanted: str) -> None:
    job = after(running(wanted=wanted), ending(Reason.SUCCEEDED), PATIENCE, NOW_MS)
    assert (job.state, job.reason) == (JobState.SUCCEEDED, Reason.SUCCEEDED)


@pytest.mark.parametrize("reason", [r for r in Reason if r is not Reason.SUCCEEDED])
def test_a_wish_to_cancel_counts_before_the_reason(reason: Reason) -> None:
    job = after(running(wanted="cancel"), ending(reason), PATIENCE, NOW_MS)
    assert (job.state, job.reason) == (JobState.CANCELLED, Reason.CANCELLED)
    assert job.wanted == ""


@pytest.mark.parametrize("reason", RETRIED)
def test_a_wish_to_pause_counts_before_a_retry(reason: Reason) -> None:
    job = after(running(wanted="pause"), ending(reason), PATIENCE, NOW_MS)
    assert (job.state, job.reason) == (JobState.PAUSED, Reason.PAUSED_BY_RENTER)


@pytest.mark.parametrize("reason", [r for r, m in MEANINGS.items() if m.next is Next.FAIL])
def test_a_failure_is_one_even_if_a_pause_was_wished(reason: Reason) -> None:
    assert after(running(wanted="pause"), ending(reason), PATIENCE, NOW_MS).state is JobState.FAILED


def test_a_pause_that_was_taken_back_is_a_retry() -> None:
    job = after(running(wanted=""), ending(Reason.PAUSED_BY_RENTER), PATIENCE, NOW_MS)
    assert (job.state, job.reason) == (JobState.RECOVERING, Reason.PAUSED_BY_RENTER)
    assert job.avoid == ()


@pytest.mark.parametrize("state", [s for s in JobState if is_terminal(JOB, s)])
def test_what_has_ended_stays_so(state: JobState) -> None:
    job = running(state=state, ended_ms=5)
    assert after(job, ending(Reason.SUCCEEDED), PATIENCE, NOW_MS) is job


@given(
    reason=st.sampled_from(Reason),
    wanted=st.sampled_from(["", "pause", "cancel"]),
    state=st.sampled_from([JobState.STARTING, JobState.RUNNING, JobState.RECOVERING]),
    signed=st.booleans(),
    progressed=st.booleans(),
    topped_up=st.booleans(),
    fruitless=st.integers(0, 8),
    refusals=st.integers(0, 80),
    settled=st.integers(0, 5_000_000),
    avoid=st.lists(st.sampled_from([f"p{n}" for n in range(12)]), unique=True, max_size=8),
)
def test_whatever_ends_however_the_job_is_in_order(
    reason: Reason,
    wanted: str,
    state: JobState,
    signed: bool,
    progressed: bool,
    topped_up: bool,
    fruitless: int,
    refusals: int,
    settled: int,
    avoid: list[str],
) -> None:
    before = running(
        state=state,
        wanted=wanted,
        fruitless=fruitless,
        refusals=refusals,
        settled_ucr=settled,
        avoid=tuple(avoid),
        prefer="p9",
        started_ms=None if state is JobState.STARTING else 1,
    )
    what = ending(
        reason, signed=signed, progressed=progressed, topped_up=topped_up, successor="p11"
    )
    job = after(before, what, PATIENCE, NOW_MS)
    goes_on = job.state in (JobState.QUEUED, JobState.RECOVERING)
    assert job.state in JOB[before.state] or job.state is before.state
    assert job.wanted == ""
    assert (job.ended_ms is not None) == is_terminal(JOB, job.state)
    # Money and the epoch are no business of this decision.
    kept = ("settled_ucr", "accepted_ucr", "budget_ucr", "accept_ucr", "epoch", "envelope")
    assert all(getattr(job, name) == getattr(before, name) for name in kept)
    assert len(job.avoid) == len(set(job.avoid)) <= MAX_AVOIDED
    assert job.prefer == ("p11" if goes_on else "")
    if goes_on:
        assert job.state is (JobState.RECOVERING if before.started_ms else JobState.QUEUED)
        assert job.fruitless < PATIENCE.fruitless_limit
        assert before.budget_ucr - settled >= MINUTE_UCR
        assert NOW_MS <= job.not_before_ms <= NOW_MS + PATIENCE.backoff_max_ms
        if signed and progressed:
            assert job.not_before_ms == NOW_MS


# ------------------------------------------------------------------ the retry budget
def test_attempts_without_a_durable_step_are_counted_and_the_last_pauses() -> None:
    job = running()
    for attempt in range(1, PATIENCE.fruitless_limit):
        job = after_all(job, ending())
        assert (job.state, job.fruitless) == (JobState.RECOVERING, attempt)
    job = after_all(job, ending(Reason.RUN_KILLED))
    assert (job.state, job.reason) == (JobState.PAUSED, Reason.NO_PROGRESS)
    assert job.detail == f"5 attempts, the last one: {MEANINGS[Reason.RUN_KILLED].says}"


def test_a_durable_step_gives_the_whole_budget_back() -> None:
    job = after_all(running(), *[ending()] * 4)
    job = after_all(job, ending(progressed=True))
    assert (job.state, job.fruitless, job.avoid) == (JobState.RECOVERING, 0, ("p0",))
    job = after_all(job, *[ending()] * 4)
    assert (job.state, job.fruitless) == (JobState.RECOVERING, 4)


def test_a_lease_that_nobody_signed_is_no_attempt() -> None:
    refusal = ending(Reason.LEASE_REFUSED, signed=False)
    job = after_all(running(fruitless=4), *[refusal] * 200)
    assert (job.state, job.fruitless, job.refusals) == (JobState.RECOVERING, 4, 200)
    job = after_all(job, ending(progressed=True))
    assert (job.fruitless, job.refusals) == (0, 0)


@pytest.mark.parametrize("refusal", [Reason.LEASE_REFUSED, Reason.LEASE_UNANSWERED])
def test_why_it_waits_is_what_its_last_attempt_came_to(refusal: Reason) -> None:
    refused = ending(refusal, signed=False, detail="images are refused for 30 s")
    failed = ending(Reason.PULL_FAILED, ran=False, detail="the registry is busy")
    job = after_all(running(), failed, refused, refused)
    assert (job.state, job.reason, job.detail) == (
        JobState.RECOVERING,
        Reason.PULL_FAILED,
        "the registry is busy",
    )
    # The next attempt says anew, and who was only ever refused is told so.
    assert after_all(job, ending(Reason.START_FAILED, ran=False)).reason is Reason.START_FAILED
    assert after_all(running(), refused).reason is refusal


def test_an_attempt_ends_the_row_of_refusals() -> None:
    refused = after_all(running(), *[ending(Reason.LEASE_UNANSWERED, signed=False)] * 3)
    assert after_all(refused, ending()).refusals == 0


def test_a_renter_who_resumes_starts_with_a_whole_budget() -> None:
    paused = after_all(running(), *[ending()] * 5)
    job = resumed(paused, NOW_MS + 7)
    assert (job.state, job.fruitless, job.not_before_ms) == (JobState.RECOVERING, 0, NOW_MS + 7)
    assert (job.reason, job.detail) == (None, "")
    assert after_all(job, *[ending()] * 4).state is JobState.RECOVERING


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_the_budget_is_the_brokers_setting(limit: int) -> None:
    patience = replace(PATIENCE, fruitless_limit=limit)
    states = []
    job = running()
    for _ in range(limit):
        job = after(replace(job, state=JobState.RUNNING), ending(), patience, NOW_MS)
        states.append(job.state)
    assert states == [JobState.RECOVERING] * (limit - 1) + [JobState.PAUSED]


# ------------------------------------------------------------------ how long it waits
def waits_ms(patience: Patience, *endings: Ending) -> list[int]:
    job, waits = running(), []
    for one in endings:
        job = after(replace(job, state=JobState.RUNNING), one, patience, NOW_MS)
        waits.append(job.not_before_ms - NOW_MS)
    return waits


def test_the_first_attempt_after_a_loss_starts_at_once_and_the_others_ever_later() -> None:
    endless = replace(PATIENCE, fruitless_limit=1_000)
    assert waits_ms(endless, *[ending()] * 8) == [
        0, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000,
    ]  # fmt: skip
    assert set(waits_ms(endless, *[ending()] * 200)[7:]) == {60_000}
    assert set(waits_ms(endless, *[ending(progressed=True)] * 20)) == {0}


def test_whoever_has_not_refused_yet_is_asked_at_once_and_whoever_has_ever_later() -> None:
    def refusal(provider: str) -> Ending:
        return ending(Reason.LEASE_REFUSED, provider=provider, signed=False)

    # Three machines refuse in turn; from the second round on they are asked less and less often.
    names = ["p0", "p1", "p2", "p0", "p1", "p2", "p0"]
    assert waits_ms(PATIENCE, *map(refusal, names)) == [0, 0, 0, 16_000, 32_000, 60_000, 60_000]


# ------------------------------------------------------------------ money
@pytest.mark.parametrize(
    ("budget", "settled", "accept", "accepted", "goes_on"),
    [
        (MINUTE_UCR, 0, MINUTE_UCR, 0, True),
        (MINUTE_UCR, 1, MINUTE_UCR, 0, False),
        (MINUTE_UCR - 1, 0, MINUTE_UCR, 0, False),
        (10**9, 10**9 - MINUTE_UCR, 10**9, 0, True),
        (10**9, 10**9 - MINUTE_UCR + 1, 10**9, 0, False),
        (10**9, 10**9, 10**9, 0, False),
        # What may be settled without the renter's signature is an end, too.
        (10**9, 0, MINUTE_UCR, 0, True),
        (10**9, 0, MINUTE_UCR, 1, False),
        (10**9, 0, 0, 0, False),
    ],
)
def test_a_budget_that_pays_for_no_minute_pauses_to_the_micro_credit(
    budget: int, settled: int, accept: int, accepted: int, goes_on: bool
) -> None:
    before = running(
        budget_ucr=budget, settled_ucr=settled, accept_ucr=accept, accepted_ucr=accepted
    )
    job = after(before, ending(), PATIENCE, NOW_MS)
    expected = (
        (JobState.RECOVERING, Reason.PROVIDER_LOST)
        if goes_on
        else (JobState.PAUSED, Reason.BUDGET_EXHAUSTED)
    )
    assert (job.state, job.reason) == expected


def test_what_costs_nothing_goes_on_without_a_budget() -> None:
    free = running(envelope=FREE.envelope, budget_ucr=0, accept_ucr=0)
    assert after(free, ending(), PATIENCE, NOW_MS).state is JobState.RECOVERING


@pytest.mark.parametrize("topped_up", [False, True])
def test_the_budgets_edge_pauses_unless_it_was_topped_up_meanwhile(topped_up: bool) -> None:
    what = ending(Reason.BUDGET_EXHAUSTED, topped_up=topped_up, progressed=True)
    job = after(running(), what, PATIENCE, NOW_MS)
    assert job.state is (JobState.RECOVERING if topped_up else JobState.PAUSED)
    assert job.reason is Reason.BUDGET_EXHAUSTED
    assert job.avoid == ()


def test_a_top_up_that_pays_for_no_minute_is_none() -> None:
    what = ending(Reason.BUDGET_EXHAUSTED, topped_up=True)
    job = after(running(budget_ucr=MINUTE_UCR - 1), what, PATIENCE, NOW_MS)
    assert (job.state, job.reason) == (JobState.PAUSED, Reason.BUDGET_EXHAUSTED)


def test_too_many_attempts_are_said_before_an_empty_budget() -> None:
    job = after(running(fruitless=4, settled_ucr=5_000_000), ending(), PATIENCE, NOW_MS)
    assert job.reason is Reason.NO_PROGRESS


# ------------------------------------------------------------------ whom it avoids
@pytest.mark.parametrize("reason", RETRIED)
def test_who_failed_the_job_is_avoided_and_who_was_told_to_go_is_not(reason: Reason) -> None:
    job = after(running(), ending(reason), PATIENCE, NOW_MS)
    assert job.avoid == (("p0",) if reason in BLAMED else ())
    assert MEANINGS[reason].fault is not Fault.RENTER or reason not in BLAMED


def test_the_newest_few_are_avoided_the_newest_last() -> None:
    refusals = [
        ending(Reason.LEASE_REFUSED, provider=f"p{n}", signed=False) for n in (*range(10), 4)
    ]
    job = after_all(running(), *refusals)
    assert job.avoid == ("p2", "p3", "p5", "p6", "p7", "p8", "p9", "p4")


def never_ran(reason: Reason, provider: str, **changes: Any) -> Ending:
    return ending(reason, provider=provider, ran=False, **changes)


def test_an_image_is_given_up_when_three_providers_do_not_find_it() -> None:
    said = [never_ran(Reason.IMAGE_UNKNOWN, f"p{n}") for n in range(3)]
    job = after_all(running(), *said[:2])
    assert (job.state, job.reason) == (JobState.RECOVERING, Reason.IMAGE_UNKNOWN)
    job = after_all(job, said[2])
    assert (job.state, job.reason) == (JobState.FAILED, Reason.IMAGE_UNAVAILABLE)
    assert job.detail == "what the agent said (said by 3 providers, in 3 attempts)"


def test_an_image_is_given_up_when_all_that_fit_were_asked_twice_over_five_minutes() -> None:
    said = never_ran(Reason.IMAGE_UNKNOWN, "p0")
    job, now_ms, waits = running(), NOW_MS, []
    while job.state is not JobState.FAILED:
        job = after(replace(job, state=JobState.RUNNING), said, PATIENCE, now_ms)
        waits.append(job.not_before_ms - now_ms)
        now_ms = max(now_ms, job.not_before_ms) + 1_000
    assert job.reason is Reason.IMAGE_UNAVAILABLE
    assert 300_000 <= now_ms - NOW_MS < 400_000
    assert waits[:-1] == sorted(waits[:-1]), "it is asked less and less often"


def test_an_image_that_nobody_finds_pauses_a_job_with_something_durable() -> None:
    said = [never_ran(Reason.IMAGE_UNKNOWN, f"p{n}", has_durable=True) for n in range(3)]
    job = after_all(running(hardware_class="rtx4090"), *said)
    assert (job.state, job.reason) == (JobState.PAUSED, Reason.IMAGE_UNAVAILABLE)
    again = after_all(resumed(job, NOW_MS), said[0])
    assert again.state is JobState.RECOVERING, "resumed by its renter, it is looked for anew"


def test_a_run_elsewhere_ends_the_search_for_an_image() -> None:
    said = [never_ran(Reason.IMAGE_UNKNOWN, f"p{n}") for n in range(3)]
    job = after_all(running(), *said[:2], ending(Reason.PROVIDER_LOST, provider="p7"), said[2])
    assert job.state is JobState.RECOVERING


def test_attempts_that_never_ran_are_many_before_they_pause_a_job() -> None:
    failed = [never_ran(Reason.PULL_FAILED, f"p{n % 2}") for n in range(20)]
    job = after_all(running(), *failed[:19])
    assert job.state is JobState.RECOVERING
    assert job.not_before_ms - NOW_MS == PATIENCE.backoff_max_ms
    job = after_all(job, failed[19])
    assert (job.state, job.reason) == (JobState.PAUSED, Reason.NO_PROGRESS)
    assert job.detail == f"20 attempts, the last one: {MEANINGS[Reason.PULL_FAILED].says}"


def test_a_machine_that_could_not_pull_sends_the_job_on_at_once() -> None:
    job = after_all(running(), never_ran(Reason.PULL_FAILED, "p0"))
    assert (job.not_before_ms, job.avoid) == (NOW_MS, ("p0",))


def test_a_kill_too_many_pauses_what_has_something_durable() -> None:
    killed = ending(Reason.KILLED_TOO_OFTEN, has_durable=True)
    job = after_all(running(hardware_class="rtx4090"), killed)
    assert (job.state, job.reason) == (JobState.PAUSED, Reason.KILLED_TOO_OFTEN)


def test_a_class_that_the_renter_asked_for_is_nothing_durable() -> None:
    asked = running(hardware_class="rtx4090")
    job = after_all(asked, ending(Reason.KILLED_TOO_OFTEN))
    assert (job.state, job.reason) == (JobState.FAILED, Reason.KILLED_TOO_OFTEN)
    said = [never_ran(Reason.IMAGE_UNKNOWN, f"p{n}") for n in range(3)]
    assert after_all(asked, *said).state is JobState.FAILED


def test_progress_forgives_all_but_who_failed_it_just_now() -> None:
    before = running(avoid=("p1", "p2"))
    assert after(before, ending(progressed=True), PATIENCE, NOW_MS).avoid == ("p0",)
    yielded = ending(Reason.YIELDED, progressed=True)
    assert after(before, yielded, PATIENCE, NOW_MS).avoid == ()


def test_who_prepared_to_take_over_is_asked_first_and_only_once() -> None:
    job = after_all(running(), ending(successor="p7"))
    assert job.prefer == "p7"
    assert after_all(job, ending()).prefer == ""
    assert after_all(job, ending(Reason.JOB_FAILED)).prefer == ""


# ------------------------------------------------------------------ in line, or not
@pytest.mark.parametrize(
    ("started_ms", "waits"), [(None, JobState.QUEUED), (1, JobState.RECOVERING)]
)
def test_it_waits_as_what_it_was(started_ms: int | None, waits: JobState) -> None:
    starting = running(state=JobState.STARTING, started_ms=started_ms)
    assert after(starting, ending(), PATIENCE, NOW_MS).state is waits
    paused = running(state=JobState.PAUSED, started_ms=started_ms)
    assert resumed(paused, NOW_MS).state is waits


@pytest.mark.parametrize("state", [s for s in JobState if is_terminal(JOB, s)])
@pytest.mark.parametrize("started_ms", [None, 1])
def test_what_has_ended_is_not_resumed(state: JobState, started_ms: int | None) -> None:
    with pytest.raises(ForbiddenTransition):
        resumed(running(state=state, started_ms=started_ms), NOW_MS)


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RECOVERING, JobState.PAUSED])
def test_without_a_lease_a_renters_cancel_ends_it_at_once(state: JobState) -> None:
    job = running(state=state, wanted="cancel", prefer="p1")
    ended = ended_by_renter(job, JobState.CANCELLED, Reason.CANCELLED, NOW_MS)
    assert (ended.state, ended.reason, ended.ended_ms) == (
        JobState.CANCELLED,
        Reason.CANCELLED,
        NOW_MS,
    )
    assert (ended.wanted, ended.prefer) == ("", "")


def test_without_a_lease_a_renters_pause_is_no_end() -> None:
    job = ended_by_renter(
        running(state=JobState.QUEUED), JobState.PAUSED, Reason.PAUSED_BY_RENTER, NOW_MS
    )
    assert (job.state, job.ended_ms) == (JobState.PAUSED, None)


@pytest.mark.parametrize("state", [s for s in JobState if is_terminal(JOB, s)])
def test_what_has_ended_is_not_cancelled(state: JobState) -> None:
    with pytest.raises(ForbiddenTransition):
        ended_by_renter(running(state=state), JobState.CANCELLED, Reason.CANCELLED, NOW_MS)


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("wanted", ["", "pause", "cancel"])
@pytest.mark.parametrize("lease_state", [None, *LeaseState])
def test_in_line_is_who_waits_unwished_and_holds_no_lease(
    state: JobState, wanted: str, lease_state: LeaseState | None
) -> None:
    leases: list[LeaseFact] = [] if lease_state is None else [lease(state=lease_state)]
    expected = (
        state in (JobState.QUEUED, JobState.RECOVERING)
        and wanted == ""
        and lease_state in (None, LeaseState.CLOSED)
    )
    job = running(state=state, wanted=wanted)
    assert wants_machine(job, leases) is expected
    assert wants_machine(job, [lease(state=LeaseState.CLOSED), *leases]) is expected


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", sorted(IMAGE_REASONS))
def test_a_lease_refused_for_its_image_counts_as_an_attempt_that_never_ran(reason: Reason) -> None:
    refused = ending(reason, signed=False, ran=False)
    moved = after(running(refusals=3), refused, PATIENCE, NOW_MS)
    assert (moved.unstarted, moved.refusals, moved.avoid) == (1, 0, ("p0",))
    assert moved == after(running(), ending(reason, ran=False), PATIENCE, NOW_MS)
    other = after(running(), ending(Reason.LEASE_REFUSED, signed=False), PATIENCE, NOW_MS)
    assert (other.unstarted, other.refusals) == (0, 1)


def test_an_image_that_nobody_else_knows_unpins_a_job_that_has_nothing_durable() -> None:
    unknown = ending(Reason.IMAGE_UNKNOWN, signed=False, ran=False, image_named=True)
    moved = after(running(image_pinned="x@sha256:1"), unknown, PATIENCE, NOW_MS)
    assert (moved.image_pinned, moved.image_unknown, moved.unstarted) == ("", (), 1)
    again = after(moved, replace(unknown, image_named=False), PATIENCE, NOW_MS)
    assert again.image_unknown == ("p0",), "now it is a witness against the tag itself"
    durable = replace(unknown, has_durable=True)
    kept = after(running(image_pinned="x@sha256:1"), durable, PATIENCE, NOW_MS)
    assert (kept.image_pinned, kept.image_unknown) == ("x@sha256:1", ("p0",))


@pytest.mark.parametrize("reason", [r for r in BLAMED if r is not Reason.IMAGE_UNKNOWN])
def test_nothing_else_unpins_it(reason: Reason) -> None:
    for has_durable in (False, True):
        seen = ending(reason, ran=False, has_durable=has_durable, image_named=True)
        moved = after(running(image_pinned="x@sha256:1"), seen, PATIENCE, NOW_MS)
        assert moved.image_pinned == "x@sha256:1"
