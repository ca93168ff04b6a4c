"""The state machines of job, run, lease, checkpoint and receipt chain, one table each.

Rules: a terminal state is final; what is not in the table does not happen. The broker's market
decides when an edge is taken; this file only says which edges there are, because renters and
agents read the same states.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar


class JobState(StrEnum):
    """Derived from the job's runs by the broker; the renter may cancel, pause and resume."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    RECOVERING = "recovering"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class RunState(StrEnum):
    """Observed, written by the agent that holds the epoch; unknown and lost by the sweeper."""

    ASSIGNED = "assigned"
    PULLING = "pulling"
    RESTORING = "restoring"
    RUNNING = "running"
    DRAINING = "draining"
    UNKNOWN = "unknown"
    LOST = "lost"
    EXITED = "exited"


class Desired(StrEnum):
    """What the broker wants of a run; it only hardens."""

    RUN = "run"
    DRAIN = "drain"
    STOP = "stop"


class LeaseState(StrEnum):
    """Written by the broker; active only once the agent has signed."""

    PROPOSED = "proposed"
    ACTIVE = "active"
    CLOSED = "closed"


class CheckpointState(StrEnum):
    """The agent begins, the verifier ends."""

    UPLOADED = "uploaded"
    DURABLE = "durable"
    REJECTED = "rejected"
    QUARANTINED = "quarantined"


class ChainState(StrEnum):
    """A lease's receipts."""

    OPEN = "open"
    SEALED = "sealed"
    SETTLED = "settled"
    DISPUTED = "disputed"


S = TypeVar("S", bound=StrEnum)

_STOPPABLE = {JobState.CANCELLED, JobState.PAUSED, JobState.FAILED}

JOB: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.STARTING} | _STOPPABLE),
    JobState.STARTING: frozenset(
        {JobState.RUNNING, JobState.RECOVERING, JobState.QUEUED, JobState.SUCCEEDED} | _STOPPABLE
    ),
    JobState.RUNNING: frozenset({JobState.RECOVERING, JobState.SUCCEEDED} | _STOPPABLE),
    # A successor passes through starting unseen: the job stays recovering until it runs again.
    JobState.RECOVERING: frozenset({JobState.RUNNING, JobState.SUCCEEDED} | _STOPPABLE),
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.RECOVERING, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}

_ENDINGS = {RunState.EXITED, RunState.UNKNOWN, RunState.LOST}

RUN: Mapping[RunState, frozenset[RunState]] = {
    RunState.ASSIGNED: frozenset(
        {RunState.PULLING, RunState.RESTORING, RunState.RUNNING, RunState.DRAINING} | _ENDINGS
    ),
    RunState.PULLING: frozenset(
        {RunState.RESTORING, RunState.RUNNING, RunState.DRAINING} | _ENDINGS
    ),
    RunState.RESTORING: frozenset({RunState.RUNNING, RunState.DRAINING} | _ENDINGS),
    RunState.RUNNING: frozenset({RunState.DRAINING} | _ENDINGS),
    RunState.DRAINING: frozenset(_ENDINGS),
    # Unreachable is not dead: it comes back in whatever state it has reached meanwhile.
    RunState.UNKNOWN: frozenset(
        {
            RunState.ASSIGNED,
            RunState.PULLING,
            RunState.RESTORING,
            RunState.RUNNING,
            RunState.DRAINING,
            RunState.EXITED,
            RunState.LOST,
        }
    ),
    RunState.LOST: frozenset(),
    RunState.EXITED: frozenset(),
}

DESIRED: Mapping[Desired, frozenset[Desired]] = {
    Desired.RUN: frozenset({Desired.DRAIN, Desired.STOP}),
    Desired.DRAIN: frozenset({Desired.STOP}),
    Desired.STOP: frozenset(),
}

LEASE: Mapping[LeaseState, frozenset[LeaseState]] = {
    LeaseState.PROPOSED: frozenset({LeaseState.ACTIVE, LeaseState.CLOSED}),
    LeaseState.ACTIVE: frozenset({LeaseState.CLOSED}),
    LeaseState.CLOSED: frozenset(),
}

CHECKPOINT: Mapping[CheckpointState, frozenset[CheckpointState]] = {
    CheckpointState.UPLOADED: frozenset({CheckpointState.DURABLE, CheckpointState.REJECTED}),
    CheckpointState.DURABLE: frozenset({CheckpointState.QUARANTINED}),
    CheckpointState.REJECTED: frozenset(),
    CheckpointState.QUARANTINED: frozenset(),
}

CHAIN: Mapping[ChainState, frozenset[ChainState]] = {
    ChainState.OPEN: frozenset({ChainState.SEALED, ChainState.SETTLED, ChainState.DISPUTED}),
    ChainState.SEALED: frozenset({ChainState.SETTLED, ChainState.DISPUTED}),
    ChainState.SETTLED: frozenset(),
    ChainState.DISPUTED: frozenset({ChainState.SETTLED}),
}


class ForbiddenTransition(ValueError):
    """An edge that no table has."""


def step(table: Mapping[S, frozenset[S]], before: S, after: S) -> S:
    """Return `after` if the table has that edge. Raises ForbiddenTransition."""
    if after not in table[before]:
        raise ForbiddenTransition(f"{type(before).__name__}: no edge {before} -> {after}")
    return after


def is_terminal(table: Mapping[S, frozenset[S]], state: S) -> bool:
    """Say whether nothing follows `state`."""
    return not table[state]


def to_mermaid(table: Mapping[S, frozenset[S]]) -> str:
    """Return the table as a Mermaid state diagram: the docs' pictures are drawn from here."""
    lines = ["stateDiagram-v2"]
    for before, edges in table.items():
        lines += [f"    {before} --> {after}" for after in sorted(edges)]
        if not edges:
            lines.append(f"    {before} --> [*]")
    return "\n".join(lines)
