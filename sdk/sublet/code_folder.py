"""Which files of a folder of code go along with a job. Nothing is sent here.

Rules:
1. .git stays home, always. Virtual environments, caches and .env files do unless .subletignore
   says otherwise (`!.env`): neither git's files nor Docker's bring them along.
2. What .gitignore leaves out stays home, in every folder as git reads it, and .dockerignore at the
   top as Docker reads it, which has the last word over git's. .subletignore, written as .gitignore
   is and in every folder too, has the last word over both.
3. A link is followed to nowhere: it goes along as a link where it leads to something in the folder,
   else it is refused by name.
4. Sizes are added up before a byte is read, so a 40 GB folder by mistake costs a moment.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pathspec import GitIgnoreSpec

from sublet.transfers import InputError
from sublet_contracts.amounts import format_bytes

MAX_CODE_BYTES = 2 * 1000**3
"""what an agent copies into a working folder"""
MAX_CODE_FILES = 20_000
MAX_IGNORE_BYTES = 1024 * 1024
LARGEST_SHOWN = 3

_NEVER = (".git", ".hg", ".svn")
STAYS_HOME = (
    ".venv/", "venv/", "node_modules/", "__pycache__/", "*.pyc",
    ".mypy_cache/", ".pytest_cache/", ".ruff_cache/", ".hypothesis/", ".ipynb_checkpoints/",
    ".tox/", ".nox/", ".cache/", ".DS_Store", ".env", ".env.*", "!.env.example",
)  # fmt: skip
_ENVIRONMENT_MARKS = ("pyvenv.cfg", "conda-meta")
"""A folder that holds one of them is a virtual environment, whatever it is called."""


class CodeError(InputError):
    """The folder can't be sent; the message names what and says what to do."""


@dataclass(frozen=True)
class CodeFile:
    """A file that goes along: its path in the folder, with slashes."""

    path: str
    size_bytes: int


@dataclass
class CodeFolder:
    """What of a folder goes along."""

    root: Path
    files: list[CodeFile] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    """path -> where it leads, relative to its own folder"""
    left_out: dict[str, int] = field(default_factory=dict)
    """what left it out -> how many files and folders"""

    @property
    def total_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def largest(self) -> list[CodeFile]:
        """Return the few largest files."""
        return sorted(self.files, key=lambda file: (-file.size_bytes, file.path))[:LARGEST_SHOWN]

    def lines(self) -> list[str]:
        """Say in words what goes along and what doesn't."""
        count = len(self.files) + len(self.links)
        what = "1 file" if count == 1 else f"{count:,} files"
        said = [f"{what}, {format_bytes(self.total_bytes)}"]
        if len(self.files) > 1:
            said[0] += "; the largest: " + ", ".join(
                f"{file.path} ({format_bytes(file.size_bytes)})" for file in self.largest()
            )
        if self.left_out:
            by = ", ".join(f"{count:,} by {why}" for why, count in self.left_out.items())
            said.append(f"left out: {by}")
        return said


@dataclass(frozen=True)
class _Rules:
    """The patterns of one file, for what lies below its folder ("" is the top)."""

    name: str
    folder: str
    spec: GitIgnoreSpec

    def decide(self, path: str) -> bool | None:
        """Say whether these leave it out; None: they say nothing of it."""
        inside = path[len(self.folder) + 1 :] if self.folder else path
        return self.spec.check_file(inside).include


def read_code_folder(root: Path) -> CodeFolder:
    """Return what of a folder goes along. Raises CodeError."""
    if not root.is_dir():
        raise CodeError(
            f"--code {root}: there is no such folder; name the one that holds your code"
        )
    found = CodeFolder(root)
    docker = _docker_rules(root)
    always = _Rules("default", "", GitIgnoreSpec.from_lines(STAYS_HOME))
    total_bytes = 0
    for entry in _walk(root, docker, always, found.left_out):
        path, info = entry
        if stat.S_ISLNK(info.st_mode):
            found.links[path] = _checked_link(root, path)
        elif stat.S_ISREG(info.st_mode):
            found.files.append(CodeFile(path, info.st_size))
            total_bytes += info.st_size
        else:
            raise CodeError(f"--code: {path} is neither a file nor a folder; {_HOW}")
        if total_bytes > MAX_CODE_BYTES or len(found.files) > MAX_CODE_FILES:
            raise CodeError(_too_much(found))
    if not found.files:
        raise CodeError(
            f"--code {root}: nothing in it would be sent; see what its ignore files say"
        )
    _check_links(found)
    return found


_HOW = "leave it out by a line in .subletignore"


