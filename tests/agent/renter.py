"""A renter in fifty lines, for tests of the agent: signs, uploads, submits, looks."""

import os
import time
from pathlib import Path
from typing import Any

import httpx

from sublet_contracts.api import JobView, MissingRequest, SignedRequest
from sublet_contracts.auth import sign_request
from sublet_contracts.digests import digest_of
from sublet_contracts.documents import Deposit, Job, KeyDocument, sign_document
from sublet_contracts.envelope import Envelope
from sublet_contracts.keys import SigningKey
from sublet_contracts.tree import scan_tree


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Renter:
    """A party at a broker. `operator` is the broker's own key, to have money."""

    def __init__(self, url: str, operator: SigningKey) -> None:
        self.http = httpx.Client(base_url=url, timeout=120)
        self.broker = str(self.http.get("/v1/broker").json()["broker"])
        self.operator = operator
        self.key = SigningKey.generate()

    def call(
        self, method: str, target: str, body: bytes = b"", key: SigningKey | None = None
    ) -> httpx.Response:
        headers = sign_request(
            key or self.key,
            broker=self.broker,
            method=method,
            target=target,
            body=body,
            time_ms=now_ms(),
            nonce=os.urandom(16).hex(),
            body_digest=target.rpartition("/")[2] if method == "PUT" else "",
        )
        kind = "application/octet-stream" if method == "PUT" else "application/json"
        if body:
            headers["Content-Type"] = kind
        answer = self.http.request(method, target, content=body, headers=headers)
        assert answer.is_success, (method, target, answer.status_code, answer.text)
        return answer

    def post(self, target: str, envelope: Envelope, key: SigningKey | None = None) -> Any:
        body = SignedRequest(envelope=envelope).model_dump_json().encode()
        return self.call("POST", target, body, key).json()

    def introduce(self, credits: int = 10) -> None:
        document = KeyDocument(
            party=self.key.party, broker=self.broker, name="tester", issued_ms=now_ms()
        )
        self.post("/v1/keys", sign_document(document, self.key).envelope)
        deposit = Deposit(
            broker=self.broker,
            party=self.key.party,
            amount_ucr=credits * 1_000_000,
            memo="test",
            nonce=os.urandom(16).hex(),
            issued_ms=now_ms(),
        )
        self.post("/v1/deposits", sign_document(deposit, self.operator).envelope, self.operator)

    def upload(self, path: Path) -> tuple[str, int]:
        tree = scan_tree(path, max_bytes=2**30)
        index = tree.index.to_bytes()
        wanted = MissingRequest(digests=tuple(tree.index.chunks())).model_dump_json().encode()
        for digest in self.call("POST", "/v1/blobs/missing", wanted).json()["missing"]:
            self.call("PUT", f"/v1/blobs/{digest}", tree.read_chunk(digest))
        digest = digest_of(index)
        self.call("PUT", f"/v1/blobs/{digest}", index)
        return digest, tree.index.total_bytes

    def submit(self, script: Path, *arguments: str, **changes: Any) -> str:
        digest, size = self.upload(script)
        where = f"/job/{script.name}"
        document = {
            "renter": self.key.party,
            "broker": self.broker,
            "nonce": os.urandom(16).hex(),
            "name": "test",
            "image": "none",
            "command": ("python", where, *arguments),
            "env": {},
            "resources": {
                "devices": 1,
                "device_kind": "cpu",
                "memory_bytes": 2**28,
                "disk_bytes": 2**28,
            },
            "max_price_ucr_per_device_hour": 1_000_000,
            "budget_ucr": 1_000_000,
            "checkpoint_interval_ms": 60_000,
            "patience_ms": 10_000,
            "stop_grace_ms": 5_000,
            "inputs": (
                {"destination": where, "kind": "file", "index_digest": digest, "total_bytes": size},
            ),
            "outputs": "/out",
            "accept_receipts_up_to_ucr": 1_000_000,
            "issued_ms": now_ms(),
            "expires_ms": now_ms() + 3_600_000,
        } | changes
        signed = sign_document(Job.model_validate(document), self.key)
        return str(self.post("/v1/jobs", signed.envelope)["id"])

    def job(self, job: str) -> JobView:
        return JobView.model_validate_json(self.call("GET", f"/v1/jobs/{job}").content)

    def events(self, job: str) -> list[dict[str, Any]]:
        return list(self.call("GET", f"/v1/jobs/{job}/events?after=0").json()["events"])

    def logs(self, job: str) -> list[str]:
        text = self.call("GET", f"/v1/jobs/{job}/logs?after=0").text
        return [line for line in text.splitlines() if line]
