"""Tree indexes: how a folder (checkpoint, input, outputs) is cut into content-addressed chunks.

The index is itself a blob: JSON that lists files, and for each its chunks in order. Chunks are at
most CHUNK_BYTES long and are named by their digest, so what is unchanged moves once. A path is
relative and plain: no '..', no link, no absolute path can be written from one. What could not be
carried (outputs only: see outputs_tree.py) is listed beside it, each entry with its reason.

A tree that is read may belong to a running job, which can swap a file or a folder for a link at any
moment: everything below the root is therefore opened from its folder's descriptor, never by path.
"""

import errno
import itertools
import os
import stat
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from sublet_contracts.cuts import CHUNK_BYTES as CHUNK_BYTES
from sublet_contracts.cuts import HEAD_BYTES, chunk_lengths
from sublet_contracts.digests import Hasher, digest_of, raw_of
from sublet_contracts.documents import refused_by_validation
from sublet_contracts.encoding import EncodingError, canonical_json, parse_json
from sublet_contracts.fields import Count, Digest
from sublet_contracts.paths import MAX_PATH_BYTES, check_relative_path
from sublet_contracts.tree_links import MAX_LINKS, TreeLink, check_links

MAX_INDEX_BYTES = 16 * 1024 * 1024
MAX_FILES = 20_000
MAX_TREE_BYTES = 64 * 1024**3
"""of a checkpoint or outputs, in all"""
MAX_LEFT_OUT = 1_000
MAX_SHOWN_CHARACTERS = 300

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Size = Annotated[int, Field(ge=1, le=CHUNK_BYTES)]
Source = tuple[Path, int, int]
"""where a chunk lies: file, offset and size in bytes"""


class TreeRefused(ValueError):
    """A tree breaks a rule; the message names the file and the rule."""


class Chunk(BaseModel):
    """A piece of a file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    digest: Digest
    size_bytes: Size = Field(description="1 byte at least")


OnChunk = Callable[[Chunk, Path, int], None]
"""is told of a chunk, its file, and where in it the chunk begins"""


class TreeFile(BaseModel):
    """One regular file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str = Field(min_length=1, max_length=MAX_PATH_BYTES, description="relative to the root")
    size_bytes: Count = Field(description="of the whole file")
    executable: bool = Field(default=False, description="whether its owner may execute it")
    chunks: tuple[Chunk, ...] = Field(description="in order; none for an empty file")

    @property
    def content(self) -> str:
        """A name of its content, made of its chunks': FileContent gives the same."""
        digests = b"".join(raw_of(chunk.digest) for chunk in self.chunks)
        return digest_of(digests)

    @field_validator("path")
    @classmethod
    def _plain(cls, path: str) -> str:
        return check_relative_path(path)

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if sum(chunk.size_bytes for chunk in self.chunks) != self.size_bytes:
            raise ValueError(f"{self.path}: its chunks don't add up to size_bytes")
        return self


class FileContent:
    """Names the content of a file that passes by piece by piece, as TreeFile.content does."""

    def __init__(self) -> None:
        self._digests = Hasher()
        self._chunk = Hasher()
        self._head = bytearray()
        self._lengths: Iterator[int] | None = None
        """None: not enough of the beginning has come to know."""
        self._wanted = self._left = 0

    def update(self, data: bytes) -> None:
        """Take the next piece."""
        if self._lengths is not None:
            self._take(memoryview(data))
            return
        self._head += data
        if len(self._head) >= HEAD_BYTES:
            self._begin()

    def _begin(self) -> None:
        head, self._head = self._head, bytearray()
        self._lengths = chunk_lengths(memoryview(head)[:HEAD_BYTES])
        self._wanted = self._left = next(self._lengths)
        self._take(memoryview(head))

    def _take(self, rest: memoryview) -> None:
        while rest:
            piece = rest[: self._left]
            self._chunk.update(piece)
            self._left -= len(piece)
            rest = rest[len(piece) :]
            if not self._left:
                self._end_chunk()

    def name(self) -> str:
        """Return the name of all that has passed; nothing more may come."""
        if self._lengths is None:
            self._begin()
        if self._left < self._wanted:
            self._end_chunk()
        return self._digests.digest()

    def _end_chunk(self) -> None:
        self._digests.update(raw_of(self._chunk.digest()))
        self._chunk = Hasher()
        if self._lengths is not None:
            self._wanted = self._left = next(self._lengths)


