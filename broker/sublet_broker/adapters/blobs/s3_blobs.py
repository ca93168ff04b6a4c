"""Content in an S3-compatible store.

    PREFIX/blobs/blake3/abcd...  a blob, by its digest: the algorithm, the hex digits
    PREFIX/packs/abcd...         a pack of chunks, named by the id that the database gave it
    PREFIX/quarantine/           what was found damaged, kept for a person to look at
    PREFIX/probe/                what a start writes to see that all works, and deletes

An object is there whole or not at all, and durable once the store has said so. Which of these a
store really keeps is its operator's to know; what it returns is hashed by whoever reads it.

Rules:
- No call waits for ever: each has a time for all of it, and few retries within a time of their own.
- At most AT_ONCE calls are under way, and who finds no place for SLOT_S is told that it is away. A
  store that didn't answer isn't asked again for PAUSE_S, and then by one caller, until it answers:
  all others are told at once. So a stall there holds few of the broker's threads.
- That a store doesn't answer says nothing about what lies in it: BlobsAway is never BlobMissing.
- A pack is created, never replaced.
"""

import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import obstore.exceptions as refused
from obstore.store import S3Store

from sublet_broker.adapters.blobs.s3_place import Credentials, PlaceRefused, S3Place
from sublet_broker.service.ports import BlobMissing, BlobsAway, StorageFull
from sublet_contracts.digests import ALGORITHM, digest_of, from_hex, hex_of

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Credential

log = logging.getLogger("sublet.blobs")

_NAME = re.compile(r"[0-9a-f]{64}")
_BLOBS = f"blobs/{ALGORITHM}"
SMALL_S = 15.0
"""For a call that moves little."""
LARGE_S = 60.0
"""For one that moves a pack: 64 MiB at a good 1 MB/s."""
RETRIES = 2
READS = 2
"""A bit that flipped on the way is no damage: what doesn't match is read once more."""
PAUSE_S = 2.0
AT_ONCE = 6
SLOT_S = 5.0
KEY_S = 60
"""So old a key may get before it is asked for again."""
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z]{1,64})</Code>")
_FULL = re.compile("quota|storagefull|insufficientstorage|nospace", re.IGNORECASE)
_LONGEST = 300


