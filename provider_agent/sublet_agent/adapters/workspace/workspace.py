"""A run's folders on this machine, and what goes into and comes out of them.

    runs/<lease>/checkpoint/{in,out,ack}   inputs/   outputs/   work/   home/   tmp/
    runs/<lease>/layout.json               where the job sees work/ and home/: core/layout.py
    runs/<lease>/snapshots/                copies of folders that the job named as its checkpoint
    prepared/<job>/                        what a possible successor has fetched already
    helper/                                the checkpoint helper, read-only in every run

What the job wrote is hostile: nothing follows a link, everything is bounded.
"""

import asyncio
import contextlib
import json
import math
import os
import posixpath
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sublet_agent.adapters.workspace import folders
from sublet_agent.adapters.workspace.checkpoint_finder import CheckpointFinder
from sublet_agent.adapters.workspace.folder_reader import FolderReader
from sublet_agent.adapters.workspace.folder_snapshots import (
    Changed,
    FolderSnapshots,
    NamedFolder,
    NoRoom,
)
from sublet_agent.adapters.workspace.folder_watch import Wish
from sublet_agent.adapters.workspace.input_cache import InputCache
from sublet_agent.adapters.workspace.layout_file import LAYOUT, read_layout, write_layout
from sublet_agent.adapters.workspace.placed_files import PlacedFile, PlacedFiles
from sublet_agent.adapters.workspace.reader import DONE, Look, Progress
from sublet_agent.adapters.workspace.transfer import Transfer
from sublet_agent.core import cadence
from sublet_agent.core.checkpoints import Stall, read_stall
from sublet_agent.core.folders_at_rest import Ended
from sublet_agent.core.layout import HOME, OUTPUTS, TMP, WORK, Layout, RunFolders
from sublet_agent.core.partial_outputs import FOUND_OUTPUTS_BYTES, FoundOutputs
from sublet_agent.core.records import RunRecord
from sublet_agent.core.runner_port import ResolvedImage, RunRefused, RunSpec
from sublet_contracts.checkpoint_folders import FolderSnapshot, next_step
from sublet_contracts.checkpoint_layouts import MAX_STEP, QUIET_MS, Snapshot
from sublet_contracts.digests import hex_of
from sublet_contracts.documents import Checkpoint, Job
from sublet_contracts.outputs_tree import scan_outputs
from sublet_contracts.tree import MAX_TREE_BYTES, OnChunk, ScannedTree, TreeRefused, scan_tree

TRIES_AT_ONCE = 4
"""to copy a folder whose files are written anew all the time"""
BY_PROTOCOL = "the job saves by the checkpoint protocol, and goes on from what it saves there"

T = TypeVar("T")
OnBytes = Callable[[int], None]
MAX_DONE_BYTES = 16 * 1024 * 1024
_PIDS_PER_RUN = 1024
_DONE_MORE = 100_000  # of what the job notes about itself


@dataclass(frozen=True)
class FoldersSeen:
    """What came of a look at the folders that the job named as its checkpoint."""

    step: int | None = None
    """that was taken"""
    age_ms: int = 0
    """how long before that its newest change was"""
    due: bool = True
    """whether one is still to be taken"""
    says: str = ""
    """why not yet"""
    left_out: tuple[str, ...] = ()
    """a few of those that can't be carried"""


class Blocking(Protocol):
    """Runs what blocks in a thread."""

    async def __call__(self, call: Callable[..., T], *arguments: Any) -> T: ...


