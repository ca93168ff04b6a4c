"""What a broker refuses becomes an exception here, and so does a broker that doesn't answer."""

import httpx
from pydantic import ValidationError

from sublet.fixes import fix_of
from sublet_contracts.api import Problem

DISK_FULL = 507


class SubletError(Exception):
    """What the broker refused, or why it couldn't be asked; `fix`: what to do next, if anything."""

    def __init__(self, problem: Problem, fix: str = "") -> None:
        super().__init__(problem.detail + (f" — {fix}" if fix else ""))
        self.problem = problem
        self.fix = fix


class BrokerAway(SubletError):
    """The broker doesn't answer, or its disk is full: later it will, and nothing is lost."""


def refusal(response: httpx.Response) -> SubletError:
    """Return the error that an answer of 400 or more stands for: its problem+json, if it has one.

    A full disk is a BrokerAway. The body must have been read."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        if _wants_https(response):
            said = _unexpected(400, "what answers there speaks https, and was spoken to in http")
            return SubletError(said, "write its URL with https:// (--broker, SUBLET_BROKER)")
        problem = _unexpected(
            response.status_code,
            f"the broker answered {response.status_code}: {response.text[:200]}",
        )
    kind = BrokerAway if response.status_code == DISK_FULL else SubletError
    return kind(problem, fix_of(problem))


def not_understood(response: httpx.Response, expected: str, error: ValidationError) -> SubletError:
    """Return the error for an answer of success that isn't what was asked for."""
    return SubletError(
        _unexpected(
            response.status_code,
            f"the answer isn't a {expected}: {error.errors()[0]['msg']}",
        ),
        "the broker may be newer or older than this client: pip install -U sublet",
    )


def no_answer(url: str, why: str) -> BrokerAway:
    """Return the error for a broker that doesn't answer. Where it can be told that the URL is wrong
    about http and https, that is said."""
    plain, detail, fix = url.partition("://")[2], f"no answer from {url} ({why})", ""
    if is_of_tls(why):
        if "certificate" in why.lower():
            detail = f"{url} shows a certificate that this machine doesn't trust ({why})"
            fix = "name its authority in SSL_CERT_FILE, or mend the broker's certificate"
        else:
            detail = f"{url} doesn't speak https: what answers there speaks http, as it seems"
            fix = f"write http://{plain} (--broker, SUBLET_BROKER)"
    problem = Problem(title="The broker doesn't answer", status=503, code="away", detail=detail)
    return BrokerAway(
        problem,
        fix
        or "check the URL (SUBLET_BROKER), also whether it should begin with http:// or https://, "
        "and whether the broker runs",
    )


def is_of_tls(why: str) -> bool:
    """Say whether a connection failed at https itself: it will not do better by waiting."""
    return "[SSL" in why


def _wants_https(response: httpx.Response) -> bool:
    """Whether an answer is that of a server of https that was spoken to in http."""
    said = response.text[:2000].lower()
    return response.status_code == 400 and "https" in said and "http request" in said


def _unexpected(status: int, detail: str) -> Problem:
    return Problem(title="Unexpected answer", status=status, code="unexpected", detail=detail)


class JobFileError(ValueError):
    """A job's file can't be used; the message names it, the line, and what to do."""
