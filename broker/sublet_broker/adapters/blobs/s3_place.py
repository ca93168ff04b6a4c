"""Where an S3-compatible store is, and the key to it.

The place is public and may be logged. The key is asked for anew at each use and never kept with the
place: what rotates it may do so at any time, and it never gets into a log or a message.

    s3://bucket/prefix           --blobs
    AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL       where it answers; else Amazon's own
    AWS_REGION, AWS_DEFAULT_REGION              else us-east-1
    AWS_CA_BUNDLE                               a file of certificates that are trusted as well
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN
    AWS_SHARED_CREDENTIALS_FILE, AWS_PROFILE    where they aren't set: a file that may change
"""

import configparser
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

SCHEME = "s3://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_SEGMENT = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]*")
MAX_PREFIX = 512


class PlaceRefused(ValueError):
    """The store can't be used as it is configured; the message says what to do."""


@dataclass(frozen=True)
class Credentials:
    """A key to the store. Its text shows nothing of it."""

    key_id: str = field(repr=False)
    secret: str = field(repr=False)
    token: str = field(default="", repr=False)


@dataclass(frozen=True)
class S3Place:
    """A bucket, a prefix in it, and where it is reached."""

    bucket: str
    prefix: str
    endpoint: str
    region: str
    ca_bundle: str = ""

    @property
    def url(self) -> str:
        """As it is named to the broker."""
        return f"{SCHEME}{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")

    @property
    def host(self) -> str:
        """The endpoint's host, with its port if it says one."""
        return urlsplit(self.endpoint).netloc

    def path_of(self, key: str) -> str:
        """Return the path at which the endpoint has what is called `key` below the prefix."""
        return "/" + "/".join(part for part in (self.bucket, self.prefix, key) if part)


def place_of(url: str, environment: Mapping[str, str]) -> S3Place:
    """Return the place that --blobs names. Raises PlaceRefused."""
    bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
    if not url.startswith(SCHEME) or not _BUCKET.fullmatch(bucket):
        raise PlaceRefused(
            f"--blobs {url}: it is s3://BUCKET/PREFIX, with a bucket of 3 to 63 lower-case "
            "letters, digits, dots and dashes"
        )
    prefix = prefix.rstrip("/")
    if prefix and not (
        len(prefix) <= MAX_PREFIX and all(map(_SEGMENT.fullmatch, prefix.split("/")))
    ):
        raise PlaceRefused(
            f"--blobs {url}: a prefix has letters, digits and .-_= between its slashes, "
            f"no part begins with a dot, and it has at most {MAX_PREFIX} characters"
        )
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "us-east-1"
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or ""
    endpoint = (endpoint or f"https://s3.{region}.amazonaws.com").rstrip("/")
    _check_endpoint(endpoint)
    return S3Place(bucket, prefix, endpoint, region, environment.get("AWS_CA_BUNDLE", ""))


def _check_endpoint(endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        whole = False
    if not whole or parts.path or parts.query or parts.fragment or parts.username is not None:
        raise PlaceRefused(
            "AWS_ENDPOINT_URL: it is http:// or https://, a host and perhaps a port, and no more"
        )


def credentials(environment: Mapping[str, str]) -> Credentials:
    """Return the key as it is now. Raises PlaceRefused."""
    found = Credentials(
        environment.get("AWS_ACCESS_KEY_ID", ""),
        environment.get("AWS_SECRET_ACCESS_KEY", ""),
        environment.get("AWS_SESSION_TOKEN", ""),
    )
    if found.key_id and found.secret:
        return found
    if named := environment.get("AWS_SHARED_CREDENTIALS_FILE"):
        return _from_file(Path(named), environment.get("AWS_PROFILE") or "default")
    raise PlaceRefused(
        "no key for the blob store: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
        "AWS_SHARED_CREDENTIALS_FILE"
    )


def _from_file(path: Path, profile: str) -> Credentials:
    reader = configparser.RawConfigParser()
    # An error of either kind may quote the file: only its kind is passed on.
    try:
        reader.read_string(path.read_text())
    except OSError as error:
        raise PlaceRefused(
            f"AWS_SHARED_CREDENTIALS_FILE {path}: {error.strerror}; make it readable for this user"
        ) from None
    except (configparser.Error, UnicodeDecodeError):
        raise PlaceRefused(
            f"AWS_SHARED_CREDENTIALS_FILE {path}: it has no [profile] with name = value lines"
        ) from None
    names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    key_id, secret, token = (reader.get(profile, name, fallback="") for name in names)
    if not (key_id and secret):
        raise PlaceRefused(
            f"AWS_SHARED_CREDENTIALS_FILE {path}: [{profile}] has no aws_access_key_id and "
            "aws_secret_access_key"
        )
    return Credentials(key_id, secret, token)
