"""Access: no request twice, the same answer for the same key, content only for whom it concerns.

Rules:
- A nonce is used once. For requests that change something it is kept in the database until its time
  is too old to be accepted anyway, before the request is acted upon: a crash in between refuses a
  replay, and the client asks again with a new nonce. For GET and PUT (which is by content) memory
  is enough, and for whoever has not introduced himself, who can do nothing else.
- An idempotency key stands for one request: the same again is answered the same, another is 409.
- Content is named by its hash but belongs to scopes: a renter's own, or a job's. A renter has his
  own scope and his jobs'. A provider has a job's scope while he holds its epoch; to read, also
  while he prepares to take it over. Whoever has no right to a blob learns nothing about it.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from sublet_broker.market.facts import (
    AnswerFact,
    BlobFact,
    CounterFact,
    JobFact,
    LeaseFact,
    NonceFact,
    PartyFact,
    RunFact,
)
from sublet_broker.service.content.retention import claim
from sublet_broker.service.errors import Refusal, conflict, invalid, not_found
from sublet_broker.service.leases.candidates import LIVE_LEASE
from sublet_broker.service.ports import BlobMissing, StorageFull
from sublet_broker.service.unit_of_work.context import Core
from sublet_broker.service.unit_of_work.job_lookup import own_job
from sublet_broker.service.unit_of_work.unit_of_work import Work
from sublet_contracts.api import MissingView
from sublet_contracts.auth import MAX_REQUEST_SKEW_MS, Caller

REMEMBERED_NONCES = 100_000
ANSWERS_KEPT_MS = 24 * 3_600_000
TIDIED = "tidied"
"""A counter: when old things were forgotten last."""
HASHES_AT_ONCE = 500
IN_MEMORY = ("GET", "HEAD", "PUT")


@dataclass(frozen=True)
class Answer:
    """What a request was answered before."""

    status: int
    body: str


class Access:
    """Who may do what, once."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._seen: OrderedDict[tuple[str, str], None] = OrderedDict()

    def begin(
        self, caller: Caller, method: str, target: str, body_sha256: str, idempotency_key: str
    ) -> Answer | None:
        """Admit an authentic request. Return its earlier answer, if it was answered before.

        Raises Refusal: the nonce was used, or the key stands for another request.
        """
        if method.upper() in IN_MEMORY:
            self._remember(caller)
            return None
        with self._core.work() as work:
            self._use_nonce(work, caller)
            if not idempotency_key:
                return None
            known = work.get(AnswerFact, caller.party, idempotency_key)
            if known is None:
                return None
            if known.request_sha256 != _digest(method, target, body_sha256):
                raise conflict(
                    "idempotency_mismatch",
                    "Key used before",
                    "this Idempotency-Key stands for another request",
                    field="Idempotency-Key",
                    fix="use a new key for a new request",
                )
            return Answer(known.status, known.body)

    def _remember(self, caller: Caller) -> None:
        key = (caller.party, caller.nonce)
        if key in self._seen:
            raise _replayed()
        self._seen[key] = None
        while len(self._seen) > REMEMBERED_NONCES:
            self._seen.popitem(last=False)

    def _use_nonce(self, work: Work, caller: Caller) -> None:
        if work.get(NonceFact, caller.party, caller.nonce) is not None:
            raise _replayed()
        if work.get(PartyFact, caller.party) is None:
            # A stranger can do nothing but introduce himself, and leaves nothing in the database.
            self._remember(caller)
            return
        settings = self._core.settings
        self._core.quotas.demand(
            "requests", caller.party, settings.max_requests_an_hour, work.now_ms
        )
        work.tx.add(NonceFact(caller.party, caller.nonce, caller.time_ms))

    def finish(
        self,
        caller: Caller,
        method: str,
        target: str,
        body_sha256: str,
        idempotency_key: str,
        status: int,
        body: str,
    ) -> None:
        """Keep the answer to a request with an idempotency key. Failures of ours aren't kept."""
        if not idempotency_key or status >= 500:
            return
        with self._core.work() as work:
            digest = _digest(method, target, body_sha256)
            fact = AnswerFact(caller.party, idempotency_key, digest, status, body, work.now_ms)
            if work.get(AnswerFact, caller.party, idempotency_key) is None:
                work.tx.add(fact)

    def forget_old(self) -> None:
        """Forget nonces that are too old to be accepted, and old answers."""
        with self._core.work() as work:
            # Written even where nobody comes: each commit carries the clock's mark, and over a
            # restart with a wrong wall clock the clock goes back by no more than this.
            work.put(CounterFact(TIDIED, work.now_ms))
            oldest = work.now_ms - 2 * MAX_REQUEST_SKEW_MS
            for nonce in work.find(NonceFact, before=("time_ms", oldest), limit=10_000):
                work.tx.delete(NonceFact, nonce.party, nonce.nonce)
            oldest = work.now_ms - ANSWERS_KEPT_MS
            for answer in work.find(AnswerFact, before=("time_ms", oldest), limit=10_000):
                work.tx.delete(AnswerFact, answer.party, answer.key)

    def put_blob(
        self, caller: str, scope: str, epoch: int | None, sha256: str, data: bytes
    ) -> None:
        """Keep content in a scope: the caller's party id, or a job (id, prefix, name)."""
        if len(data) > self._core.settings.max_blob_bytes:
            raise Refusal(
                413,
                "too_large",
                "Too large",
                f"{len(data)} bytes; at most {self._core.settings.max_blob_bytes} are taken",
                fix="the sublet client cuts files into chunks",
            )
        with self._core.read() as look:
            self._may_write(look, caller, scope, epoch)
        while True:
            self._put_file(sha256, data)
            with self._core.work() as work:
                # The sweeper may have deleted it in between: then it is written anew.
                if self._core.ports.blobs.has(sha256):
                    key = self._may_write(work, caller, scope, epoch)
                    claim(self._core, work, key, sha256, len(data), self._room(caller, key))
                    return

    def _room(self, caller: str, key: str) -> int:
        settings = self._core.settings
        return settings.max_renter_bytes if key == caller else settings.max_job_bytes

    def _put_file(self, sha256: str, data: bytes) -> None:
        try:
            self._core.ports.blobs.put(sha256, data)
        except ValueError as error:
            raise invalid(
                "hash_mismatch",
                "Content differs",
                str(error),
                field="sha256",
                fix="the file changed while it was sent, or was damaged on the way: send it again",
            ) from error
        except StorageFull as error:
            raise Refusal(
                507,
                "storage_full",
                "Broker's disk full",
                "nothing was kept",
                fix="tell the operator; then try again",
            ) from error

    def get_blob(self, caller: str, scope: str, epoch: int | None, sha256: str) -> bytes:
        """Return content of a scope that the caller may read."""
        with self._core.read() as look:
            key = self._may_read(look, caller, scope, epoch)
            known = look.get(BlobFact, key, sha256)
            job = look.get(JobFact, key)
            if known is None and job is not None and job.ended_ms is not None:
                days = self._core.settings.keep_ended_ms // 86_400_000
                raise Refusal(
                    410,
                    "let_go",
                    "No longer kept",
                    f"a job's outputs and last checkpoint are kept for {days} days after its end",
                    fix="run the job again",
                )
        if known is None:
            raise not_found("blob", sha256)
        try:
            return self._core.ports.blobs.get(sha256)
        except BlobMissing as error:
            raise Refusal(
                410,
                "damaged",
                "Content damaged",
                f"{sha256[:10]} is no longer readable here",
                fix="a job's older checkpoint is used by itself; outputs must be made again",
            ) from error

    def missing(
        self, caller: str, scope: str, epoch: int | None, hashes: Iterable[str]
    ) -> MissingView:
        """Return which of `hashes` must be uploaded into the scope."""
        asked = list(dict.fromkeys(hashes))
        have: set[str] = set()
        # Once where nothing is asked, too: whose scope it is is checked whatever comes.
        for start in range(0, max(1, len(asked)), HASHES_AT_ONCE):
            some = tuple(asked[start : start + HASHES_AT_ONCE])
            with self._core.work() as work:
                key = self._may_write(work, caller, scope, epoch)
                for blob in work.find(BlobFact, {"scope": key, "sha256": some}):
                    if self._core.ports.blobs.has(blob.sha256):
                        # Whoever is told that it is here counts on it.
                        size_bytes = blob.size_bytes
                        claim(self._core, work, key, blob.sha256, size_bytes, size_bytes)
                        have.add(blob.sha256)
        return MissingView(missing=tuple(sha256 for sha256 in asked if sha256 not in have))

    def _may_write(self, work: Work, caller: str, scope: str, epoch: int | None) -> str:
        """Return the scope's key. Raises Refusal."""
        if scope == caller:
            if work.get(PartyFact, caller) is None:
                raise Refusal(
                    403,
                    "unknown_party",
                    "Unknown party",
                    "this key has not been introduced",
                    fix="the sublet client does it on first use",
                )
            return caller
        if epoch is None:
            return own_job(work, caller, scope).id
        return self._held_by(work, caller, scope, epoch)

    def _may_read(self, work: Work, caller: str, scope: str, epoch: int | None) -> str:
        if work.find(RunFact, {"job": scope, "successor": caller}, limit=1):
            return scope
        return self._may_write(work, caller, scope, epoch)

    def _held_by(self, work: Work, caller: str, scope: str, epoch: int) -> str:
        job = work.get(JobFact, scope)
        mine = work.find(LeaseFact, {"job": scope, "provider": caller, "epoch": epoch})
        if job is None or not mine:
            raise not_found("job", scope)
        if mine[0].state not in LIVE_LEASE or epoch != job.epoch:
            raise conflict(
                "stale_epoch",
                "Stale epoch",
                f"epoch {epoch} no longer holds the job; it is at {job.epoch}",
                field="Sublet-Epoch",
                fix="stop this run: the job has gone on elsewhere",
            )
        return job.id


def _digest(method: str, target: str, body_sha256: str) -> str:
    return hashlib.sha256(f"{method.upper()}\n{target}\n{body_sha256}".encode()).hexdigest()


def _replayed() -> Refusal:
    return Refusal(
        409,
        "replayed",
        "Replayed",
        "this very request was received before",
        field="Sublet-Nonce",
        fix="sign the request again with a new nonce",
    )