class WhyLeftOut(StrEnum):
    """Why something that lay in a folder is not in its index."""

    LINK = "link"
    NOT_A_FILE = "not_a_file"
    NAME = "name"
    UNREADABLE = "unreadable"
    CHANGED = "changed"
    TOO_MANY = "too_many"
    TOO_BIG = "too_big"
    TOO_DEEP = "too_deep"
    NO_ROOM = "no_room"
    NO_TIME = "no_time"


LEFT_OUT_SAYS: dict[WhyLeftOut, str] = {
    WhyLeftOut.LINK: "a link, which isn't carried",
    WhyLeftOut.NOT_A_FILE: "neither a file nor a folder",
    WhyLeftOut.NAME: "its name can't be carried: no UTF-8, a backslash or control character, or "
    "too long",
    WhyLeftOut.UNREADABLE: "it can't be read",
    WhyLeftOut.CHANGED: "it changed or went away while it was read",
    WhyLeftOut.TOO_MANY: f"more than {MAX_FILES} files; pack many small ones into one",
    WhyLeftOut.TOO_BIG: "with it there were more bytes than are brought back",
    WhyLeftOut.TOO_DEEP: "its folders lie too deep in one another",
    WhyLeftOut.NO_ROOM: "the broker has no more room for this job",
    WhyLeftOut.NO_TIME: "the time to hand it over was too short",
}
"""The words for a person."""


class LeftOut(BaseModel):
    """Something that lay in the folder and is not carried."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str = Field(
        max_length=MAX_SHOWN_CHARACTERS, description="to be shown: escaped and cut; '': the folder"
    )
    why: WhyLeftOut = Field(strict=False, description="the kind of reason")
    detail: str = Field(
        default="", max_length=MAX_SHOWN_CHARACTERS, description="more of it, to be shown"
    )

    @field_validator("path", "detail")
    @classmethod
    def _printable(cls, text: str) -> str:
        # Not by `isprintable`: what counts as that differs between versions of Unicode.
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
            raise ValueError("it holds a control character")
        return text


class TreeIndex(BaseModel):
    """All files of a tree, sorted by path. A lone file has its own name as its path."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    version: int = Field(default=1, ge=1, le=1, description="of this format")
    files: tuple[TreeFile, ...] = Field(max_length=MAX_FILES, description="sorted by path")
    links: tuple[TreeLink, ...] = Field(
        default=(),
        max_length=MAX_LINKS,
        description="sorted by path; in a renter's inputs alone, never in what a job wrote",
    )
    left_out: tuple[LeftOut, ...] = Field(
        default=(), max_length=MAX_LEFT_OUT, description="what lay there and is not carried"
    )
    left_out_total: Count = Field(
        default=0, description="how much that is, what has no entry in left_out included"
    )

    @model_validator(mode="after")
    def _counted(self) -> Self:
        if self.left_out_total < len(self.left_out):
            raise ValueError("left_out_total: it is less than left_out lists")
        return self

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
        check_links(self.links, taken)
        sizes: dict[str, int] = {}
        for file in self.files:
            for chunk in file.chunks:
                if sizes.setdefault(chunk.digest, chunk.size_bytes) != chunk.size_bytes:
                    raise ValueError(f"{file.path}: one chunk can't have two sizes")
        return self

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    def to_bytes(self) -> bytes:
        """Return the index as a blob."""
        return canonical_json(self.model_dump(mode="json"))

    def chunks(self) -> dict[str, int]:
        """Return each distinct chunk's digest with its size in bytes."""
        return {c.digest: c.size_bytes for file in self.files for c in file.chunks}


@dataclass(frozen=True)
class ScannedTree:
    """A folder as it was read: its index, and where each chunk lies on disk."""

    index: TreeIndex
    sources: dict[str, Source]
    """by digest"""

    def without(self, lost: Mapping[str, WhyLeftOut]) -> "ScannedTree":
        """Return the tree without the files that need one of these chunks, which are listed as left
        out, each for its reason."""
        kept: list[TreeFile] = []
        left_out = list(self.index.left_out)
        total = self.index.left_out_total
        for file in self.index.files:
            why = next((lost[c.digest] for c in file.chunks if c.digest in lost), None)
            if why is None:
                kept.append(file)
                continue
            total += 1
            if len(left_out) < MAX_LEFT_OUT:
                left_out.append(LeftOut(path=shown(file.path), why=why))
        index = TreeIndex(files=tuple(kept), left_out=tuple(left_out), left_out_total=total)
        needed = index.chunks()
        return ScannedTree(index, {k: v for k, v in self.sources.items() if k in needed})

    def read_chunk(self, digest: str) -> bytes:
        """Return a chunk. Raises TreeRefused if the file has changed since it was scanned."""
        data = self.raw_chunk(digest)
        if digest_of(data) != digest:
            raise TreeRefused(f"{self.sources[digest][0]} changed while it was being read")
        return data

    def raw_chunk(self, digest: str) -> bytes:
        """Return what lies where the chunk was, for who receives it to hash. Raises TreeRefused if
        it is gone, or shorter."""
        source = self.sources[digest]
        data = bytearray(source[2])
        read_source(source, memoryview(data))
        return bytes(data)


