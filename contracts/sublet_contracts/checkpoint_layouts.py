"""Recognises the checkpoints that HF Trainer, Lightning and torch.distributed write into a job's
outputs folder.

So a renter's script resumes elsewhere without knowing sublet. Pure: the agent lists the outputs
folder and reads a little of it, `find_checkpoints` says which checkpoints are whole by their names,
`next_snapshot` which files make the next checkpoint and what its step is. The files go into it
under the names of `packed`, beside a record of them (RECORD); at restore `placed` says where they
go back to: where the script had written them, which is where it looks for them (HF Trainer:
get_last_checkpoint; Lightning: ckpt_path="last").

Rules:
1. HF Trainer: a folder checkpoint-N with trainer_state.json, which the Trainer writes after all
   else, weights (every shard that the names promise) and an optimizer, neither younger than it. A
   folder without an optimizer (save_only_model) can't be resumed from. `read_trainer_state` says
   whether that file is all there.
2. Lightning: the *.ckpt files of one folder, the newest few. Names say steps (step=N); last.ckpt
   says none, and its content is a pickle, which we never open. Each must be whole as torch's ZIP:
   nothing else tells them from files that are merely called so.
3. torch.distributed: a folder of __R_I.distcp files and a .metadata that is written after them.
   The folder's name says the step, if it ends with a number.
4. No file of it is torn (file_formats.py), and nothing is whole before it is at rest: no file of it
   is open for writing, and all have been quiet for a while.
5. A snapshot is the newest whole checkpoint of each folder that has any (a script may train several
   models, one after the other), and for HF Trainer the best one that it names, which
   load_best_model_at_end needs. It is new when something in it is newer than all of the one before.
6. Its step is the one that the newest checkpoint's name says, if that is past the step before;
   otherwise steps are counted on from there.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sublet_contracts.fields import Count
from sublet_contracts.paths import RelativePath
from sublet_contracts.tree import MAX_FILES

PACKED = "outputs-layout"
"""First part of the path of every file in a checkpoint that was packed from the outputs folder."""

RECORD = "outputs-layout.json"
"""The file in such a checkpoint that lists them: a Snapshot."""

QUIET_MS = 2_000
ORDER_MS = 1_000
"""By so much what is written last may be older than what is written before it: copies of a
checkpoint keep no order."""
MAX_STATE_BYTES = 16 * 1024 * 1024
MAX_RECORD_BYTES = 16 * 1024 * 1024
MAX_STEP = 10**15 - 1
"""A trainer's step beyond it is none, and a checkpoint's can be followed by no other."""
_MAX_FOLDERS = 16
_LIGHTNING_FILES = 5

Framework = Literal["hf-trainer", "lightning", "torch-distributed"]

HF_FOLDER = re.compile(r"checkpoint-(0|[1-9][0-9]{0,14})")
HF_STATE = "trainer_state.json"
_HF_WEIGHTS = re.compile(
    r"(model|adapter_model|pytorch_model)\.(safetensors|bin)"
    r"|(model|pytorch_model)-(?P<shard>[0-9]{5})-of-(?P<shards>[0-9]{5})\.(safetensors|bin)"
    r"|pytorch_model_fsdp(_0)?(\.bin|/.+)|global_step[0-9]+/.*model_states\.pt"
)
_HF_OPTIMIZER = re.compile(r"optimizer(_0)?(\.pt|\.bin|/.+)|global_step[0-9]+/.*optim_states\.pt")
HF_BEFORE_STATE = re.compile(
    r"training_args\.bin|scheduler\.pt|optimizer\.(pt|bin)|rng_state\.pth"
    r"|(model|adapter_model|pytorch_model)(-[0-9]{5}-of-[0-9]{5})?\.(safetensors|bin)"
)
DISTRIBUTED_PART = re.compile(r"__[0-9]+_[0-9]+\.distcp")
DISTRIBUTED_STATE = ".metadata"
_DISTRIBUTED_STEP = re.compile(r"(?:.*[^0-9])?([0-9]{1,15})")
_LIGHTNING_STEP = re.compile(r"(?:^|[-_.])step=([0-9]{1,15})(?=[-_.]|$)")


class ListedFile(BaseModel):
    """A regular file below the outputs folder, as a listing shows it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: RelativePath = Field(description="relative to the outputs folder, with '/'")
    size_bytes: Count = Field(description="of the file")
    mtime_ms: Count = Field(description="when it was last written, by the machine's clock")


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
class FoundCheckpoint:
    """A checkpoint that is whole by its names: the files that make it, sorted by path."""

    framework: Framework
    folder: str
    """in which the script keeps its checkpoints; "" is the outputs folder itself"""
    step: int | None
    """as a name says; None: no name says one"""
    files: tuple[ListedFile, ...]

    @property
    def mtime_ms(self) -> int:
        """When its newest file was written."""
        return max(file.mtime_ms for file in self.files)

    @property
    def state_path(self) -> str | None:
        """The path of its trainer_state.json; None for those of others."""
        if self.framework != "hf-trainer":
            return None
        return f"{_join(self.folder, f'checkpoint-{self.step}')}/{HF_STATE}"

    @property
    def must_be_known(self) -> bool:
        """Whether each of its files has to be whole by its own format, not merely not torn."""
        return self.framework == "lightning"


