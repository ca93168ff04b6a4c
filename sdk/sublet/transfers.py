"""Moving content: inputs to the broker before a job is signed, outputs back from it."""

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from sublet import addressed
from sublet.errors import SubletError
from sublet.http import Link
from sublet_contracts.amounts import format_bytes
from sublet_contracts.api import MissingRequest, MissingView
from sublet_contracts.digests import digest_of, hex_of
from sublet_contracts.documents import Input
from sublet_contracts.packs import PackRefused, PackTable, cut_read, in_packs, in_reads
from sublet_contracts.paths import check_relative_path
from sublet_contracts.problems import ProblemCode
from sublet_contracts.tree import (
    MAX_INDEX_BYTES,
    Chunk,
    ScannedTree,
    TreeFile,
    TreeIndex,
    TreeRefused,
    parse_index,
    scan_tree,
)

MAX_INPUT_BYTES = 1 << 40
BATCH = 5_000
PARALLEL = 4

OnBytes = Callable[[int], None]
T = TypeVar("T")


class InputError(ValueError):
    """An input can't be sent; the message names it and says what to do."""


class TargetError(ValueError):
    """A download can't be written there; the message names the place and says what to do."""


def upload_inputs(
    link: Link, inputs: Mapping[str, str], announce: Callable[[str, int], OnBytes]
) -> tuple[Input, ...]:
    """Send each local file or folder; return what the job names. Only what the broker lacks moves.

    `announce(what, total_bytes)` is called before each; what it returns is called with the
    bytes of each part that has moved.
    Raises InputError, SubletError.
    """
    return tuple(
        _upload(link, Path(source).expanduser(), destination, announce)
        for source, destination in inputs.items()
    )


def describe_inputs(inputs: Mapping[str, str]) -> tuple[Input, ...]:
    """Return what a job would name, without sending anything. Raises InputError."""
    return tuple(
        _described(Path(source).expanduser(), destination, _scanned(Path(source).expanduser()))
        for source, destination in inputs.items()
    )


def _scanned(source: Path) -> ScannedTree:
    try:
        return scan_tree(source, max_bytes=MAX_INPUT_BYTES)
    except FileNotFoundError as error:
        raise InputError(f"input {source}: there is no such file; check the path") from error
    except (TreeRefused, OSError) as error:
        raise InputError(f"input {source}: {error}") from error


def _described(source: Path, destination: str, scanned: ScannedTree) -> Input:
    return Input(
        destination=destination,
        kind="file" if source.is_file() else "folder",
        index_digest=digest_of(scanned.index.to_bytes()),
        total_bytes=scanned.index.total_bytes,
    )


def _upload(
    link: Link, source: Path, destination: str, announce: Callable[[str, int], OnBytes]
) -> Input:
    scanned = _scanned(source)
    send_tree(link, f"input {source}", scanned, partial(announce, source.name))
    return _described(source, destination, scanned)


def send_tree(
    link: Link, what: str, scanned: ScannedTree, announce: Callable[[int], OnBytes]
) -> None:
    """Send what the broker lacks of a tree that was read. Raises InputError, which names `what`, if
    it has changed since; SubletError."""
    index = scanned.index.to_bytes()
    index_digest = digest_of(index)
    missing, by_address = _missing(
        link, "/v1/blobs/missing", [*scanned.index.chunks(), index_digest]
    )
    sizes = scanned.index.chunks()
    advance = announce(sum(sizes.get(name, 0) for name in missing))

    def send(table: PackTable) -> None:
        changed = InputError(f"{what} changed while it was sent; submit again")
        try:
            chunks = [scanned.raw_chunk(digest) for digest, _ in table.chunks]
        except (TreeRefused, FileNotFoundError) as error:
            raise changed from error
        try:
            if by_address:
                addressed.send_pack(link, table, chunks)
            else:
                data = b"".join((table.to_bytes(), *chunks))
                link.send("PUT", f"/v1/packs/{table.name}", data=data, signed_digest=table.name)
        except SubletError as error:
            if error.problem.code == ProblemCode.HASH_MISMATCH:
                raise changed from error
            raise
        except addressed.StoreRefused as error:
            raise InputError(f"{what}: {error}; submit again later") from error
        for chunk in chunks:
            advance(len(chunk))

    # The index goes last: what it names is then there.
    _in_parallel(send, in_packs((name for name in missing if name != index_digest), sizes))
    if index_digest in missing:
        link.send("PUT", f"/v1/blobs/{index_digest}", data=index, signed_digest=index_digest)


