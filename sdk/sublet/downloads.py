"""What a download brings: chosen by what a job has, and said in words where that isn't there.

Rules:
1. Without a wish: the outputs; where there are none, what a run had written that ended without
   finishing (partial outputs), and it is called so.
2. A checkpoint is one that is durable and kept: the newest, the one of a step, or the best one that
   HF Trainer names in its trainer_state.json. Of the best only its own folder is brought.
3. A checkpoint that was made of the script's own files comes back under the names that the script
   gave them.
4. What isn't there yields a sentence that says what is, and what brings that.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from sublet.errors import SubletError
from sublet_contracts import checkpoint_folders, checkpoint_layouts
from sublet_contracts.amounts import format_bytes
from sublet_contracts.api import CheckpointView, JobView, Problem
from sublet_contracts.checkpoint_layouts import MAX_STATE_BYTES, read_trainer_state
from sublet_contracts.framework_layouts import HF_STATE
from sublet_contracts.keys import short
from sublet_contracts.paths import check_relative_path
from sublet_contracts.states import JOB, CheckpointState, is_terminal
from sublet_contracts.tree import LeftOut, TreeFile, TreeIndex, TreeRefused

_STEP_FOLDER = re.compile(r"(?:(.*)/)?checkpoint-([0-9]{1,15})/" + re.escape(HF_STATE))


@dataclass(frozen=True)
class Wish:
    """What is asked for."""

    checkpoint: str | None = None
    """a step, "latest" or "best"; None: no checkpoint"""
    partial: bool = False
    include: tuple[str, ...] = ()
    """patterns of paths; none: all"""

    @classmethod
    def of(cls, checkpoint: str | int | None, partial: bool, include: Iterable[str]) -> "Wish":
        """Read it as it was given. Raises SubletError."""
        chosen = None if checkpoint is None else str(checkpoint).strip()
        if chosen is not None and chosen not in ("latest", "best") and not chosen.isdecimal():
            raise _no(
                "bad_wish",
                f"--checkpoint {chosen!r}: it is a step, `latest` or `best`",
                "sublet inspect lists the steps that are kept",
            )
        if chosen is not None and partial:
            raise _no(
                "bad_wish",
                "--checkpoint and --partial exclude each other",
                "ask for one of them at a time",
            )
        patterns = (include,) if isinstance(include, str) else tuple(include)
        return cls(chosen, partial, patterns)


@dataclass(frozen=True)
class Chosen:
    """A tree of the job."""

    kind: str
    """outputs, partial-outputs, checkpoint"""
    step: int
    epoch: int
    index_digest: str
    total_bytes: int

    @property
    def says(self) -> str:
        """What it is, in words."""
        match self.kind:
            case "outputs":
                return "the outputs"
            case "partial-outputs":
                return f"partial outputs: what run {self.epoch} had written, which did not finish"
            case _:
                return f"the checkpoint of step {self.step}"


@dataclass(frozen=True)
class Downloaded:
    """What a download has brought. Iterating yields the files."""

    kind: str
    """outputs, partial-outputs (of a run that did not finish), checkpoint"""
    step: int
    epoch: int
    """the run's that made it"""
    files: tuple[Path, ...]
    left_out: tuple[LeftOut, ...]
    """what lay in the job's folder and could not be carried, at most 1,000 of them"""
    left_out_total: int

    def __iter__(self) -> Iterator[Path]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def choose(view: JobView, checkpoints: Sequence[CheckpointView], wish: Wish) -> Chosen:
    """Return the tree that a wish means; of `best` the newest checkpoint, which names it (see
    `best_folders`). Raises SubletError: there is none."""
    if wish.checkpoint is not None:
        return _checkpoint(view, checkpoints, wish.checkpoint)
    outputs = next((c for c in _kept(checkpoints, "outputs") if c.id == view.outputs), None)
    partial = next(
        (c for c in _kept(checkpoints, "partial-outputs") if c.id == view.partial_outputs), None
    )
    found = partial if wish.partial or outputs is None else outputs
    if found is None:
        raise _nothing(view, checkpoints, wish)
    return _chosen(found)


