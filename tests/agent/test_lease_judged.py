"""An agent signs a lease only if its own signed offer and the devices of the lease meet the job."""

from __future__ import annotations

from typing import Any

import pytest

from sublet_agent.core import effects
from sublet_contracts.documents import Device, Resources
from sublet_contracts.requirements import Constraint
from sublet_contracts.wire import LeaseAnswer
from tests.agent.test_core import GPU, OTHER, PRICE, World, only, wanted
from tests.contracts.varied import Recording

SMALL = Device(id="gpu-1", kind="gpu", name="T4", memory_bytes=2**33, hardware_class="nvidia-t4")

CASES: list[tuple[Constraint, dict[str, Any], dict[str, Any]]] = [
    # constraint, what the job asks besides, what the owner offers
    (Constraint.REGION, {"region": "moon"}, {}),
    (Constraint.DISK, {"disk_bytes": 2**35}, {}),
    (Constraint.MEMORY, {"memory_bytes": 2**35}, {}),
    (Constraint.CPU, {"cpu_millis": 4001}, {}),
    (Constraint.IMAGE, {"image": "img:1"}, {"image_policy": "digest"}),
    (Constraint.DEVICE_MEMORY, {"device_memory_bytes": 2**35}, {}),
    (Constraint.DEVICE_NAME, {"device_name": "H100"}, {}),
    (Constraint.HARDWARE_CLASS, {"hardware_class": "nvidia-h100"}, {}),
    (Constraint.DEVICE_KIND, {"device_kind": "cpu"}, {}),
    (Constraint.EGRESS, {"egress": True}, {}),
    (Constraint.USER, {"user": "1000"}, {}),
    (Constraint.ACCEPTS, {}, {"accepts": (OTHER.party,)}),
]


def job_of(world: World, **wishes: Any) -> Any:
    asked = {"devices": 1, "device_kind": "any", "memory_bytes": 1, "disk_bytes": 1000}
    named = {"image": wishes.pop("image")} if "image" in wishes else {}
    return world.job(resources=asked | wishes, **named)


@pytest.mark.parametrize(("constraint", "wishes", "offered"), CASES)
def test_a_lease_on_a_machine_that_falls_short_is_refused_by_the_constraints_name(
    constraint: Constraint, wishes: dict[str, Any], offered: dict[str, Any]
) -> None:
    world = World(**offered)
    _, step = world.assign(job_of(world, **wishes))
    answer = only(step, LeaseAnswer)
    assert answer.signed is None
    assert answer.refusal.startswith(f"{constraint}: ")
    assert not world.core.saved.runs
    assert not wanted(step, effects.Pull)


def test_no_constraint_is_left_out_here() -> None:
    # BUSY, and how many devices, are told by the lease's own devices; the price by the lease's.
    told_otherwise = {Constraint.BUSY, Constraint.DEVICES, Constraint.PRICE}
    assert set(Constraint) - {case[0] for case in CASES} == told_otherwise, "add a case for it"


def test_a_price_that_is_above_what_the_job_allows_is_refused() -> None:
    world = World()
    _, step = world.assign(world.job(max_price_ucr_per_device_hour=PRICE - 1))
    assert only(step, LeaseAnswer).refusal.startswith("price: ")


def test_the_devices_of_the_lease_are_judged_not_the_best_of_the_offer() -> None:
    world = World(devices=(GPU, SMALL))
    asked = job_of(world, device_name="a100")
    _, step = world.assign(asked, device_ids=("gpu-1",))
    assert only(step, LeaseAnswer).refusal.startswith("device_name: T4 there")
    _, step = world.assign(asked, device_ids=("gpu-0",))
    assert only(step, LeaseAnswer).signed is not None


def test_two_devices_must_be_of_one_class_and_different() -> None:
    world = World(devices=(GPU, SMALL))
    _, step = world.assign(job_of(world, devices=2), device_ids=("gpu-0", "gpu-1"))
    assert only(step, LeaseAnswer).refusal.startswith("devices: ")
    for devices in (("gpu-0",), ("gpu-0", "gpu-0")):
        _, step = world.assign(job_of(world, devices=2), device_ids=devices)
        assert only(step, LeaseAnswer).refusal.startswith("device_ids: ")


def test_the_agent_reads_every_field_of_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    from sublet_agent.core import offers

    seen: list[Recording] = []
    judge = offers.shortfalls

    def recording(need: Any, *rest: Any) -> Any:
        seen.append(Recording(need.resources))
        object.__setattr__(need, "resources", seen[-1])
        return judge(need, *rest)

    monkeypatch.setattr(offers, "shortfalls", recording)
    world = World()
    _, step = world.assign(world.job())
    assert only(step, LeaseAnswer).signed is not None
    forgotten = set(Resources.model_fields) - seen[0].read
    assert not forgotten, f"the agent signs whatever a job asks for as {sorted(forgotten)}"