def read_index(link: Link, job: str, index_digest: str) -> TreeIndex:
    """Return the index of a tree of a job. Raises TreeRefused, SubletError."""
    data = link.send("GET", f"/v1/jobs/{job}/blobs/{index_digest}").content
    if len(data) > MAX_INDEX_BYTES or digest_of(data) != index_digest:
        raise TreeRefused("the broker gave an index that does not match its hash")
    return parse_index(data)


def read_file(link: Link, job: str, file: TreeFile) -> bytes:
    """Return the content of one small file of a tree. Raises TreeRefused, SubletError."""
    return b"".join(piece for part in in_reads(file.chunks) for piece in _chunks(link, job, part))


def download_files(
    link: Link,
    job: str,
    files: Mapping[str, TreeFile],
    target: Path,
    announce: Callable[[str, int], OnBytes],
) -> tuple[Path, ...]:
    """Write files of a tree below `target`, under the names given; return where they lie.

    Each is checked and appears whole, in place of what lay there. What was interrupted goes on when
    it is asked for again: pieces that have come lie in a folder `.sublet-...` of the target until
    then. Raises TargetError, TreeRefused where content does not match, SubletError, OSError.
    """
    for name in files:
        check_relative_path(name)
    _make_target(target)
    todo = {name: file for name, file in files.items() if not _is_there(target / name, file)}
    aside = target / f".sublet-{_name_of(files)}"
    pieces, places = _pieces_missing(todo, aside)
    size_bytes = sum(chunk.size_bytes for chunk in pieces.values())
    advance = announce(target.name or str(target), size_bytes)
    free_bytes = shutil.disk_usage(target).free
    if size_bytes > free_bytes:
        raise TargetError(
            f"{target}: {format_bytes(size_bytes)} are to be written, {format_bytes(free_bytes)} "
            "are free; make room, or name a folder on another disk"
        )

    def fetch(chunks: tuple[Chunk, ...]) -> None:
        for chunk, data in zip(chunks, _chunks(link, job, chunks), strict=True):
            for path, offset in places[chunk.digest]:
                descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
                try:
                    _write_all(descriptor, data, offset)
                finally:
                    os.close(descriptor)
            advance(len(data))

    _in_parallel(fetch, in_reads(pieces.values()))
    parents: set[Path] = set()
    for name, file in todo.items():
        piece, place = aside / name, target / name
        if not _is_there(piece, file):
            piece.unlink()
            raise TreeRefused(f"{name} does not match its hash; download it again")
        piece.chmod(0o755 if file.executable else 0o644)
        if place.parent not in parents:
            _make_parent(place, target)
            parents.add(place.parent)
        if place.is_dir() and not place.is_symlink():
            raise TargetError(
                f"{place} is a folder, and a file is to be written there; move it away"
            )
        piece.replace(place)
    _remove(aside)
    return tuple(target / name for name in files)


def _make_target(target: Path) -> None:
    for path in (target, *target.parents):
        if path.is_dir():
            break
        if path.exists() or path.is_symlink():
            raise TargetError(
                f"{path} is not a folder; name a folder to download into, which is made if need be"
            )
    target.mkdir(parents=True, exist_ok=True)


def _make_parent(place: Path, target: Path) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise TargetError(
            f"{place.parent} is not a folder, and {place.name} is to be written there; move it away"
        ) from error
    if not place.parent.resolve().is_relative_to(target.resolve()):
        raise TargetError(f"{place.parent} leads out of {target}; move the link away")


def _name_of(files: Mapping[str, TreeFile]) -> str:
    """The same files are downloaded into the same folder, whenever that is asked for."""
    listed = "\0".join(f"{name}\0{file.content}" for name, file in sorted(files.items()))
    return hex_of(digest_of(listed.encode()))[:12]


