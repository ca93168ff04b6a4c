"""Folders that a job named as its checkpoint (`--checkpoint DIR`): when one is saved, and as what.

Pure: the agent lists the folders and reads a little of them, copies them aside when these rules say
so, and uploads the copy. The copy holds each file under the name of `packed`, beside a record of
them all (RECORD); before the next run starts they are put back where they lay. Rules:

1. What is named is what is saved, and nothing else: layouts that are recognised in the outputs
   folder (checkpoint_layouts.py) count only where no folder is named.
2. A snapshot is taken when one is due: at each checkpoint interval, when the job is asked to stop,
   and once more when it has ended.
3. It is new if a file that counts has changed since the one before. A log doesn't count, nor what
   a framework renames once it is whole: by its name (`is_log`), or because it has only grown, so
   that its old content, which was not torn, is the beginning of the new. A log is carried along,
   but it may be torn, and it may be open.
4. The files that count must be at rest: nobody has one open for writing since its last change, and
   none was changed for a moment (`quiet_needed_ms`). The longer a snapshot is due, the shorter the
   moment may be: a script that saves again and again is caught between two of its saves. Where
   nobody can tell whether a file is open, the moment is long, and stays so.
5. None of them is torn (file_formats.py), and nothing says that more is to come (`in_the_making`
   in framework_layouts.py): else the snapshot waits, and the one before stays what a resume starts
   from. When the job was killed, a file that was never seen at rest must be whole by its own
   format.
6. Its step is what a Trainer's checkpoint in it says, if that is past the step before; otherwise
   steps are counted on from there.
7. What it is worth is counted up to the newest change in it, not to when it was found.
8. Links and empty folders are carried along as such: a script may find its newest checkpoint by a
   link, and write into a folder that its image has. They make no new checkpoint, but a link that
   has just been changed isn't at rest. A link's target is only text to us: nobody here follows one.
"""

import re
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sublet_contracts.documents import MAX_CHECKPOINT_FOLDERS
from sublet_contracts.fields import Count, Digest
from sublet_contracts.framework_layouts import ListedFile, find_checkpoints
from sublet_contracts.paths import RelativePath
from sublet_contracts.tree import MAX_FILES

PACKED = "checkpoint-folders"
"""First part of the path of every file in such a checkpoint."""

RECORD = "checkpoint-folders.json"
"""The file in it that lists them: a FolderSnapshot."""

QUIET_MS = 2_000
LEAST_QUIET_MS = 20
HALVINGS_PER_INTERVAL = 24
"""How often the moment is halved in one checkpoint interval: a script is caught within it that
rests for a tenth of a second between two saves."""
UNKNOWN_QUIET_MS = 10_000
"""where nobody can tell whether a file is open for writing"""
MAX_RECORD_BYTES = 16 * 1024 * 1024
MAX_FOLDER_FILES = MAX_FILES - 1
MAX_LINKS = 4_096
MAX_EMPTY_FOLDERS = 4_096
MAX_TARGET_BYTES = 1_024

_LOG = re.compile(
    r"(?:.*/)?(?:.*\.(?:log|csv|tsv|out|err|pyc)|events\.out\.tfevents\..*)|(?:.*/)?__pycache__/.*"
    r"|.*\.orbax-checkpoint-tmp[^/]*/.*"
)


class SavedFile(BaseModel):
    """A file of one of the folders, as it was saved."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    folder: int = Field(ge=0, lt=MAX_CHECKPOINT_FOLDERS, description="which of the folders")
    path: RelativePath = Field(description="relative to that folder, with '/'")
    size_bytes: Count = Field(description="of the file")
    mtime_ms: Count = Field(description="when it was last written, by the machine's clock")
    content: Digest = Field(description="its content's name (TreeFile.content)")
    written: bool = Field(
        default=True, description="whether the job wrote it: else the image has it"
    )


class SavedFolder(BaseModel):
    """A folder in one of the folders in which nothing is that was saved."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    folder: int = Field(ge=0, lt=MAX_CHECKPOINT_FOLDERS, description="which of the folders")
    path: RelativePath = Field(description="relative to that folder, with '/'")


