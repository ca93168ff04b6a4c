"""What the checkpoints of each framework look like on disk, and when one is whole by its names.

Two tables, FOLDERS and FILES; a framework is added by a row. The orders of writing are those that
the libraries themselves keep (traced: see tests/contracts/test_framework_layouts.py). Pure: who
asks lists the files, and later reads a little of each (file_formats.py); nothing is unpickled.

Rules:
1. A checkpoint that is a folder is known by its `mark`, a file directly in it that is written last.
   It is whole with the mark, one file of each kind that it needs, every shard that a name promises,
   and nothing of `before` younger than the mark: else it is being written anew.
2. Where a framework writes something after the mark that only some scripts have (`later`), a
   checkpoint has what those before it in the same place have. If none is before it, only time
   tells (`must_be_quiet`).
3. Orbax writes below a name that ends with .orbax-checkpoint-tmp and renames that at the end; what
   lies below such a name is none yet, whatever it holds.
4. A torch.distributed folder in a checkpoint-N, or with the name of a part of one, is a part of
   that.
5. A checkpoint that is a file must be a whole ZIP as torch writes it, and hold an optimizer's
   state: with the weights alone nothing can be resumed. Where Lightning keeps a last.ckpt, it is
   written after the others, and is what the script goes on from: none of them is younger. A folder
   in which an optimizer has a file of its own is one whose files belong together, and none of them
   is a checkpoint by itself.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sublet_contracts.fields import Count
from sublet_contracts.paths import RelativePath

ORDER_MS = 1_000
"""By so much what is written last may be older than what is written before it: copies of a
checkpoint keep no order."""
_JUST_BEFORE_MS = 10_000
_CUT_OFF = "it was written just before the run was killed, and perhaps"
_MAX_FILES_LOOKED_AT = 10
"""of the checkpoints that are a file each, in one folder: the newest"""

Framework = Literal[
    "hf-trainer",
    "accelerate",
    "lightning",
    "torch-distributed",
    "torch-save",
    "orbax",
    "keras",
]


class ListedFile(BaseModel):
    """A regular file below the outputs folder, as a listing shows it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: RelativePath = Field(description="relative to the outputs folder, with '/'")
    size_bytes: Count = Field(description="of the file")
    mtime_ms: Count = Field(description="when it was last written, by the machine's clock")


@dataclass(frozen=True)
class FolderLayout:
    """A framework whose checkpoint is a folder. All names are relative to it."""

    framework: Framework
    mark: str
    needs: tuple[re.Pattern[str], ...]
    """of each kind one file that is not empty"""
    before: re.Pattern[str]
    """what is written before the mark"""
    folder: re.Pattern[str]
    """its name; a group `step`, where it is there, is the step"""
    slack_ms: int = 0
    """by how much the mark may be older than `before`"""
    holds: re.Pattern[str] = re.compile(r".*")
    """what of the folder belongs to it"""
    known: re.Pattern[str] | None = None
    """what must be whole by its own format, not merely not torn"""
    later: re.Pattern[str] | None = None
    """what may be written after the mark"""
    own: re.Pattern[str] | None = None
    """Names that nobody else uses: a folder with one of them is in the making until it is whole.
    None: it is if it lies beside a whole one, and is called as that is."""
    parts: re.Pattern[str] | None = None
    """What may be the beginning of one, though others call it so as well: so it is taken if it was
    written just before a kill."""
    in_numbered: bool = True
    """whether it may lie in a folder that is called checkpoint-N"""


@dataclass(frozen=True)
class FileLayout:
    """A framework whose checkpoint is a file."""

    framework: Framework
    name: re.Pattern[str]
    step: re.Pattern[str]
    """searched for in the name without its ending"""
    together: int
    """how many of a folder, the newest, make one checkpoint"""
    kept: int
    """how many checkpoints of a folder, the newest, go along"""
    last: re.Pattern[str] | None = None
    """what of a checkpoint is written last, in the scripts that write it"""


