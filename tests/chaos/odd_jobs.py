"""Odd jobs by the thousand on one agent, which must not be moved by any of them.

    python -m tests.chaos.odd_jobs [--runner process|docker] [--jobs N] [--first SEED] [--only SEED]
                                   [--parallel N] [--state FILE] [--json FILE]

The real shell, core, journal, spool and runner, in this process, with a broker of few words: it
leases, takes every checkpoint for durable, and settles what has ended. What each job does, and how
its end may be judged, is drawn from a seed (odd_behaviour.py). Checked:

- the agent never ends, and says nothing of `unexpected`;
- each run ends once, with a reason that the table of what it did allows, and is cleared away;
- the event loop is never late by over 200 ms more than a bare loop in a process beside it;
- nothing is left at the end: no process, no container, no folder.

With `--state` it goes on where it was interrupted. Exit status 0: all held; 1: something did not.
A problem ends it at once; a late loop is noted, with when and by how much, and the rest is played.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from sublet_agent.adapters.docker.images import ImageRules
from sublet_agent.adapters.docker.runner import DockerRunner
from sublet_agent.adapters.process.runner import ProcessRunner
from sublet_agent.adapters.session.journal import Journal
from sublet_agent.adapters.session.log_spool import Spool
from sublet_agent.adapters.shell import UNEXPECTED, Shell, put_the_loop_first
from sublet_agent.adapters.workspace import folders
from sublet_agent.adapters.workspace.pack_pipe import PackBody
from sublet_agent.adapters.workspace.transfer import Transfer, TransferRefused
from sublet_agent.core.agent import AgentCore
from sublet_agent.core.runner_port import Runner
from sublet_contracts.api import MissingRequest, MissingView
from sublet_contracts.ckpt_helper_install import write_helper
from sublet_contracts.documents import (
    Device,
    Job,
    Lease,
    Receipt,
    Settlement,
    read_document,
    sign_document,
)
from sublet_contracts.keys import SigningKey
from sublet_contracts.packs import ChunkDiffers, PackReader
from sublet_contracts.problems import ProblemCode
from sublet_contracts.reasons import MEANINGS, Reason
from sublet_contracts.wire import (
    Assign,
    CheckpointUploaded,
    CheckpointVerdict,
    LeaseAnswer,
    Logs,
    LogsWanted,
    Message,
    Order,
    ReceiptIssued,
    RunChanged,
    SettlementNotice,
    Welcome,
)
from tests.agent.test_core import terms
from tests.chaos.odd_behaviour import OddJob, draw
from tests.images import base_image

BROKER = SigningKey.from_seed(b"b" * 32)
PROVIDER = SigningKey.from_seed(b"p" * 32)
RENTER = SigningKey.from_seed(b"r" * 32)
MARK = f"{os.getpid()}-odd-job"
"""in the environment of all that an odd job starts, as a part of a value"""
MEMORY_BYTES = 128 * 1024 * 1024
DISK_BYTES = 24 * 1024 * 1024
LOG_BYTES = 512 * 1024
JOB_S = 120.0
"""in which each job must have ended and been cleared away"""
LATE_S = 0.2
BEAT_S = 0.02
STACK_SHOWN = 6
NEAR_S = 1.0
"""around a late beat, in which the bare loop beside it is asked whether it was late as well"""


@dataclass
class Result:
    """What was played so far."""

    jobs: int = 0
    next_seed: int = 0
    seconds: float = 0.0
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)
    deeds: collections.Counter[str] = field(default_factory=collections.Counter)
    worst_late_ms: int = 0
    """of the agent's loop"""
    worst_beside_ms: int = 0
    """of the bare one"""
    worst_excess_ms: int = 0
    """by which the agent's was later than the bare one at about that time"""
    late: list[str] = field(default_factory=list)
    """each time that it was so by more than it may"""
    problems: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {**asdict(self), "reasons": dict(self.reasons), "deeds": dict(self.deeds)}


# -- time ------------------------------------------------------------------------------------------

