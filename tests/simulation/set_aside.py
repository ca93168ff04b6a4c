"""The auditor's model of machines that are set aside, because they could not start what they were
given; and of images that nobody finds."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.simulation.models import LeaseModel, never

if TYPE_CHECKING:
    from tests.simulation.auditor import Auditor

FIRST_MS = 15_000
MOST_MS = 1_800_000
WITNESSES = 3
TWICE_WITHIN_MS = 300_000


@dataclass
class _Machine:
    failures: int = 0
    job: str = ""
    until_ms: int = 0


class SetAside:
    """Follows them by the leases that end. Times are the broker's clock."""

    def __init__(self, auditor: Auditor) -> None:
        self._auditor = auditor
        self._machines: dict[str, _Machine] = defaultdict(_Machine)
        self._unknown: dict[str, list[tuple[str, int]]] = defaultdict(list)
        """By job: which machine was told that its image is unknown, and when, since it last ran."""

    def is_set_aside(self, provider: str, now_ms: int) -> bool:
        """Say whether nothing may be leased there."""
        return now_ms < self._machines[provider].until_ms

    def leased(self, provider: str, now_ms: int) -> None:
        """A lease is proposed."""
        left_ms = self._machines[provider].until_ms - now_ms
        never(left_ms > 0, f"a machine is leased that is set aside for {left_ms} ms more")

    def started(self, provider: str) -> None:
        """A run has begun there, as the broker knows."""
        machine = self._machines[provider]
        if machine.failures:
            self._machines[provider] = _Machine()
            self._auditor.market.matching.touched(provider)

    def closed(self, lease: LeaseModel, now_ms: int) -> None:
        """A lease is closed."""
        job, provider = lease.document["job"], lease.document["provider"]
        if lease.ran:
            self._unknown.pop(job, None)
        elif lease.reason == "image_unknown" and self._is_witness(lease):
            self._unknown[job].append((provider, now_ms))
        elif lease.reason in ("start_failed", "run_quarantined"):
            self._could_not_start(self._machines[provider], job, now_ms)

    def _is_witness(self, lease: LeaseModel) -> bool:
        """Whether it was asked for the job's own image, or for what something durable rests on."""
        durable = self._auditor._resume_point(lease.document["job"])[1]
        return not lease.document["image"] or durable is not None

    def _could_not_start(self, machine: _Machine, job: str, now_ms: int) -> None:
        if machine.job != job or not machine.failures:
            machine.failures += 1
        machine.job = job
        span_ms = min(MOST_MS, FIRST_MS * 2 ** (machine.failures - 1))
        machine.until_ms = max(machine.until_ms, now_ms + span_ms)

    def agent(self, new: Any) -> None:
        """What the broker has written down of a provider's machine."""
        mine = self._machines[new.id].until_ms
        never(
            new.set_aside_until_ms != mine,
            f"a machine is set aside until {new.set_aside_until_ms}, {mine} is right",
        )

    def resumed(self, job: str) -> None:
        """Its renter has it tried again."""
        self._unknown.pop(job, None)

    def image_given_up(self, job: str, now_ms: int) -> None:
        """A job's image counts as not to be had."""
        said = self._unknown[job]
        machines = [machine for machine, _ in said]
        enough = len(set(machines)) >= WITNESSES
        twice = machines.count(machines[-1]) > 1 if machines else False
        long = bool(said) and now_ms - said[0][1] >= TWICE_WITHIN_MS
        never(
            not enough and not (twice and long),
            f"an image is given up that {len(set(machines))} machines did not find",
        )
