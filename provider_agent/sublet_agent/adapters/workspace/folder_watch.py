"""What lies in the folders that a job named as its checkpoint, and whether it is at rest and whole.

The rules stand in `sublet_contracts.checkpoint_folders`. The folders are the job's, which may put
anything there at any moment: everything is opened from its folder's descriptor, no link is
followed, and listing ends at a bound. It runs in the process that reads for the agent (reader.py),
which looks often, so that it knows of each file whether it was seen at rest before its job was
killed, and whether it only grows.
"""

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sublet_agent.adapters.workspace.open_writers import has_writer
from sublet_agent.adapters.workspace.outputs_search import as_listed, entries_below, judged, opened
from sublet_agent.core.folders_at_rest import Ended, FileSeen, State, decide
from sublet_contracts.checkpoint_folders import (
    MAX_EMPTY_FOLDERS,
    MAX_FOLDER_FILES,
    MAX_LINKS,
    SavedFolder,
    SavedLink,
    is_log,
    trained_steps,
)
from sublet_contracts.checkpoint_layouts import (
    MAX_STATE_BYTES,
    TrainerState,
    read_trainer_state,
)
from sublet_contracts.file_formats import Verdict
from sublet_contracts.framework_layouts import ListedFile, in_the_making
from sublet_contracts.tree import TreeRefused

MAX_ENTRIES = 40_000
MAX_DEPTH = 32
_LEFT_OUT_SAID = 5
_SAMPLES, _SAMPLE_BYTES = 32, 1024
_NS_PER_MS = 1_000_000


class WatchedFile(BaseModel):
    """A regular file in one of the folders. All but the first three tell it from what it is later:
    times in ns by this machine's clock."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    folder: int
    path: str
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    log: bool = False
    """whether it only carries along: it may be torn, and may change meanwhile"""
    written: bool = False
    """whether this run has changed it"""


class Watched(BaseModel):
    """What was seen at one look."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    state: State
    says: str = ""
    """why not more"""
    age_ms: int = 0
    """how long ago the newest change was that counts"""
    trained_step: int = 0
    total_steps: int = 0
    files: tuple[WatchedFile, ...] = ()
    """where it is ready"""
    links: tuple[SavedLink, ...] = ()
    empty: tuple[SavedFolder, ...] = ()
    left_out: int = 0
    left_out_said: tuple[str, ...] = Field(default=(), max_length=_LEFT_OUT_SAID)
    """of what can't be carried (sockets, FIFOs, names that are no text): a few"""


@dataclass(frozen=True)
class Wish:
    """What the agent wants to know."""

    leave_out: tuple[tuple[str, ...], ...] = ()
    """for each folder what lies there without belonging to it: where something else is mounted"""
    waited_ms: int | None = None
    """since when a snapshot is due; None: none is"""
    interval_ms: int = 120_000
    """how often one is to be due"""
    since_ns: int = 0
    """when the last one was taken"""
    begun_ns: int = 0
    """when the run began: what lay there before was not written by it"""
    ended: Ended = ""


@dataclass
class _Known:
    """A file as it was seen last."""

    file: WatchedFile
    since_s: float
    at_rest: bool = False
    """Nobody had it open for writing when it was seen so."""
    writers_known: bool = True
    verdict: Verdict | None = None
    sample: tuple[int, bytes] | None = None
    """its size when it was at rest, and a hash of pieces of it"""
    grows: bool = False
    first: bool = False
    """It has not changed since the first look of all."""


