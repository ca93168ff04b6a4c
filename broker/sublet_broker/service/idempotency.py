"""Access: no request twice, the same answer for the same key, content only for whom it concerns.

Rules:
- A nonce is used once. For requests that change something it is kept in the database until its time
  is too old to be accepted anyway, before the request is acted upon: a crash in between refuses a
  replay, and the client asks again with a new nonce. For GET and PUT (which is by content) memory
  is enough, and for whoever has not introduced himself, who can do nothing else.
- An idempotency key stands for one request: the same again gets the same answer, another none.
- Content is named by its hash but belongs to scopes: a renter's own, or a job's. A renter has his
  own scope and his jobs'. A provider has a job's scope while he holds its epoch; to read, also
  while he prepares to take it over. Whoever has no right to a blob learns nothing about it.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from sublet_broker.market.facts import (
    AnswerFact,
    CounterFact,
    NonceFact,
    PartyFact,
)
from sublet_broker.service.errors import Refusal
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.auth import MAX_REQUEST_SKEW_MS, Caller
from sublet_contracts.problems import ProblemCode

REMEMBERED_NONCES = 100_000
ANSWERS_KEPT_MS = 24 * 3_600_000
TIDIED = "tidied"
"""A counter: when old things were forgotten last."""
IN_MEMORY = ("GET", "HEAD", "PUT")


@dataclass(frozen=True)
class Answer:
    """What a request was answered before."""

    status: int
    body: str


class Idempotency:
    """Who may do what, once."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._seen: OrderedDict[tuple[str, str], None] = OrderedDict()

    def begin(
        self, caller: Caller, method: str, target: str, body_digest: str, idempotency_key: str
    ) -> Answer | None:
        """Admit an authentic request. Return its earlier answer, if it was answered before.

        Raises Refusal: the nonce was used, or the key stands for another request.
        """
        if method.upper() in IN_MEMORY:
            self._remember(caller)
            return None
        with self._context.work() as work:
            self._use_nonce(work, caller)
            if not idempotency_key:
                return None
            known = work.get(AnswerFact, caller.party, idempotency_key)
            if known is None:
                return None
            if known.request_sha256 != _digest(method, target, body_digest):
                raise Refusal(
                    ProblemCode.IDEMPOTENCY_MISMATCH,
                    "this Idempotency-Key stands for another request",
                    field="Idempotency-Key",
                )
            return Answer(known.status, known.body)

    def _remember(self, caller: Caller) -> None:
        key = (caller.party, caller.nonce)
        if key in self._seen:
            raise _replayed()
        self._seen[key] = None
        while len(self._seen) > REMEMBERED_NONCES:
            self._seen.popitem(last=False)

    def _use_nonce(self, work: UnitOfWork, caller: Caller) -> None:
        if work.get(NonceFact, caller.party, caller.nonce) is not None:
            raise _replayed()
        if work.get(PartyFact, caller.party) is None:
            # A stranger can do nothing but introduce himself, and leaves nothing in the database.
            self._remember(caller)
            return
        settings = self._context.settings
        self._context.rate_limits.demand(
            "requests", caller.party, settings.max_requests_an_hour, work.now_ms
        )
        work.add(NonceFact(caller.party, caller.nonce, caller.time_ms))

    def finish(
        self,
        caller: Caller,
        method: str,
        target: str,
        body_digest: str,
        idempotency_key: str,
        status: int,
        body: str,
    ) -> None:
        """Keep the answer to a request with an idempotency key, as the edge gave it. `status` is
        kept and never read here; refusals and failures of ours aren't kept."""
        if not idempotency_key:
            return
        with self._context.work() as work:
            digest = _digest(method, target, body_digest)
            fact = AnswerFact(caller.party, idempotency_key, digest, status, body, work.now_ms)
            if work.get(AnswerFact, caller.party, idempotency_key) is None:
                work.add(fact)

    def forget_old(self) -> None:
        """Forget nonces that are too old to be accepted, and old answers."""
        with self._context.work() as work:
            # Written even where nobody comes: each commit carries the clock's mark, and over a
            # restart with a wrong wall clock the clock goes back by no more than this.
            work.put(CounterFact(TIDIED, work.now_ms))
            oldest = work.now_ms - 2 * MAX_REQUEST_SKEW_MS
            for nonce in work.find(NonceFact, before=("time_ms", oldest), limit=10_000):
                work.delete(nonce)
            oldest = work.now_ms - ANSWERS_KEPT_MS
            for answer in work.find(AnswerFact, before=("time_ms", oldest), limit=10_000):
                work.delete(answer)


def _digest(method: str, target: str, body_digest: str) -> str:
    return hashlib.sha256(f"{method.upper()}\n{target}\n{body_digest}".encode()).hexdigest()


def _replayed() -> Refusal:
    return Refusal(
        ProblemCode.REPLAYED, "this very request was received before", field="Sublet-Nonce"
    )
