"""From what a renter writes to the job document that is signed."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar, Unpack, cast

from pydantic import ValidationError

from sublet.options import OPTIONS, JobDescription, completed
from sublet.units import UnitError, credits_to_ucr, duration_ms, parse_gpus, size_bytes
from sublet_contracts.documents import Input, Job, Resources, refused_by_validation
from sublet_contracts.encoding import MAX_DOCUMENT_BYTES, canonical_json

D = TypeVar("D", Resources, Job)

CODE_PATH = "/work"
DEFAULT_MEMORY = {"gpu": "8GB", "cpu": "1GB"}


class JobSpec:
    """A job as a renter describes it: the options of sublet/options.py, with every default."""

    def __init__(self, **options: Unpack[JobDescription]) -> None:
        """Raises TypeError if an option is missing or unknown; no value is looked at before it's
        needed."""
        self.options: Final = completed(options)

    def __repr__(self) -> str:
        given = ((k, v) for k, v in self.options.items() if v != OPTIONS[k].default)
        return f"JobSpec({', '.join(f'{name}={value!r}' for name, value in given)})"

    @property
    def inputs(self) -> Mapping[str, str]:
        """Local path -> path in the container."""
        return self.options["inputs"] or {}

    @property
    def code(self) -> Path | None:
        """The folder of code that goes along."""
        written = self.options["code"]
        return Path(written).expanduser() if written else None

    @property
    def code_destination(self) -> str:
        """Where the code is in the container: its command begins there."""
        return self.options["workdir"] or CODE_PATH

    @property
    def max_price_ucr(self) -> int:
        """The highest price, in ucr per device-hour. Raises UnitError."""
        return credits_to_ucr(self.options["max_price"], "max_price")

    @property
    def budget_ucr(self) -> int:
        """The budget in ucr. Raises UnitError."""
        return credits_to_ucr(self.options["budget"], "budget")

    def resources(self) -> Resources:
        """Return what the job needs. Raises UnitError, which names the option."""
        gpus = parse_gpus(self.options["gpus"])
        memory = self.options["memory"] or DEFAULT_MEMORY[gpus.kind]
        return _checked(
            Resources,
            **self._converted(Resources),
            devices=gpus.devices,
            device_kind=gpus.kind,
            device_memory_bytes=gpus.memory_bytes,
            device_name=gpus.name,
            memory_bytes=size_bytes(memory, "memory"),
        )

    def document(self, *, renter: str, broker: str, now_ms: int, inputs: tuple[Input, ...]) -> Job:
        """Return the document to sign. Raises UnitError, which names the field."""
        accept_ucr = self.budget_ucr
        if self.options["accept_receipts"] is not None:
            accept_ucr = credits_to_ucr(self.options["accept_receipts"], "accept_receipts")
        decided = self._converted(Job)
        if self.code is not None:
            decided["workdir"] = self.code_destination
        job = _checked(
            Job,
            **decided,
            renter=renter,
            broker=broker,
            nonce=os.urandom(16).hex(),
            name=self.options["name"] or default_name(self.options["image"]),
            resources=self.resources(),
            inputs=inputs,
            accept_receipts_up_to_ucr=accept_ucr,
            issued_ms=now_ms,
            expires_ms=now_ms + duration_ms(self.options["start_within"], "start_within"),
        )
        _check_size(job)
        return job

    def _converted(self, kind: type[Resources] | type[Job]) -> dict[str, object]:
        """Return the fields of `kind` that follow from one option each."""
        values: Mapping[str, object] = cast(Mapping[str, object], self.options)
        return {
            option.fields[0]: option.convert(values[name], name)
            for name, option in OPTIONS.items()
            if option.convert is not None and option.fields[0] in kind.model_fields
        }


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