_BARE = """
import asyncio, time
async def beat():
    due = time.monotonic()
    while True:
        due += {beat}
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        now = time.monotonic()
        if now - due > {beat}:
            print(due, now - due, flush=True)
        due = max(due, now)
asyncio.run(beat())
"""


def _ran_and_waited_s(thread: str = "thread-self") -> tuple[float, float]:
    """Return for how long a thread has run; and was ready, and all processors busy with others."""
    ran_ns, waited_ns, _ = Path(f"/proc/{thread}/schedstat").read_text().split()
    return int(ran_ns) / 1e9, int(waited_ns) / 1e9


def _waits_of_others(loop: int) -> dict[str, float]:
    """Return how long each other thread of this process was kept off the processors so far."""
    found = {}
    for name in os.listdir("/proc/self/task"):
        if name != str(loop):
            with contextlib.suppress(OSError):  # it has ended
                found[name] = _ran_and_waited_s(f"self/task/{name}")[1]
    return found


@dataclass(frozen=True)
class Late:
    """A beat that came late, and what the loop's thread did from the one before on."""

    due_s: float
    late_s: float
    ran_s: float
    waited_s: float

    def excess_s(self, beside_s: float, others_waited_s: float) -> float:
        """Return what of it is the agent's own doing.

        `others_waited_s`: the longest that another thread of the agent was kept off the processors
        meanwhile. It may have held the interpreter then; for that the loop neither runs nor is
        ready, so no more than such a time is taken off.
        """
        blocked_s = max(0.0, self.late_s - self.ran_s - self.waited_s)
        return self.late_s - self.waited_s - min(blocked_s, others_waited_s) - beside_s


class Clock:
    """Beats in this loop, and in a bare one beside it.

    For how long this loop's thread was ready and got no processor doesn't count: that is the jobs'
    right, who are leased all of them, and shows how many play at once. Neither does it where that
    befell a thread for which the loop had to wait.
    """

    def __init__(self, folder: Path) -> None:
        self._log = folder / "beats"
        with self._log.open("wb") as log:
            self._bare = subprocess.Popen(
                [sys.executable, "-I", "-c", _BARE.format(beat=BEAT_S)],
                stdout=log,
            )
        self._late: list[Late] = []
        self._next_s = float("inf")
        self._where: dict[float, str] = {}
        """of a beat that is overdue: where the loop is, by when it was due"""
        self._others_waited_s: dict[float, float] = {}
        """of such a beat: how long another thread was kept off the processors, at most"""
        self._ended = threading.Event()
        loop = (threading.get_ident(), threading.get_native_id())
        threading.Thread(target=self._watch, args=loop, name="odd-clock", daemon=True).start()

    def _watch(self, thread: int, native: int) -> None:
        """Look where the loop's thread is when its beat is overdue: how else would anybody know."""
        before = _waits_of_others(native)
        overdue: float | None = None
        while not self._ended.wait(LATE_S / 4):
            due = self._next_s
            now = _waits_of_others(native)
            if overdue is not None:
                waits = (waited_s - before.get(name, 0.0) for name, waited_s in now.items())
                self._others_waited_s[overdue] = max(waits, default=0.0)
            if time.monotonic() - due <= LATE_S:
                before, overdue = now, None
                continue
            overdue = due
            if due not in self._where:
                frame = sys._current_frames().get(thread)
                stack = traceback.extract_stack(frame)[-STACK_SHOWN:]
                places = [f"{Path(f.filename).stem}.{f.name}:{f.lineno}" for f in stack]
                self._where[due] = " > ".join(places)

    async def beat(self) -> None:
        """Note how late this loop is, until cancelled."""
        due, (ran_s, waited_s) = time.monotonic(), _ran_and_waited_s()
        while True:
            due += BEAT_S
            self._next_s = due
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            now, before = time.monotonic(), (ran_s, waited_s)
            ran_s, waited_s = _ran_and_waited_s()
            if now - due > BEAT_S:
                self._late.append(Late(due, now - due, ran_s - before[0], waited_s - before[1]))
            due = max(due, now)

    def close(self) -> None:
        """End the bare loop."""
        self._ended.set()
        self._bare.kill()
        self._bare.wait()

    def judge(self, result: Result) -> None:
        """Compare the two."""
        beside = [
            (float(due), float(late))
            for due, late in (line.split() for line in self._log.read_text().splitlines()[:-1])
        ]
        worst = max((late for _, late in beside), default=0.0)
        result.worst_beside_ms = max(result.worst_beside_ms, round(worst * 1000))
        for beat in self._late:
            due, late = beat.due_s, beat.late_s
            near = [
                other for at, other in beside if due - NEAR_S - other <= at <= due + late + NEAR_S
            ]
            others_s = self._others_waited_s.get(due, 0.0)
            excess_ms = round(beat.excess_s(max(near, default=0.0), others_s) * 1000)
            result.worst_late_ms = max(result.worst_late_ms, round(late * 1000))
            result.worst_excess_ms = max(result.worst_excess_ms, excess_ms)
            if excess_ms > LATE_S * 1000:
                where = self._where.get(due, "nobody saw where")
                result.late.append(
                    f"the loop was late by {late:.3f} s, {excess_ms} ms more: {where}"
                )


