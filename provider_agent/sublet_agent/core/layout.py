"""Where a run's own folders are: as the job sees them, and on this machine's disk. Pure.

    runs/<lease>/work   the working folder: the image's WORKDIR, or the job's --workdir, or /work
    runs/<lease>/home   HOME, as the image has it, or /home/job
    runs/<lease>/tmp    /tmp
    runs/<lease>/saved-N  a --checkpoint folder that lies in none of the others, nor in the outputs

All three are the run's alone, may be written and executed, begin with what the image has there, and
go with the run. Each is a folder of its own that the job can't put anything else in the place of,
unless it is the same as another one, or lies in the outputs folder: then it is part of that.

Where the image's folder can't be had (it is the root, holds more than a run may bring along, or is
closed to the job's user) the run gets an empty one at a place of ours, and `notes` say so.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sublet_contracts.run_conventions import NOT_THE_JOBS

WORK, HOME, TMP, OUTPUTS, SAVED = "work", "home", "tmp", "outputs", "saved"
"""the folders' names below runs/<lease>"""
WORK_PATH = "/work"
HOME_PATH = "/home/job"
TMP_PATH = "/tmp"
SEED_BYTES = 2 * 1000**3
"""what a run's folders may begin with, in all; less where the job asked for less disk"""
SEED_ENTRIES = 50_000
"""files and folders, of each"""
_MAX_PATH = 512


@dataclass(frozen=True)
class Layout:
    """Where a run's own folders are in its container."""

    work_path: str = WORK_PATH
    home_path: str = HOME_PATH
    user_name: str = "job"
    user_ids: tuple[int, int] | None = None
    """uid and gid of a job that has chosen them"""
    user_files: tuple[str, ...] = ()
    """files of /etc that are the run's own, below runs/<lease>/etc"""
    has_caches: bool = False
    """whether HOME has a .cache that isn't empty: it is not to be hidden by another"""
    cache_dir: str = ""
    """where on this disk the renter's own caches lie that outlive the run; '': he has none"""
    cache_bytes: int = 0
    """what they held before the run"""
    notes: tuple[str, ...] = ()
    """what the renter is told of it, before the job's own first line"""


UNFURNISHED = Layout()
"""of a run whose image has nothing of its own"""


@dataclass(frozen=True)
class ImageFolders:
    """What an image says of itself: '' where it says nothing."""

    work_path: str = ""
    home_path: str = ""


@dataclass(frozen=True)
class Place:
    """Where something of the job's lies on this machine."""

    root: Path
    """a folder that the job can't put anything else in the place of"""
    inside: str
    """the way from there, '' for itself: may lead over links that the job has made"""
    name: str
    """which folder it is: work, home, tmp, outputs; 'input': may not be written"""


def is_within(path: str, folder: str) -> bool:
    """Say whether a path is a folder or lies in it; both as `plain_path` returns them."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def plain_path(path: str) -> str:
    """Return an absolute path without '.', '..' or doubled slashes; '' if it is none, or too long.

    An image may say anything of itself.
    """
    if not path.startswith("/") or len(path) > _MAX_PATH or not path.isprintable() or ":" in path:
        return ""
    return "/" + posixpath.normpath(path).strip("/")


def why_not_own(path: str) -> str:
    """Say why a path can't be a folder of a run's own; '' if it can."""
    if path == "/":
        return "is the root of the image"
    if any(is_within(path, folder) for folder in NOT_THE_JOBS):
        return "is not the job's to use"
    return ""


def planned(image: ImageFolders, *, asked_work: str = "", asked_home: str = "") -> Layout:
    """Return where a run's folders are to be. `asked_work`, `asked_home`: what the job wishes."""
    named = asked_work or image.work_path
    work = plain_path(named)
    notes: tuple[str, ...] = ()
    if not named:
        notes = (f"the working folder is {WORK_PATH}: the image names none of its own",)
        work = WORK_PATH
    elif why := why_not_own(work) if work else "is no plain path":
        notes = (f"the working folder is {WORK_PATH}: {ascii(named[:80])[1:-1]} {why}",)
        work = WORK_PATH
    home = plain_path(asked_home or image.home_path)
    if not home or why_not_own(home):
        home = HOME_PATH
    return Layout(work, home, notes=notes)