def read_source(source: Source, buffer: memoryview) -> None:
    """Fill the buffer with what lies where a chunk was, for who receives it to hash. Raises
    TreeRefused if it is gone, or shorter; OSError."""
    path, offset, size = source
    descriptor = _open(path, path.name)
    try:
        # Regular files only: a pipe in its place would keep us waiting.
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        whole = regular and len(buffer) == size and _fill(descriptor, buffer, offset) == size
    finally:
        os.close(descriptor)
    if not whole:
        raise TreeRefused(f"{path} changed while it was being uploaded; submit again")


def shown(text: str) -> str:
    """Return a stranger's text as it can be shown and written down: escaped where it holds control
    characters or bytes that are no UTF-8, and cut. What is fit to be shown stays as it is."""
    try:
        raw = text.encode(errors="surrogateescape")
        said = raw.decode(errors="backslashreplace")
    except UnicodeEncodeError:
        said = text.encode(errors="backslashreplace").decode()
    plain = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in said
    )
    limit = MAX_SHOWN_CHARACTERS
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."


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
    on_chunk: OnChunk | None = None,
    inside: Path | None = None,
) -> ScannedTree:
    """Read a file or a folder into chunks. `skip` are top-level names that are left out. `on_chunk`
    is told of each, its file and where in it the chunk begins; what that raises ends it.

    `inside` is a folder above `root` that is ours, when what lies between the two may be a
    stranger's: from there on no link is followed. Raises TreeRefused on links, devices, odd names,
    unreadable or vanished files, too many files or more than `max_bytes`; FileNotFoundError if
    `root` isn't there.
    """
    files: list[TreeFile] = []
    sources: dict[str, Source] = {}
    total = 0
    top = open_root(root, inside)
    is_folder = stat.S_ISDIR(os.fstat(top).st_mode)
    try:
        for descriptor, relative in _open_files(top, root, skip):
            with os.fdopen(descriptor, "rb") as file:
                if len(files) >= MAX_FILES:
                    raise TreeRefused(
                        f"{root} holds more than {MAX_FILES} files; pack them into one"
                    )
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise TreeRefused(f"{relative} is not a regular file")
                path = root / relative if is_folder else root
                left = max_bytes - total
                told = partial(_told, on_chunk, path) if on_chunk else None
                found = cut_file(file, relative, left, status.st_mode, told)
                if found is None:
                    raise TreeRefused(f"{root.name} holds more than {max_bytes} bytes")
            total += found.size_bytes
            files.append(found)
            note_sources(sources, found, path)
    finally:
        os.close(top)
    files.sort(key=lambda file: file.path)
    return ScannedTree(TreeIndex(files=tuple(files)), sources)


def cut_file(
    file: BufferedReader,
    relative: str,
    max_bytes: int,
    mode: int,
    on_chunk: Callable[[Chunk, int], None] | None = None,
) -> TreeFile | None:
    """Read an open file into chunks; None: it has more than `max_bytes`. `mode`: its st_mode.
    Raises OSError, and what `on_chunk` raises, which is told of each chunk and its offset."""
    chunks: list[Chunk] = []
    size_bytes = 0
    # One buffer for all: new memory for each piece costs more than to hash it.
    buffer = memoryview(bytearray(HEAD_BYTES))
    descriptor = file.fileno()
    head = _fill(descriptor, buffer, 0)
    lengths = chunk_lengths(buffer[:head])
    length = min(head, next(lengths))
    while length:
        if size_bytes + length > max_bytes:
            return None
        chunk = Chunk(digest=digest_of(buffer[:length]), size_bytes=length)
        chunks.append(chunk)
        if on_chunk:
            on_chunk(chunk, size_bytes)
        size_bytes += length
        length = _fill(descriptor, buffer[: next(lengths)], size_bytes)
    return TreeFile(
        path=relative,
        size_bytes=size_bytes,
        executable=bool(mode & stat.S_IXUSR),
        chunks=tuple(chunks),
    )


