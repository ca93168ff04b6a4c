"""Moving content by address: what is tried again, and when it is given up. No network here: who
moves hands in how to ask his broker, and how to reach the hosts that it names.

Rules:
- An address expires, and a store fails: another one is asked for, ATTEMPTS times at the most, each
  time after a longer pause.
- What lies there already (412) came with an earlier attempt, whose answer was lost: it is
  committed. Whether it is right, the broker finds out.
- An upload that the broker no longer knows, or that isn't there, begins anew; so does one that came
  to lie there with other bytes than were sent.
- What can't be read by address, or doesn't match, is asked of the broker itself, chunk by chunk:
  it reads it, too, and finds out whether it is damaged.
"""

import base64
import hashlib
from collections.abc import Callable, Iterable, Sequence

from sublet_contracts.addresses import Run, UploadAddress
from sublet_contracts.digests import digest_of
from sublet_contracts.packs import PackTable

ATTEMPTS = 8
READ_ATTEMPTS = 3
_PAUSE_S = (0.2, 10.0)
_KEPT = (200, 201, 204)
_IS_THERE = 412
_PARTIAL = 206


class NotMoved(Exception):
    """A store took or gave nothing, however often it was asked."""


def announcement(table: PackTable, chunks: Iterable[bytes]) -> dict[str, str]:
    """Return what the broker is told of a pack that is to be put by address (AddressRequest)."""
    whole = hashlib.sha256()
    for chunk in chunks:
        whole.update(chunk)
    return {
        "table": base64.b64encode(table.to_bytes()).decode(),
        "body_sha256": whole.hexdigest(),
    }


def keeps_to(table: PackTable, chunks: Sequence[bytes]) -> bool:
    """Say whether the chunks are what the table says. Where they are, and the broker found others,
    it was on their way, or in the store."""
    return all(
        digest_of(chunk) == digest for (digest, _), chunk in zip(table.chunks, chunks, strict=True)
    )


def upload(
    ask: Callable[[], UploadAddress],
    put: Callable[[UploadAddress], int],
    commit: Callable[[str], bool],
    pause: Callable[[float], None],
    *,
    attempts: int = ATTEMPTS,
) -> None:
    """Put a pack where the broker says, and commit it. `attempts` 0: until one of them raises.

    `put` returns the store's status, 0 where it gave none; `commit` whether the broker knows the
    upload and has found it as it should be. Raises what they raise, and NotMoved.
    """
    pause_s, longest_s = _PAUSE_S
    status = attempt = 0
    while not attempts or attempt < attempts:
        if attempt:
            pause(pause_s)
            pause_s = min(2 * pause_s, longest_s)
        attempt += 1
        address = ask()
        status = put(address)
        if (status in _KEPT or status == _IS_THERE) and commit(address.pack):
            return
    said = f"it answers {status}" if status else "it does not answer"
    raise NotMoved(f"the store that the broker named took nothing: {said}")


def exactly(status: int, pieces: Iterable[bytes], size_bytes: int) -> bytes | None:
    """Return what a store answers to a range, if it is as long as that; None: it isn't. No more is
    taken than fits."""
    if status != _PARTIAL:
        return None
    data = bytearray()
    for piece in pieces:
        data += piece
        if len(data) > size_bytes:
            return None
    return bytes(data) if len(data) == size_bytes else None


def read(
    ask: Callable[[], Sequence[Run]],
    get: Callable[[Run], bytes | None],
    pause: Callable[[float], None],
) -> bytes:
    """Return chunks, one after another, as they were asked for; they are not checked yet.

    `get` returns exactly the run's bytes, or None. Raises what they raise, and NotMoved.
    """
    pause_s, longest_s = _PAUSE_S
    for attempt in range(READ_ATTEMPTS):
        if attempt:
            pause(pause_s)
            pause_s = min(2 * pause_s, longest_s)
        parts: list[bytes] = []
        for run in ask():
            data = get(run)
            if data is None or len(data) != run.size_bytes:
                break
            parts.append(data)
        else:
            return b"".join(parts)
    raise NotMoved("the store that the broker named gave nothing")
