"""Addresses that are signed for one request: AWS Signature Version 4, in the query.

The client of the store signs addresses, too, but with no header in them; and an upload has to be
bound to its length, its SHA-256 and If-None-Match, which are headers.
"""

import hashlib
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import quote

from sublet_broker.adapters.blobs.s3_place import Credentials, S3Place

_ALGORITHM = "AWS4-HMAC-SHA256"


def presigned(
    method: str,
    place: S3Place,
    key: str,
    credentials: Credentials,
    *,
    now_ms: int,
    expires_s: int,
    headers: Mapping[str, str],
) -> str:
    """Return the address of an object for one method, until it expires. Whoever uses it sends
    exactly these headers (lower-case names) with it, and others if he likes."""
    moment = datetime.fromtimestamp(now_ms / 1000, UTC)
    stamp, day = moment.strftime("%Y%m%dT%H%M%SZ"), moment.strftime("%Y%m%d")
    scope = f"{day}/{place.region}/s3/aws4_request"
    covered = {"host": place.host, **headers}
    names = ";".join(sorted(covered))
    query = {
        "X-Amz-Algorithm": _ALGORITHM,
        "X-Amz-Credential": f"{credentials.key_id}/{scope}",
        "X-Amz-Date": stamp,
        "X-Amz-Expires": str(expires_s),
        "X-Amz-SignedHeaders": names,
    }
    if credentials.token:
        query["X-Amz-Security-Token"] = credentials.token
    asked = "&".join(f"{_escaped(name)}={_escaped(query[name])}" for name in sorted(query))
    path = quote(place.path_of(key), safe="/-_.~")
    lines = [f"{name}:{covered[name].strip()}" for name in sorted(covered)]
    request = "\n".join([method, path, asked, *lines, "", names, "UNSIGNED-PAYLOAD"])
    said = "\n".join([_ALGORITHM, stamp, scope, hashlib.sha256(request.encode()).hexdigest()])
    secret = b"AWS4" + credentials.secret.encode()
    for part in (day, place.region, "s3", "aws4_request", said):
        secret = hmac.new(secret, part.encode(), hashlib.sha256).digest()
    return f"{place.endpoint}{path}?{asked}&X-Amz-Signature={secret.hex()}"


def _escaped(text: str) -> str:
    return quote(text, safe="-_.~")