# -- the broker of few words -----------------------------------------------------------------------


class Blobs(Transfer):
    """Takes what is uploaded: reads every pack as a broker does, and keeps none."""

    def __init__(self) -> None:
        super().__init__("http://nowhere", PROVIDER, lambda: BROKER.party, lambda: 0)

    def request(self, method: str, target: str, body: bytes | PackBody = b"", **_: Any) -> bytes:
        """See Transfer: everything is missing, and what comes is taken."""
        *_above, kind, name = target.split("/")
        if name == "missing" and isinstance(body, bytes):
            asked = MissingRequest.model_validate_json(body)
            return MissingView(missing=asked.digests).model_dump_json().encode()
        assert method == "PUT", target
        if kind == "packs" and not isinstance(body, bytes):
            reader = PackReader(name)
            try:
                for part in body.pieces():
                    reader.feed(bytes(part))
                reader.close()
            except ChunkDiffers as error:
                code = ProblemCode.HASH_MISMATCH
                raise TransferRefused(str(error), code, 422, error.digest) from error
        return b""


@dataclass
class Leased:
    """A job under a lease."""

    odd: OddJob
    lease_id: str
    job_id: str
    ends: list[Reason] = field(default_factory=list)
    finals: list[Receipt] = field(default_factory=list)
    settled: bool = False


