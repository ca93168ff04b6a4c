"""Tree indexes: how a folder (checkpoint, input, outputs) is cut into content-addressed chunks.

The index is itself a blob: JSON that lists files, and for each its chunks in order. Chunks are at
most CHUNK_BYTES long and are named by their SHA-256, so what is unchanged moves once. A path is
relative and plain: no '..', no link, no absolute path can be written from one.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sublet_contracts.documents import Count, Sha256, refused_by_validation
from sublet_contracts.encoding import EncodingError, canonical_json, parse_json

CHUNK_BYTES = 4 * 1024 * 1024
MAX_INDEX_BYTES = 16 * 1024 * 1024
MAX_FILES = 20_000

Size = Annotated[int, Field(ge=1, le=CHUNK_BYTES)]


class TreeRefused(ValueError):
    """A tree breaks a rule; the message names the file and the rule."""


class Chunk(BaseModel):
    """A piece of a file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    sha256: Sha256
    size_bytes: Size


class TreeFile(BaseModel):
    """One regular file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str = Field(min_length=1, max_length=1024)
    size_bytes: Count
    sha256: Sha256
    executable: bool = False
    chunks: tuple[Chunk, ...]

    @field_validator("path")
    @classmethod
    def _plain(cls, path: str) -> str:
        return check_relative_path(path)

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if sum(chunk.size_bytes for chunk in self.chunks) != self.size_bytes:
            raise ValueError(f"{self.path}: its chunks don't add up to size_bytes")
        return self


class TreeIndex(BaseModel):
    """All files of a tree, sorted by path. A lone file has the path '.'-less name it came with."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    version: int = Field(default=1, ge=1, le=1)
    files: tuple[TreeFile, ...] = Field(max_length=MAX_FILES)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        paths = [file.path for file in self.files]
        if paths != sorted(set(paths)):
            raise ValueError("files: paths must be sorted and stand once each")
        taken = set(paths)
        for path in paths:
            parents = path.split("/")[:-1]
            for depth in range(1, len(parents) + 1):
                if "/".join(parents[:depth]) in taken:
                    raise ValueError(f"files: {path} lies below something that is a file")
        return self

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    def to_bytes(self) -> bytes:
        """Return the index as a blob."""
        return canonical_json(self.model_dump(mode="json"))

    def chunks(self) -> dict[str, int]:
        """Return each distinct chunk's sha256 with its size in bytes."""
        return {c.sha256: c.size_bytes for file in self.files for c in file.chunks}


@dataclass(frozen=True)
class ScannedTree:
    """A folder as it was read: its index, and where each chunk lies on disk."""

    index: TreeIndex
    sources: dict[str, tuple[Path, int, int]]
    """chunk sha256 -> (file, offset in bytes, size in bytes)"""

    def read_chunk(self, sha256: str) -> bytes:
        """Return a chunk. Raises TreeRefused if the file has changed since it was scanned."""
        path, offset, size = self.sources[sha256]
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise TreeRefused(f"{path} changed while it was being uploaded; submit again")
        return data


def check_relative_path(path: str) -> str:
    """Return `path` if it is plain and relative. Raises ValueError."""
    parts = path.split("/")
    if path.startswith("/") or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{path!r} must be a plain relative path without '..'")
    if any(ord(character) < 32 or character in "\\\x7f" for character in path):
        raise ValueError(f"{path!r} holds a control character or a backslash")
    return path


def parse_index(data: bytes) -> TreeIndex:
    """Return the index that `data` is. Raises TreeRefused."""
    try:
        parse_json(data, max_bytes=MAX_INDEX_BYTES)
        return TreeIndex.model_validate_json(data)
    except EncodingError as error:
        raise TreeRefused(f"the tree index is refused: {error}") from error
    except ValidationError as error:
        raise TreeRefused(f"the tree index is refused: {refused_by_validation(error)}") from error


def scan_tree(
    root: Path,
    *,
    max_bytes: int,
    skip: frozenset[str] = frozenset(),
    on_bytes: Callable[[int], None] | None = None,
) -> ScannedTree:
    """Read a file or a folder into chunks. `skip` are top-level names that are left out.

    Raises TreeRefused on links, devices, odd names, too many files or more than `max_bytes`;
    FileNotFoundError if `root` isn't there.
    """
    files: list[TreeFile] = []
    sources: dict[str, tuple[Path, int, int]] = {}
    total = 0
    for path, relative in _walk(root, skip):
        if len(files) >= MAX_FILES:
            raise TreeRefused(f"{root} holds more than {MAX_FILES} files; pack them into one")
        try:
            check_relative_path(relative)
        except ValueError as error:
            raise TreeRefused(str(error)) from error
        chunks: list[Chunk] = []
        whole = hashlib.sha256()
        # O_NOFOLLOW: the tree may belong to a running job, which could swap a file for a link
        # between our looking at it and opening it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise TreeRefused(f"{relative} is not a regular file")
            offset = 0
            while data := file.read(CHUNK_BYTES):
                total += len(data)
                if total > max_bytes:
                    raise TreeRefused(f"{root.name} holds more than {max_bytes} bytes")
                digest = hashlib.sha256(data).hexdigest()
                whole.update(data)
                chunks.append(Chunk(sha256=digest, size_bytes=len(data)))
                sources.setdefault(digest, (path, offset, len(data)))
                offset += len(data)
                if on_bytes:
                    on_bytes(len(data))
        files.append(
            TreeFile(
                path=relative,
                size_bytes=offset,
                sha256=whole.hexdigest(),
                executable=bool(status.st_mode & stat.S_IXUSR),
                chunks=tuple(chunks),
            )
        )
    files.sort(key=lambda file: file.path)
    return ScannedTree(TreeIndex(files=tuple(files)), sources)


def write_tree(index: TreeIndex, root: Path, read_chunk: Callable[[str], bytes]) -> None:
    """Write the tree below `root` (an empty or new folder), checking each chunk and each file.

    Raises TreeRefused if content does not match its hash. Every file is fsynced.
    """
    root.mkdir(parents=True, exist_ok=True)
    for entry in index.files:
        target = root / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        whole = hashlib.sha256()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = os.open(target, flags, 0o755 if entry.executable else 0o644)
        with os.fdopen(descriptor, "wb") as file:
            for chunk in entry.chunks:
                data = read_chunk(chunk.sha256)
                if hashlib.sha256(data).hexdigest() != chunk.sha256:
                    raise TreeRefused(f"{entry.path}: a chunk does not match its hash")
                whole.update(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if whole.hexdigest() != entry.sha256:
            raise TreeRefused(f"{entry.path} does not match its hash")


def _walk(root: Path, skip: frozenset[str]) -> Iterator[tuple[Path, str]]:
    mode = os.lstat(root).st_mode
    if stat.S_ISREG(mode):
        yield root, root.name
        return
    if not stat.S_ISDIR(mode):
        raise TreeRefused(f"{root} is neither a file nor a folder (links are not followed)")
    pending = [(root, "")]
    while pending:
        folder, prefix = pending.pop()
        for entry in sorted(os.scandir(folder), key=lambda item: item.name):
            if not prefix and entry.name in skip:
                continue
            relative = prefix + entry.name
            if entry.is_symlink():
                raise TreeRefused(f"{relative} is a link; links are not carried")
            if entry.is_dir(follow_symlinks=False):
                pending.append((Path(entry.path), relative + "/"))
            elif entry.is_file(follow_symlinks=False):
                yield Path(entry.path), relative
            else:
                raise TreeRefused(f"{relative} is neither a file nor a folder")