HF_STATE = "trainer_state.json"
HF_FOLDER = re.compile(r"checkpoint-(?P<step>0|[1-9][0-9]{0,14})")
_NUMBERED = re.compile(r"(?:.*[^0-9])?(?P<step>[0-9]{1,15})|.*")
_SHARD = re.compile(
    r"(?P<stem>.*)-(?P<shard>[0-9]{5})-of-(?P<shards>[0-9]{5})\.(?:safetensors|bin)"
)
_NEVER = re.compile(r"(?!)")
_TMP = ".orbax-checkpoint-tmp"
_STANDARD = re.compile(
    r"(?:model|adapter_model|pytorch_model)(?:_[0-9]+)?(?:-[0-9]{5}-of-[0-9]{5})?"
    r"\.(?:safetensors|bin)"
)

FOLDERS: tuple[FolderLayout, ...] = (
    FolderLayout(
        "hf-trainer",
        HF_STATE,
        needs=(
            re.compile(
                rf"(?:[^/]+/)?adapter_model\.safetensors|{_STANDARD.pattern}"
                r"|pytorch_model_fsdp(_0)?(\.bin|/.+)|global_step[0-9]+/.*model_states\.pt"
            ),
            # Without it (save_only_model) nothing can be resumed.
            re.compile(r"optimizer(_0)?(\.pt|\.bin|/.+)|global_step[0-9]+/.*optim_states\.pt"),
        ),
        # Other processes' files may be later (rng_state_1.pth).
        before=re.compile(
            r"training_args\.bin|scheduler\.pt|optimizer\.(pt|bin)|rng_state\.pth|"
            + _STANDARD.pattern
        ),
        folder=HF_FOLDER,
        slack_ms=ORDER_MS,
        own=re.compile(r"training_args\.bin|scheduler\.pt|rng_state(?:_[0-9]+)?\.pth"),
    ),
    FolderLayout(
        "accelerate",
        "random_states_0.pkl",
        needs=(
            # Hooks, as those of diffusers, put models into folders of their own.
            re.compile(
                rf"{_STANDARD.pattern}|(?:[^/]+/)+[^/]+\.(?:safetensors|bin)"
                r"|pytorch_lora_weights\.safetensors|pytorch_model(?:_[0-9]+)?/.*model_states\.pt"
                r"|pytorch_model_fsdp(?:_[0-9]+)?(?:\.bin|/.+)"
            ),
            re.compile(r"optimizer(?:_[0-9]+)?(?:\.bin|/.+)|pytorch_model.*/.*optim_states\.pt"),
        ),
        before=re.compile(
            r"(?:optimizer|scheduler|sampler|dl_state_dict)(?:_[0-9]+)?\.bin|scaler\.pt|"
            + _STANDARD.pattern
        ),
        folder=_NUMBERED,
        known=re.compile(r".*\.safetensors|optimizer(?:_[0-9]+)?\.bin|random_states_[0-9]+\.pkl"),
        later=re.compile(r"custom_checkpoint_[0-9]+\.pkl"),
        parts=re.compile(
            r"optimizer(?:_[0-9]+)?\.bin|(?:[^/]+/)*(?:diffusion_pytorch_model[^/]*|config\.json)|"
            + _STANDARD.pattern
        ),
    ),
    FolderLayout(
        "torch-distributed",
        ".metadata",
        needs=(re.compile(r"__[0-9]+_[0-9]+\.distcp"),),
        before=re.compile(r"__[0-9]+_[0-9]+\.distcp"),
        folder=re.compile(rf"(?!pytorch_model|optimizer)(?:{_NUMBERED.pattern})"),
        holds=re.compile(r"[^/]+"),
        slack_ms=ORDER_MS,
        own=re.compile(r"__[0-9]+_[0-9]+\.distcp"),
        in_numbered=False,  # there it is a part of what the Trainer writes
    ),
    FolderLayout(
        "orbax",
        "_CHECKPOINT_METADATA",
        # A manager's step has folders of items, a plain checkpoint is one itself.
        needs=(
            re.compile(r"(?:[^/]+/)?manifest\.ocdbt"),
            re.compile(r"(?:[^/]+/)?_METADATA"),
            re.compile(r"(?:[^/]+/)?(?:ocdbt\.process_[0-9]+/)?d/[^/]+"),
        ),
        before=_NEVER,  # what is whole was renamed
        folder=_NUMBERED,
        own=_NEVER,
        known=re.compile(r"(?:.*/)?(?:manifest\.ocdbt|_METADATA|_CHECKPOINT_METADATA)"),
    ),
    FolderLayout(
        "keras",
        "training_metadata.json",
        needs=(re.compile(r"latest\.weights\.h5"),),
        before=re.compile(r"latest\.weights\.h5"),
        folder=re.compile(r".*"),
        parts=re.compile(r"latest\.weights\.h5"),
        holds=re.compile(r"(?:latest\.weights\.h5|training_metadata\.json)(?:\.bkp)?"),
        known=re.compile(r"latest\.weights\.h5|training_metadata\.json"),
    ),
)