def best_folders(index: TreeIndex, read: Callable[[TreeFile], bytes]) -> tuple[str, ...]:
    """Return the folders of the best checkpoints that a checkpoint's files name and hold.

    `read` returns the content of a file, whose size is bounded here. Raises what it does.
    """
    found = []
    newest: dict[str, tuple[int, TreeFile]] = {}
    for parent, step, file in _states(index):
        if file.size_bytes <= MAX_STATE_BYTES and step >= newest.get(parent, (-1, file))[0]:
            newest[parent] = (step, file)
    paths = [file.path for file in index.files]
    for parent, (step, file) in sorted(newest.items()):
        state = read_trainer_state(read(file), step)
        if state is None or state.best_step is None:
            continue
        folder = f"{parent}/checkpoint-{state.best_step}/".lstrip("/")
        if any(path.startswith(folder) for path in paths):
            found.append(folder)
    return tuple(found)


def no_best(view: JobView, checkpoints: Sequence[CheckpointView]) -> SubletError:
    """Return the error that no kept checkpoint names a best one that is there."""
    return _no(
        "no_best",
        f"none of the checkpoints of job {short(view.id)} says which one is the best and has it "
        "(HF Trainer does, with metric_for_best_model or load_best_model_at_end); "
        f"kept are {_steps(checkpoints)}",
        f"sublet download {short(view.id)} --checkpoint latest (or a step)",
    )


def local_names(index: TreeIndex, read: Callable[[TreeFile], bytes]) -> dict[str, str]:
    """Return under which path (relative to the target) each file of a tree is written; what is ours
    alone is left out. Raises TreeRefused, and what `read` does, which returns a file's content."""
    by_path = {file.path: file for file in index.files}
    if checkpoint_layouts.RECORD in by_path:
        return _without_prefix(by_path, checkpoint_layouts.PACKED + "/")
    record = by_path.get(checkpoint_folders.RECORD)
    if record is None:
        return {path: path for path in by_path}
    if record.size_bytes > checkpoint_folders.MAX_RECORD_BYTES:
        raise TreeRefused(f"{record.path} is too long")
    try:
        folders = checkpoint_folders.read_record(read(record)).folders
    except ValueError as error:
        raise TreeRefused(str(error)) from error
    names = _folder_names(folders)
    result: dict[str, str] = {}
    for number, name in enumerate(names):
        packed = checkpoint_folders.packed(number, "")
        for path, rest in _without_prefix(by_path, packed).items():
            result[path] = f"{name}/{rest}"
    return result


def matching(names: dict[str, str], patterns: Sequence[str], within: Sequence[str]) -> list[str]:
    """Return the tree's paths that are wanted: `patterns` are of the names that they get, a folder
    standing for all in it; `within` are folders of the tree. None of either: all."""
    wanted = []
    for path, name in names.items():
        if within and not path.startswith(tuple(within)):
            continue
        if patterns and not any(_matches(name, pattern) for pattern in patterns):
            continue
        wanted.append(path)
    return wanted


def nothing_matches(view: JobView, chosen: Chosen, names: Iterable[str]) -> SubletError:
    """Return the error that no file of a tree is wanted."""
    some = sorted(names)
    listed = ", ".join(some[:5]) + (f" and {len(some) - 5} more" if len(some) > 5 else "")
    return _no(
        "no_match",
        f"--include: no file of {chosen.says} matches; there are: {listed or 'none'}",
        "leave --include out to get all of them",
    )


def _matches(name: str, pattern: str) -> bool:
    plain = pattern.strip("/")
    if fnmatchcase(name, plain) or fnmatchcase(name, f"{plain}/*"):
        return True
    return "/" not in plain and fnmatchcase(name.rsplit("/", 1)[-1], plain)


def _without_prefix(paths: Iterable[str], prefix: str) -> dict[str, str]:
    return {path: path[len(prefix) :] for path in paths if path.startswith(prefix)}


def _folder_names(folders: Sequence[str]) -> list[str]:
    """Name each folder as the job did, as short as that is unambiguous."""
    last = [folder.rstrip("/").rsplit("/", 1)[-1] for folder in folders]
    names = []
    for number, name in enumerate(last):
        try:
            plain = check_relative_path(name)
        except ValueError:
            plain = "folder"
        names.append(plain if last.count(name) == 1 else f"{plain}-{number}")
    return names


