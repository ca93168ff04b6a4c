"""A folder of code as a tree that can be sent: its files and links, and where it comes from."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sublet.code_folder import CodeError, CodeFolder, read_code_folder
from sublet.code_origin import DIFF, FOLDER, ORIGIN, CodeOrigin, find_origin
from sublet.http import Link
from sublet.transfers import OnBytes, send_tree
from sublet_contracts.digests import digest_of
from sublet_contracts.documents import Input
from sublet_contracts.tree import (
    ScannedTree,
    TreeFile,
    TreeIndex,
    TreeRefused,
    cut_file,
    note_sources,
)
from sublet_contracts.tree_links import TreeLink

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Code:
    """A folder of code that was read."""

    folder: CodeFolder
    origin: CodeOrigin
    tree: ScannedTree


def read_code(root: Path, beside: Path) -> Code:
    """Read a folder of code. What is noted of its origin is written into the folder `beside`, which
    has to stay until the tree was sent. Raises CodeError."""
    folder = read_code_folder(root)
    paths = [file.path for file in folder.files]
    if any(path.split("/")[0] == FOLDER for path in [*paths, *folder.links]):
        raise CodeError(f"--code {root}: {FOLDER} is made by sublet; leave it out in .subletignore")
    origin, diff = find_origin(root, paths)
    sources: dict[str, tuple[Path, int, int]] = {}
    files = [_cut(root / path, path, sources) for path in paths]
    for path, data in ((ORIGIN, origin.to_bytes()), (DIFF, diff)):
        if data:
            place = beside / path.rpartition("/")[2]
            place.write_bytes(data)
            files.append(_cut(place, path, sources))
    files.sort(key=lambda file: file.path)
    links = tuple(TreeLink(path=path, target=to) for path, to in sorted(folder.links.items()))
    try:
        index = TreeIndex(files=tuple(files), links=links)
    except ValueError as error:
        raise CodeError(f"--code {root}: {error}") from error
    return Code(folder, origin, ScannedTree(index, sources))


def preview(root: Path) -> list[str]:
    """Say in words what would be sent; no content is read. Raises CodeError."""
    folder = read_code_folder(root)
    origin, _ = find_origin(root, [file.path for file in folder.files])
    return [*folder.lines(), origin.line()]


def send_code(
    link: Link, root: Path, destination: str, announce: Callable[[str, int], OnBytes]
) -> Input:
    """Send what the broker lacks of a folder of code; return what the job names. `announce` as in
    upload_inputs. Raises CodeError, InputError, SubletError."""
    with tempfile.TemporaryDirectory(prefix="sublet-code-") as beside:
        code = read_code(root, Path(beside))
        send_tree(link, f"--code {root}", code.tree, partial(announce, "code"))
        return _described(code, destination)


def describe_code(root: Path, destination: str) -> Input:
    """Return what a job would name, without sending anything. Raises CodeError."""
    with tempfile.TemporaryDirectory(prefix="sublet-code-") as beside:
        return _described(read_code(root, Path(beside)), destination)


def _described(code: Code, destination: str) -> Input:
    index = code.tree.index
    return Input(
        destination=destination,
        kind="folder",
        index_digest=digest_of(index.to_bytes()),
        total_bytes=index.total_bytes,
    )


def _cut(path: Path, relative: str, sources: dict[str, tuple[Path, int, int]]) -> TreeFile:
    try:
        with os.fdopen(os.open(path, _OPEN), "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise CodeError(f"--code: {relative} changed while it was being read; try again")
            found = cut_file(file, relative, info.st_size, info.st_mode)
    except (OSError, TreeRefused) as error:
        raise CodeError(f"--code: {relative}: {error}") from error
    if found is None:
        raise CodeError(f"--code: {relative} grew while it was being read; try again")
    note_sources(sources, found, path)
    return found