FILES: tuple[FileLayout, ...] = (
    FileLayout(
        "lightning",
        re.compile(r".*\.ckpt"),
        step=re.compile(r"(?:^|[-_.])step=([0-9]{1,15})(?=[-_.]|$)"),
        together=5,  # the best and the last
        kept=1,
        last=re.compile(r"last(?:-v[0-9]+)?\.ckpt"),
    ),
    FileLayout(
        "torch-save",
        re.compile(r".*\.(?:pt|pth|tar)"),
        step=re.compile(r"(?:^|[-_.=a-z])([0-9]{1,15})$"),
        together=1,
        kept=2,
    ),
)
_FOLDERS = {layout.framework: layout for layout in FOLDERS}
_FILES = {layout.framework: layout for layout in FILES}
_PART_ALONE = re.compile(
    r"(?i:optim|scheduler|scaler|rng_state|random_states|training_args|mp_rank_|zero_pp_rank_).*"
)


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint that is whole by its names: the files that make it, sorted by path."""

    framework: Framework
    folder: str
    """in which the script keeps its checkpoints; "" is the outputs folder itself"""
    step: int | None
    """as a name says; None: no name says one"""
    files: tuple[ListedFile, ...]
    at: str = ""
    """the folder that it is; of those that are files, none"""
    must_be_quiet: bool = False
    """Whether nothing but time tells that no more is to come, whoever was killed meanwhile."""

    @property
    def mtime_ms(self) -> int:
        """When its newest file was written."""
        return max(file.mtime_ms for file in self.files)

    @property
    def state_path(self) -> str | None:
        """The path of its trainer_state.json; None for those of others."""
        return f"{self.at}/{HF_STATE}" if self.framework == "hf-trainer" else None

    @property
    def kept(self) -> int:
        """How many of its framework and folder go along."""
        layout = _FILES.get(self.framework)
        return layout.kept if layout else 1

    @property
    def needs_optimizer(self) -> bool:
        """Whether one of its files has to hold an optimizer's state."""
        return self.framework in _FILES

    def must_be_known(self, path: str) -> bool:
        """Say whether a file of it has to be whole by its own format, not merely not torn."""
        layout = _FOLDERS.get(self.framework)
        if layout is None:
            return True  # nothing else tells it from a file that is merely called so
        name = path[len(self.at) + 1 :] if self.at else path
        return layout.known is not None and layout.known.fullmatch(name) is not None


def find_checkpoints(listing: Iterable[ListedFile]) -> list[FoundCheckpoint]:
    """Return the checkpoints in a listing that are whole by their names, newest first."""
    files = [file for file in sorted(listing, key=lambda file: file.path) if _TMP not in file.path]
    found = [*_folders(files), *_single_files(files)]
    return sorted(found, key=lambda c: (c.mtime_ms, c.step or 0, c.folder), reverse=True)


# -- folders -------------------------------------------------------------------------------------

_BY_MARK = {layout.mark: layout for layout in FOLDERS}