def _walk(
    root: Path, docker: _Rules | None, always: _Rules, left_out: dict[str, int]
) -> Iterator[tuple[str, os.stat_result]]:
    """Yield what goes along, sorted, with its path. Folders that stay home are not looked into."""

    def below(
        folder: str, git: tuple[_Rules, ...], own: tuple[_Rules, ...]
    ) -> Iterator[tuple[str, os.stat_result]]:
        here = root / folder
        git = (*git, *_rules_here(here, folder, ".gitignore"))
        own = (*own, *_rules_here(here, folder, ".subletignore"))
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            raise CodeError(f"--code: {folder or root}: {error.strerror}; {_HOW}") from error
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            try:
                path.encode()
            except UnicodeEncodeError as error:
                raise CodeError(f"--code: {path!a} is no UTF-8; rename it") from error
            is_folder = entry.is_dir(follow_symlinks=False)
            by_default = (*git, *((docker,) if docker else ()), always)
            why = _left_out_by(path, is_folder, (*by_default, *own))
            why = "default" if entry.name in _NEVER else why
            if is_folder and not why and _is_environment(here / entry.name):
                why = "default"
            if is_folder and (not why or (docker and why == docker.name)):
                # Docker may send a part of a folder that it leaves out.
                yield from below(path, git, own)
            elif why:
                left_out[why] = left_out.get(why, 0) + 1
            else:
                yield path, entry.stat(follow_symlinks=False)

    yield from below("", (), ())


def _left_out_by(path: str, is_folder: bool, in_order: tuple[_Rules, ...]) -> str:
    """Return what leaves it out, "" if nothing does: the last one that says something of it."""
    for rules in reversed(in_order):
        decided = rules.decide(f"{path}/" if is_folder else path)
        if decided is not None:
            return rules.name if decided else ""
    return ""


def _rules_here(here: Path, folder: str, name: str) -> Iterator[_Rules]:
    lines = _lines(here / name)
    if lines:
        yield _Rules(name, folder, _spec(lines, here / name))


def _docker_rules(root: Path) -> _Rules | None:
    """Docker's patterns begin at the top, and know no slash at their end."""
    lines = []
    for line in _lines(root / ".dockerignore"):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        no, pattern = ("!", text[1:]) if text.startswith("!") else ("", text)
        pattern = pattern.strip().removeprefix("./").strip("/")
        if pattern and pattern != ".":
            lines.append(f"{no}/{pattern}")
    name = ".dockerignore"
    return _Rules(name, "", _spec(lines, root / name)) if lines else None


def _spec(lines: list[str], file: Path) -> GitIgnoreSpec:
    try:
        return GitIgnoreSpec.from_lines(lines)
    except ValueError as error:
        raise CodeError(f"--code: {file}: {error}") from error


def _lines(file: Path) -> list[str]:
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_IGNORE_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError):
        return []
    except OSError as error:
        raise CodeError(f"--code: {file}: {error.strerror}") from error
    if len(data) > MAX_IGNORE_BYTES:
        raise CodeError(f"--code: {file} has more than {format_bytes(MAX_IGNORE_BYTES)}")
    return data.decode(errors="surrogateescape").splitlines()


def _is_environment(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in _ENVIRONMENT_MARKS)


def _checked_link(root: Path, path: str) -> str:
    target = os.readlink(root / path)
    inside = os.path.normpath(os.path.join(os.path.dirname(path), target))
    if os.path.isabs(target) or inside == ".." or inside.startswith("../"):
        raise CodeError(
            f"--code: {path} is a link that leads out of the folder, to {target}; {_HOW}, "
            "or send what it leads to by --input"
        )
    return target


def _check_links(found: CodeFolder) -> None:
    """Raise CodeError where a link leads to something that stays home."""
    there = {file.path for file in found.files} | found.links.keys()
    folders = {parent for path in there for parent in _above(path)} | {"."}
    for path, target in found.links.items():
        leads_to = os.path.normpath(os.path.join(os.path.dirname(path), target))
        if leads_to not in there and leads_to not in folders:
            raise CodeError(
                f"--code: {path} is a link to {target}, which stays home or isn't there; {_HOW}"
            )


def _above(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _too_much(found: CodeFolder) -> str:
    by_top: dict[str, int] = {}
    for file in found.files:
        top = file.path.split("/")[0]
        by_top[top] = by_top.get(top, 0) + file.size_bytes
    largest = sorted(by_top.items(), key=lambda item: -item[1])[:LARGEST_SHOWN]
    named = ", ".join(f"{name} ({format_bytes(size)})" for name, size in largest)
    return (
        f"--code {found.root}: over {format_bytes(MAX_CODE_BYTES)} or {MAX_CODE_FILES:,} files "
        f"(so far the largest: {named}); name what is not code in .subletignore, and send data "
        "by --input"
    )
