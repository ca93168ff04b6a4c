"""Content moved by address: the hosts that the broker has named in a signed answer, and no others
(sublet_contracts/addresses.py). What goes there is the content and the headers of the address:
nothing that says who we are.
"""

from collections.abc import Iterator, Sequence

import httpx

from sublet_contracts import moves
from sublet_contracts.addresses import Run, UploadAddress

_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_PIECE_BYTES = 128 * 1024


class StoreClient:
    """Moves bytes to and from the broker's store. Any thread may use it."""

    def __init__(self) -> None:
        limits = httpx.Limits(max_connections=16, max_keepalive_connections=8)
        self._http = httpx.Client(timeout=_TIMEOUT, limits=limits, follow_redirects=False)

    def close(self) -> None:
        """Let go of connections."""
        self._http.close()

    def put(self, address: UploadAddress, parts: Sequence[bytes]) -> int:
        """Put this there. Return the store's status; 0: it gave none."""
        try:
            with self._http.stream(
                "PUT", address.url, headers=address.headers, content=in_pieces(parts)
            ) as answer:
                return answer.status_code  # What else it says is a stranger's.
        except httpx.HTTPError:
            return 0

    def get(self, run: Run) -> bytes | None:
        """Return exactly these bytes; None: they didn't come."""
        try:
            headers = {"range": run.range_header, "accept-encoding": "identity"}
            with self._http.stream("GET", run.url, headers=headers) as answer:
                return moves.exactly(answer.status_code, answer.iter_raw(), run.size_bytes)
        except httpx.HTTPError:
            return None


def in_pieces(parts: Sequence[bytes]) -> Iterator[bytes]:
    """Small ones: of what a socket doesn't take at once the rest is copied each time."""
    for part in parts:
        for at in range(0, len(part), _PIECE_BYTES):
            yield part[at : at + _PIECE_BYTES]
