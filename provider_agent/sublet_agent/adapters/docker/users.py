"""The job's user as programs look him up: lines for the image's own passwd and group. Pure.

Without one `getpass.getuser()`, `os.path.expanduser` and `ssh` fail, and with them what asks for a
name in passing (torch's compile cache does). Ours come first, so that they count where the image
knows the same number by another name; its own lines stay.
"""

from __future__ import annotations

NAME = "job"
MAX_BYTES = 1024 * 1024
_MAX_NAMES = 1000


def passwd(image: bytes, uid: int, gid: int, home: str) -> tuple[str, str]:
    """Return (the whole file, the user's name in it). `image`: the image's, b'' where it has
    none."""
    kept = _lines(image, 7)
    name = _free_name({line.split(":", 1)[0] for line in kept})
    own = f"{name}:x:{uid}:{gid}::{home}:/bin/sh"
    return "\n".join((own, *(kept or ["root:x:0:0:root:/root:/bin/sh"]), "")), name


def group(image: bytes, gid: int, name: str) -> str:
    """Return the whole file, with a group of the user's."""
    kept = _lines(image, 4)
    taken = {line.split(":", 1)[0] for line in kept}
    own = f"{name if name not in taken else _free_name(taken)}:x:{gid}:"
    return "\n".join((own, *(kept or ["root:x:0:"]), ""))


def ids_of(image: bytes, user: str) -> tuple[int, int] | None:
    """Return uid and gid of a user that a job names: UID, UID:GID, or by the image's passwd.
    None: it has no such user, or it is root."""
    for line in _lines(image, 7):
        name, _, uid, gid, *_ = line.split(":")
        if user in (name, uid) and uid.isdecimal() and gid.isdecimal():
            return _not_root(int(uid), int(gid))
    uid, _, gid = user.partition(":")
    return _not_root(int(uid), int(gid or uid)) if uid.isdecimal() else None


def _not_root(uid: int, gid: int) -> tuple[int, int] | None:
    return (uid, gid) if 0 < uid < 2**31 and 0 < gid < 2**31 else None


def home_of(image: bytes, user: str) -> str:
    """Return the home that an image's passwd gives to the user that the image names (by name or
    number, with a group or without); '' if none."""
    wanted = user.split(":", 1)[0] or "root"
    for line in _lines(image, 7):
        fields = line.split(":")
        if wanted in (fields[0], fields[2]):
            return fields[5]
    return ""


def _lines(image: bytes, fields: int) -> list[str]:
    """Return the lines that are as they must be."""
    text = image[:MAX_BYTES].decode(errors="replace")
    return [
        line
        for line in text.split("\n")
        if line.count(":") == fields - 1 and line.isprintable() and not line.startswith("#")
    ]


def _free_name(taken: set[str]) -> str:
    names = (NAME, *(f"{NAME}-{number}" for number in range(1, _MAX_NAMES)))
    return next((name for name in names if name not in taken), NAME)
