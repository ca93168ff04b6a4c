"""What the OpenAPI description says beyond the routes: signing, problems, and the request bodies.

Bodies are read and verified by hand (signed_calls.py), so FastAPI can't know their models: `takes`
names the model of a call, and `describe` puts its schema among the components.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from sublet_broker.adapters.http.problems import PROBLEM_JSON, STATUS
from sublet_contracts.api import (
    AddressRequest,
    CommitRequest,
    MatchRequest,
    MissingRequest,
    Problem,
    ResumeRequest,
    SignedRequest,
)
from sublet_contracts.problems import PROBLEMS

TITLE = "sublet broker"

DESCRIPTION = """\
Renters submit jobs and read their bills, providers move checkpoints. Agents talk over one
websocket, `/v1/agent`, whose messages are in `sublet_contracts/wire.py`.

**Signing.** There are no passwords. Each request carries the caller's Ed25519 signature over
method, path and query, the body's digest, time, nonce, idempotency key and this broker's id:

| header | value |
|---|---|
| `Sublet-Party` | `ed25519-` and 64 hex digits: the public key |
| `Sublet-Time-Ms` | ms since 1970, at most five minutes off |
| `Sublet-Nonce` | 32 hex digits, never used twice |
| `Sublet-Signature` | base64 of the signature over DSSE's PAE of the canonical JSON of these |
| `Idempotency-Key` | optional, on a POST: same key and body, same answer; another body, 409 |

`sublet_contracts.auth.sign_request` makes them.

**Documents.** Jobs, offers, receipts and so on are signed envelopes (DSSE) of at most 64 KiB. Their
fields are in `contracts/README.md`.

**Units.** Money is in micro-credits (`_ucr`; 1 credit = 1 000 000), time in milliseconds (`_ms`),
sizes in bytes, usage in device-milliseconds.

**Errors** are problem+json (RFC 9457) with a stable `code`, a `detail` that says what is so, the
`field` that is wrong, and `facts` for programs. What to do next is the client's to say; where an
answer did not come or is a 5xx, send a POST again with the same Idempotency-Key. The codes:

| code | status | title | facts |
|---|---|---|---|
"""

TAGS = [
    {"name": "market", "description": "Who the broker is, and what is on offer at which price."},
    {"name": "jobs", "description": "Submit, watch, pause, resume and cancel your jobs."},
    {
        "name": "content",
        "description": "Inputs, checkpoints and outputs: content-addressed chunks.",
    },
    {"name": "money", "description": "Balances, statements, receipts and deposits."},
    {"name": "operation", "description": "For the operator: health, readiness, metrics. Unsigned."},
]

_EXAMPLES: dict[type[BaseModel], dict[str, Any]] = {
    SignedRequest: {
        "envelope": {
            "payloadType": "application/vnd.sublet.job.v1+json",
            "payload": "eyJicm9rZXIiOi4uLn0=",
            "signatures": [{"keyid": "ed25519-" + "ab" * 32, "sig": "A" * 86 + "=="}],
        }
    },
    MatchRequest: {
        "resources": {
            "devices": 1,
            "device_kind": "gpu",
            "device_memory_bytes": 24 * 1024**3,
            "cpu_millis": 4000,
            "memory_bytes": 16 * 1024**3,
            "disk_bytes": 50 * 1024**3,
        },
        "max_price_ucr_per_device_hour": 400_000,
        "budget_ucr": 5_000_000,
    },
    MissingRequest: {
        "digests": ["blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"]
    },
    AddressRequest: {
        "table": "c3VibGV0LXBhY2stMSBibGFrZTMKAAAAAQ==",
        "body_sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    },
    CommitRequest: {"pack": "ab" * 32},
    ResumeRequest: {"amendment": None},
}

_SAYS = {
    400: "The body isn't JSON under our rules.",
    401: "Not signed, wrongly signed, replayed, or the clock is off; `field` names the header.",
    402: "The balance is less than the budget.",
    403: "Authentic, but not yours to do.",
    404: "Not there, or not yours.",
    409: "It can't be done in this state; or the Idempotency-Key came with another body.",
    413: "Larger than this call takes, or more than is kept for one party; nothing was stored.",
    422: "Understood and not acceptable; `field` says what.",
    410: "No longer kept, or found damaged.",
    429: "More than one party may have or do in an hour; `detail` says what.",
    503: "Busy, or the match engine is away. Send it again.",
    507: "The broker's disk is full. Nothing was stored and nothing is lost.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the problem answers of a call, for its `responses`."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": _SAYS[status], "content": {PROBLEM_JSON: {"schema": schema}}}
        for status in statuses
    }


READ = problems(401, 404)
WRITE = problems(400, 401, 404, 409, 413, 422, 429, 507)


def takes(model: type[BaseModel], what: str, *, required: bool = True) -> dict[str, Any]:
    """Return the openapi_extra of a call whose body is `model`."""
    return _signed(
        {
            "requestBody": {
                "required": required,
                "description": what,
                "content": {
                    "application/json": {
                        "schema": {"$ref": f"#/components/schemas/{model.__name__}"},
                        "example": _EXAMPLES[model],
                    }
                },
            }
        }
    )


def takes_bytes(what: str) -> dict[str, Any]:
    """Return the openapi_extra of a call whose body is raw bytes."""
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return _signed({"requestBody": {"required": True, "description": what, "content": content}})


def _signed(extra: dict[str, Any]) -> dict[str, Any]:
    return {**extra, "security": [{"SubletSignature": []}]}


SIGNED: dict[str, Any] = _signed({})


def _codes_table() -> str:
    """Return the rows of all codes that a request can be refused with."""
    return "".join(
        f"| `{code}` | {STATUS[code]} | {kind.title} | "
        f"{', '.join(f'`{name}`' for name in kind.facts)} |\n"
        for code, kind in PROBLEMS.items()
    )


def describe(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(
        title=TITLE,
        version=app.version,
        description=DESCRIPTION + _codes_table(),
        routes=app.routes,
        tags=TAGS,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    models: tuple[type[BaseModel], ...] = (Problem, *_EXAMPLES)
    for model in models:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    components["securitySchemes"] = {
        "SubletSignature": {
            "type": "apiKey",
            "in": "header",
            "name": "Sublet-Signature",
            "description": "Ed25519 over the request, with Sublet-Party, Sublet-Time-Ms and "
            "Sublet-Nonce beside it; see the introduction.",
        }
    }
    for methods in document["paths"].values():
        for call in methods.values():
            answers = call.get("responses", {})
            if "422" in answers and "HTTPValidationError" in str(answers["422"]):
                answers["422"] = problems(422)[422]
    app.openapi_schema = document
    return document
