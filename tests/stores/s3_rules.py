"""What a real S3 holds and moto's server doesn't: signatures in addresses, and checksums.

The signature is made anew with botocore, which is others' code, from the request as it came.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import parse_qs, urlsplit

import botocore.auth
import botocore.awsrequest
import botocore.credentials

from sublet_broker.adapters.blobs.s3_place import Credentials

_FAR_S = 7 * 86_400


def refusal(
    key: Credentials, method: str, url: str, headers: Mapping[str, str], body: bytes
) -> tuple[int, str] | None:
    """Return the status and code with which S3 would refuse this, or None."""
    sent = {name.lower(): value for name, value in headers.items()}
    query = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
    if "X-Amz-Signature" in query and (why := _of_address(key, method, url, query, sent)):
        return why
    if "X-Amz-Signature" not in query and "authorization" not in sent:
        return 403, "AccessDenied"
    wanted = sent.get("x-amz-checksum-sha256")
    if wanted and base64.b64encode(hashlib.sha256(body).digest()).decode() != wanted:
        return 400, "BadDigest"
    return None


def _of_address(
    key: Credentials, method: str, url: str, query: dict[str, str], sent: Mapping[str, str]
) -> tuple[int, str] | None:
    begun = datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    expires_s = int(query["X-Amz-Expires"])
    if not 0 < expires_s <= _FAR_S:
        return 400, "AuthorizationQueryParametersError"
    if time.time() > begun.timestamp() + expires_s:
        return 403, "AccessDenied"
    names = query["X-Amz-SignedHeaders"].split(";")
    needed = {"host"} | {name for name in sent if name.startswith("x-amz-")}
    if not needed <= set(names) or not set(names) <= set(sent):
        return 403, "SignatureDoesNotMatch"
    scope = query["X-Amz-Credential"].split("/")
    credentials = botocore.credentials.Credentials(key.key_id, key.secret, key.token or None)
    auth = botocore.auth.S3SigV4QueryAuth(credentials, "s3", scope[2], expires=expires_s)
    request = botocore.awsrequest.AWSRequest(
        method=method,
        url=url.partition("?")[0],
        headers={name: sent[name] for name in names},
    )
    request.context["timestamp"] = query["X-Amz-Date"]
    auth._modify_request_before_signing(request)
    text = auth.string_to_sign(request, auth.canonical_request(request))
    return (
        None
        if auth.signature(text, request) == query["X-Amz-Signature"]
        else (403, "SignatureDoesNotMatch")
    )
