"""Moving content: inputs to the broker before a job is signed, outputs back from it."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sublet.http import Link
from sublet_contracts.api import MissingRequest, MissingView
from sublet_contracts.documents import Input
from sublet_contracts.tree import ScannedTree, TreeRefused, parse_index, scan_tree, write_tree

MAX_INPUT_BYTES = 1 << 40
BATCH = 5_000
PARALLEL = 4

OnBytes = Callable[[int], None]


class InputError(ValueError):
    """An input can't be sent; the message names it and says what to do."""


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
        index_sha256=hashlib.sha256(scanned.index.to_bytes()).hexdigest(),
        total_bytes=scanned.index.total_bytes,
    )


def _upload(
    link: Link, source: Path, destination: str, announce: Callable[[str, int], OnBytes]
) -> Input:
    scanned = _scanned(source)
    index = scanned.index.to_bytes()
    index_sha256 = hashlib.sha256(index).hexdigest()
    missing = _missing(link, "/v1/blobs/missing", [*scanned.index.chunks(), index_sha256])
    sizes = scanned.index.chunks()
    advance = announce(source.name, sum(sizes.get(name, 0) for name in missing))

    def send(sha256: str) -> None:
        try:
            data = index if sha256 == index_sha256 else scanned.read_chunk(sha256)
        except (TreeRefused, FileNotFoundError) as error:
            raise InputError(f"input {source} changed while it was sent; submit again") from error
        link.send("PUT", f"/v1/blobs/{sha256}", data=data, content_type="application/octet-stream")
        if sha256 != index_sha256:
            advance(len(data))

    # The index goes last: what it names is then there.
    _in_parallel(send, [name for name in missing if name != index_sha256])
    if index_sha256 in missing:
        send(index_sha256)
    return _described(source, destination, scanned)


def download_tree(
    link: Link,
    job: str,
    index_sha256: str,
    target: Path,
    announce: Callable[[str, int], OnBytes],
) -> list[Path]:
    """Write a tree of a job below `target`, each file checked, and replaced as a whole.

    Returns the files. Raises TreeRefused where content does not match, SubletError.
    """
    index = parse_index(_blob(link, job, index_sha256))
    advance = announce(target.name or str(target), index.total_bytes)
    target.mkdir(parents=True, exist_ok=True)
    aside = target / f".sublet-{index_sha256[:12]}-{os.getpid()}"

    def read_chunk(sha256: str) -> bytes:
        data = _blob(link, job, sha256)
        advance(len(data))
        return data

    try:
        write_tree(index, aside, read_chunk)
        written = []
        for entry in index.files:
            place = target / entry.path
            place.parent.mkdir(parents=True, exist_ok=True)
            (aside / entry.path).replace(place)
            written.append(place)
        return written
    finally:
        _remove(aside)


def _blob(link: Link, job: str, sha256: str) -> bytes:
    return link.send("GET", f"/v1/jobs/{job}/blobs/{sha256}").content


def _missing(link: Link, path: str, names: list[str]) -> list[str]:
    found: list[str] = []
    for start in range(0, len(names), BATCH):
        body = MissingRequest(sha256=tuple(names[start : start + BATCH]))
        found += link.call("POST", path, MissingView, body=body).missing
    return found


def _in_parallel(send: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(PARALLEL) as pool:
        for _ in pool.map(send, names):
            pass


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True) if folder.exists() else []:
        path.rmdir() if path.is_dir() else path.unlink()
    if folder.exists():
        folder.rmdir()
