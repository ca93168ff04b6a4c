"""What a renter does next, for each code that a broker refuses with, in commands and options.

The broker says what is so, as codes with facts (sublet_contracts/problems.py); it knows no client.
"""

from collections.abc import Callable

from pydantic import ValidationError

from sublet.shortfalls import advice_from
from sublet_contracts.amounts import format_credits, format_duration
from sublet_contracts.api import Problem
from sublet_contracts.problems import FactValue, ProblemCode
from sublet_contracts.states import JobState

Fix = Callable[[Problem], str]


def fix_of(problem: Problem) -> str:
    """Return what to do about a refusal; '' where there is nothing to do, or where the code or its
    facts are those of a broker that is newer than this client: its detail stands for itself."""
    try:
        return FIXES[ProblemCode(problem.code)](problem)
    except (ValueError, KeyError, TypeError, ValidationError):
        return ""


def _always(text: str) -> Fix:
    return lambda _: text


def _whole(problem: Problem, name: str) -> int:
    """Return a fact that is a whole number. Raises KeyError, TypeError."""
    fact: FactValue = problem.facts[name]
    if not isinstance(fact, int):
        raise TypeError(name)
    return fact


def _credits(problem: Problem, name: str) -> str:
    return format_credits(_whole(problem, name))


_LISTED = {
    "job": "sublet ps -a lists your jobs",
    "run": "sublet inspect JOB lists its runs",
}


def _not_found(problem: Problem) -> str:
    return _LISTED.get(str(problem.facts["what"]), "")


def _document_refused(problem: Problem) -> str:
    if problem.field == "budget_ucr":
        return "name a higher total; to spend less, sublet pause or sublet cancel"
    if problem.field in ("issued_ms", "expires_ms"):
        return "check this machine's clock (timedatectl), then try again"
    if problem.field == "broker":
        return "check the broker's URL (--broker, SUBLET_BROKER) and the profile"
    return "correct that and sign a new document: the sublet client does it when asked again"


def _no_match(problem: Problem) -> str:
    if _whole(problem, "considered") == 0:
        return "leave out --no-wait, and it waits in line for an offer"
    return advice_from(problem.facts["shortfalls"])


def _method(problem: Problem) -> str:
    allowed = problem.facts["allowed"]
    newer = "the client may be newer than the broker; its /docs shows what there is"
    return f"use {allowed}; {newer}" if allowed else newer


def _too_much_stored(problem: Problem) -> str:
    kept = format_duration(_whole(problem, "unused_kept_ms"))
    return (
        "send less: fewer or smaller inputs, or a smaller checkpoint; "
        f"what is not used goes by itself after {kept}"
    )


FIXES: dict[ProblemCode, Fix] = {
    ProblemCode.NO_SUCH_ADDRESS: _always(
        "the client may be newer than the broker; its /docs shows what there is"
    ),
    ProblemCode.METHOD: _method,
    ProblemCode.MALFORMED: _always("send one JSON object as the broker's /docs shows"),
    ProblemCode.INVALID: _always("correct that field; the broker's /docs says what it takes"),
    ProblemCode.TOO_LARGE: _always("send less; files go up in chunks (the sublet client does it)"),
    ProblemCode.TOO_SLOW: _always("send it again; smaller chunks go through slower lines"),
    ProblemCode.GONE: _always("send it again"),
    ProblemCode.NOT_AUTHENTIC: _always(
        "nothing on the way, such as a proxy, may change a request; if nothing does, update the "
        "client: pip install -U sublet"
    ),
    ProblemCode.CLOCK: _always(
        "set the clock of this machine (timedatectl set-ntp true); if it is right, tell the "
        "broker's operator"
    ),
    ProblemCode.REPLAYED: _always("sign the request again with a new nonce"),
    ProblemCode.IDEMPOTENCY_MISMATCH: _always("use a new key for a new request"),
    ProblemCode.UNKNOWN_PARTY: _always(
        "the sublet client introduces it on first use; run any sublet command again"
    ),
    ProblemCode.NOT_OPERATOR: _always(
        "run sublet fund with --operator-key pointing to the broker's key file"
    ),
    ProblemCode.STALE_INSTANCE: _always("stop one of the two agents"),
    ProblemCode.NOT_FOUND: _not_found,
    ProblemCode.AMBIGUOUS: _always("give more digits of the job's id"),
    ProblemCode.BAD_STATE: _always(f"one of {', '.join(JobState)}"),
    ProblemCode.DOCUMENT_REFUSED: _document_refused,
    ProblemCode.IMAGE_NOT_PINNED: _always("use name@sha256:... (docker inspect shows the digest)"),
    ProblemCode.BUDGET_TOO_SMALL: lambda problem: (
        f"set a budget of at least {_credits(problem, 'least_ucr')}"
    ),
    ProblemCode.OVER_BALANCE: _always("lower the budget, or ask the operator to run sublet fund"),
    ProblemCode.NO_MATCH: _no_match,
    ProblemCode.JOB_ENDED: _always("to run it once more, submit it again as a new job"),
    ProblemCode.NOT_PAUSED: _always(
        "only a paused job is resumed; sublet resume --budget TOTAL raises the budget of any other"
    ),
    ProblemCode.BUDGET_USED_UP: lambda problem: (
        "resume with a total budget of at least "
        f"{_credits(problem, 'least_budget_ucr')} (sublet resume --budget TOTAL)"
    ),
    ProblemCode.RECEIPTS_UNSIGNED: _always(
        "sign the job's receipts (sublet statement shows them, sublet logs -f signs them), "
        "then resume"
    ),
    ProblemCode.INPUT_MISSING: _always("upload it first; the sublet client does so on run"),
    ProblemCode.INPUT_CHANGED: _always("submit again"),
    ProblemCode.INPUT_REFUSED: _always("upload it with the sublet client"),
    ProblemCode.INPUT_TOO_LARGE: _always("leave out what the job does not read"),
    ProblemCode.HASH_MISMATCH: _always(
        "the file changed while it was sent, or was damaged on the way: send it again"
    ),
    ProblemCode.STALE_EPOCH: _always("stop this run: the job has gone on elsewhere"),
    ProblemCode.NO_LONGER_KEPT: _always("run the job again"),
    ProblemCode.DAMAGED: _always(
        "a job's older checkpoint is used by itself; outputs must be made again"
    ),
    ProblemCode.TOO_MANY: _always(
        "go on in the next hour; the operator may raise the broker's limit"
    ),
    ProblemCode.TOO_MANY_JOBS: _always("wait until some have ended, or cancel some"),
    ProblemCode.TOO_MANY_STREAMS: _always("close some, or read without following"),
    ProblemCode.TOO_MUCH_STORED: _too_much_stored,
    ProblemCode.BUSY: _always("try again in a few seconds"),
    ProblemCode.MATCHER_AWAY: _always(
        "queued jobs are matched when it is back; nothing needs to be sent again"
    ),
    ProblemCode.DATABASE_AWAY: _always("try again later"),
    ProblemCode.BY_ADDRESS: _always("ask for its address; the sublet client does so by itself"),
    ProblemCode.BLOBS_AWAY: _always("try again later; what has come already isn't sent again"),
    ProblemCode.STORAGE_FULL: _always(
        "try again later; the broker's operator must free some space"
    ),
    ProblemCode.STORAGE_FAILING: _always(
        "see later whether it was done (sublet ps), and try again if not; the broker's operator "
        "must look"
    ),
    ProblemCode.INTERNAL: _always(
        "see whether it was done (sublet ps), and try again if not; tell the broker's operator the "
        "incident"
    ),
}
