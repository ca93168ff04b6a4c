"""A renter that submits signed jobs through the HTTP API from a process of its own.

`flood`: each connection sends the next job as soon as the last one was answered. `paced`: jobs are
sent at times that were drawn before (Poisson arrivals, the same in every market), whether or not
the earlier ones have been answered. At even times they would march in step with the ends of the
runs before them, which all take equally long, and meet either all of those or none. Jobs are signed
before the clock starts; each request is signed when it is sent, as the client does.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from multiprocessing.connection import Connection
from random import Random
from typing import Any

import httpx

from sublet.spec import JobSpec
from sublet_contracts.api import SignedRequest
from sublet_contracts.auth import sign_request
from sublet_contracts.documents import KeyDocument, sign_document
from sublet_contracts.keys import SigningKey
from tests.benchmarks.scripted_agents import REGIONS, region_of

ATTEMPT_S = 120.0
AGAIN_AFTER_S = 0.1
ARRIVALS_SEED = 10
MIX: tuple[dict[str, Any], ...] = (
    *({"gpus": 1, "region": region_of(number)} for number in range(REGIONS)),
    *({"gpus": "2x16GB", "region": region_of(number)} for number in range(0, REGIONS, 3)),
    {"gpus": 1},
    {"gpus": "1xA100"},
)
"""What jobs ask for, in turns: most of them a region, some the whole market. There is room for all
of it many times over."""


@dataclass(frozen=True)
class SubmitterConfig:
    """Who submits to whom."""

    url: str
    broker: str
    key_seed: bytes


@dataclass(frozen=True)
class Phase:
    """What is to be submitted."""

    jobs: int
    connections: int
    limit_s: float
    """No job is begun after this."""
    jobs_a_second: float | None = None
    """On average. None: as fast as they are answered."""

    @property
    def due_s(self) -> list[float]:
        """When each job is due, since the beginning."""
        if self.jobs_a_second is None:
            return [0.0] * self.jobs
        chance = Random(ARRIVALS_SEED)
        gaps = (chance.expovariate(self.jobs_a_second) for _ in range(self.jobs))
        return list(accumulate(gaps))


@dataclass(frozen=True)
class Submission:
    """One accepted job; times by CLOCK_MONOTONIC, which all processes of a machine share."""

    job: str
    sent_ns: int
    answered_ns: int


@dataclass(frozen=True)
class PhaseReport:
    """What became of a phase."""

    begun: int
    accepted: list[Submission]
    refused: dict[str, int]
    """Answers other than 201, and lines that broke; each was sent again unless it was a 4xx."""
    cpu_s: float


@dataclass
class _Work:
    requests: list[tuple[str, bytes]]
    due_s: list[float]
    began_s: float
    phase: Phase
    taken: int = 0
    begun: int = 0
    accepted: list[Submission] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> int | None:
        with self.lock:
            if self.taken >= len(self.requests):
                return None
            self.taken += 1
            return self.taken - 1


class Submitter:
    """The renter."""

    def __init__(self, config: SubmitterConfig) -> None:
        self._config = config
        self._key = SigningKey.from_seed(config.key_seed)
        self._number = 0

    def introduce(self) -> None:
        """Tell the broker this key. Raises httpx.HTTPStatusError."""
        document = KeyDocument(
            party=self._key.party, broker=self._config.broker, name="renter", issued_ms=_now_ms()
        )
        with self._client() as http:
            body = self._body(document)
            http.post(
                "/v1/keys", content=body, headers=self._headers("/v1/keys", body, "")
            ).raise_for_status()

    def play(self, phase: Phase) -> PhaseReport:
        """Submit a phase's jobs."""
        requests = [self._job() for _ in range(phase.jobs)]
        cpu_s = time.process_time()
        work = _Work(requests, phase.due_s, time.monotonic(), phase)
        with ThreadPoolExecutor(phase.connections) as pool:
            for done in [pool.submit(self._work, work) for _ in range(phase.connections)]:
                done.result()
        cpu_s = time.process_time() - cpu_s
        return PhaseReport(work.begun, work.accepted, dict(work.refused), cpu_s)

    def _work(self, work: _Work) -> None:
        with self._client() as http:
            while (number := work.take()) is not None:
                due_s = work.began_s + work.due_s[number]
                time.sleep(max(0.0, due_s - time.monotonic()))
                if time.monotonic() - work.began_s > work.phase.limit_s:
                    return
                with work.lock:
                    work.begun += 1
                self._submit(http, work, *work.requests[number])

    def _submit(self, http: httpx.Client, work: _Work, job: str, body: bytes) -> None:
        idempotency_key = os.urandom(16).hex()
        sent_ns = time.monotonic_ns()
        deadline_s = time.monotonic() + ATTEMPT_S
        while time.monotonic() < deadline_s:
            try:
                headers = self._headers("/v1/jobs", body, idempotency_key)
                answer = http.post("/v1/jobs", content=body, headers=headers)
            except httpx.TransportError as error:
                how, again = type(error).__name__, True
            else:
                if answer.status_code == 201:
                    submission = Submission(job, sent_ns, time.monotonic_ns())
                    with work.lock:
                        work.accepted.append(submission)
                    return
                how, again = f"{answer.status_code} {answer.text[:200]}", answer.status_code >= 429
            with work.lock:
                work.refused[how] += 1
            if not again:
                return
            time.sleep(AGAIN_AFTER_S)

    def _client(self) -> httpx.Client:
        return httpx.Client(base_url=self._config.url, timeout=httpx.Timeout(60.0, connect=5.0))

    def _job(self) -> tuple[str, bytes]:
        wish = MIX[self._number % len(MIX)]
        self._number += 1
        spec = JobSpec(
            image="registry.example/train@sha256:" + "5" * 64,
            command=("python", "train.py", "--epochs", "3"),
            max_price="0.60",
            budget=1,
            name=f"train-{self._number}",
            **wish,
        )
        document = spec.document(
            renter=self._key.party, broker=self._config.broker, now_ms=_now_ms(), inputs=()
        )
        signed = sign_document(document, self._key)
        return signed.id, SignedRequest(envelope=signed.envelope).model_dump_json().encode()

    def _body(self, document: KeyDocument) -> bytes:
        envelope = sign_document(document, self._key).envelope
        return SignedRequest(envelope=envelope).model_dump_json().encode()

    def _headers(self, target: str, body: bytes, idempotency_key: str) -> dict[str, str]:
        return sign_request(
            self._key,
            broker=self._config.broker,
            method="POST",
            target=target,
            body=body,
            time_ms=_now_ms(),
            nonce=os.urandom(16).hex(),
            idempotency_key=idempotency_key,
        ) | {"Content-Type": "application/json"}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def play(config: SubmitterConfig, pipe: Connection) -> None:
    """The submitter's process: introduces itself and says its party, then a PhaseReport for each
    Phase that comes; it ends when the line is closed."""
    submitter = Submitter(config)
    submitter.introduce()
    pipe.send(None)
    while True:
        try:
            phase = pipe.recv()
        except EOFError:
            return
        pipe.send(submitter.play(phase))
