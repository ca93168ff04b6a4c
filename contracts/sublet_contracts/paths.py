"""Paths of a tree: plain and relative, so that none can be written outside of it."""

from typing import Annotated

from pydantic import AfterValidator

MAX_PATH_BYTES = 1024


def check_relative_path(path: str) -> str:
    """Return `path` if it is plain and relative. Raises ValueError."""
    parts = path.split("/")
    if path.startswith("/") or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{path!r} must be a plain relative path without '..'")
    try:
        encoded = path.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path!r} is not UTF-8") from error
    if len(encoded) > MAX_PATH_BYTES or any(len(part) > 255 for part in encoded.split(b"/")):
        raise ValueError(
            f"{path[:80]!r}... is too long: {MAX_PATH_BYTES} bytes, and 255 a part, are the most"
        )
    if any(ord(character) < 32 or character in "\\\x7f" for character in path):
        raise ValueError(f"{path!r} holds a control character or a backslash")
    return path


RelativePath = Annotated[str, AfterValidator(check_relative_path)]