class SavedLink(SavedFolder):
    """A symbolic link in one of the folders."""

    target: str = Field(description="what it says, wherever that leads")

    @field_validator("target")
    @classmethod
    def _text(cls, target: str) -> str:
        if not 0 < len(target.encode(errors="surrogatepass")) <= MAX_TARGET_BYTES:
            raise ValueError(f"a link's target has 1 to {MAX_TARGET_BYTES} bytes")
        if not target.isprintable():
            raise ValueError("a link's target holds what can't be printed")
        return target


class FolderSnapshot(BaseModel):
    """What the folders held at one moment."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    version: int = Field(default=1, ge=1, le=1, description="of this format")
    step: Count = Field(description="of the checkpoint; never goes back within a job")
    trained_step: Count = Field(description="as a Trainer's state in it says; 0: nothing says it")
    total_steps: Count = Field(description="as a Trainer's state in it says; 0: nothing says it")
    folders: tuple[str, ...] = Field(
        min_length=1, max_length=MAX_CHECKPOINT_FOLDERS, description="as the job named them"
    )
    files: tuple[SavedFile, ...] = Field(
        min_length=1, max_length=MAX_FOLDER_FILES, description="sorted by folder and path"
    )
    links: tuple[SavedLink, ...] = Field(
        default=(), max_length=MAX_LINKS, description="symbolic links, put back after the files"
    )
    empty: tuple[SavedFolder, ...] = Field(
        default=(), max_length=MAX_EMPTY_FOLDERS, description="folders without any of these"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "FolderSnapshot":
        names = [(file.folder, file.path) for file in self.files]
        if names != sorted(set(names)):
            raise ValueError("files: they must be sorted and stand once each")
        links = [(link.folder, link.path) for link in self.links]
        names += [*links, *((folder.folder, folder.path) for folder in self.empty)]
        if len(set(names)) != len(names):
            raise ValueError("links, empty: a name stands twice")
        if max(folder for folder, _ in names) >= len(self.folders):
            raise ValueError("files, links, empty: one lies in a folder that is not listed")
        leaves = set(names)
        for folder, path in names:
            parts = path.split("/")
            above = {(folder, "/".join(parts[:depth])) for depth in range(1, len(parts))}
            if not leaves.isdisjoint(above):
                raise ValueError("files, links, empty: one lies below what is no folder")
        return self

    @property
    def mtime_ms(self) -> int:
        """When its newest file was written."""
        return max(file.mtime_ms for file in self.files)

    @property
    def total_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.size_bytes for file in self.files)

    def to_bytes(self) -> bytes:
        """Return it as RECORD holds it."""
        return self.model_dump_json().encode()


def read_record(data: bytes) -> FolderSnapshot:
    """Return the snapshot that RECORD holds. Raises ValueError."""
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"{RECORD} has more than {MAX_RECORD_BYTES} bytes")
    try:
        return FolderSnapshot.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{RECORD}: {first['msg']}") from error


def packed(folder: int, path: str) -> str:
    """Return the name in the checkpoint of a file of a folder."""
    return f"{PACKED}/{folder}/{path}"


def is_log(path: str) -> bool:
    """Say whether a file's name is that of a log, which alone makes no new checkpoint."""
    return _LOG.fullmatch(path) is not None


def quiet_needed_ms(waited_ms: int, interval_ms: int, *, writers_known: bool) -> int:
    """Return for how long (ms) nothing may have changed, once a snapshot is due for `waited_ms` of
    a job whose checkpoint interval is `interval_ms`."""
    if not writers_known:
        return UNKNOWN_QUIET_MS
    halvings = min(max(0, waited_ms) * HALVINGS_PER_INTERVAL // max(1, interval_ms), 16)
    return max(LEAST_QUIET_MS, QUIET_MS >> halvings)


def trained_steps(files: Sequence[ListedFile]) -> list[str]:
    """Return the paths of the Trainers' states that may say how far the training is, newest first.

    `files`: of one folder.
    """
    found = [checkpoint.state_path for checkpoint in find_checkpoints(files)]
    return [path for path in found if path is not None]


def next_step(after_step: int, trained_step: int) -> int:
    """Return the step of the next snapshot."""
    return max(after_step + 1, trained_step)