def _states(index: TreeIndex) -> list[tuple[str, int, TreeFile]]:
    found = []
    for file in index.files:
        match = _STEP_FOLDER.fullmatch(file.path)
        if match:
            found.append((match.group(1) or "", int(match.group(2)), file))
    return found


def _kept(checkpoints: Iterable[CheckpointView], kind: str) -> list[CheckpointView]:
    durable = CheckpointState.DURABLE
    return [c for c in checkpoints if c.kind == kind and c.state is durable and c.kept]


def _chosen(found: CheckpointView) -> Chosen:
    return Chosen(found.kind, found.step, found.epoch, found.index_digest, found.total_bytes)


def _checkpoint(view: JobView, checkpoints: Sequence[CheckpointView], wanted: str) -> Chosen:
    kept = sorted(_kept(checkpoints, "checkpoint"), key=lambda c: (c.step, c.epoch, c.created_ms))
    if not kept:
        had = any(c.kind == "checkpoint" for c in checkpoints)
        why = "keeps no checkpoint any more" if had else "has saved no checkpoint yet"
        if is_terminal(JOB, view.state) and not had:
            why = "has saved no checkpoint"
        there, fix = _there(view, checkpoints, checkpoint=False)
        raise _no("no_checkpoint", f"job {short(view.id)} {why}{there}", fix)
    if not wanted.isdecimal():
        return _chosen(kept[-1])
    same = [c for c in kept if c.step == int(wanted)]
    if not same:
        raise _no(
            "no_checkpoint",
            f"job {short(view.id)} keeps no checkpoint of step {int(wanted)}: kept are "
            f"{_steps(checkpoints)}",
            f"sublet download {short(view.id)} --checkpoint {kept[-1].step}",
        )
    return _chosen(same[-1])


def _steps(checkpoints: Iterable[CheckpointView]) -> str:
    steps = sorted({c.step for c in _kept(checkpoints, "checkpoint")})
    return ("step " if len(steps) == 1 else "steps ") + ", ".join(map(str, steps))


def _nothing(view: JobView, checkpoints: Sequence[CheckpointView], wish: Wish) -> SubletError:
    what = "partial outputs" if wish.partial else "outputs"
    ended = is_terminal(JOB, view.state)
    kind = "partial-outputs" if wish.partial else "outputs"
    if any(c.kind == kind and c.state is CheckpointState.DURABLE for c in checkpoints):
        why = f"no longer keeps its {what}"
    elif wish.partial:
        why = "has no partial outputs, which are what a run leaves that doesn't finish"
    elif view.state == "succeeded":
        why = "succeeded and has no outputs: it wrote nothing that is brought back"
    elif ended:
        why = f"{view.state} and its runs left no outputs behind"
    else:
        why = f"is {view.state}, and outputs come when a run ends"
    there, fix = _there(view, checkpoints)
    return _no("no_outputs", f"job {short(view.id)} {why}{there}", fix)


def _there(
    view: JobView, checkpoints: Sequence[CheckpointView], *, checkpoint: bool = True
) -> tuple[str, str]:
    """Say what a job has instead, and which command brings that."""
    command = f"sublet download {short(view.id)}"
    for kind, says, option in (
        ("outputs", "its outputs", ""),
        ("partial-outputs", "what a run had written that did not finish", " --partial"),
    ):
        found = _kept(checkpoints, kind)
        if found:
            size = format_bytes(found[0].total_bytes)
            return f"; it has {says} ({size})", command + option
    if checkpoint and _kept(checkpoints, "checkpoint"):
        return f"; there are checkpoints of {_steps(checkpoints)}", f"{command} --checkpoint latest"
    if not is_terminal(JOB, view.state):
        return "", f"sublet wait {short(view.id)}, then try again"
    fix = "run it with --outputs DIR, the folder that it writes into"
    return "", "" if any(c.kind != "checkpoint" for c in checkpoints) else fix


def _no(code: str, detail: str, fix: str) -> SubletError:
    return SubletError(
        Problem(title="Nothing to download", status=404, code=code, detail=detail), fix
    )