class Market:
    """One agent, and what it is told."""

    def __init__(self, root: Path, kind: str, parallel: int, result: Result) -> None:
        self.root = root
        self.kind = kind
        self.result = result
        self.said: list[str] = []
        self.witnessed = True
        """whether the runner tells a code that a job returned from a signal"""
        root.mkdir(exist_ok=True)
        state = root / "state"
        self.journal = Journal(state)
        devices = ("cpu",) if kind == "docker" else tuple(f"gpu-{n}" for n in range(parallel))
        offered = terms(
            devices=tuple(
                Device(id=id, kind="gpu", name="odd", memory_bytes=2**34, hardware_class="odd")
                for id in devices
            ),
            runner=kind,
            accepts=(RENTER.party,),
        )
        self.core = AgentCore(offered, PROVIDER, self.journal.load())
        self.image = base_image() if kind == "docker" else "local/python"
        self.runner = self._runner(state)
        self.spool = Spool(state / "spool.db", self.journal.reserve)
        self.shell = Shell(
            state=state,
            core=self.core,
            journal=self.journal,
            spool=self.spool,
            runner=self.runner,
            transfer=Blobs(),
            helper=write_helper(root / "helper"),
            now_ms=lambda: time.time_ns() // 1_000_000,
            say=self.said.append,
        )
        self.free = list(devices)
        self.leases: dict[str, Leased] = {}
        self.live = True
        self._grew = asyncio.Event()
        self._taken = 0
        """up to which number it has taken the agent's messages"""

    def _runner(self, state: Path) -> Runner:
        if self.kind == "docker":
            rules = ImageRules(allowed=(self.image,))
            runner = DockerRunner(self.journal.state_id, state, images=rules, log_bytes=LOG_BYTES)
            self.witnessed = not runner.why_no_witness()
            return runner
        process = ProcessRunner(self.journal.state_id, state / "process", log_bytes=LOG_BYTES)
        self.witnessed = not process.why_no_witness()
        return process

    # What the shell takes for its link:

    def send(self, message: Message) -> bool:
        """Take an unreliable message."""
        if isinstance(message, Logs):
            following = message.lines[-1].number + 1
            wanted = LogsWanted(lease=message.lease, next_number=following)
            asyncio.get_running_loop().call_soon(self.shell.arrived, wanted)
        return True

    def outbox_grew(self) -> None:
        """Take what is reliable."""
        self._grew.set()

    # The broker:

    async def serve(self) -> None:
        """Answer the agent, until cancelled."""
        while True:
            await self._grew.wait()
            self._grew.clear()
            for pending in self.journal.pending(after=self._taken):
                assert pending.message is not None
                self._taken = pending.number
                done = self.journal.rows_of_acknowledged((pending.mid,))
                self.shell.writer.write(done, lambda: None)
                self._take(pending.message)

    def _take(self, message: Message) -> None:
        match message:
            case LeaseAnswer(lease=lease_id, signed=None):
                self._problem(self.leases[lease_id].odd, f"refused: {message.refusal}")
                self.leases[lease_id].settled = True
            case CheckpointUploaded():
                payload = json.loads(message.checkpoint.payload_bytes)
                verdict = CheckpointVerdict(
                    lease=payload["lease"],
                    epoch=1,
                    checkpoint=message.checkpoint.id,
                    kind=payload["kind"],
                    step=payload["step"],
                    durable=True,
                )
                self.shell.arrived(verdict)
            case RunChanged(state="exited"):
                assert message.reason is not None
                self.leases[message.lease].ends.append(message.reason)
            case ReceiptIssued():
                receipt = read_document(message.receipt, Receipt, signed_by=(PROVIDER.party,))
                if receipt.final:
                    self.leases[receipt.lease].finals.append(receipt)
                    self._settle(self.leases[receipt.lease], receipt, message.receipt.id)
            case _:
                return

    def _settle(self, leased: Leased, receipt: Receipt, receipt_id: str) -> None:
        assert receipt.reason is not None
        settlement = Settlement(
            broker=BROKER.party,
            job=leased.job_id,
            lease=leased.lease_id,
            epoch=1,
            receipt=receipt_id,
            reason=receipt.reason,
            fault=MEANINGS[receipt.reason].fault,
            accepted_by="none",
            cum_device_ms=receipt.cum_device_ms,
            payable_device_ms=0,
            lost_device_ms=receipt.cum_device_ms,
            charged_ucr=0,
            fee_ucr=0,
            provider_ucr=0,
            transfers=(),
            issued_ms=self.shell.now_ms(),
        )
        notice = SettlementNotice(settlement=sign_document(settlement, BROKER).envelope)
        leased.settled = True
        # A while later, as a renter signs first.
        asyncio.get_running_loop().call_later(0.05, self.shell.arrived, notice)

    def _problem(self, odd: OddJob, says: str) -> None:
        self.result.problems.append(f"{odd.name}: {says}")

    # The renter:

    async def play(self, odd: OddJob) -> None:
        """Have one job run, and look how it ended."""
        device = self.free.pop()
        leased = self._lease(odd, device)
        began = time.monotonic()
        orders = sorted(odd.end.orders, key=lambda order: order.after_s)
        while leased.lease_id in self.core.runs or not leased.settled:
            await asyncio.sleep(0.05)
            for order in list(orders):
                if time.monotonic() - began >= order.after_s:
                    orders.remove(order)
                    self.shell.arrived(
                        Order.model_validate(
                            {
                                "lease": leased.lease_id,
                                "epoch": 1,
                                "desired": order.desired,
                                "reason": order.reason,
                                "grace_ms": order.grace_ms,
                            }
                        )
                    )
            if time.monotonic() - began > JOB_S:
                run = self.core.runs.get(leased.lease_id)
                self._problem(odd, f"no end: {run.record.phase if run else 'not settled'}")
                return
        self._judge(leased)
        del self.leases[leased.lease_id]
        self.free.append(device)

    def _lease(self, odd: OddJob, device: str) -> Leased:
        now_ms = self.shell.now_ms()
        command = odd.end.command or ("python3", "-S", "-c", odd.code)
        # A third each: what is recognised, one folder by name, the working folder as well.
        named = ((), ("/out",), (".", "/out"))[odd.seed % 3]
        job = sign_document(
            Job.model_validate(
                {
                    "renter": RENTER.party,
                    "broker": BROKER.party,
                    "nonce": f"{odd.seed:016x}",
                    "name": "odd",
                    "image": self.image,
                    "command": command,
                    "env": {"ODD_JOB": f"{MARK}-{odd.seed}"},
                    "outputs": "/out",
                    "checkpoints": named,
                    "resources": {
                        "devices": 1,
                        "device_kind": "any",
                        "cpu_millis": 1000,
                        "memory_bytes": MEMORY_BYTES,
                        "disk_bytes": DISK_BYTES,
                    },
                    "max_price_ucr_per_device_hour": 400_000,
                    "budget_ucr": 1_000_000,
                    "checkpoint_interval_ms": 1_000 if named else 60_000,
                    "patience_ms": 20_000,
                    "inputs": (),
                    "accept_receipts_up_to_ucr": 0,
                    "issued_ms": now_ms,
                    "expires_ms": now_ms + 10**9,
                }
            ),
            RENTER,
        )
        lease = sign_document(
            Lease.model_validate(
                {
                    "broker": BROKER.party,
                    "provider": PROVIDER.party,
                    "renter": RENTER.party,
                    "job": job.id,
                    "offer": self.core.saved.offers[-1].id,
                    "epoch": 1,
                    "device_ids": (device,),
                    "price_ucr_per_device_hour": 400_000,
                    "fee_bps": 500,
                    "hold_ucr": 1_000_000,
                    "start_step": 0,
                    "issued_ms": now_ms,
                    "answer_by_ms": now_ms + 10_000,
                }
            ),
            BROKER,
        )
        leased = self.leases[lease.id] = Leased(odd, lease.id, job.id)
        self.shell.arrived(Assign(lease=lease.envelope, job=job.envelope, checkpoint=None))
        return leased

    def _judge(self, leased: Leased) -> None:
        odd, result = leased.odd, self.result
        result.jobs += 1
        result.deeds.update(deed.name for deed in odd.deeds)
        allowed = odd.reasons(self.kind)
        if not self.witnessed and Reason.JOB_FAILED in allowed:
            allowed |= {Reason.KILLED_UNATTRIBUTED}  # a code is all that is seen
        if len(leased.ends) != 1 or len(leased.finals) != 1:
            self._problem(odd, f"{len(leased.ends)} ends, {len(leased.finals)} final receipts")
            return
        [reason], [receipt] = leased.ends, leased.finals
        result.reasons[reason] += 1
        if receipt.reason is not reason:
            self._problem(odd, f"{reason}, and {receipt.reason} on the receipt")
        if reason not in allowed:
            self._problem(odd, f"{reason}, where it may be {', '.join(sorted(allowed))}")

    # The whole:

    async def run(self, jobs: Iterable[OddJob]) -> None:
        """Play them all."""
        self.shell.link = cast(Any, self)
        await self.shell.start()
        put_the_loop_first()
        clock = Clock(self.root)
        tasks = [
            asyncio.create_task(work) for work in (clock.beat(), self.serve(), self.shell.ticking())
        ]
        try:
            self.shell.joined(BROKER.party, 0, {})
            welcome = {"heartbeat_ms": 3000, "fee_bps": 500, "leases": ()}
            self.shell.arrived(Welcome.model_validate(welcome))
            await self._play_all(jobs, tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            clock.close()
            self.shell.close()
            self.spool.close()
            self.journal.close()
        clock.judge(self.result)
        self._look_for_leftovers()

    async def _play_all(self, jobs: Iterable[OddJob], tasks: list[asyncio.Task[Any]]) -> None:
        playing: set[asyncio.Task[None]] = set()
        for odd in jobs:
            while not self.free and playing:
                done, playing = await asyncio.wait(playing, return_when=asyncio.FIRST_COMPLETED)
                for one in done:
                    one.result()
            if not self.free or self._is_over(tasks) or len(self.result.problems) > 20:
                break
            playing.add(asyncio.create_task(self.play(odd)))
            await asyncio.sleep(0)
            self.result.next_seed = odd.seed + 1
        if playing:
            for one in (await asyncio.wait(playing))[0]:
                one.result()
        self._is_over(tasks)

    def _is_over(self, tasks: list[asyncio.Task[Any]]) -> bool:
        """Whether the agent has ended, which it must not."""
        for task in tasks:
            if task.done():
                self.result.problems.append(f"the agent ended: {task.exception()!r}")
        if self.shell.failed is not None:
            self.result.problems.append(f"the agent ended: {self.shell.failed!r}")
        for line in self.said:
            if UNEXPECTED in line:
                self.result.problems.append(line)
        self.said.clear()
        return bool(self.shell.failed) or any(task.done() for task in tasks)

    def _look_for_leftovers(self) -> None:
        found = [item.run_id for item in self.runner.find()]
        folders = [path.name for path in (self.root / "state" / "runs").glob("*")]
        left = [*found, *folders, *(f"process {pid}" for pid in processes_of_jobs())]
        if left:
            self.result.problems.append(f"left at the end: {', '.join(left[:10])}")


def processes_of_jobs() -> list[int]:
    """Return the processes that an odd job has started and that are still there."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if MARK.encode() in Path(f"/proc/{name}/environ").read_bytes():
                found.append(int(name))
        except OSError:
            continue
    return found


def play(
    root: Path, kind: str, jobs: Iterable[OddJob], result: Result, parallel: int = 4
) -> Result:
    """Play these jobs on one agent."""
    began = time.monotonic()

    async def whole() -> None:
        # Made within the loop that it is used in.
        await Market(root, kind, parallel, result).run(jobs)

    switch_s = sys.getswitchinterval()
    try:
        asyncio.run(whole(), debug=False)
    finally:
        # A test goes on in this process.
        sys.setswitchinterval(switch_s)
        gc.unfreeze()
    result.seconds += time.monotonic() - began
    return result


def main(arguments: list[str]) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.odd_jobs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runner", choices=("process", "docker"), default="process")
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--only", type=int, nargs="+", metavar="SEED", help="these, one by one")
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--batch", type=int, default=500, help="jobs between two notes in --state")
    parser.add_argument("--state", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    seeds = options.only or range(options.first, options.first + options.jobs)
    result = Result(next_seed=seeds[0])
    if options.state and options.state.is_file():
        said = json.loads(options.state.read_text())
        result = Result(**said)
        result.reasons = collections.Counter(said["reasons"])
        result.deeds = collections.Counter(said["deeds"])
    if options.only:
        for seed in seeds:
            print(draw(seed).name, sorted(draw(seed).reasons(options.runner)))
            print(draw(seed).code)
    while not result.problems:
        due = [seed for seed in seeds if seed >= result.next_seed][: options.batch]
        if not due:
            break
        root = Path(tempfile.mkdtemp(prefix="sublet-odd-"))
        play(root, options.runner, map(draw, due), result, options.parallel)
        if options.state:
            options.state.parent.mkdir(parents=True, exist_ok=True)
            options.state.write_text(json.dumps(result.record()))
        print(
            f"{result.jobs} jobs in {result.seconds:.0f} s; late by {result.worst_late_ms} ms, "
            f"{result.worst_excess_ms} ms more than beside",
            flush=True,
        )
        if not result.problems:
            folders.delete(root)
        else:
            print(f"FAILED, what is left lies in {root}")
    command = f"python -m tests.chaos.odd_jobs --runner {options.runner} --jobs {options.jobs}"
    record = {"command": command, "runner": options.runner, **result.record()}
    print(json.dumps(record, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 1 if result.problems or result.late else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