def _folders(files: Sequence[ListedFile]) -> list[FoundCheckpoint]:
    layouts: dict[str, FolderLayout] = {}
    for file in files:
        at, _, name = file.path.rpartition("/")
        layout = _BY_MARK.get(name)
        if layout is not None and at not in layouts and _may_be(layout, at):
            layouts[at] = layout
    content: dict[str, dict[str, ListedFile]] = defaultdict(dict)
    for file in files:
        inside = [above for above in _above(file.path) if above in layouts]
        if not inside:
            continue
        at = inside[-1]
        name = file.path[len(at) + 1 :] if at else file.path
        # Of the outputs folder itself a checkpoint is only what lies directly in it.
        if (at or "/" not in name) and layouts[at].holds.fullmatch(name):
            content[at][name] = file
    whole = {at: names for at, names in content.items() if _is_whole(layouts[at], names)}
    lacking, first = _by_those_before(layouts, whole)
    found = []
    for at, names in whole.items():
        if at in lacking:
            continue
        layout = layouts[at]
        place, _, called = at.rpartition("/")
        step = layout.folder.fullmatch(called)
        said = step["step"] if step and "step" in layout.folder.groupindex else None
        number = None if said is None else int(said)
        those = tuple(names[name] for name in sorted(names))
        found.append(
            FoundCheckpoint(layout.framework, place, number, those, at, must_be_quiet=at in first)
        )
    return found


def _may_be(layout: FolderLayout, at: str) -> bool:
    above, _, name = at.rpartition("/")
    if not layout.in_numbered and any(map(HF_FOLDER.fullmatch, above.split("/"))):
        return False
    return layout.folder.fullmatch(name) is not None


def _above(path: str) -> list[str]:
    """Return the folders that a path lies in, from the top."""
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(len(parts))]


def _is_whole(layout: FolderLayout, names: Mapping[str, ListedFile]) -> bool:
    if layout.mark not in names or not names[layout.mark].size_bytes:
        return False
    there = [name for name, file in names.items() if file.size_bytes]
    if not all(any(map(need.fullmatch, there)) for need in layout.needs):
        return False
    times = {name: file.mtime_ms for name, file in names.items()}
    return not _is_older(layout, times) and _has_all_shards(there)


def _is_older(layout: FolderLayout, times: Mapping[str, int]) -> bool:
    """Say whether what is written before the mark is younger than it."""
    last_ms = times[layout.mark] + layout.slack_ms
    return any(at_ms > last_ms for name, at_ms in times.items() if layout.before.fullmatch(name))


def _has_all_shards(names: Iterable[str]) -> bool:
    """Say whether every shard is there that the name of one promises."""
    shards: dict[tuple[str, int], set[int]] = defaultdict(set)
    for name in names:
        if match := _SHARD.fullmatch(name):
            shards[match["stem"], int(match["shards"])].add(int(match["shard"]))
    stems = [stem for stem, _ in shards]
    return len(set(stems)) == len(stems) and all(
        there == set(range(1, promised + 1)) for (_, promised), there in shards.items()
    )


def _by_those_before(
    layouts: Mapping[str, FolderLayout], whole: Mapping[str, Mapping[str, ListedFile]]
) -> tuple[set[str], set[str]]:
    """Return those that have not all of `later` that one written before them, in the same place,
    has; and those before which there is none."""
    lacking, first = set(), set()
    had: dict[tuple[Framework, str], set[str]] = {}
    for at, names in sorted(whole.items(), key=lambda each: _marked_ms(layouts, *each)):
        layout = layouts[at]
        if layout.later is None:
            continue
        there = {name for name in names if layout.later.fullmatch(name)}
        key = layout.framework, at.rpartition("/")[0]
        if had.get(key, set()) - there:
            lacking.add(at)
        if key not in had:
            first.add(at)
        had[key] = had.get(key, set()) | there
    return lacking, first


def _marked_ms(
    layouts: Mapping[str, FolderLayout], at: str, names: Mapping[str, ListedFile]
) -> int:
    return names[layouts[at].mark].mtime_ms


# -- what has been begun -------------------------------------------------------------------------


def in_the_making(files: Iterable[tuple[str, int, int]], killed_ms: int | None = None) -> str:
    """Return the folder in which a framework has begun a checkpoint that isn't done, with why; ''
    if there is none.

    `files`: path, size (bytes) and time (ms) of each. `killed_ms`: when their script was killed, or
    a little later; None: it wasn't.
    """
    folders: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for path, size, time_ms in files:
        if _TMP in path:
            continue  # a framework that renames doesn't look at it when it resumes
        for above in _above(path):
            folders[above][path[len(above) + 1 :] if above else path] = (size, time_ms)
    alike = Counter(map(_numbered, folders))
    marked: dict[tuple[str, tuple[str, str] | None], set[str]] = {}
    for at, names in sorted(folders.items(), key=lambda each: max(t for _, t in each[1].values())):
        for layout in FOLDERS:
            if not _may_be(layout, at):
                continue
            beside = marked.get((layout.mark, _numbered(at)))
            why = _undone(layout, names, beside)
            if killed_ms is not None and beside is None and not why:
                why = _cut_off(layout, at, names, killed_ms, alone=alike[_numbered(at)] == 1)
            if why:
                return f"{at or '.'}: {why}"
            if layout.mark in names and (kind := _numbered(at)) is not None:
                marked.setdefault((layout.mark, kind), set()).update(names)
    return ""