def own_folders(
    layout: Layout, outputs_path: str | None, checkpoint_paths: tuple[str, ...] = ()
) -> dict[str, str]:
    """Return what of the run's folders is mounted where: path in the container -> name."""
    found: dict[str, str] = {} if outputs_path is None else {outputs_path: OUTPUTS}
    for path, name in ((layout.work_path, WORK), (layout.home_path, HOME), (TMP_PATH, TMP)):
        if path not in found and not (outputs_path and is_within(path, outputs_path)):
            found[path] = name
    for number, path in enumerate(checkpoint_paths):
        if path.startswith("/") and not any(is_within(path, folder) for folder in found):
            found[path] = f"{SAVED}-{number}"
    return found


def seeded_folders(layout: Layout, outputs_path: str | None) -> dict[str, str]:
    """Return which of them begin with what the image has there, in the order in which they are
    served: the outputs folder only where work or home lie in it."""
    own = own_folders(layout, outputs_path)
    wanted = (layout.work_path, layout.home_path, TMP_PATH)
    mounts = [max((at for at in own if is_within(path, at)), key=len) for path in wanted]
    return {path: own[path] for path in dict.fromkeys(mounts)}


def below(path: str, folders: Iterable[str]) -> list[str]:
    """Return those folders that lie in a path, as seen from it: what is mounted over it there."""
    return [
        folder[len(path.rstrip("/")) + 1 :]
        for folder in folders
        if folder != path and is_within(folder, path)
    ]


@dataclass(frozen=True)
class RunFolders:
    """A run's folders on disk, with the layout that the job sees them in."""

    root: Path
    """runs/<lease>"""
    layout: Layout = UNFURNISHED
    outputs_path: str | None = None
    inputs: Mapping[str, Path] = field(default_factory=dict)
    """destination -> where it lies"""
    checkpoint_paths: tuple[str, ...] = ()
    """folders that the job named as its checkpoint, as it named them"""

    def mounts(self) -> dict[str, Path]:
        """Return every folder that can be written: path in the container -> folder on disk."""
        own = own_folders(self.layout, self.outputs_path, self.checkpoint_paths)
        return {path: self.root / name for path, name in own.items()}

    def place_of(self, path: str) -> Place | None:
        """Return where a path of the container lies on this disk; one that isn't absolute is meant
        from the working folder. None: it is in the image, or is nobody's to name."""
        wanted = plain_path(path if path.startswith("/") else f"{self.layout.work_path}/{path}")
        if not wanted:
            return None
        own = own_folders(self.layout, self.outputs_path, self.checkpoint_paths)
        all_of_them = {**dict.fromkeys(self.inputs, "input"), **own}
        over = [folder for folder in all_of_them if is_within(wanted, folder)]
        if not over:
            return None
        mount = max(over, key=len)
        name = all_of_them[mount]
        root = self.root / name if mount in own else self.inputs[mount]
        return Place(root, wanted[len(mount) :].lstrip("/"), name)

    def mounted_in(self, path: str) -> list[str]:
        """Return what is mounted in a folder of the container, as seen from it; one that isn't
        absolute is meant from the working folder."""
        wanted = plain_path(path if path.startswith("/") else f"{self.layout.work_path}/{path}")
        own = own_folders(self.layout, self.outputs_path, self.checkpoint_paths)
        return sorted({*below(wanted, own), *below(wanted, self.inputs)})

    def input_at(self, path: str) -> Path | None:
        """Return the folder of an input that is what lies at a path of the run's own; None: that
        is the image's."""
        over = [folder for folder in self.inputs if is_within(path, folder)]
        if not over:
            return None
        mount = max(over, key=len)
        return self.inputs[mount] / path[len(mount) :].lstrip("/")

    @property
    def work(self) -> Place:
        """Where the working folder is."""
        place = self.place_of(self.layout.work_path)
        assert place is not None  # it is mounted itself, or lies in what is
        return place
