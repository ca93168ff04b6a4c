"""Checkpoints that a script left in its outputs folder, by itself: what makes the next snapshot.

So a renter's script resumes elsewhere without knowing sublet. Pure: the agent lists the outputs
folder and reads a little of it, `find_checkpoints` (framework_layouts.py) says which checkpoints
are whole by their names, `next_snapshot` which files make the next checkpoint and what its step is.
The files go into it under the names of `packed`, beside a record of them (RECORD); at restore
`placed` says where they go back to: where the script had written them, which is where it looks for
them (HF Trainer: get_last_checkpoint; Lightning: ckpt_path="last").

Rules:
1. A checkpoint is whole by its names, and none of its files is torn (file_formats.py). Of a
   Trainer's, `read_trainer_state` says whether its state is all there.
2. Nothing is whole before it is at rest: no file of it is open for writing, and all have been quiet
   for a while.
3. A snapshot is the newest whole checkpoint of each folder that has any (a script may train several
   models, one after the other), with as many before it as its framework keeps, and for HF Trainer
   the best one that it names, which load_best_model_at_end needs. It is new when something in it is
   newer than all of the one before.
4. Its step is the one that the newest checkpoint's name says, if that is past the step before;
   otherwise steps are counted on from there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sublet_contracts.fields import Count
from sublet_contracts.framework_layouts import HF_FOLDER, FoundCheckpoint, ListedFile
from sublet_contracts.tree import MAX_FILES

PACKED = "outputs-layout"
"""First part of the path of every file in a checkpoint that was packed from the outputs folder."""

RECORD = "outputs-layout.json"
"""The file in such a checkpoint that lists them: a Snapshot."""

QUIET_MS = 2_000
MAX_STATE_BYTES = 16 * 1024 * 1024
MAX_RECORD_BYTES = 16 * 1024 * 1024
MAX_STEP = 10**15 - 1
"""A trainer's step beyond it is none, and a checkpoint's can be followed by no other."""
_MAX_FOLDERS = 16


class Snapshot(BaseModel):
    """The files of the outputs folder that make one checkpoint."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    version: int = Field(default=1, ge=1, le=1, description="of this format")
    step: Count = Field(description="of the checkpoint; never goes back within a job")
    trained_step: Count = Field(description="as trainer_state.json says; 0: nothing says it")
    total_steps: Count = Field(description="as trainer_state.json says; 0: nothing says it")
    files: tuple[ListedFile, ...] = Field(
        min_length=1, max_length=MAX_FILES - 1, description="sorted by path"
    )

    @property
    def mtime_ms(self) -> int:
        """When its newest file was written."""
        return max(file.mtime_ms for file in self.files)

    @property
    def finished(self) -> bool:
        """Whether the training that wrote it had come to its end."""
        return 0 < self.total_steps <= self.trained_step

    def to_bytes(self) -> bytes:
        """Return it as RECORD holds it."""
        return self.model_dump_json().encode()


@dataclass(frozen=True)
class TrainerState:
    """What trainer_state.json says that matters to us."""

    step: int
    total_steps: int
    """0: unknown"""
    best_step: int | None


def read_trainer_state(data: bytes, step: int | None) -> TrainerState | None:
    """Read trainer_state.json; None if it is torn, or is not that of `step`."""
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if step is None or not isinstance(said, dict) or _count(said.get("global_step")) != step:
        return None
    best = _count(said.get("best_global_step"))
    if best is None:
        # Older Trainers name the folder only.
        path = said.get("best_model_checkpoint")
        match = HF_FOLDER.fullmatch(path.rsplit("/", 1)[-1]) if isinstance(path, str) else None
        best = int(match["step"]) if match else None
    return TrainerState(step, _count(said.get("max_steps")) or 0, best)


def next_snapshot(
    sound: Sequence[FoundCheckpoint],
    states: Mapping[str, TrainerState],
    last: Snapshot | None,
    after_step: int,
) -> Snapshot | None:
    """Return the checkpoint to take next, or None: there is nothing newer than `last`.

    `sound` are those that were found whole and read, newest first; `states` what their
    trainer_state.json said, by its path.
    """
    if not sound or (last is not None and sound[0].mtime_ms <= last.mtime_ms):
        return None
    newest: dict[tuple[str, str], list[FoundCheckpoint]] = {}
    for checkpoint in sound:
        those = newest.setdefault((checkpoint.framework, checkpoint.folder), [])
        if len(those) < checkpoint.kept:
            those.append(checkpoint)
    chosen = [checkpoint for those in list(newest.values())[:_MAX_FOLDERS] for checkpoint in those]
    said = [(c.folder, states.get(c.state_path or "")) for c in chosen]
    best = {(folder, state.best_step) for folder, state in said if state is not None}
    chosen += [c for c in sound if (c.folder, c.step) in best and c.framework == "hf-trainer"]
    files = {file.path: file for checkpoint in chosen for file in checkpoint.files}
    if len(files) >= MAX_FILES:
        return None
    after = max(after_step, last.step if last else 0)
    step = sound[0].step
    if step is None or step <= after:
        step = after + 1
    state = states.get(sound[0].state_path or "")
    return Snapshot(
        step=step,
        trained_step=state.step if state else 0,
        total_steps=state.total_steps if state else 0,
        files=tuple(files[path] for path in sorted(files)),
    )


def packed(path: str) -> str:
    """Return the name in the checkpoint of a file of the outputs folder."""
    return f"{PACKED}/{path}"


def read_record(data: bytes) -> Snapshot:
    """Return the snapshot that RECORD holds. Raises ValueError."""
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"{RECORD} has more than {MAX_RECORD_BYTES} bytes")
    try:
        return Snapshot.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{RECORD}: {first['msg']}") from error


def placed(snapshot: Snapshot, step: int, now_ms: int) -> Snapshot:
    """Return the snapshot as it is to lie on another machine: same order, nothing in the future.

    Scripts go by the order of the times (Lightning's "last" is the newest), and the other machine's
    clock is not this one's.
    """
    shift = now_ms - snapshot.mtime_ms
    files = tuple(
        file.model_copy(update={"mtime_ms": max(0, file.mtime_ms + shift)})
        for file in snapshot.files
    )
    return snapshot.model_copy(update={"step": step, "files": files})


def _count(value: object) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_STEP
    return value if whole and isinstance(value, int) else None
