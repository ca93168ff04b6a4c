"""What the runner reads of a run's folder: parsed strictly, for a job may have written it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from sublet_agent.adapters.process.files import read_bounded
from sublet_contracts.run_conventions import MAX_LOG_STATE_CHARACTERS

_MOST_BYTES = 4 * 1024 * 1024
_MOST_MS = 2**53 - 1
_Milliseconds = Annotated[int, Field(ge=0, le=_MOST_MS)]
_Name = Annotated[str, StringConstraints(max_length=200)]
_State = Annotated[str, StringConstraints(max_length=MAX_LOG_STATE_CHARACTERS)]
_Words = Annotated[str, StringConstraints(max_length=2000)]


class Damaged(Exception):
    """A file that is there and is not what its writer wrote."""


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class SpecRecord(_Record):
    """Of `spec.json`: whose the run is."""

    owner: _Name
    job_id: _Name
    lease_id: _Name
    epoch: Annotated[int, Field(ge=0, le=_MOST_MS)]
    checkpoint_dir: Annotated[str, StringConstraints(max_length=4096, pattern=r"^/[^\x00]*$")]


class RunningRecord(_Record):
    """Of `running.json`: the job's own process, since when, and in which start of the machine."""

    job_pid: Annotated[int, Field(gt=1, le=2**31 - 1)]
    job_started: Annotated[int, Field(ge=0)]
    started_ms: _Milliseconds
    boot: _Name


class ExitRecord(_Record):
    """`exit.json`: how it ended."""

    exit_code: Annotated[int, Field(ge=0, le=255)] | None
    returned: bool
    signal: Annotated[int, Field(ge=1, le=127)] | None
    worker_signal: Annotated[int, Field(ge=1, le=127)] | None
    oom_killed: bool
    limit_exceeded: _Words
    outside_signal: _Words
    unknown_signal: _Words
    error: _Words | None
    started_ms: _Milliseconds
    finished_ms: _Milliseconds


class NowRecord(_Record):
    """Of `now.json`: how it stands."""

    at_ms: _Milliseconds
    cpu_ns: _Milliseconds
    memory_bytes: _Milliseconds
    peak_memory_bytes: _Milliseconds
    states: Annotated[dict[Literal["stdout", "stderr"], _State], Field(max_length=2)]


R = TypeVar("R", bound=_Record)


def read(path: Path, kind: type[R]) -> R | None:
    """Return the record, or None where there is no such file. Raises Damaged."""
    try:
        return kind.model_validate_json(read_bounded(path, _MOST_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        raise Damaged(f"{path.name} is damaged") from error


def read_sound(path: Path, kind: type[R]) -> R | None:
    """Return the record, or None where there is none that can be read."""
    with contextlib.suppress(Damaged):
        return read(path, kind)
    return None
