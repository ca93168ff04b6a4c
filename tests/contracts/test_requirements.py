"""One judge of machines: every constraint by its name, every field of Resources read."""

from dataclasses import replace
from typing import Any, cast

import pytest
from pydantic import TypeAdapter, ValidationError

from sublet_contracts.api import MatchView
from sublet_contracts.documents import Device, Offer, Resources
from sublet_contracts.requirements import (
    _UNITS,
    Constraint,
    MachineRequirements,
    Shortfall,
    choose_devices,
    ease,
    required_by,
    shortfalls,
)
from tests.contracts import samples
from tests.contracts.varied import Recording

GB = 10**9
JOB = samples.job()
OTHER = samples.BROKER
GPU = Device(id="GPU-1", kind="gpu", name="RTX 4090", memory_bytes=24 * GB, hardware_class="4090")
NEED = MachineRequirements(
    renter=JOB.renter,
    resources=Resources(devices=1, device_kind="gpu", memory_bytes=8 * GB, disk_bytes=GB),
    max_price_ucr_per_device_hour=500_000,
    image="train@sha256:" + "0" * 64,
)


def offer(**changes: Any) -> Offer:
    fields: dict[str, Any] = {
        "devices": (GPU, GPU.model_copy(update={"id": "GPU-2"})),
        "price_ucr_per_device_hour": 400_000,
        "cpu_millis": 4000,
        "memory_bytes": 16 * GB,
        "disk_bytes": 50 * GB,
        "region": "home",
        "runner": "docker",
        "image_policy": "digest",
        "egress": False,
        "accepts": (),
    }
    return Offer.model_validate({**dict(samples.offer()), **fields, **changes})


def need(resources: dict[str, Any] | None = None, **changes: Any) -> MachineRequirements:
    wanted = NEED.resources.model_copy(update=resources or {})
    return replace(NEED, resources=wanted, **changes)


CASES: list[tuple[MachineRequirements, Offer, Constraint, Any, Any]] = [
    (NEED, offer(price_ucr_per_device_hour=600_000), Constraint.PRICE, 600_000, 500_000),
    (need({"region": "moon"}), offer(), Constraint.REGION, "home", "moon"),
    (need({"disk_bytes": 51 * GB}), offer(), Constraint.DISK, 50 * GB, 51 * GB),
    (need({"memory_bytes": 17 * GB}), offer(), Constraint.MEMORY, 16 * GB, 17 * GB),
    (need({"cpu_millis": 4001}), offer(), Constraint.CPU, 4000, 4001),
    (need(pinned_threads=5), offer(), Constraint.CPU, 4000, 5000),
    (need(image="train:1"), offer(), Constraint.IMAGE, "digest", "train:1"),
    (
        need({"device_memory_bytes": 25 * GB}),
        offer(),
        Constraint.DEVICE_MEMORY,
        24 * GB,
        25 * GB,
    ),
    (need({"device_name": "H100"}), offer(), Constraint.DEVICE_NAME, "RTX 4090", "H100"),
    (need({"hardware_class": "h100"}), offer(), Constraint.HARDWARE_CLASS, "4090", "h100"),
    (need(pinned_class="h100"), offer(), Constraint.HARDWARE_CLASS, "4090", "h100"),
    (need({"devices": 3}), offer(), Constraint.DEVICES, 2, 3),
    (need({"device_kind": "cpu"}), offer(), Constraint.DEVICE_KIND, "gpu", "cpu"),
    (need({"egress": True}), offer(), Constraint.EGRESS, False, True),
    (need({"user": "1000"}), offer(), Constraint.USER, False, "1000"),
    (NEED, offer(accepts=(OTHER,)), Constraint.ACCEPTS, "other renters", JOB.renter),
]


@pytest.mark.parametrize(("wants", "offered", "constraint", "has", "needs"), CASES)
def test_each_constraint_is_judged_by_its_name_with_its_facts(
    wants: MachineRequirements, offered: Offer, constraint: Constraint, has: Any, needs: Any
) -> None:
    assert shortfalls(NEED, offer(), offer().devices) == []
    assert shortfalls(wants, offered, offered.devices) == [Shortfall(constraint, has, needs)]


NAMES = {
    "A10": "NVIDIA A10",
    "A10 in part": "NVIDIA A10-24Q",
    "A10G": "NVIDIA A10G",
    "A100": "NVIDIA A100-SXM4-80GB",
    "A100 PCIe": "NVIDIA A100 80GB PCIe",
    "L4": "NVIDIA L4",
    "L40": "NVIDIA L40",
    "L40S": "NVIDIA L40S",
    "H100": "NVIDIA H100 80GB HBM3",
    "GH200": "NVIDIA GH200 480GB",
    "4090": "NVIDIA GeForce RTX 4090",
    "4080": "NVIDIA GeForce RTX 4080 SUPER",
    "6000": "NVIDIA RTX 6000 Ada Generation",
    "A6000": "NVIDIA RTX A6000",
}


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("A10", ["A10", "A10 in part"]),
        ("a10g", ["A10G"]),
        ("A100", ["A100", "A100 PCIe"]),
        ("A100-SXM4", ["A100"]),
        ("A100-SXM4-80GB", ["A100"]),
        ("nvidia_a100", ["A100", "A100 PCIe"]),
        ("L4", ["L4"]),
        ("L40", ["L40"]),
        ("L40S", ["L40S"]),
        ("H100-80GB", ["H100"]),
        ("H100", ["H100"]),
        ("H200", []),
        ("RTX 4090", ["4090"]),
        ("rtx4090", ["4090"]),
        ("4090", ["4090"]),
        ("RTX", ["4090", "4080", "6000", "A6000"]),
        ("4080SUPER", ["4080"]),
        ("RTX 6000", ["6000"]),
        ("GeForce 4090", []),
        ("90", []),
        ("RT", []),
        ("-", []),
        ("", list(NAMES)),
    ],
)
def test_a_device_is_asked_for_by_whole_words_of_its_name(asked: str, found: list[str]) -> None:
    suits = []
    for short, name in NAMES.items():
        device = GPU.model_copy(update={"name": name})
        if not shortfalls(need({"device_name": asked}), offer(devices=(device,)), (device,)):
            suits.append(short)
    assert suits == found


