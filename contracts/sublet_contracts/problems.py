"""What a broker says no with: the one list of codes, each with its title and the facts it carries.

A refusal is a code, a sentence of what is so (`detail`), perhaps the field that is wrong, and facts
for programs. What HTTP calls it is the broker's edge's business (adapters/http/problems.py); what
to do about it is said by whoever speaks to people: the SDK (sublet/fixes.py) and the agent
(sublet_agent/core/fixes.py).

To add a code: a member here, a row in PROBLEMS, a status at the edge, a fix in the SDK; a test
names whichever is missing. Facts are integers with their unit in the name, or short strings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from pydantic import JsonValue

FactValue = JsonValue
"""What a fact can be: plain JSON."""


class ProblemCode(StrEnum):
    """Why a broker refuses; for programs, and stable."""

    # The request itself.
    NO_SUCH_ADDRESS = "no_such_address"
    METHOD = "method"
    MALFORMED = "malformed"
    INVALID = "invalid"
    TOO_LARGE = "too_large"
    TOO_SLOW = "too_slow"
    GONE = "gone"
    # Who asks.
    NOT_AUTHENTIC = "not_authentic"
    CLOCK = "clock"
    REPLAYED = "replayed"
    IDEMPOTENCY_MISMATCH = "idempotency_mismatch"
    UNKNOWN_PARTY = "unknown_party"
    NOT_OPERATOR = "not_operator"
    STALE_INSTANCE = "stale_instance"
    # What is asked about.
    NOT_FOUND = "not_found"
    AMBIGUOUS = "ambiguous"
    BAD_STATE = "bad_state"
    # A job, its terms and its course.
    DOCUMENT_REFUSED = "document_refused"
    IMAGE_NOT_PINNED = "image_not_pinned"
    BUDGET_TOO_SMALL = "budget_too_small"
    OVER_BALANCE = "over_balance"
    NO_MATCH = "no_match"
    JOB_ENDED = "job_ended"
    NOT_PAUSED = "not_paused"
    BUDGET_USED_UP = "budget_used_up"
    RECEIPTS_UNSIGNED = "receipts_unsigned"
    # Content.
    INPUT_MISSING = "input_missing"
    INPUT_CHANGED = "input_changed"
    INPUT_REFUSED = "input_refused"
    INPUT_TOO_LARGE = "input_too_large"
    HASH_MISMATCH = "hash_mismatch"
    STALE_EPOCH = "stale_epoch"
    NO_LONGER_KEPT = "no_longer_kept"
    DAMAGED = "damaged"
    BY_ADDRESS = "by_address"
    # How much of it.
    TOO_MANY = "too_many"
    TOO_MANY_JOBS = "too_many_jobs"
    TOO_MANY_STREAMS = "too_many_streams"
    TOO_MUCH_STORED = "too_much_stored"
    # The broker's own troubles.
    BUSY = "busy"
    MATCHER_AWAY = "matcher_away"
    DATABASE_AWAY = "database_away"
    BLOBS_AWAY = "blobs_away"
    STORAGE_FULL = "storage_full"
    STORAGE_FAILING = "storage_failing"
    INTERNAL = "internal"


@dataclass(frozen=True)
class ProblemKind:
    """What is the same for all refusals of a code."""

    title: str
    facts: Mapping[str, type]
    """The facts that every one of them carries: name -> int, str, list or dict."""


def _kind(title: str, **facts: type) -> ProblemKind:
    return ProblemKind(title, facts)


PROBLEMS: dict[ProblemCode, ProblemKind] = {
    ProblemCode.NO_SUCH_ADDRESS: _kind("Not found"),
    ProblemCode.METHOD: _kind("Method not allowed", allowed=str),
    ProblemCode.MALFORMED: _kind("Malformed"),
    ProblemCode.INVALID: _kind("Not valid"),
    ProblemCode.TOO_LARGE: _kind("Too large", limit_bytes=int),
    ProblemCode.TOO_SLOW: _kind("Too slow", limit_ms=int),
    ProblemCode.GONE: _kind("Gone"),
    ProblemCode.NOT_AUTHENTIC: _kind("Not authentic"),
    ProblemCode.CLOCK: _kind("Clock differs"),
    ProblemCode.REPLAYED: _kind("Replayed"),
    ProblemCode.IDEMPOTENCY_MISMATCH: _kind("Key used before"),
    ProblemCode.UNKNOWN_PARTY: _kind("Unknown party"),
    ProblemCode.NOT_OPERATOR: _kind("Not the operator"),
    ProblemCode.STALE_INSTANCE: _kind("Replaced"),
    ProblemCode.NOT_FOUND: _kind("Not found", what=str, ref=str),
    ProblemCode.AMBIGUOUS: _kind("Ambiguous", ref=str, jobs=int),
    ProblemCode.BAD_STATE: _kind("No such state", state=str),
    ProblemCode.DOCUMENT_REFUSED: _kind("Document refused"),
    ProblemCode.IMAGE_NOT_PINNED: _kind("Image not pinned", image=str),
    ProblemCode.BUDGET_TOO_SMALL: _kind("Budget too small", amount_ucr=int, least_ucr=int),
    ProblemCode.OVER_BALANCE: _kind("Not enough credit", amount_ucr=int, balance_ucr=int),
    # failures: constraint -> how many offers fail on it; shortfalls: as MatchView.relax.
    # waiting: jobs that are in line for the same kind of device.
    ProblemCode.NO_MATCH: _kind(
        "No match", considered=int, failures=dict, shortfalls=list, waiting=int
    ),
    ProblemCode.JOB_ENDED: _kind("Ended", state=str),
    ProblemCode.NOT_PAUSED: _kind("Not paused", state=str),
    ProblemCode.BUDGET_USED_UP: _kind("Budget used up", left_ucr=int, least_budget_ucr=int),
    ProblemCode.RECEIPTS_UNSIGNED: _kind("Receipts not signed", left_ucr=int, least_ucr=int),
    ProblemCode.INPUT_MISSING: _kind("Input missing", destination=str),
    ProblemCode.INPUT_CHANGED: _kind(
        "Input changed", destination=str, signed_bytes=int, listed_bytes=int
    ),
    ProblemCode.INPUT_REFUSED: _kind("Input refused", destination=str),
    ProblemCode.INPUT_TOO_LARGE: _kind("Inputs too large", total_bytes=int, limit_bytes=int),
    ProblemCode.HASH_MISMATCH: _kind("Content differs", digest=str),
    ProblemCode.STALE_EPOCH: _kind("Stale epoch", epoch=int, current_epoch=int),
    ProblemCode.NO_LONGER_KEPT: _kind("No longer kept", kept_ms=int),
    ProblemCode.DAMAGED: _kind("Content damaged", digest=str),
    ProblemCode.BY_ADDRESS: _kind("Moves by address"),
    ProblemCode.TOO_MANY: _kind("Too many", what=str, limit=int),
    ProblemCode.TOO_MANY_JOBS: _kind("Too many jobs", limit=int),
    ProblemCode.TOO_MANY_STREAMS: _kind("Too many streams", open_streams=int),
    ProblemCode.TOO_MUCH_STORED: _kind(
        "Too much stored", stored_bytes=int, limit_bytes=int, unused_kept_ms=int
    ),
    ProblemCode.BUSY: _kind("Busy", waiting=int),
    ProblemCode.MATCHER_AWAY: _kind("Matching waits"),
    ProblemCode.DATABASE_AWAY: _kind("The broker's database is away"),
    ProblemCode.BLOBS_AWAY: _kind("The broker's blob store is away"),
    ProblemCode.STORAGE_FULL: _kind("The broker's disk is full"),
    ProblemCode.STORAGE_FAILING: _kind("The broker's disk can't be written"),
    ProblemCode.INTERNAL: _kind("Our mistake", incident=str),
}