def _fill(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read until the buffer is full or the file at its end; return how much was read."""
    length = 0
    while length < len(buffer) and (
        read := os.preadv(descriptor, [buffer[length:]], offset + length)
    ):
        length += read
    return length


def _told(on_chunk: OnChunk, path: Path, chunk: Chunk, offset: int) -> None:
    on_chunk(chunk, path, offset)


def note_sources(sources: dict[str, Source], file: TreeFile, path: Path) -> None:
    """Add where each of a file's chunks lies, `path` being where the file does."""
    offset = 0
    for chunk in file.chunks:
        sources.setdefault(chunk.digest, (path, offset, chunk.size_bytes))
        offset += chunk.size_bytes


def open_root(root: Path, inside: Path | None) -> int:
    """Return a descriptor of the tree's root, a file or a folder. Raises TreeRefused, OSError."""
    if inside is None or root == inside:
        return _open(root, str(root), missing_is_refused=False)
    *above, name = root.relative_to(inside).parts
    base = os.open(inside, _OPEN | os.O_DIRECTORY)
    try:
        parent = open_below(base, tuple(above))
    finally:
        os.close(base)
    try:
        return _open(name, str(root), folder=parent, missing_is_refused=False)
    finally:
        os.close(parent)


def _open(
    path: Path | str, said: str, *, folder: int | None = None, missing_is_refused: bool = True
) -> int:
    try:
        return os.open(path, _OPEN, dir_fd=folder)
    except OSError as error:
        match error.errno:
            case errno.ELOOP:
                raise TreeRefused(f"{said} is a link; links are not carried") from error
            case errno.ENOENT | errno.ENOTDIR if missing_is_refused:
                raise TreeRefused(f"{said} changed while it was being read; try again") from error
            case errno.EACCES | errno.EPERM:
                raise TreeRefused(f"{said} can't be read: permission denied") from error
            case errno.ENXIO:
                raise TreeRefused(f"{said} is neither a file nor a folder") from error
            case _:
                raise


def open_below(top: int, parts: tuple[str, ...]) -> int:
    """Return a descriptor of `parts` below `top`, following no link on the way, for the caller to
    close. Raises TreeRefused, OSError."""
    here = os.dup(top)
    for depth, part in enumerate(parts, start=1):
        try:
            below = _open(part, "/".join(parts[:depth]), folder=here)
        finally:
            os.close(here)
        here = below
    return here


def _open_files(top: int, root: Path, skip: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Yield each file's descriptor, which the caller closes, and its path relative to the root."""
    mode = os.fstat(top).st_mode
    if stat.S_ISREG(mode):
        yield os.dup(top), _checked(root.name)
        return
    if not stat.S_ISDIR(mode):
        raise TreeRefused(f"{root} is neither a file nor a folder")
    pending: list[tuple[str, ...]] = [()]
    left = 2 * MAX_FILES  # folders count here: they cost time, though they are not carried
    while pending:
        parts = pending.pop()
        # From the root each time, so that a deep tree does not cost a descriptor per level.
        folder = open_below(top, parts)
        try:
            with os.scandir(folder) as listing:
                entries = list(itertools.islice(listing, left + 1))
            left -= len(entries)
            if left < 0:
                raise TreeRefused(f"{root} holds more than {2 * MAX_FILES} files and folders")
            for entry in sorted(entries, key=lambda item: item.name):
                if not parts and entry.name in skip:
                    continue
                relative = _checked("/".join((*parts, entry.name)))
                if entry.is_symlink():
                    raise TreeRefused(f"{relative} is a link; links are not carried")
                if entry.is_dir(follow_symlinks=False):
                    pending.append((*parts, entry.name))
                elif entry.is_file(follow_symlinks=False):
                    yield _open(entry.name, relative, folder=folder), relative
                else:
                    raise TreeRefused(f"{relative} is neither a file nor a folder")
        except NotADirectoryError as error:
            raise TreeRefused(f"{'/'.join(parts)} changed while it was being read") from error
        finally:
            os.close(folder)


def _checked(relative: str) -> str:
    try:
        return check_relative_path(relative)
    except ValueError as error:
        raise TreeRefused(str(error)) from error