class S3Blobs:
    """ports.BlobStore in a bucket. Any number of threads and processes may use it at once."""

    def __init__(
        self,
        place: S3Place,
        key: Callable[[], Credentials],
        *,
        small_s: float = SMALL_S,
        large_s: float = LARGE_S,
        pause_s: float = PAUSE_S,
    ) -> None:
        self.place = place
        self.key = key
        self._small = _client(place, key, small_s)
        self._large = _client(place, key, large_s)
        self._pause_s = pause_s
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(AT_ONCE)
        self._why_away = ""
        """Why it didn't answer last; "": it did."""
        self._paused_until_s = 0.0
        self._being_tried = False

    # -- blobs -------------------------------------------------------------------------------------

    def put(self, digest: str, data: bytes) -> None:
        """See ports.BlobStore."""
        key = blob_key(digest)
        if digest_of(data) != digest:
            raise ValueError("the content does not match its digest; send it again")
        with self._asked():
            self._large.put(key, data, mode="overwrite", use_multipart=False)

    def get(self, digest: str) -> bytes:
        """See ports.BlobStore. A damaged blob is moved to quarantine/ and counts as missing."""
        key = blob_key(digest)
        e_tag = None
        for _ in range(READS):
            try:
                with self._asked():
                    found = self._large.get(key)
                    data = bytes(found.bytes())
            except FileNotFoundError as error:
                raise BlobMissing(f"no blob {digest}") from error
            if digest_of(data) == digest:
                return data
            e_tag = found.meta["e_tag"]
        self._set_aside(key, e_tag)
        raise BlobMissing(f"blob {digest} has been damaged in the store; it is in quarantine")

    def has(self, digest: str) -> bool:
        """See ports.BlobStore."""
        return self._size_of(blob_key(digest)) is not None

    def delete(self, digest: str) -> None:
        """See ports.BlobStore."""
        self._delete(blob_key(digest))

    def names(self) -> Iterator[str]:
        """See ports.BlobStore."""
        return (from_hex(name) for name in self._listed(_BLOBS))

    # -- packs -------------------------------------------------------------------------------------

    def put_pack(self, pack: str, parts: Iterable[bytes]) -> None:
        """See ports.BlobStore."""
        data = b"".join(parts)
        try:
            with self._asked():
                self._large.put(pack_key(pack), data, mode="create", use_multipart=False)
        except refused.AlreadyExistsError:
            # Nobody else has this id: it is ours, from an attempt whose answer was lost.
            if self.read_pack(pack, 0, len(data) + 1) != data:
                raise BlobsAway(f"pack {pack} lies there with other content") from None

    def read_pack(self, pack: str, offset_bytes: int, size_bytes: int) -> bytes:
        """See ports.BlobStore."""
        try:
            with self._asked():
                end = offset_bytes + size_bytes
                return bytes(self._large.get_range(pack_key(pack), start=offset_bytes, end=end))
        except FileNotFoundError as error:
            raise BlobMissing(f"no pack {pack}") from error
        except _Refused as error:
            if error.status == 416:
                return b""  # It ends before that.
            raise

    def has_pack(self, pack: str) -> bool:
        """See ports.BlobStore."""
        return self._size_of(pack_key(pack)) is not None

    def delete_pack(self, pack: str) -> None:
        """See ports.BlobStore."""
        self._delete(pack_key(pack))

    def set_pack_aside(self, pack: str) -> None:
        """See ports.BlobStore: it goes to quarantine/."""
        self._set_aside(pack_key(pack), None)

    def packs(self) -> Iterator[str]:
        """See ports.BlobStore."""
        return self._listed("packs")

    # -- a start, and a look -----------------------------------------------------------------------

    def prepare(self) -> bool:
        """Write, read, list and delete one object. Return whether the store refuses to create what
        is there already. Raises PlaceRefused: what is wrong, and what to do."""
        name = secrets.token_hex(32)
        key, said = f"probe/{name}", secrets.token_bytes(64)
        keeps = False
        try:
            self.key()
            with self._asked():
                self._small.put(key, said, mode="create", use_multipart=False)
            try:
                with self._asked():
                    self._small.put(key, said, mode="create", use_multipart=False)
            except refused.AlreadyExistsError:
                keeps = True
            with self._asked():
                read = bytes(self._small.get(key).bytes())
            if read != said or name not in set(self._listed("probe")):
                raise PlaceRefused(
                    f"{self.place.url} doesn't give back what was written just now: use a store "
                    "that shows a new object at once"
                )
            self._delete(key)
            if self._size_of(key) is not None:
                raise PlaceRefused(f"{self.place.url} doesn't delete: allow s3:DeleteObject")
        except StorageFull as error:
            raise PlaceRefused(f"{self.place.url} is full: free some space there") from error
        except BlobsAway as error:
            raise PlaceRefused(
                f"{self.place.url} at {self.place.endpoint} can't be used: {error}"
            ) from error
        return keeps

    def forget_probe(self, key: str) -> None:
        """Delete what another trial has written. Raises PlaceRefused."""
        try:
            self._delete(key)
        except (BlobsAway, StorageFull) as error:
            raise PlaceRefused(f"{self.place.url} can't be used: {error}") from error

    def trouble(self) -> str:
        """Say what is wrong with the store now, or ''."""
        try:
            self._size_of("probe/none")
        except (BlobsAway, StorageFull) as error:
            return str(error)
        return ""

    # ----------------------------------------------------------------------------------------------

    def _size_of(self, key: str) -> int | None:
        try:
            with self._asked(without_words=True):
                return self._small.head(key)["size"]
        except FileNotFoundError:
            return None

    def _delete(self, key: str) -> None:
        try:
            with self._asked():
                self._small.delete(key)
        except FileNotFoundError:
            return  # Some stores say so.

    def _set_aside(self, key: str, e_tag: str | None) -> None:
        """Keep what lies there elsewhere and delete it; not what was put there since (`e_tag`)."""
        aside = f"quarantine/{key.rpartition('/')[2]}.{secrets.token_hex(4)}"
        try:
            with self._asked():
                self._large.copy(key, aside)
            with self._asked(without_words=True):
                if e_tag is not None and self._small.head(key)["e_tag"] != e_tag:
                    return
                self._small.delete(key)
        except FileNotFoundError:
            return  # another reader was first

    def _listed(self, folder: str) -> Iterator[str]:
        pages = self._small.list(folder, chunk_size=1_000)
        while True:
            with self._asked():
                page = next(pages, None)
            if page is None:
                return
            for found in page:
                name = found["path"].rpartition("/")[2]
                if _NAME.fullmatch(name):
                    yield name

    @contextmanager
    def _asked(self, *, without_words: bool = False) -> Iterator[None]:
        """Around what asks the store. Raises BlobsAway, StorageFull, FileNotFoundError where there
        is no such object, and AlreadyExistsError as it is. `without_words`: its answer has no
        body, so that a 404 alone must do."""
        self._refuse_while_away()
        if not self._slots.acquire(timeout=SLOT_S):
            raise BlobsAway("it is slow: too many calls are under way")
        why_away: str | None = None
        trial = False
        try:
            trial = self._may_ask()  # It may have gone while this one waited.
            yield
            why_away = ""
        except refused.AlreadyExistsError:
            why_away = ""
            raise
        except FileNotFoundError as error:
            why_away = ""
            _, code, says = _what(error)
            # Any server has 404s, and what is missing may be the bucket: lost is what is named so.
            if without_words or code == "NoSuchKey":
                raise
            log.warning("the blob store: %s", says)
            raise _Refused(says, 404) from error
        except BlobsAway:
            raise
        except (refused.BaseError, OSError, PlaceRefused) as error:
            status, code, says = _what(error)
            why_away = ""
            if status == 507 or (status in (400, 403, 409) and _FULL.search(code)):
                raise StorageFull("the blob store is full: free some space there") from error
            if status == 0 or status >= 500:
                why_away = says
            log.warning("the blob store: %s", says)
            raise _Refused(says, status) from error
        finally:
            self._slots.release()
            self._ended(trial, why_away)

    def _refuse_while_away(self) -> None:
        """Raise BlobsAway where the store isn't to be asked. Called with or without the lock."""
        away = self._why_away
        if away and (self._being_tried or time.monotonic() < self._paused_until_s):
            raise BlobsAway(away)

    def _may_ask(self) -> bool:
        """Return whether this call tries if the store is back. Raises BlobsAway: it isn't asked."""
        with self._lock:
            self._refuse_while_away()
            self._being_tried = bool(self._why_away)
            return self._being_tried

    def _ended(self, trial: bool, why_away: str | None = None) -> None:
        """A call is over. `why_away`: "" where the store answered, None where nothing is known."""
        with self._lock:
            if trial:
                self._being_tried = False
            if why_away is not None:
                self._why_away = why_away
            if why_away:
                self._paused_until_s = time.monotonic() + self._pause_s