def test_no_constraint_is_left_out_here() -> None:
    shown = {constraint for _, _, constraint, _, _ in CASES}
    # BUSY is not a machine's: who knows what is taken says so (market/matching.py).
    assert set(Constraint) - shown == {Constraint.BUSY}, "add a case for it"
    numbers = {constraint for _, _, constraint, has, _ in CASES if type(has) is int}
    bare = numbers - set(_UNITS) - {Constraint.DEVICES}
    assert not bare, f"say in requirements.py's _UNITS how {sorted(bare)} is written"


def test_every_field_of_resources_is_judged() -> None:
    seen = Recording(NEED.resources)
    offered = offer()
    wants = replace(NEED, resources=cast(Resources, seen))
    assert shortfalls(wants, offered, offered.devices) == []
    forgotten = set(Resources.model_fields) - seen.read
    assert not forgotten, f"add a row to requirements.py for {sorted(forgotten)}"


def test_only_the_devices_that_are_named_count() -> None:
    small = GPU.model_copy(update={"id": "GPU-0", "memory_bytes": 8 * GB})
    offered = offer(devices=(GPU, small))
    wants = need({"device_memory_bytes": 20 * GB})
    assert shortfalls(wants, offered, offered.devices) == []
    assert shortfalls(wants, offered, [small]) == [
        Shortfall(Constraint.DEVICE_MEMORY, 8 * GB, 20 * GB)
    ]


def test_a_job_gets_devices_of_one_class_and_the_smallest_that_do() -> None:
    devices = [
        Device(id=f"GPU-{n}", kind="gpu", name="x", memory_bytes=size * GB, hardware_class=name)
        for n, (name, size) in enumerate([("a", 8), ("b", 80), ("b", 24), ("b", 40)])
    ]
    assert choose_devices(need({"devices": 2}), devices) == ("GPU-2", "GPU-3")
    offered = offer(devices=tuple(devices))
    wants = need({"devices": 3, "device_memory_bytes": 10 * GB, "hardware_class": "b"})
    assert choose_devices(wants, devices) == ("GPU-2", "GPU-3", "GPU-1")
    # Three have 10 GB, but of any class only so many: the count that all rules leave is named.
    mixed = (*devices[:2], devices[2].model_copy(update={"hardware_class": "c"}))
    offered = offer(devices=mixed)
    assert shortfalls(need({"devices": 2}), offered, mixed) == [Shortfall(Constraint.DEVICES, 1, 2)]


def test_what_is_easily_changed_comes_first() -> None:
    places = [ease(constraint) for constraint in Constraint]
    assert places == sorted(places)
    assert ease(Constraint.PRICE) < ease(Constraint.DEVICE_KIND) < ease("of a newer release")


def test_a_shortfall_travels_and_a_newer_brokers_is_read_too() -> None:
    found = (
        Shortfall(Constraint.PRICE, 600_000, 500_000),
        Shortfall(Constraint.EGRESS, False, True),
        Shortfall("colour", "red", "blue"),
    )
    view = MatchView(offers=(), considered=1, failures={}, relax=found)
    again = MatchView.model_validate_json(view.model_dump_json())
    assert again.relax == found
    assert isinstance(again.relax[0].constraint, Constraint)
    facts = [shortfall.as_json() for shortfall in found]
    assert TypeAdapter(tuple[Shortfall, ...]).validate_python(facts) == found
    assert [shortfall.distance for shortfall in found] == [100_000, 0, 0]
    assert str(found[0]) == "price: 0.60 there, 0.50 asked for"
    assert str(found[1]) == "egress: no there, yes asked for"


def test_what_a_jobs_document_requires() -> None:
    wants = required_by(JOB)
    assert (wants.renter, wants.resources) == (JOB.renter, JOB.resources)
    assert wants.hardware_class == JOB.resources.hardware_class


@pytest.mark.parametrize("user", ["root", "0", "0:5", "5:0", "a b", "Ann", "-x", "5:", ":5"])
def test_nobody_asks_to_be_root_or_in_words_that_mean_nothing(user: str) -> None:
    with pytest.raises(ValidationError):
        Resources(devices=1, device_kind="any", memory_bytes=1, disk_bytes=1, user=user)
    for fine in ("", "1000", "1000:5", "ann", "_apt", "www-data"):
        made = Resources(devices=1, device_kind="any", memory_bytes=1, disk_bytes=1, user=fine)
        assert made.user == fine