def _is_there(path: Path, file: TreeFile) -> bool:
    """Whether exactly this file lies there."""
    try:
        if path.is_symlink() or path.stat().st_size != file.size_bytes or not path.is_file():
            return False
        with path.open("rb") as opened:
            return all(
                digest_of(opened.read(chunk.size_bytes)) == chunk.digest for chunk in file.chunks
            )
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False


def _pieces_missing(
    files: Mapping[str, TreeFile], aside: Path
) -> tuple[dict[str, Chunk], dict[str, list[tuple[Path, int]]]]:
    """Make room for the files in `aside`; return the chunks that are not there yet, and where each
    belongs: file and offset in bytes."""
    pieces: dict[str, Chunk] = {}
    places: dict[str, list[tuple[Path, int]]] = {}
    for name, file in files.items():
        path = aside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        with os.fdopen(os.open(path, flags, 0o600), "r+b") as opened:
            begun = os.fstat(opened.fileno()).st_size
            opened.truncate(file.size_bytes)
            offset = 0
            for chunk in file.chunks:
                data = b""
                if offset + chunk.size_bytes <= begun:
                    opened.seek(offset)
                    data = opened.read(chunk.size_bytes)
                if digest_of(data) != chunk.digest:
                    pieces[chunk.digest] = chunk
                    places.setdefault(chunk.digest, []).append((path, offset))
                offset += chunk.size_bytes
    return pieces, places


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    os.lseek(descriptor, offset, os.SEEK_SET)
    while view:
        view = view[os.write(descriptor, view) :]


def _chunks(link: Link, job: str, chunks: tuple[Chunk, ...]) -> list[bytes]:
    names = ",".join(chunk.digest for chunk in chunks)
    try:
        data = link.send("GET", f"/v1/jobs/{job}/chunks/{names}").content
    except SubletError as error:
        if error.problem.code != ProblemCode.BY_ADDRESS:
            raise
        return _by_address(link, job, chunks)
    try:
        return cut_read(data, chunks)
    except PackRefused as error:
        raise TreeRefused(
            "the broker gave a chunk that does not match its hash; try again"
        ) from error


def _by_address(link: Link, job: str, chunks: tuple[Chunk, ...]) -> list[bytes]:
    try:
        return cut_read(addressed.read_chunks(link, job, chunks), chunks)
    except SubletError as error:
        if error.problem.code != ProblemCode.TOO_LARGE or len(chunks) == 1:
            raise
        half = len(chunks) // 2
        parts = (chunks[:half], chunks[half:])
        return [data for part in parts for data in _by_address(link, job, part)]
    except (addressed.StoreRefused, PackRefused):
        # The broker reads it itself, and finds out whether it is damaged.
        return [
            data
            for chunk in chunks
            for data in cut_read(
                link.send("GET", f"/v1/jobs/{job}/blobs/{chunk.digest}").content, (chunk,)
            )
        ]


def _missing(link: Link, path: str, names: list[str]) -> tuple[list[str], bool]:
    """Return those that the broker lacks, and whether packs of them are sent by address."""
    found: list[str] = []
    by_address = False
    for start in range(0, len(names), BATCH):
        body = MissingRequest(digests=tuple(names[start : start + BATCH]))
        view = link.call("POST", path, MissingView, body=body)
        found += view.missing
        by_address = view.by_address
    return found, by_address


def _in_parallel(act: Callable[[T], None], names: Iterable[T]) -> None:
    """Act on each, PARALLEL at once and as many waiting; the first error ends it."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        window: deque[Future[None]] = deque()
        try:
            for name in names:
                window.append(pool.submit(act, name))
                if len(window) >= 2 * PARALLEL:
                    window.popleft().result()
            while window:
                window.popleft().result()
        finally:
            for future in window:
                future.cancel()


def _remove(folder: Path) -> None:
    """Remove what is left of a download that is complete: empty folders."""
    for path in sorted(folder.rglob("*"), reverse=True) if folder.exists() else []:
        path.rmdir() if path.is_dir() else path.unlink()
    if folder.exists():
        folder.rmdir()
