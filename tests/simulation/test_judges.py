"""The auditor judges machines by a model of its own. It must read all that the market's judge
reads, and come to the same."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from sublet_contracts.documents import Device, Job, Offer, Resources
from sublet_contracts.reasons import MEANINGS, Fault, Reason
from sublet_contracts.requirements import Constraint, required_by, shortfalls
from tests.contracts import samples
from tests.contracts.varied import Recording
from tests.simulation.charges import _BROKERS_FAULT, _PROVIDERS_FAULT
from tests.simulation.matching import _Machine
from tests.simulation.truth import _LOST, _REASONS

PAIRS = 5_000
NAMES = ("NVIDIA RTX 4090", "NVIDIA H100", "NVIDIA A100-SXM4-80GB", "NVIDIA A10", "NVIDIA L40S")
ASKED = ("4090", "rtx", "RTX4090", "a10", "A100", "A100-SXM4", "L4", "L40", "l40s", "h100")


def an_offer(draw: random.Random) -> Offer:
    devices = tuple(
        Device(
            id=f"GPU-{n}",
            kind=draw.choice(("gpu", "gpu", "gpu", "cpu")),
            name=draw.choice(NAMES),
            memory_bytes=draw.choice((24, 80)),
            hardware_class=draw.choice(("a", "a", "b")),
        )
        for n in range(draw.choice((1, 2, 3)))
    )
    return samples.offer().model_copy(
        update={
            "devices": devices,
            "price_ucr_per_device_hour": draw.choice((1, 1, 2)),
            "cpu_millis": draw.choice((1000, 2000)),
            "memory_bytes": draw.choice((10, 20)),
            "disk_bytes": draw.choice((10, 20)),
            "region": draw.choice(("home", "moon")),
            "image_policy": draw.choice(("any", "any", "digest")),
            "egress": draw.choice((True, True, False)),
            "users": draw.choice((True, True, False)),
            "accepts": draw.choice(((), (), (samples.RENTER,), (samples.BROKER,))),
        }
    )


def a_job(draw: random.Random) -> Job:
    resources = Resources(
        devices=draw.choice((1, 1, 2)),
        device_kind=draw.choice(("gpu", "any", "any", "cpu")),
        device_memory_bytes=draw.choice((0, 24, 80)),
        device_name=draw.choice(("", "", "", "", "", *ASKED)),
        hardware_class=draw.choice(("", "", "a", "b")),
        cpu_millis=draw.choice((1000, 1500)),
        memory_bytes=draw.choice((10, 15)),
        disk_bytes=draw.choice((10, 15)),
        region=draw.choice(("", "", "home")),
        egress=draw.choice((False, False, True)),
        user=draw.choice(("", "", "1000")),
    )
    return samples.job().model_copy(
        update={
            "resources": resources,
            "max_price_ucr_per_device_hour": draw.choice((1, 2, 2)),
            "image": draw.choice(("train:1", "train@sha256:" + "0" * 64)),
        }
    )


def auditor_says(job: Any, offer: Offer, pinned: str = "", threads: int = 0) -> bool:
    document = offer.model_dump(mode="json")
    return _Machine("box", document, document["devices"], 0).suits(job, pinned, threads)


def test_both_judges_read_every_field_of_resources() -> None:
    job, offer = samples.job(), samples.offer()
    market, auditor = Recording(job.resources), Recording(job.resources)
    need = replace(required_by(job), resources=market)  # type: ignore[arg-type]
    assert shortfalls(need, offer, offer.devices) == []
    assert auditor_says({**dict(job), "resources": auditor}, offer)
    fields = set(Resources.model_fields)
    assert not fields - market.read, f"contracts' requirements.py forgets {fields - market.read}"
    assert not fields - auditor.read, f"simulation/matching.py forgets {fields - auditor.read}"


def test_both_judges_say_the_same_of_any_job_and_machine() -> None:
    draw = random.Random(10)
    met: set[str] = set()
    fitting = 0
    for _ in range(PAIRS):
        job, offer, pinned = a_job(draw), an_offer(draw), draw.choice(("", "", "a", "b"))
        threads = draw.choice((0, 0, 1, 2))
        need = replace(required_by(job), pinned_class=pinned, pinned_threads=threads)
        found = shortfalls(need, offer, offer.devices)
        said = auditor_says(job.model_dump(mode="json"), offer, pinned, threads)
        assert said == (not found), f"{job.resources} on {offer}: {[*map(str, found)]}"
        met.update(str(each.constraint) for each in found if len(found) == 1)
        fitting += said
    assert fitting > PAIRS // 100
    assert set(Constraint) - met == {Constraint.BUSY}, "let jobs or offers vary in this too"


def test_the_auditor_knows_whose_fault_each_reason_is() -> None:
    """Its table is its own: a reason that is missing in it would be judged as nobody's fault."""
    for fault, table in ((Fault.PROVIDER, _PROVIDERS_FAULT), (Fault.BROKER, _BROKERS_FAULT)):
        ours = {str(reason) for reason in Reason if MEANINGS[reason].fault is fault}
        assert table == ours, f"tests/simulation/charges.py: {sorted(table ^ ours)} ({fault})"


def test_the_auditor_knows_an_end_for_each_reason_that_a_machine_may_give() -> None:
    """Which are those that no stop, no preparation and no broker gives."""
    given = {reason for reasons in _REASONS.values() for reason in reasons.split()} | _LOST
    assert given <= set(Reason), given - set(Reason)
    assert {"succeeded", "job_failed", "yielded", "killed_unattributed"} <= given
    assert {"device_failed", "engine_stopped", "run_killed", "out_of_memory"} <= given
