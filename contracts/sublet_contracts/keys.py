"""Ed25519 keys and party ids. A party's id *is* its public key, so that verifying needs no look-up.

A small-order public key verifies some signature over every message (RFC 8032 leaves the check to
the caller), and a non-canonical one gives a party two ids: both are refused here, where every id
that comes from outside becomes a key.
"""

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sublet_contracts.durable import make_folder

PARTY_PATTERN = r"^ed25519-[0-9a-f]{64}$"
SIGNATURE_BYTES = 64

_FIELD_PRIME = 2**255 - 19
# y coordinates of the eight points whose order divides eight (the sign of x does not matter here).
_SMALL_ORDER_Y = frozenset(
    {
        0,
        1,
        _FIELD_PRIME - 1,
        int.from_bytes(
            bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
            "little",
        ),
        int.from_bytes(
            bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
            "little",
        ),
    }
)


class KeyRefused(ValueError):
    """The public key is malformed, non-canonical or of small order."""


@lru_cache(maxsize=4096)
def public_key(party: str) -> Ed25519PublicKey:
    """Return the key that `party` names. Raises KeyRefused."""
    # Python's `$` lets a line feed pass, which would give the party a second id.
    if not re.fullmatch(PARTY_PATTERN, party):
        raise KeyRefused(f"{party[:80]!r} is not a party id (ed25519- and 64 hex digits)")
    raw = bytes.fromhex(party.removeprefix("ed25519-"))
    y = int.from_bytes(raw, "little") & (2**255 - 1)
    if y >= _FIELD_PRIME:
        raise KeyRefused(f"{short(party)} is not encoded canonically; make a new key")
    if y in _SMALL_ORDER_Y:
        raise KeyRefused(f"{short(party)} is a point of small order; make a new key")
    return Ed25519PublicKey.from_public_bytes(raw)


def verify(party: str, signature: bytes, message: bytes) -> bool:
    """Say whether `signature` is `party`'s over exactly `message`. Raises KeyRefused."""
    key = public_key(party)
    if len(signature) != SIGNATURE_BYTES:
        return False
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def short(identifier: str) -> str:
    """Return the form of a party or document id that people see: ten digits."""
    return identifier.removeprefix("ed25519-")[:10]


@dataclass(frozen=True)
class SigningKey:
    """A party's private key. Never printed, never sent."""

    _private: Ed25519PrivateKey
    party: str

    def __repr__(self) -> str:
        return f"SigningKey({short(self.party)})"

    @classmethod
    def from_seed(cls, seed: bytes) -> "SigningKey":
        """Return the key of a 32-byte seed (RFC 8032's private key)."""
        private = Ed25519PrivateKey.from_private_bytes(seed)
        return cls(private, "ed25519-" + private.public_key().public_bytes_raw().hex())

    @classmethod
    def generate(cls) -> "SigningKey":
        """Return a new key from the operating system's randomness."""
        return cls.from_seed(os.urandom(32))

    @classmethod
    def load_or_create(cls, path: Path) -> "SigningKey":
        """Return the key kept at `path` (mode 0600), made on first use.

        Raises KeyRefused if the file isn't a key or if others may read it.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            make_folder(path.parent, 0o700)
            return cls._create(path)
        with os.fdopen(descriptor, "rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise KeyRefused(f"{path} can be read by others; run: chmod 600 {path}")
            text = file.read(1024).strip()
        try:
            seed = bytes.fromhex(text.decode("ascii"))
            if len(seed) != 32:
                raise ValueError("not 32 bytes")
        except ValueError as error:
            raise KeyRefused(
                f"{path} does not hold a key; move it away to make a new one"
            ) from error
        # Whoever made it may have died before its name was durable.
        _fsync_folder(path.parent)
        return cls.from_seed(seed)

    @classmethod
    def _create(cls, path: Path) -> "SigningKey":
        seed = os.urandom(32)
        # Written aside and linked into place: two first uses at once agree on one key, and a crash
        # leaves none rather than half of one.
        aside = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(seed.hex().encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(aside, path)
            except FileExistsError:
                return cls.load_or_create(path)
            try:
                _fsync_folder(path.parent)
            except OSError:
                # A key that a power cut may take away must not sign anything.
                path.unlink()
                raise
        finally:
            aside.unlink()
        return cls.from_seed(seed)

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte signature over `message`."""
        return self._private.sign(message)


def _fsync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return  # another's folder, with a key for us in it: it's theirs to keep
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