class FolderWatch:
    """What is known of one run's folders."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], _Known] = {}
        self._is_first = True
        self._links: dict[SavedLink, float] = {}
        """since when (monotonic, in seconds) each has been as it is; 0.0: since before"""
        self._empty: list[SavedFolder] = []
        self._left_out: list[str] = []
        self._left_out_count = 0

    def look(self, tops: list[int | None], wish: Wish) -> Watched:
        """Look into the folders; None stands for one that isn't there. Raises TreeRefused: there is
        too much to look through; OSError."""
        self._left_out, self._left_out_count = [], 0
        listing = self._list(tops, wish.leave_out)
        self._note(tops, listing, wish.ended)
        known = [self._known[file.folder, file.path] for file in listing]
        files = [self._seen(tops, each, wish) for each in known]
        counted = [each for each, seen in zip(known, files, strict=True) if seen.counts]
        state, says = decide(
            files,
            waited_ms=wish.waited_ms,
            interval_ms=wish.interval_ms,
            ended=wish.ended,
            in_the_making=lambda: _in_the_making(len(tops), counted, wish.ended),
            links_quiet_ms=(time.monotonic() - max(self._links.values(), default=0.0)) * 1000,
        )
        if state != "ready":
            return self._watched(state, says)
        now_ns = time.time_ns()
        newest_ns = max(each.file.ctime_ns for each in counted)
        trained = _trained(tops, listing)
        plain = {(each.file.folder, each.file.path) for each in counted}
        return self._watched(
            "ready",
            age_ms=max(0, now_ns - newest_ns) // _NS_PER_MS,
            trained_step=trained.step if trained else 0,
            total_steps=trained.total_steps if trained else 0,
            files=tuple(
                file.model_copy(
                    update={
                        "log": (file.folder, file.path) not in plain,
                        "written": file.ctime_ns >= wish.begun_ns,
                    }
                )
                for file in listing
            ),
            links=tuple(self._links),
            empty=tuple(self._empty),
        )

    def _watched(self, state: State, says: str = "", **more: object) -> Watched:
        return Watched.model_validate(
            {
                "state": state,
                "says": says[:500],
                "left_out": self._left_out_count,
                "left_out_said": tuple(self._left_out),
                **more,
            }
        )

    # -- what is there -----------------------------------------------------------------------------

    def _list(
        self, tops: list[int | None], leave_out: tuple[tuple[str, ...], ...]
    ) -> list[WatchedFile]:
        listing: list[WatchedFile] = []
        found: dict[SavedLink, float] = {}
        inner: list[tuple[int, tuple[str, ...]]] = []
        left = MAX_ENTRIES
        for number, top in enumerate(tops):
            skipped = frozenset(leave_out[number]) if number < len(leave_out) else frozenset()
            if top is None:
                continue
            with contextlib.closing(entries_below(top, MAX_DEPTH, leave_out=skipped)) as below:
                for folder, path, entry in below:
                    left -= 1
                    if left < 0:
                        raise TreeRefused(
                            f"the --checkpoint folders hold more than {MAX_ENTRIES} files and "
                            "folders, too many to save: name a smaller one"
                        )
                    if path in skipped:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        parts = tuple(path.split("/"))
                        if len(parts) <= MAX_DEPTH:
                            inner.append((number, parts))
                        else:
                            self._leave_out(path)
                        continue
                    if entry.is_symlink():
                        if link := _as_link(number, path, entry.name, folder):
                            found[link] = self._links.get(link, time.monotonic())
                        else:
                            self._leave_out(path)
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        info = entry.stat(follow_symlinks=False)
                        if watched := _as_watched(number, path, info):
                            listing.append(watched)
                        else:
                            self._leave_out(path)
        if len(listing) > MAX_FOLDER_FILES:
            raise TreeRefused(
                f"the --checkpoint folders hold {len(listing)} files, and {MAX_FOLDER_FILES} are "
                "the most: pack them into one, or name a smaller folder"
            )
        listing.sort(key=lambda file: (file.folder, file.path))
        for link in list(found)[MAX_LINKS:]:
            self._leave_out(link.path)
            del found[link]
        self._links = dict(sorted(found.items(), key=lambda each: (each[0].folder, each[0].path)))
        self._empty = self._without_content(inner, [*listing, *found])
        return listing

    def _without_content(
        self,
        inner: list[tuple[int, tuple[str, ...]]],
        content: Sequence[WatchedFile | SavedLink],
    ) -> list[SavedFolder]:
        """Return those of the folders in which neither content nor a folder lies."""
        above = {(number, parts[:-1]) for number, parts in inner}
        above.update((each.folder, tuple(each.path.split("/")[:-1])) for each in content)
        empty = []
        for number, parts in sorted(set(inner) - above):
            path = "/".join(parts)
            try:
                empty.append(SavedFolder(folder=number, path=path))
            except ValidationError:
                self._leave_out(path)
        return empty[:MAX_EMPTY_FOLDERS]

    def _leave_out(self, path: str) -> None:
        self._left_out_count += 1
        if len(self._left_out) < _LEFT_OUT_SAID:
            self._left_out.append(ascii(path)[1:-1][:100])

    def _note(self, tops: list[int | None], listing: list[WatchedFile], ended: Ended) -> None:
        """Remember of each file that has changed whether it is at rest, and whether it has only
        grown."""
        now_s = time.monotonic()
        known: dict[tuple[int, str], _Known] = {}
        for file in listing:
            key = file.folder, file.path
            before = self._known.get(key)
            if before is not None and before.file == file:
                known[key] = before
                if before.at_rest or ended:
                    continue
                now = before
            else:
                now = known[key] = _Known(file, now_s, first=self._is_first)
                if before is not None:
                    now.sample, now.grows = before.sample, before.grows
            top = tops[file.folder]
            if not is_log(file.path) and top is not None:
                _look_at(top, now, ended)
        self._known, self._is_first = known, False

    def _seen(self, tops: list[int | None], known: _Known, wish: Wish) -> FileSeen:
        file, top = known.file, tops[known.file.folder]
        # By what was seen as well: the clock may have been set back since.
        written_by_the_run = not known.first or file.ctime_ns >= wish.begun_ns

        def verdict() -> Verdict:
            if known.verdict is None:
                with opened(top or 0, file.path) as descriptor:
                    if descriptor is None:
                        return Verdict("torn", "it was deleted just now")
                    known.verdict = judged(descriptor, file.path)
            return known.verdict

        # The clock may have been set back since: then by what was seen.
        seen_ms = (time.monotonic() - known.since_s) * 1000
        return FileSeen(
            file.path,
            new=file.ctime_ns > wish.since_ns,
            at_rest=known.at_rest,
            quiet_ms=max(seen_ms, (time.time_ns() - file.ctime_ns) / _NS_PER_MS),
            writers_known=known.writers_known,
            grows=known.grows,
            torn=lambda: verdict().torn if written_by_the_run else "",
            sure=lambda: verdict().kind == "whole",
        )


def _in_the_making(folders: int, counted: list[_Known], ended: Ended) -> str:
    killed_ms = time.time_ns() // _NS_PER_MS if ended == "killed" else None
    for number in range(folders):
        files = [known.file for known in counted if known.file.folder == number]
        if says := in_the_making(
            ((file.path, file.size_bytes, file.mtime_ns // _NS_PER_MS) for file in files),
            killed_ms,
        ):
            return says
    return ""


def _look_at(top: int, known: _Known, ended: Ended) -> None:
    with opened(top, known.file.path) as file:
        if file is None:
            return
        if ended != "killed":
            # Of who was killed nobody knows any more what it had open.
            writer = has_writer(file)
            known.writers_known = writer is not None
            known.at_rest = writer is not True
            if not known.at_rest:
                return
        known.verdict = judged(file, known.file.path)
        before, known.sample = known.sample, _sample(file, known.file.size_bytes)
        if known.verdict.kind == "torn" or not known.file.size_bytes:
            known.sample = None  # what it becomes when it is completed is no growth
        if before is not None and before != known.sample:
            longer = known.file.size_bytes > before[0]
            known.grows = longer and _sample(file, before[0]) == before


def _sample(file: int, size: int) -> tuple[int, bytes]:
    """Return what tells whether a file still begins with what it was at that size: pieces from its
    beginning to its end."""
    taken = hashlib.sha256()
    last = max(0, size - _SAMPLE_BYTES)
    for at in sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)}):
        taken.update(os.pread(file, min(_SAMPLE_BYTES, size - at), at))
    return size, taken.digest()


def _trained(tops: list[int | None], listing: list[WatchedFile]) -> TrainerState | None:
    """Return what the newest Trainer's state in the folders says."""
    for number, top in enumerate(tops):
        if top is None:
            continue
        files = [
            ListedFile(
                path=file.path, size_bytes=file.size_bytes, mtime_ms=file.mtime_ns // _NS_PER_MS
            )
            for file in listing
            if file.folder == number and file.mtime_ns >= 0
        ]
        for path in trained_steps(files):
            step = int(path.rsplit("/", 2)[-2].rsplit("-", 1)[-1])
            with opened(top, path) as file:
                data = b"" if file is None else os.pread(file, MAX_STATE_BYTES, 0)
            state = read_trainer_state(data, step)
            if state is not None:
                return state
    return None


def _as_link(number: int, path: str, name: str, folder: int) -> SavedLink | None:
    """Return a link, or None for what no checkpoint can hold: odd names and targets."""
    try:
        target = os.readlink(name, dir_fd=folder)
        return SavedLink(folder=number, path=path, target=target)
    except (OSError, ValueError):
        return None


def _as_watched(folder: int, path: str, info: os.stat_result) -> WatchedFile | None:
    """Return the entry, or None for what no checkpoint can hold: other than files, odd names."""
    if not stat.S_ISREG(info.st_mode) or as_listed(path, info) is None:
        return None
    return WatchedFile(
        folder=folder,
        path=path,
        size_bytes=info.st_size,
        mtime_ns=info.st_mtime_ns,
        ctime_ns=info.st_ctime_ns,
        inode=info.st_ino,
    )