class _Refused(BlobsAway):
    def __init__(self, says: str, status: int) -> None:
        super().__init__(says)
        self.status = status


def pack_key(pack: str) -> str:
    """Return what a pack is called below the prefix. Raises ValueError."""
    if not _NAME.fullmatch(pack):
        raise ValueError("a pack's id is 64 lower-case hex digits")
    return f"packs/{pack}"


def blob_key(digest: str) -> str:
    """Return what a blob is called below the prefix. Raises ValueError."""
    return f"{_BLOBS}/{hex_of(digest)}"


def _what(error: Exception) -> tuple[int, str, str]:
    """Return the store's status (0: it gave none), its code, and both in a sentence. No more of
    what it said: that is a stranger's text, and may quote the request."""
    text = str(error)
    status = _STATUS.search(text)
    code = _CODE.search(text)
    number = int(status[1]) if status else 0
    word = code[1] if code else ""
    if isinstance(error, PlaceRefused):
        return 401, "", text
    if number in (401, 403):
        return (
            number,
            word,
            (
                f"it refuses the key ({number} {word}): see that AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN are those of a key that may "
                "s3:PutObject, s3:GetObject, s3:DeleteObject and s3:ListBucket there, and this "
                "machine's clock is right"
            ),
        )
    if word == "NoSuchBucket":
        return number, word, "it has no such bucket: make it, or correct --blobs"
    if number:
        return number, word, f"it answers {number} {word}".rstrip()
    # The client's own words: what it asked for, how long that took, and why it gave up.
    why = text.splitlines()[0].rpartition(" - ")[2] if text else type(error).__name__
    return 0, "", f"it does not answer: {why[:_LONGEST]}"


def _client(place: S3Place, key: Callable[[], Credentials], timeout_s: float) -> S3Store:
    def now() -> "S3Credential":
        mine = key()
        return {
            "access_key_id": mine.key_id,
            "secret_access_key": mine.secret,
            "token": mine.token or None,
            "expires_at": datetime.now(UTC) + timedelta(seconds=KEY_S),
        }

    client: ClientConfig = {
        "connect_timeout": timedelta(seconds=5),
        "timeout": timedelta(seconds=timeout_s),
        "allow_http": place.endpoint.startswith("http://"),
    }
    if place.ca_bundle:
        try:
            client["root_certificate"] = Path(place.ca_bundle).read_bytes()
        except OSError as error:
            raise PlaceRefused(f"AWS_CA_BUNDLE {place.ca_bundle}: {error.strerror}") from error
    retry: RetryConfig = {
        "max_retries": RETRIES,
        "retry_timeout": timedelta(seconds=timeout_s),
        "backoff": {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=2),
            "base": 2,
        },
    }
    return S3Store(
        place.bucket,
        prefix=place.prefix or None,
        endpoint=place.endpoint,
        region=place.region,
        virtual_hosted_style_request=False,
        disable_bulk_delete=True,  # not every store has it
        client_options=client,
        retry_config=retry,
        credential_provider=now,
    )
