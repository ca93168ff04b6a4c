"""A market with something to see in it, and requests that Schemathesis draws, signed and sent."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import httpx
import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis import checks
from schemathesis.specs.openapi import checks as by_schema

from sublet_contracts.documents import Amendment, Deposit, KeyDocument, sign_document
from sublet_contracts.envelope import Envelope
from tests.histories.asgi import Answer, Door
from tests.service.world import World, key_named

SECRET = "s3cr3t-of-anna"
ABSENT = "deadbeef" * 8
OTHERS = ("boris", "rival", "nobody")
"""Another renter, a provider that holds nothing of anna's, and a key that nobody has introduced."""
CHECKS = [
    checks.not_a_server_error, by_schema.status_code_conformance,
    by_schema.content_type_conformance, by_schema.response_schema_conformance,
    by_schema.response_headers_conformance,
]  # fmt: skip


class Town(World):
    """A market in which anna's job runs on the owner's machine: all there is to see is there."""

    def __init__(self) -> None:
        super().__init__()
        self.owner = self.agent("owner")
        self.anna = self.renter("anna")
        self.boris = self.renter("boris")
        self.anna_job = self.anna.run(
            name=SECRET,
            image=f"{SECRET}@sha256:" + "1" * 64,
            command=("run", SECRET),
            env={"TOKEN": SECRET},
            outputs="/out",
        )
        run = self.owner.the_run
        self.pass_ms(5_000)
        self.owner.durable(run, 10, content={"model.bin": SECRET.encode()})
        self.owner.log(run, 0, SECRET, "a line")
        self.pass_ms(5_000)
        self.receipt = self.owner.receipt(run).id
        self.ended = self.anna.submit(name=SECRET + "-ended")
        self.broker.jobs.cancel(self.anna.party, self.ended)
        self.boris_job = self.boris.submit(name="boris-job")
        page = self.broker.views.checkpoints(self.anna.party, self.anna_job)
        self.index = page.checkpoints[0].index_digest
        rival = self.agent("rival")
        rival.withdraw()
        self.secrets = (SECRET, self.anna.party, self.anna_job, self.ended, self.receipt)

    def document(self, kind: str, who: str) -> Envelope:
        """Return a good document of that kind, signed by `who`."""
        key = key_named(who)
        if kind == "job" and who in ("anna", "boris"):
            return (self.anna if who == "anna" else self.boris).job().envelope
        document: Any
        match kind:
            case "deposit":
                document = Deposit(
                    broker=self.key.party,
                    party=self.boris.party,
                    amount_ucr=5,
                    memo="",
                    nonce=self.nonce(),
                    issued_ms=self.now_ms,
                )
            case "amendment":
                document = Amendment(
                    renter=key.party,
                    broker=self.key.party,
                    job=self.anna_job,
                    budget_ucr=20_000_000,
                    accept_receipts_up_to_ucr=20_000_000,
                    issued_ms=self.now_ms,
                )
            case "receipt":
                page = self.broker.views.receipts(self.anna.party, self.anna_job)
                return page.receipts[-1].countersigned(key)
            case _:
                document = KeyDocument(
                    party=key.party, broker=self.key.party, name=who, issued_ms=self.now_ms
                )
        return sign_document(document, key).envelope


def _describe() -> dict[str, Any]:
    with Door(World()) as made:
        document: dict[str, Any] = json.loads(made.ask(None, "GET", "/openapi.json").body)
    return document


SCHEMA = schemathesis.openapi.from_dict(_describe())
CALLS = {call.label: call for call in (found.ok() for found in SCHEMA.get_all_operations())}
OF_JOBS = {label: call for label, call in CALLS.items() if "{job}" in label}
PARTIES = st.sampled_from(("anna", "boris", "owner", "rival", "broker", "nobody", None))
BODIES = ("job", "deposit", "amendment", "receipt", "key")


def send(
    door: Door, case: schemathesis.Case, who: str | None, body: bytes | None = None
) -> tuple[Answer, requests.PreparedRequest]:
    """Send what was drawn as a signed request; `body` in the place of the drawn one."""
    kwargs = case.as_transport_kwargs(base_url="http://broker")
    kwargs.pop("cookies", None)
    if body is not None:
        kwargs = {name: kwargs[name] for name in kwargs if name not in ("json", "data", "files")}
        kwargs["data"] = body
    made = requests.Request(**kwargs).prepare()
    assert made.method is not None
    raw = made.body or b""
    assert isinstance(raw, str | bytes)
    headers = {
        name: value.decode("latin-1") if isinstance(value, bytes) else value
        for name, value in made.headers.items()
        if not name.lower().startswith("sublet-") or name.lower() == "sublet-epoch"
    }
    headers.pop("Content-Length", None)
    data = raw.encode() if isinstance(raw, str) else raw
    return door.ask(who, made.method, made.path_url, data, headers), made


def conforms(case: schemathesis.Case, answer: Answer, made: requests.PreparedRequest) -> None:
    """Check an answer against the description of its call."""
    request = httpx.Request(str(made.method), str(made.url))
    response = httpx.Response(
        answer.status, headers=answer.headers, content=answer.body, request=request
    )
    response.elapsed = timedelta(0)
    case.validate_response(response, checks=CHECKS)


def town_of(door: Door) -> Town:
    """Return the town behind a door."""
    assert isinstance(door.world, Town)
    return door.world