def _undone(
    layout: FolderLayout, names: Mapping[str, tuple[int, int]], beside: Set[str] | None
) -> str:
    """Say why it isn't done. `beside`: the names in those with its mark that were written before
    it, lie beside it and are called as it is; None: there are none."""
    if layout.own is not None and not any(map(layout.own.fullmatch, names)):
        return ""  # others call their folders so as well
    if layout.mark not in names or not names[layout.mark][0]:
        missing = layout.own is not None or beside is not None
        return f"{layout.mark}, which is written last, is not there yet" if missing else ""
    if _is_older(layout, {name: at_ms for name, (_, at_ms) in names.items()}):
        return f"{layout.mark}, which is written last, is older than what lies beside it"
    if layout.later is not None:
        for name in sorted((beside or set()) - names.keys()):
            if layout.later.fullmatch(name):
                return f"{name}, which the one before it has, is not there yet"
    return ""


def _cut_off(
    layout: FolderLayout,
    at: str,
    names: Mapping[str, tuple[int, int]],
    killed_ms: int,
    *,
    alone: bool,
) -> str:
    """Say why the first of its kind may not be done, where it was written just before a kill.
    `alone`: whether no other lies beside it."""
    written_ms = max(at_ms for _, at_ms in names.values())
    unnumbered = layout.folder is _NUMBERED and _numbered(at) is None
    if unnumbered or written_ms < killed_ms - _JUST_BEFORE_MS:
        return ""
    if layout.mark in names:
        return f"{_CUT_OFF} more was to come" if alone and layout.later is not None else ""
    begun = layout.parts is not None and any(map(layout.parts.fullmatch, names))
    return f"{_CUT_OFF} {layout.mark} was to come" if begun else ""


def _numbered(at: str) -> tuple[str, str] | None:
    """Return where a folder lies and what it is called but for its number; None: it has none."""
    place, _, name = at.rpartition("/")
    stem = name.rstrip("0123456789")
    return None if stem == name else (place, stem)


# -- files ---------------------------------------------------------------------------------------


def _single_files(files: Sequence[ListedFile]) -> list[FoundCheckpoint]:
    folders: dict[str, list[ListedFile]] = defaultdict(list)
    for file in files:
        folders[file.path.rpartition("/")[0]].append(file)
    found = []
    for folder, every in folders.items():
        parts = any(_PART_ALONE.fullmatch(_name(file)) for file in every)
        for layout in FILES:
            if parts and layout.together == 1:
                continue
            these = [file for file in every if layout.name.fullmatch(_name(file))]
            these.sort(key=lambda file: (file.mtime_ms, file.path))
            if layout.together == 1:
                groups = [[file] for file in these[-_MAX_FILES_LOOKED_AT:]]
            else:
                groups = [these[-layout.together :]] if these else []
            for group in groups:
                last = [
                    file for file in group if layout.last and layout.last.fullmatch(_name(file))
                ]
                if not all(file.size_bytes for file in group) or (last and group[-1] not in last):
                    continue
                group.sort(key=lambda file: file.path)
                found.append(
                    FoundCheckpoint(
                        layout.framework,
                        folder,
                        _said_step(layout, group),
                        tuple(group),
                        must_be_quiet=layout.last is not None and not last,
                    )
                )
    return found


def _said_step(layout: FileLayout, group: Sequence[ListedFile]) -> int | None:
    stems = [_name(file).removesuffix(".tar").rpartition(".")[0] or _name(file) for file in group]
    said = [int(match[1]) for stem in stems if (match := layout.step.search(stem))]
    return max(said, default=None)


def _name(file: ListedFile) -> str:
    return file.path.rpartition("/")[2]
