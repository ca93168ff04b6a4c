"""Addresses: where content moves to and from, past the broker, when its store is a service.

A broker whose content lies in an S3-compatible store answers with addresses instead of bytes: each
is good for one object, for some minutes, and for an upload only with exactly the content that was
announced, for a read only of the bytes that were asked for. The answer is an envelope that the
broker has signed.

**Whoever moves content talks to his broker, and to the hosts that his broker has named in an answer
that it signed; to nobody else.** So a redirect is never followed, and an address is refused:
- that isn't https, unless the broker itself is reached by http (a market on one machine);
- that names this machine, unless the broker is on it;
- that names a link-local address, where clouds have their machines' keys.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sublet_contracts.encoding import EncodingError, canonical_json, parse_json
from sublet_contracts.envelope import Envelope, SignatureRefused, sign_payload
from sublet_contracts.keys import KeyRefused, SigningKey
from sublet_contracts.packs import MAX_READ_CHUNKS

TYPE = "application/vnd.sublet.addresses.v1+json"
"""Of the payload, and of an answer that has addresses instead of bytes."""
MAX_ANSWER_BYTES = 96 * 1024
MAX_URL = 4096
MAX_READS = 16
"""in one answer: it is a document, and these have a limit"""
_HEADERS = ("if-none-match", "content-length")
_HEADER_PREFIX = "x-amz-"


class AddressRefused(ValueError):
    """An answer with addresses breaks a rule; nobody was asked."""


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class UploadAddress(_Said):
    """Where one pack's chunks are to be put, and the headers to put them with."""

    name: str = Field(max_length=128, description="the pack's, as in the request")
    pack: str = Field(pattern="^[0-9a-f]{64}$", description="its id, by which it is committed")
    url: str = Field(max_length=MAX_URL)
    headers: dict[str, str] = Field(max_length=16)


class ReadAddress(_Said):
    """Where some of the chunks that were asked for lie, one behind the other in one object.

    It is good for these bytes alone, as Range has them (`range_of`): in the same object there may
    be others, of other people.
    """

    url: str = Field(max_length=MAX_URL)
    offset_bytes: int = Field(ge=0, le=2**53 - 1)
    chunks: int = Field(ge=1, le=MAX_READ_CHUNKS, description="how many")


class ReadAddresses(_Said):
    """Where chunks are to be had, in the order in which they were asked for."""

    reads: tuple[ReadAddress, ...] = Field(max_length=MAX_READS)


S = TypeVar("S", UploadAddress, ReadAddresses)


@dataclass(frozen=True)
class Run:
    """Bytes of one object that are asked for with one request: those of some chunks in a row."""

    url: str
    offset_bytes: int
    size_bytes: int
    chunks: range
    """Which of those that were asked for."""

    @property
    def range_header(self) -> str:
        """As HTTP's Range has it."""
        return range_of(self.offset_bytes, self.size_bytes)


def range_of(offset_bytes: int, size_bytes: int) -> str:
    """Return these bytes as HTTP's Range has them: a part of what an address is signed for."""
    return f"bytes={offset_bytes}-{offset_bytes + size_bytes - 1}"


def signed(said: UploadAddress | ReadAddresses, key: SigningKey) -> bytes:
    """Return the answer's body."""
    payload = canonical_json(said.model_dump(mode="json"))
    return sign_payload(TYPE, payload, [key]).model_dump_json().encode()


def read_upload(data: bytes, *, broker: str, broker_url: str, name: str) -> UploadAddress:
    """Return the address for this pack. Raises AddressRefused."""
    said = _opened(data, broker, UploadAddress)
    if said.name != name:
        raise AddressRefused("the address is for another pack than was asked for")
    for header, value in said.headers.items():
        known = header in _HEADERS or header.startswith(_HEADER_PREFIX)
        if not known or not value.isascii() or not value.isprintable():
            raise AddressRefused("the address wants a header that no upload needs")
    check_url(said.url, broker_url)
    return said


def read_runs(data: bytes, *, broker: str, broker_url: str, sizes: Sequence[int]) -> list[Run]:
    """Return what to ask for, for chunks of these sizes. Raises AddressRefused."""
    said = _opened(data, broker, ReadAddresses)
    if sum(read.chunks for read in said.reads) != len(sizes):
        raise AddressRefused("the addresses are for other chunks than were asked for")
    runs, at = [], 0
    for read in said.reads:
        check_url(read.url, broker_url)
        chunks = range(at, at + read.chunks)
        size_bytes = sum(sizes[at : chunks.stop])
        runs.append(Run(read.url, read.offset_bytes, size_bytes, chunks))
        at = chunks.stop
    return runs


def check_url(url: str, broker_url: str) -> None:
    """Raise AddressRefused for what a broker at `broker_url` has no reason to name."""
    try:
        parts, own = urlsplit(url), urlsplit(broker_url)
        host = (parts.hostname or "").lower().rstrip(".")
        own_host = (own.hostname or "").lower().rstrip(".")
        whole = bool(host) and parts.username is None and not parts.fragment
        whole = whole and parts.port != 0 and url.isascii() and url.isprintable()
    except ValueError:
        whole = False
    if not whole:
        raise AddressRefused("what the broker named is no address")
    if parts.scheme != "https" and not (parts.scheme == own.scheme == "http"):
        raise AddressRefused(f"{host}: content is moved by https only")
    if _is_link_local(host):
        raise AddressRefused(f"{host}: no content is moved to or from a link-local address")
    if _is_here(host) and not _is_here(own_host):
        raise AddressRefused(f"{host}: the broker named this machine")


def _is_here(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = _address(host)
    return address is not None and (address.is_loopback or address.is_unspecified)


def _is_link_local(host: str) -> bool:
    address = _address(host)
    return address is not None and address.is_link_local


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is written as, in any of the ways in which systems read one."""
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        last = host.rpartition(".")[2]
        if last[:1].isdigit():
            # A host whose last part begins with a digit is no name: 127.1, 0x7f000001, 2130706433.
            raise AddressRefused(f"{host}: an address is written in full") from None
        return None
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        return found.ipv4_mapped
    return found


def _opened(data: bytes, broker: str, kind: type[S]) -> S:
    if len(data) > MAX_ANSWER_BYTES:
        raise AddressRefused(f"an answer of {len(data)} bytes; at most {MAX_ANSWER_BYTES} are read")
    try:
        envelope = Envelope.model_validate_json(data)
        if envelope.payloadType != TYPE or envelope.signers != (broker,):
            raise AddressRefused("the addresses are not signed by this broker")
        envelope.require(broker)
        parse_json(envelope.payload_bytes, max_bytes=MAX_ANSWER_BYTES)
        return kind.model_validate_json(envelope.payload_bytes)
    except (SignatureRefused, KeyRefused) as error:
        raise AddressRefused(f"the addresses are not signed by this broker: {error}") from error
    except (ValidationError, EncodingError) as error:
        raise AddressRefused("the answer is not what addresses look like") from error
