"""From what a renter writes to the job document that is signed."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TypeVar

from pydantic import ValidationError

from sublet.units import (
    UnitError,
    cores_to_millis,
    credits_to_ucr,
    duration_ms,
    parse_gpus,
    size_bytes,
)
from sublet_contracts.documents import Input, Job, Resources, refused_by_validation
from sublet_contracts.encoding import MAX_DOCUMENT_BYTES, canonical_json

D = TypeVar("D", Resources, Job)
Amount = str | int | float | Decimal

DEFAULT_MEMORY = {"gpu": "8GB", "cpu": "1GB"}


@dataclass(frozen=True)
class JobSpec:
    """A job as a renter describes it; see `sublet.run` for the meaning and the defaults."""

    image: str
    command: Sequence[str]
    max_price: Amount
    budget: Amount
    gpus: str | int = 1
    checkpoint_every: str | int = "2m"
    patience: str | int = "20s"
    stop_grace: str | int = "30s"
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    memory: str | int = ""
    disk: str | int = "10GB"
    cpus: Amount = 1
    region: str = ""
    hardware_class: str = ""
    egress: bool = False
    accept_receipts: Amount | None = None
    start_within: str | int = "7d"

    def resources(self) -> Resources:
        """Return what the job needs. Raises UnitError, which names the option."""
        gpus = parse_gpus(self.gpus)
        return _checked(
            Resources,
            devices=gpus.devices,
            device_kind=gpus.kind,
            device_memory_bytes=gpus.memory_bytes,
            device_name=gpus.name,
            hardware_class=self.hardware_class,
            cpu_millis=cores_to_millis(self.cpus),
            memory_bytes=size_bytes(self.memory or DEFAULT_MEMORY[gpus.kind], "memory"),
            disk_bytes=size_bytes(self.disk, "disk"),
            region=self.region,
            egress=self.egress,
        )

    @property
    def max_price_ucr(self) -> int:
        """The highest price, in ucr per device-hour."""
        return credits_to_ucr(self.max_price, "max_price")

    @property
    def budget_ucr(self) -> int:
        """The budget in ucr."""
        return credits_to_ucr(self.budget, "budget")

    def document(self, *, renter: str, broker: str, now_ms: int, inputs: tuple[Input, ...]) -> Job:
        """Return the document to sign. Raises UnitError, which names the field."""
        accept = self.budget_ucr
        if self.accept_receipts is not None:
            accept = credits_to_ucr(self.accept_receipts, "accept_receipts")
        job = _checked(
            Job,
            renter=renter,
            broker=broker,
            nonce=os.urandom(16).hex(),
            name=self.name or default_name(self.image),
            image=self.image,
            command=tuple(self.command),
            env=dict(self.env),
            resources=self.resources(),
            max_price_ucr_per_device_hour=self.max_price_ucr,
            budget_ucr=self.budget_ucr,
            checkpoint_interval_ms=duration_ms(self.checkpoint_every, "checkpoint_every"),
            patience_ms=duration_ms(self.patience, "patience"),
            stop_grace_ms=duration_ms(self.stop_grace, "stop_grace"),
            inputs=inputs,
            outputs=self.outputs,
            accept_receipts_up_to_ucr=accept,
            issued_ms=now_ms,
            expires_ms=now_ms + duration_ms(self.start_within, "start_within"),
        )
        _check_size(job)
        return job


def default_name(image: str) -> str:
    """Return a job name made of the image's."""
    last = image.rsplit("/", 1)[-1].split("@")[0].split(":")[0]
    plain = re.sub(r"[^A-Za-z0-9._-]", "", last)[:64]
    return plain if plain and plain != "sha256" and plain[0].isalnum() else "job"


def _check_size(job: Job) -> None:
    size = len(canonical_json(job.model_dump(mode="json")))
    if size > MAX_DOCUMENT_BYTES:
        parts = {
            "command": sum(len(part) for part in job.command),
            "env": sum(len(name) + len(value) for name, value in job.env.items()),
            "inputs": sum(len(item.destination) for item in job.inputs),
        }
        largest = max(parts, key=lambda name: parts[name])
        fix = "put them into one folder" if largest == "inputs" else "pass it as an input file"
        raise UnitError(
            f"{largest}: the job's document has {size} bytes, and {MAX_DOCUMENT_BYTES} are the "
            f"most; {fix}"
        )


def _checked(kind: type[D], **values: object) -> D:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UnitError(str(refused_by_validation(error))) from error
