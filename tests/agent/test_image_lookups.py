"""A tag is looked up before its lease is signed: in time, once, and judged anew afterwards."""

from __future__ import annotations

import pytest

from sublet_agent.core import effects, events
from sublet_agent.core.agent import NEVER_MS
from sublet_agent.core.image_lookups import MARGIN_MS, MOST_MS
from sublet_agent.core.run_phases import RunPhase
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import LeaseAnswer, Order, Prepare, RunChanged
from tests.agent.test_core import NOW, RENTER, World, only, said, wanted

TAG = "registry.example/lab/train:1"
MEANT = "registry.example/lab/train@sha256:" + "a" * 64
OTHER = "registry.example/lab/train@sha256:" + "b" * 64
ID = "sha256:" + "c" * 64


def waiting(world: World, **lease: object) -> str:
    """Let a lease of a job with a tag come: it waits."""
    lease_id, step = world.assign(world.job(image=TAG), **lease)
    (asked,) = wanted(step, effects.LookUpImage)
    assert (asked.lease_id, asked.image) == (lease_id, TAG)
    assert step.save.empty, "nothing is signed before it is known what the tag means"
    return lease_id


@pytest.mark.parametrize("image", [MEANT, ID])
def test_what_the_tag_means_is_said_with_the_signature_and_pulled(image: str) -> None:
    world = World()
    lease_id = waiting(world)
    step = world.do(events.ImageLookedUp(lease_id, image))
    answer = only(step, LeaseAnswer)
    assert (answer.signed is not None, answer.image, answer.reason) == (True, image, None)
    assert step.save.runs[lease_id].image == image
    assert wanted(step, effects.Pull)


def test_a_lease_that_names_the_image_needs_no_look_and_is_bound_to_it() -> None:
    world = World()
    lease_id, step = world.assign(world.job(image=TAG), image=MEANT)
    assert wanted(step, effects.LookUpImage) == []
    assert only(step, LeaseAnswer).image == MEANT
    ended = world.do(events.ImageReady(lease_id, OTHER))
    change = only(ended, RunChanged)
    assert (change.state, change.reason) == ("exited", Reason.PULL_FAILED)
    assert OTHER in change.detail
    assert MEANT in change.detail


def test_the_image_that_was_looked_up_is_the_one_that_has_to_come() -> None:
    world = World()
    lease_id = waiting(world)
    world.do(events.ImageLookedUp(lease_id, MEANT))
    world.do(events.ImageReady(lease_id, MEANT))
    assert world.core.runs[lease_id].record.phase is RunPhase.RESTORING


@pytest.mark.parametrize("image", ["registry.example/lab/other@sha256:" + "a" * 64, "", TAG])
def test_an_image_that_the_tag_can_not_mean_is_refused(image: str) -> None:
    world = World()
    lease_id = waiting(world)
    answer = only(world.do(events.ImageLookedUp(lease_id, image)), LeaseAnswer)
    assert (answer.signed, answer.reason) == (None, Reason.PULL_FAILED)


def test_a_lease_that_names_an_image_that_the_tag_can_not_mean_is_refused() -> None:
    world = World()
    foreign = "registry.example/lab/other@sha256:" + "a" * 64
    _, step = world.assign(world.job(image=TAG), image=foreign)
    assert only(step, LeaseAnswer).refusal.startswith("image: ")
    _, step = world.assign(world.job(image=MEANT, nonce="1" * 32), image=MEANT)
    assert only(step, LeaseAnswer).refusal.startswith("image: "), "it has no tag"


@pytest.mark.parametrize("image", [MEANT, ID, "../images"])
def test_what_has_no_tag_is_not_looked_up(image: str) -> None:
    world = World()
    _, step = world.assign(world.job(image=image))
    assert wanted(step, effects.LookUpImage) == []
    answer = only(step, LeaseAnswer)
    assert (answer.signed is not None, answer.image) == (True, "")


def test_a_runner_without_images_looks_nothing_up_and_keeps_what_the_lease_says() -> None:
    world = World(runner="process", accepts=(RENTER.party,))
    lease_id, step = world.assign(world.job(image=TAG), image=MEANT)
    assert only(step, LeaseAnswer).image == MEANT
    world.do(events.ImageReady(lease_id, ""))
    assert world.core.runs[lease_id].record.phase is RunPhase.RESTORING


@pytest.mark.parametrize(
    "reason", [Reason.IMAGE_UNKNOWN, Reason.PULL_FAILED, Reason.IMAGE_NOT_ALLOWED, None]
)
def test_what_fails_is_refused_by_its_reason_and_remembered_where_it_is_this_machines(
    reason: Reason | None,
) -> None:
    world = World()
    lease_id = waiting(world)
    says = "image 'registry.example/lab/train:1': the registry is busy"
    answer = only(world.do(events.LookUpFailed(lease_id, reason, says)), LeaseAnswer)
    assert (answer.signed, answer.reason, answer.refusal) == (None, reason, says)
    assert lease_id not in world.core.runs
    _, step = world.assign(world.job(image=TAG, nonce="1" * 32))
    remembered = reason in (Reason.PULL_FAILED, Reason.IMAGE_NOT_ALLOWED)
    assert bool(said(step, LeaseAnswer)) is remembered


@pytest.mark.parametrize(("left_ms", "span_ms"), [(10_000, MOST_MS), (4_000, 4_000 - MARGIN_MS)])
def test_it_ends_in_time_to_answer(left_ms: int, span_ms: int) -> None:
    world = World()
    lease_id = waiting(world, answer_by_ms=NOW + left_ms)
    world.now += span_ms - 1
    assert said(world.do(events.Tick()), LeaseAnswer) == []
    world.now += 1
    answer = only(world.do(events.Tick()), LeaseAnswer)
    assert (answer.signed, answer.reason) == (None, Reason.PULL_FAILED)
    assert "did not answer in time" in answer.refusal
    late = world.do(events.ImageLookedUp(lease_id, MEANT))
    assert late.save.empty
    assert late.effects == []


def test_a_clock_that_is_set_back_does_not_let_it_wait_for_ever() -> None:
    world = World()
    waiting(world)
    world.now -= 3_600_000
    assert only(world.do(events.Tick()), LeaseAnswer).signed is None


def test_the_machine_is_judged_anew_when_the_answer_comes() -> None:
    world = World()
    lease_id = waiting(world)
    world.do(events.DrainAsked(Reason.RECLAIMED, 1_000, then_stop=False))
    answer = only(world.do(events.ImageLookedUp(lease_id, MEANT)), LeaseAnswer)
    assert (answer.signed, answer.refusal) == (None, "I am being drained")


def test_a_lease_that_comes_twice_waits_once_and_one_that_was_to_stop_is_refused() -> None:
    world = World()
    lease_id = waiting(world)
    assert world.core.quiet_until_ms() == 0
    _, again = world.assign(world.job(image=TAG))
    assert wanted(again, effects.LookUpImage) == []
    order = Order(lease=lease_id, epoch=1, desired="stop", reason=Reason.CANCELLED, grace_ms=0)
    assert only(world.do(events.MessageArrived(order)), LeaseAnswer).signed is None
    assert world.do(events.ImageLookedUp(lease_id, MEANT)).save.empty
    assert 0 < world.core.quiet_until_ms() < NEVER_MS


def test_who_prepares_to_take_over_prepares_the_same_image() -> None:
    world = World()
    message = Prepare(job=world.job(image=TAG).envelope, checkpoint=None, image=MEANT)
    (ahead,) = wanted(world.do(events.MessageArrived(message)), effects.PrepareJob)
    assert ahead.image == MEANT