@dataclass(frozen=True)
class TrainerState:
    """What trainer_state.json says that matters to us."""

    step: int
    total_steps: int
    """0: unknown"""
    best_step: int | None


def find_checkpoints(listing: Iterable[ListedFile]) -> list[FoundCheckpoint]:
    """Return the checkpoints in a listing that are whole by their names, newest first."""
    files = sorted(listing, key=lambda file: file.path)
    found = [*_hf_trainer(files), *_lightning(files), *_distributed(files)]
    return sorted(found, key=lambda c: (c.mtime_ms, c.step or 0, c.folder), reverse=True)


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
        best = int(match.group(1)) if match else None
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
    newest: dict[tuple[str, str], FoundCheckpoint] = {}
    for checkpoint in sound:
        newest.setdefault((checkpoint.framework, checkpoint.folder), checkpoint)
    chosen = list(newest.values())[:_MAX_FOLDERS]
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


def _hf_trainer(files: Sequence[ListedFile]) -> list[FoundCheckpoint]:
    folders: dict[tuple[str, int], list[ListedFile]] = {}
    for file in files:
        parts = file.path.split("/")
        for depth, part in enumerate(parts[:-1]):
            match = HF_FOLDER.fullmatch(part)
            if match:
                key = "/".join(parts[:depth]), int(match.group(1))
                folders.setdefault(key, []).append(file)
                break
    return [
        FoundCheckpoint("hf-trainer", folder, step, tuple(content))
        for (folder, step), content in folders.items()
        if _is_whole(content, _join(folder, f"checkpoint-{step}"))
    ]


def _is_whole(content: Sequence[ListedFile], folder: str) -> bool:
    names = {file.path[len(folder) + 1 :]: file.size_bytes for file in content}
    if not names.get(HF_STATE):
        return False
    if not any(_HF_OPTIMIZER.fullmatch(name) for name in names):
        return False
    if not _comes_last(content, f"{folder}/{HF_STATE}", folder, HF_BEFORE_STATE):
        return False
    weights = [match for name in names if (match := _HF_WEIGHTS.fullmatch(name)) and names[name]]
    shards = {int(m["shard"]) for m in weights if m["shard"]}
    promised = {int(m["shards"]) for m in weights if m["shards"]}
    if promised:
        return len(promised) == 1 and shards == set(range(1, promised.pop() + 1))
    # peft with several adapters: adapter_model.safetensors lies one folder deeper.
    return bool(weights) or any(
        name.count("/") == 1 and name.endswith("/adapter_model.safetensors") for name in names
    )


def _comes_last(
    content: Sequence[ListedFile], last: str, folder: str, before: re.Pattern[str]
) -> bool:
    """Say whether what is written last is no older than what is written before it: else that is
    being written anew. Other processes' files may be later (rng_state_1.pth)."""
    times = {file.path: file.mtime_ms for file in content}
    names = {path: path[len(folder) + 1 :] if folder else path for path in times}
    return all(
        at <= times[last] + ORDER_MS for path, at in times.items() if before.fullmatch(names[path])
    )


def _distributed(files: Sequence[ListedFile]) -> list[FoundCheckpoint]:
    folders: dict[str, list[ListedFile]] = {}
    for file in files:
        folders.setdefault(file.path.rpartition("/")[0], []).append(file)
    found = []
    for folder, content in folders.items():
        names = {file.path.rpartition("/")[2]: file for file in content}
        state = names.get(DISTRIBUTED_STATE)
        parts = [file for name, file in names.items() if DISTRIBUTED_PART.fullmatch(name)]
        if state is None or not state.size_bytes or not parts:
            continue
        if not _comes_last(content, state.path, folder, DISTRIBUTED_PART):
            continue
        above, _, name = folder.rpartition("/")
        if any(HF_FOLDER.fullmatch(part) for part in above.split("/")):
            continue  # a part of what the Trainer writes
        said = _DISTRIBUTED_STEP.fullmatch(name)
        step = int(said[1]) if said else None
        found.append(FoundCheckpoint("torch-distributed", above, step, tuple(content)))
    return found


def _lightning(files: Sequence[ListedFile]) -> list[FoundCheckpoint]:
    folders: dict[str, list[ListedFile]] = {}
    for file in files:
        if file.path.endswith(".ckpt"):
            folders.setdefault(file.path.rpartition("/")[0], []).append(file)
    found = []
    for folder, every in folders.items():
        every.sort(key=lambda file: (file.mtime_ms, file.path))
        kept = every[-_LIGHTNING_FILES:]
        if not all(file.size_bytes for file in kept):
            continue
        named = [int(m.group(1)) for f in kept if (m := _LIGHTNING_STEP.search(_stem(f)))]
        kept.sort(key=lambda file: file.path)
        found.append(FoundCheckpoint("lightning", folder, max(named, default=None), tuple(kept)))
    return found


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _stem(file: ListedFile) -> str:
    return file.path.rsplit("/", 1)[-1].removesuffix(".ckpt")


def _count(value: object) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_STEP
    return value if whole and isinstance(value, int) else None
