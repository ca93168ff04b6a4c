"""Recognises the checkpoints that HF Trainer and Lightning write into a job's outputs folder.

So a renter's script resumes elsewhere without knowing sublet. Pure: the agent lists the outputs
folder, `find_checkpoints` says which checkpoints in it are whole, and the agent packs the newest
one under the names of `packed`. At restore, `placement` says where the files go: back to where the
script had written them, which is where it looks for them (HF Trainer: resume_from_checkpoint=True;
Lightning: ckpt_path="last").

Rules:
1. HF Trainer: a folder checkpoint-N with trainer_state.json, which the Trainer writes after all
   else, weights (every shard that the names promise) and an optimizer. A folder without an
   optimizer (save_only_model) can't be resumed from.
2. Lightning: a file *.ckpt. Its name says the step (step=N); last.ckpt goes along with the one it
   repeats. Where no name says a step (the content is a pickle, which we never open), checkpoints
   are counted instead: `after_step + 1`.
3. Nothing is whole before it has been quiet for `quiet_ms`: no file of it is younger.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

PACKED = "outputs-layout"
"""First part of the path of every file in a checkpoint that was packed from the outputs folder."""

QUIET_MS = 2_000

Framework = Literal["hf-trainer", "lightning"]

_HF_FOLDER = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")
_HF_WEIGHTS = re.compile(
    r"(model|adapter_model|pytorch_model)\.(safetensors|bin)"
    r"|(model|pytorch_model)-(?P<shard>[0-9]{5})-of-(?P<shards>[0-9]{5})\.(safetensors|bin)"
    r"|pytorch_model_fsdp(_0)?(\.bin|/.+)|global_step[0-9]+/.*model_states\.pt"
)
_HF_OPTIMIZER = re.compile(r"optimizer(_0)?(\.pt|\.bin|/.+)|global_step[0-9]+/.*optim_states\.pt")
_LIGHTNING_STEP = re.compile(r"(?:^|[-_.])step=([0-9]{1,18})(?=[-_.]|$)")
_LIGHTNING_LAST = re.compile(r"last(-v[0-9]+)?")


@dataclass(frozen=True)
class ListedFile:
    """A regular file below the outputs folder, as a listing shows it."""

    path: str
    """relative to the outputs folder, with '/'"""
    size_bytes: int
    mtime_ms: int


@dataclass(frozen=True)
class FoundCheckpoint:
    """A whole checkpoint: the files that make it, sorted by path."""

    framework: Framework
    step: int
    step_is_counted: bool
    """no name said the step, so checkpoints were counted"""
    files: tuple[ListedFile, ...]

    @property
    def mtime_ms(self) -> int:
        """When its newest file was written."""
        return max(file.mtime_ms for file in self.files)

    @property
    def total_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.size_bytes for file in self.files)


def find_checkpoints(
    listing: Iterable[ListedFile],
    now_ms: int,
    *,
    after_step: int = 0,
    after_mtime_ms: int = 0,
    quiet_ms: int = QUIET_MS,
) -> list[FoundCheckpoint]:
    """Return the whole checkpoints in a listing that are past `after_step`, oldest step first.

    `now_ms` must be by the clock that the mtimes are by. `after_mtime_ms` keeps a checkpoint that
    is counted from being found again: give the newest mtime of the last one found or placed.
    """
    files = sorted(listing, key=lambda file: file.path)
    found = [*_hf_trainer(files), *_lightning(files, after_step, after_mtime_ms)]
    whole = [c for c in found if c.mtime_ms <= now_ms - quiet_ms and c.step > after_step]
    return sorted(whole, key=lambda c: (c.step, c.mtime_ms, c.files[0].path))


def packed(path: str) -> str:
    """Return the name in the checkpoint of a file of the outputs folder."""
    return f"{PACKED}/{path}"


def placement(checkpoint_paths: Iterable[str]) -> dict[str, str]:
    """Return path in the checkpoint -> path in the outputs folder, for all that belong there.

    Empty for a checkpoint that the job wrote by the protocol itself: that one stays in in/step-N.
    """
    prefix = PACKED + "/"
    return {path: path[len(prefix) :] for path in checkpoint_paths if path.startswith(prefix)}


def _hf_trainer(files: Sequence[ListedFile]) -> list[FoundCheckpoint]:
    folders: dict[tuple[str, int], list[ListedFile]] = {}
    for file in files:
        parts = file.path.split("/")
        for depth, part in enumerate(parts[:-1]):
            match = _HF_FOLDER.fullmatch(part)
            if match:
                folder = "/".join(parts[: depth + 1])
                folders.setdefault((folder, int(match.group(1))), []).append(file)
                break
    return [
        FoundCheckpoint("hf-trainer", step, False, tuple(content))
        for (folder, step), content in folders.items()
        if _is_whole(content, folder)
    ]


def _is_whole(content: Sequence[ListedFile], folder: str) -> bool:
    names = {file.path[len(folder) + 1 :]: file.size_bytes for file in content}
    if not names.get("trainer_state.json"):
        return False
    if not any(_HF_OPTIMIZER.fullmatch(name) for name in names):
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


def _lightning(
    files: Sequence[ListedFile], after_step: int, after_mtime_ms: int
) -> list[FoundCheckpoint]:
    checkpoints = [f for f in files if f.path.endswith(".ckpt") and f.size_bytes]
    named: list[tuple[int, ListedFile]] = []
    unnamed: list[ListedFile] = []
    for file in checkpoints:
        match = _LIGHTNING_STEP.search(_stem(file))
        if match:
            named.append((int(match.group(1)), file))
        else:
            unnamed.append(file)
    found = []
    for step, file in named:
        newest = step == max(other for other, _ in named)
        along = [f for f in unnamed if newest and _is_last(f) and _folder(f) == _folder(file)]
        content = sorted([file, *along], key=lambda f: f.path)
        found.append(FoundCheckpoint("lightning", step, False, tuple(content)))
    if unnamed and not named:
        newest_file = max(unnamed, key=lambda f: (f.mtime_ms, f.path))
        if newest_file.mtime_ms > after_mtime_ms:
            found.append(FoundCheckpoint("lightning", after_step + 1, True, (newest_file,)))
    return found


def _stem(file: ListedFile) -> str:
    return file.path.rsplit("/", 1)[-1].removesuffix(".ckpt")


def _folder(file: ListedFile) -> str:
    return file.path.rpartition("/")[0]


def _is_last(file: ListedFile) -> bool:
    return _LIGHTNING_LAST.fullmatch(_stem(file)) is not None