@contextlib.contextmanager
def _own_folder(path: Path) -> Iterator[int | None]:
    """Open a folder that the job may have replaced by a link; None where it is none (any more).

    What is done through the descriptor stays in that folder, whatever the job does meanwhile.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class Workspace:
    """The folders of one run."""

    def __init__(self, state: Path, record: RunRecord) -> None:
        self.record = record
        self.state = state
        self.root = state / "runs" / record.lease_id[:16]
        self.checkpoint = self.root / "checkpoint"
        self.inputs = self.root / "inputs"
        self.outputs = self.root / "outputs"
        self._placed = PlacedFiles(self.root)
        self._layout: Layout | None = None
        self._finder = CheckpointFinder(self.root)
        self._snapshots = FolderSnapshots(self.root, record.job.checkpoints)
        self.stall: Stall | None = None
        """what the checkpoint that was read last says of how long saving has held the job's loop"""

    @property
    def folders(self) -> RunFolders:
        """The run's own folders as the job sees them: `folders.work` is the working folder,
        `folders.place_of(path)` finds any path of the container."""
        inputs = dict(zip((i.destination for i in self.record.job.inputs), self._input_paths()))
        job = self.record.job
        return RunFolders(self.root, self.layout, job.outputs or None, inputs, job.checkpoints)

    @property
    def named_folders(self) -> list[NamedFolder]:
        """Where the folders lie that the job named as its checkpoint. Raises RunRefused."""
        own, found = self.folders, []
        for path in self.record.job.checkpoints:
            place = own.place_of(path)
            if place is None or place.name == "input":
                raise RunRefused(
                    f"--checkpoint {path}: the command can't write there; name a folder below its "
                    "working folder, or one of its own"
                )
            inside = tuple(part for part in place.inside.split("/") if part)
            found.append(NamedFolder(place.root, inside, tuple(own.mounted_in(path))))
        return found

    @property
    def layout(self) -> Layout:
        """Where the job sees them, as it was when the run was furnished."""
        if self._layout is None:
            self._layout = read_layout(self.root / LAYOUT)
        return self._layout or Layout()

    def make(self) -> None:
        """Make the folders."""
        own = [self.root / name for name in (WORK, HOME, TMP)]
        for folder in (*(self.checkpoint / n for n in ("in", "out", "ack")), self.inputs, *own):
            folder.mkdir(parents=True, exist_ok=True)
        if self.record.job.outputs:
            self.outputs.mkdir(exist_ok=True)

    def _saved_folders(self) -> list[Path]:
        """The folders of its own that the job named as its checkpoint."""
        mounts = self.folders.mounts()
        return [mounts[path] for path in self.record.job.checkpoints if path in mounts]

    def delete(self) -> bool:
        """Delete everything of this run; return whether nothing is left."""
        return folders.delete(self.root)

    def spec(self, image: ResolvedImage | None, helper: Path) -> RunSpec:
        """Return what the runner is to run."""
        job, lease = self.record.job, self.record.lease
        need = job.resources
        return RunSpec(
            run_id=run_id(self.record.lease_id),
            job_id=self.record.job_id,
            lease_id=self.record.lease_id,
            epoch=lease.epoch,
            image=job.image,
            image_id=image.image_id if image else None,
            command=job.command,
            env=job.env,
            device_ids=lease.device_ids,
            cpu_millis=max(1, need.cpu_millis or self.record.cpu_millis),
            memory_bytes=max(1, need.memory_bytes),
            disk_bytes=max(1, need.disk_bytes),
            pids=_PIDS_PER_RUN,
            network="egress" if need.egress else "none",
            run_dir=self.root,
            workdir=job.workdir,
            shm_bytes=job.shm_bytes,
            user=need.user,
            checkpoint_dir=self.checkpoint,
            inputs_dir=self.inputs,
            helper_dir=helper,
            stop_grace_ms=job.stop_grace_ms,
            threads=lease.threads,
            destinations=dict(zip((i.destination for i in job.inputs), self._input_paths())),
            outputs_dir=self.outputs if job.outputs else None,
            outputs_path=job.outputs or None,
            checkpoint_paths=job.checkpoints,
            cache_dir=Path(self.layout.cache_dir) if self.layout.cache_dir else None,
            layout=self.layout,
        )

    def _input_paths(self) -> Iterator[Path]:
        yield from input_paths(self.record.job, self.inputs)

    # -- in ----------------------------------------------------------------------------------------

    def restore(
        self,
        transfer: Transfer,
        kept: InputCache,
        cancel: threading.Event,
        furnish: Callable[[], Layout],
        *,
        reads_show: bool = False,
    ) -> None:
        """Place inputs and checkpoint, from what was prepared or from the broker. Can be repeated.

        `furnish` fills the run's own folders between the two: inputs may be copied into them, and
        what is restored comes into what the image has. `reads_show`: whether it would be seen that
        the job reads in/, which a container has read-only. Raises InputLost, CheckpointLost, and
        what Transfer and `furnish` raise.
        """
        record = self.record
        folders.delete(self.root)
        self.make()
        prepared = Prepared(self.state, record.job_id)
        epoch = record.lease.epoch
        if prepared.inputs_ready:
            os.rmdir(self.inputs)
            os.rename(prepared.inputs, self.inputs)
        else:
            fetch_inputs(transfer, kept, record.job_id, epoch, record.job, self.inputs, cancel)
        self._layout = furnish()
        write_layout(self.root / LAYOUT, self._layout)
        for folder in self._saved_folders():
            folder.mkdir(exist_ok=True)
        named = self.named_folders
        if record.checkpoint is not None:
            step = record.checkpoint.step
            if step >= MAX_STEP:
                raise CheckpointLost(f"step {step}: nothing that is saved after it can be told")
            target = self.checkpoint / "in" / f"step-{step}"
            ready = prepared.checkpoint(record.checkpoint)
            if ready.is_dir():
                os.rename(ready, target)
            else:
                fetch_checkpoint(transfer, record.job_id, epoch, record.checkpoint, target, cancel)
            self._place(target, step, named)
        prepared.delete()
        if record.checkpoint is not None:
            target = self._in_step(record.checkpoint.step)
            self._placed.watch(self._placed_files(target, reads_show=reads_show))

    def _place(self, target: Path, step: int, named: list[NamedFolder]) -> None:
        """Files of a checkpoint that was packed from the outputs folder, or from folders that the
        job named, go back there."""
        try:
            if named:
                self._snapshots.place(target, step, named)
            elif self.record.job.outputs:
                self._finder.place(target, step)
        except ValueError as error:
            raise CheckpointLost(f"step {step}: {error}") from error

    # -- out ---------------------------------------------------------------------------------------

    async def look(self, reader: FolderReader) -> Look:
        """Look what lies in the checkpoint folder. Raises FolderRefused, FolderBusy."""
        return await reader.look(self.checkpoint)

    async def usage(self, reader: FolderReader) -> int:
        """Measure what the job has on disk, up to its limit. Raises FolderRefused, FolderBusy."""
        limit = self.record.job.resources.disk_bytes
        own = [self.outputs, *(self.root / name for name in (WORK, HOME, TMP))]
        # Of its renter's caches, what it adds to them.
        own += [Path(self.layout.cache_dir)] if self.layout.cache_dir else []
        before = self.layout.cache_bytes
        used = await reader.usage(self.checkpoint, [*own, *self._saved_folders()], limit + before)
        used = max(0, used - before)
        if not self.record.job.checkpoints:
            return used
        # Copies of ours, which the job's user can't read; they take its disk all the same.
        loop = asyncio.get_running_loop()
        return used + await loop.run_in_executor(None, self._snapshots.held_bytes)

    async def search_outputs(
        self, reader: FolderReader, look: Look, blocking: Blocking, *, exited: bool = False
    ) -> int | None:
        """Return the step of the newest checkpoint that the script left in its outputs folder.

        None, too, for a job that saves by the protocol: it looks for its state in in/step-N, and
        what else it writes is its own. Once it has exited, nothing needs to be quiet. Raises
        FolderRefused: too much is there, or no step is left; FolderBusy; OSError.
        """
        job = self.record.job
        if not job.outputs or job.checkpoints or look.by_protocol:
            return None
        after = max([self.record.lease.start_step, *self.record.local_checkpoints])
        last_step, last_mtime_ms, since_ms = await blocking(self._finder.search_from, _booted_ms())
        fresh = await reader.search(
            self.record.lease_id,
            self.outputs,
            after_step=max(after, last_step),
            last_mtime_ms=last_mtime_ms,
            quiet_ms=0 if exited else QUIET_MS,
            since_ms=since_ms,
        )
        if fresh is not None:
            await blocking(self._finder.take, fresh)
        last = self._finder.last()
        return None if last is None else last.step

    async def search_folders(
        self,
        reader: FolderReader,
        look: Look,
        blocking: Blocking,
        *,
        waited_ms: int | None,
        ended: Ended = "",
    ) -> FoldersSeen:
        """Look into the folders that the job named as its checkpoint, and copy what is there if
        that is due (for `waited_ms`; None: it isn't), at rest, whole and new.

        Raises FolderRefused: too much is there; FolderBusy; OSError.
        """
        if look.by_protocol:
            return FoldersSeen(due=False, says=BY_PROTOCOL)
        record = self.record
        # Measured first: between the look and the copy there is to be no time to lose.
        room_bytes = record.job.resources.disk_bytes
        if waited_ms is not None or ended:
            room_bytes = max(0, room_bytes - await self.usage(reader))
        wish = Wish(
            leave_out=tuple(place.leave_out for place in self.named_folders),
            waited_ms=waited_ms,
            interval_ms=cadence.interval(record).ms,
            since_ns=await blocking(self._snapshots.since_ns),
            begun_ns=(record.started_ms or 0) * 1_000_000,
            ended=ended,
        )
        for _ in range(TRIES_AT_ONCE):
            with contextlib.suppress(Changed):
                return await self._take_folders(reader, blocking, wish, room_bytes)
        return FoldersSeen()

    async def _take_folders(
        self, reader: FolderReader, blocking: Blocking, wish: Wish, room_bytes: int
    ) -> FoldersSeen:
        """Raises Changed: what was to be copied was written anew meanwhile."""
        record, named = self.record, self.named_folders
        seen = await reader.watch(record.lease_id, named, wish)
        if seen.state == "same":
            return await blocking(self._untold)
        if seen.state != "ready":
            return FoldersSeen(says=seen.says)
        under_way = record.uploading is not None or any(
            awaiting.kind == "checkpoint" for awaiting in record.awaiting_verdict.values()
        )
        if under_way and not wish.ended:
            return FoldersSeen()  # two copies beside the folder would be one too many
        began_s = time.monotonic()
        last = await blocking(self._snapshots.last)
        after = [record.lease.start_step, *record.local_checkpoints, last.step if last else 0]
        step = next_step(max(after), seen.trained_step)
        if step > MAX_STEP:
            return FoldersSeen(due=False, says=f"no step comes after {max(after)}")
        try:
            taken = await blocking(self._snapshots.take, named, seen, step, room_bytes)
        except NoRoom as error:
            return FoldersSeen(due=False, says=str(error))
        if taken is None:
            return FoldersSeen(due=False)
        age_ms = seen.age_ms + int((time.monotonic() - began_s) * 1000)
        return FoldersSeen(step, age_ms, due=False, left_out=seen.left_out_said)

    def _untold(self) -> FoldersSeen:
        """What is to be said where nothing is new: an agent that was killed may have taken the
        newest snapshot and told nobody."""
        record, last = self.record, self._snapshots.last()
        told = max([record.lease.start_step, record.uploaded_step, *record.local_checkpoints])
        if last is None or last.step <= told or not self._snapshots.holds(last.step):
            return FoldersSeen(due=False)
        age_ms = max(0, time.time_ns() - self._snapshots.since_ns()) // 1_000_000
        return FoldersSeen(last.step, age_ms, due=False)

    def scan_checkpoint(self, step: int, on_chunk: OnChunk | None = None) -> ScannedTree:
        """Read a checkpoint, checking DONE against what is there. Raises TreeRefused, OSError, and
        what `on_chunk` raises, which is told of each chunk once it was hashed."""
        limit = self.record.job.resources.disk_bytes
        folder = self.checkpoint / "out" / f"step-{step}"
        if not folder.is_symlink() and folder.is_dir():
            # `out` is the job's to replace by a link at any moment; the folder above it is ours.
            tree = scan_tree(folder, max_bytes=limit, inside=self.checkpoint, on_chunk=on_chunk)
            self.stall = check_done(tree, step)
            return tree
        snapshot = self._snapshots.scan(step, limit, on_chunk)
        if snapshot is not None:
            return snapshot
        return self._finder.scan(step, limit, on_chunk)

    def checkpoint_bytes(self, step: int) -> int:
        """Return about how much a checkpoint will be, to show how far its upload is."""
        own = self.checkpoint / "out" / f"step-{step}"
        if not own.is_dir():
            own = self.root / "snapshots" / f"step-{step}"
        if own.is_dir():
            return folders.usage([own], MAX_TREE_BYTES)
        found = self._finder.last()
        return sum(file.size_bytes for file in found.files) if found is not None else 0

    def scan_outputs(
        self,
        on_bytes: OnBytes | None = None,
        left_s: Callable[[], float] = lambda: math.inf,
    ) -> ScannedTree:
        """Read what can be carried of the outputs folder, in the seconds that are left; where the
        job named none, of what it has written in its working folder. Raises OSError, and what
        `on_bytes` raises."""
        limit = min(self.record.job.resources.disk_bytes, MAX_TREE_BYTES)
        if self.record.job.outputs:
            return scan_outputs(
                self.outputs,
                max_bytes=limit,
                inside=self.root,
                on_bytes=on_bytes,
                has_time=lambda: left_s() > 0,
            )
        work = self.folders.work
        found = FoundOutputs(self.record.started_ms or 0, self.folders, self._written_before())
        return scan_outputs(
            work.root / work.inside,
            max_bytes=min(limit, FOUND_OUTPUTS_BYTES),
            inside=self.root,
            on_bytes=on_bytes,
            has_time=lambda: left_s() > 0,
            wanted=lambda path, status: found.wants(path, status.st_ctime_ns // 1_000_000),
        )

    def _written_before(self) -> frozenset[str]:
        """Return what of the working folder the job had written, maybe in a run before this one:
        by the newest record of its --checkpoint folders."""
        snapshot = self._snapshots.last() if self.record.job.checkpoints else None
        if snapshot is None:
            return frozenset()
        work, named, found = self.folders.work, self.named_folders, set()
        top = tuple(part for part in work.inside.split("/") if part)
        for file in snapshot.files:
            place = named[file.folder]
            parts = (*place.inside, *file.path.split("/"))
            if file.written and place.root == work.root and parts[: len(top)] == top:
                found.add("/".join(parts[len(top) :]))
        return frozenset(found)

    def finished(self, look: Look) -> bool:
        """Whether exit code 0 of a job that was asked to stop means that it had finished.

        A job that uses the checkpoint protocol knows that 75 is the code for what isn't. Any other
        script may end with 0 whenever it's asked to (Lightning does): then its trainer_state.json
        must say that the last step was made.
        """
        if look.by_protocol or look.progress is not None:
            return True
        last = self._last()
        return last is not None and 0 < last.total_steps <= last.trained_step

    def _last(self) -> Snapshot | FolderSnapshot | None:
        """The newest checkpoint that the script left, here or where it ran before."""
        return self._snapshots.last() if self.record.job.checkpoints else self._finder.last()

    def acknowledge(self, step: int) -> None:
        """Tell the job: durable off this machine."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        # Whatever the job has put there instead is its own loss.
        with _own_folder(self.checkpoint / "ack") as ack, contextlib.suppress(OSError):
            if ack is not None:
                os.close(os.open(f"step-{step}", flags, 0o644, dir_fd=ack))

    def delete_steps(self, steps: tuple[int, ...]) -> None:
        """Delete checkpoints that are no longer needed here."""
        with _own_folder(self.checkpoint / "out") as out:
            if out is not None:
                for step in steps:
                    folders.delete_in(out, f"step-{step}")
        self._snapshots.delete(steps)

    async def saved_file(self, reader: FolderReader) -> str:
        """Return the path, as the job sees it, of the file that it seems to save its state to; ''
        if there is none. Raises FolderRefused, FolderBusy."""
        mounts = self.folders.mounts()
        tops = {p: top for p, top in mounts.items() if top.name in (WORK, OUTPUTS) and top.is_dir()}
        if not tops:
            return ""
        since_ns = (self.record.started_ms or 0) * 1_000_000
        found = await reader.saved(list(tops.values()), since_ns)
        if found is None or not 0 <= found[0] < len(tops):
            return ""
        return posixpath.join(list(tops)[found[0]], found[1])

    def opened(self, look: Look) -> bool | None:
        """Say whether the job has opened what it was restored from; None: it began anew, or nobody
        can know. It may say so itself (ckpt.restore); else the files' access times do."""
        if self.record.checkpoint is None:
            return None
        if look.restored:
            return True
        seen = self._placed.opened()
        if seen is None and self._in_step(self.record.checkpoint.step).is_dir():
            return look.restored  # it saves by the protocol, so its helper's word is what counts
        return seen

    def _in_step(self, step: int) -> Path:
        return self.checkpoint / "in" / f"step-{step}"

    def _placed_files(self, target: Path, *, reads_show: bool) -> list[PlacedFile]:
        """Return where the files of a checkpoint were placed of which a read would be seen."""
        if target.is_dir():
            files = [path for path in target.rglob("*") if path.is_file()] if reads_show else []
            return [PlacedFile(target, path.relative_to(target).parts) for path in files]
        if self.record.job.checkpoints:
            named, snapshot = self.named_folders, self._snapshots.last()
            return [
                PlacedFile(
                    named[file.folder].root,
                    (*named[file.folder].inside, *file.path.split("/")),
                )
                for file in (snapshot.files if snapshot is not None else ())
            ]
        placed = self._finder.last()
        files_of = placed.files if placed is not None else ()
        return [PlacedFile(self.outputs, tuple(file.path.split("/"))) for file in files_of]

    def progress(self, look: Look) -> Progress | None:
        """Return step, total steps and metrics that the job told last; None: nothing sensible.

        A script that tells none is as far as its newest checkpoint says.
        """
        last = self._last() if look.progress is None else None
        if last is None:
            return look.progress
        return last.trained_step or last.step, last.total_steps, {}


def _booted_ms() -> int:
    """When this machine was started, by its wall clock."""
    return (time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) // 1_000_000


class Prepared:
    """What is fetched ahead for a job that may come."""

    def __init__(self, state: Path, job_id: str) -> None:
        self.root = state / "prepared" / job_id[:16]
        self.inputs = self.root / "inputs"

    @property
    def inputs_ready(self) -> bool:
        """Whether all inputs are here."""
        return self.inputs.is_dir()

    def checkpoint(self, document: Checkpoint) -> Path:
        """Return where that checkpoint is, if it is prepared."""
        return self.root / f"checkpoint-{hex_of(document.index_digest)[:32]}"

    def fetch(
        self,
        transfer: Transfer,
        kept: InputCache,
        job_id: str,
        job: Job,
        checkpoint: Checkpoint | None,
        cancel: threading.Event,
    ) -> None:
        """Fetch inputs and checkpoint; what is there already is left as it is."""
        self.root.mkdir(parents=True, exist_ok=True)
        if not self.inputs_ready:
            aside = self.root / "inputs.tmp"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            fetch_inputs(transfer, kept, job_id, None, job, aside, cancel)
            os.rename(aside, self.inputs)
        if checkpoint is not None and not self.checkpoint(checkpoint).is_dir():
            aside = self.root / "checkpoint.tmp"
            shutil.rmtree(aside, ignore_errors=True)
            fetch_checkpoint(transfer, job_id, None, checkpoint, aside, cancel)
            os.rename(aside, self.checkpoint(checkpoint))

    def delete(self) -> None:
        """Drop it."""
        shutil.rmtree(self.root, ignore_errors=True)


class InputLost(Exception):
    """An input's content can't be had from the broker."""


class CheckpointLost(Exception):
    """The checkpoint can't be had from the broker, or isn't what its index says."""


def run_id(lease_id: str) -> str:
    """Return the runner's name for a lease's run."""
    return f"sublet-{lease_id[:32]}"


def input_paths(job: Job, inputs: Path) -> list[Path]:
    """Return where each input lies: under its own name, numbered where two share one."""
    taken: set[str] = set()
    paths = []
    for number, item in enumerate(job.inputs):
        name = item.destination.rsplit("/", 1)[-1]
        if name in taken:
            name = f"{number}-{name}"
        taken.add(name)
        paths.append(inputs / name)
    return paths


def fetch_inputs(
    transfer: Transfer,
    kept: InputCache,
    job_id: str,
    epoch: int | None,
    job: Job,
    inputs: Path,
    cancel: threading.Event,
) -> None:
    """Fetch a job's inputs that aren't kept here. Raises InputLost and what Transfer raises."""
    for item, path in zip(job.inputs, input_paths(job, inputs), strict=True):
        try:
            # Asked of the broker also for what is kept: its word is that the job may have it.
            digest = item.index_digest
            index = transfer.index(job_id, epoch, digest, cancel)
            is_folder = item.kind == "folder"
            if not is_folder and (len(index.files) != 1 or index.links):
                raise TreeRefused(f"its index lists {len(index.files)} files instead of one")
            tree = path if is_folder else path.with_name(f".{path.name}.tmp")
            if not kept.place(job.renter, digest, index, tree):
                transfer.download(job_id, epoch, index, tree, cancel)
                kept.keep(job.renter, digest, index, tree)
            if not is_folder:
                os.rename(tree / index.files[0].path, path)
                shutil.rmtree(tree)
        except TreeRefused as error:
            raise InputLost(f"input {item.destination}: {error}") from error


def fetch_checkpoint(
    transfer: Transfer,
    job_id: str,
    epoch: int | None,
    document: Checkpoint,
    target: Path,
    cancel: threading.Event,
) -> None:
    """Fetch a checkpoint into `target`, which appears whole. Raises CheckpointLost and what
    Transfer raises."""
    aside = target.with_name(target.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        index = transfer.index(job_id, epoch, document.index_digest, cancel)
        if index.links:
            raise TreeRefused(f"{index.links[0].path} is a link")
        transfer.download(job_id, epoch, index, aside, cancel)
    except TreeRefused as error:
        raise CheckpointLost(f"step {document.step}: {error}") from error
    os.rename(aside, target)


def check_done(tree: ScannedTree, step: int) -> Stall | None:
    """Compare DONE with what was read, by paths and sizes; return what it says of the job's stall.

    What is in the files is told by the hashes that were taken as they were read; that they are
    whole, by the rename, unless the machine was started anew since (core/checkpoints.py). Raises
    TreeRefused: the checkpoint is torn or altered.

    DONE is taken from the tree as it was read, not opened anew: the job could have put something
    else in its place meanwhile.
    """
    entry = next((file for file in tree.index.files if file.path == DONE), None)
    if entry is None:
        raise TreeRefused("DONE is gone")
    if entry.size_bytes > MAX_DONE_BYTES:
        raise TreeRefused(f"DONE has more than {MAX_DONE_BYTES} bytes")
    data = b"".join(tree.read_chunk(chunk.digest) for chunk in entry.chunks)
    # Parsing holds up all threads: what can't be this tree's is not parsed.
    if (
        data.count(b"{") + data.count(b"[") > 2 * len(tree.index.files) + _DONE_MORE
        or data.count(b",") > 4 * len(tree.index.files) + _DONE_MORE
    ):
        raise TreeRefused("DONE holds more than the files that are there")
    try:
        done = json.loads(data)
        said = {str(f["path"]): int(f["size_bytes"]) for f in done["files"]}
        said_step = int(done["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        # repr() of a UnicodeDecodeError holds all that was read, up to 16 MiB.
        said_wrong = _sayable(f"{type(error).__name__}: {error}")
        raise TreeRefused(f"DONE can't be read: {said_wrong}") from error
    there = {f.path: f.size_bytes for f in tree.index.files if f.path != DONE}
    if said_step != step:
        raise TreeRefused(f"DONE says step {_sayable(str(said_step))}")
    if said != there:
        wrong = sorted(p for p in said.keys() | there.keys() if said.get(p) != there.get(p))
        raise TreeRefused(f"{_sayable(wrong[0])} is not as DONE says: torn or changed")
    return read_stall(done)


def _sayable(text: str) -> str:
    """Return what of a stranger's text fits into a message: short, and no half of a character,
    which can't be written to a log or a database."""
    return text[:200].encode(errors="backslashreplace").decode()
