"""Each durable write meets kill -9, EIO and ENOSPC, in a market of real processes that goes on.

Jobs run on two agents while the gatekeeper brings faults to one crash point after the other; what
ended is started again, as systemd would. When each known point has met each fault (or the limit is
reached), faults stop, every job has to end, and every promise of churn must hold, and besides:

- what the broker acknowledged, it has: deposits to the micro-credit, and every job;
- while every durable write fails, nothing is acknowledged;
- a path whose fsync failed is made durable later, or is there no more;
- a process ends only of a fault, and says why;
- nothing of the market is left running, Ray's processes among it.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sublet.client import Client, Job
from sublet.demo.local import LocalMarketError, LocalProcess
from sublet.errors import BrokerAway, SubletError
from sublet_agent.adapters.owner.control import NoAgent, ask_agent
from sublet_contracts.api import JobView
from tests.chaos.churn import FUNDS_CREDITS, PATIENCE, TIMES, Churn, ChurnFailed, Result, Say
from tests.chaos.gated_market import GatedMarket
from tests.chaos.gatekeeper import Gatekeeper
from tests.chaos.losses import Loss
from tests.chaos.strace import Strace
from tests.e2e.scenario import EVERY, JOB_SCRIPT, STEPS

KINDS = {"broker": ("broker", "ray"), "agent": ("agent", "supervisor")}
"""What can be asked for, and the processes that it stands for."""
FAULTS = ("kill", "EIO", "ENOSPC")
AGENTS = 2
AT_ONCE = 2
PACE_S = 0.05
FAULTS_A_JOB = 10
BREATH_S = 30.0
QUIET_S = 300.0
"""No new crash point and no fault met for so long: what is still due doesn't come any more."""
ACTS_S = 3.0
STUNS_S = (3.0, 8.0)
STILL_S = 6.0
STARTS_LIMIT = 100
ANSWER_LIMIT_S = 180.0
AGENT_END_LIMIT_S = 120.0
SAYS_WHY = {"broker": "sublet broker: ", "agent": " error: "}
"""How a process begins its last words, where it ends of an error."""
NOT_COUNTED = ("kills", "seed", "recovery_s", "long_losses", "unexplained_losses")
"""What churn's record has and this one hasn't."""

T = TypeVar("T")
ENDED_FOR_GOOD = ("succeeded", "failed", "cancelled")


@dataclass
class Ends:
    """How often a process ended of a fault, and what it said last where it wasn't killed."""

    times: Counter[str] = field(default_factory=Counter)
    words: dict[str, str] = field(default_factory=dict)


class Writes(Churn):
    """One run."""

    def __init__(
        self,
        root: Path,
        what: Sequence[str],
        seed: int,
        say: Say,
        *,
        limit: int | None = None,
        seconds: float = 3600.0,
        first_starts: bool = True,
        still: Sequence[str] = ("EIO", "ENOSPC"),
    ) -> None:
        super().__init__(root, 0, seed, say)
        processes = [process for kind in what for process in KINDS[kind]]
        (root / "traces").mkdir(parents=True)
        self.gates = Gatekeeper(root / "traces", processes, FAULTS, seed, limit)
        self.market = GatedMarket(root / "market", TIMES)
        self.market.gate = self.gates.address
        self.what = what
        self.seconds = seconds
        self.still = still
        """With which errors every durable write fails for a while, before the end."""
        self.first_starts = first_starts and "broker" in what
        self.ends = Ends()
        self.acknowledged: set[str] = set()
        self.funded_ucr = FUNDS_CREDITS * 1_000_000
        self.unsure_ucr = 0
        """Deposits that were answered with an error: they may have been made, or not."""
        self.refusals: Counter[str] = Counter()
        self.still_writes = 0
        """Attempts to have something acknowledged while no durable write worked."""
        self.cancelled: list[Job] = []
        self.leaving: dict[str, int] = {}
        """Agents that are to drain and end, and the process that has been asked to."""
        self.still_met: Counter[str] = Counter()
        self.made_ucr = 0
        """Of those: what was made."""
        self.acknowledged_meanwhile = 0
        self.gone = 0
        self._keeping = threading.Event()
        self._keeper: threading.Thread | None = None
        self._acts = 0
        self._hurting = True
        self._stunned: list[threading.Timer] = []
        self._breath = (0, 0)
        """Jobs that had ended, and faults that had been met, when the last one ended."""

    # -- systemd -----------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self.first_starts:
            self._first_starts()
        self.market.start_broker()
        self.client = Client(
            broker=self.market.url, config_dir=self.root / "config", away_limit_s=2.0
        )
        self.clients = [self.client]
        for number in range(AGENTS):
            self._start_agent(f"box{number}")
        self.client.fund(self.client.party, FUNDS_CREDITS, operator_key=self.market.operator_key)
        self.market.wait_for(lambda: len(self.client.offers().offers) == AGENTS, "all offers")
        self.wanted = 1  # Jobs are submitted until it's 0.
        self._keeping.set()
        self._keeper = threading.Thread(target=self._keep, name="systemd", daemon=True)
        self._keeper.start()
        self.gates.enable(True)

    def _keep(self) -> None:
        """Start again what ended."""
        while self._keeping.is_set():
            assert self.market.broker is not None
            if not self.market.broker.running:
                self._tell_end(self.market.broker)
                with contextlib.suppress(LocalMarketError):
                    self.market.restart_broker()
            for name, agent in list(self.market.agents.items()):
                if name in self.leaving and self._left(agent):
                    self.gates.forget(agent.pid)
                    del self.market.agents[name], self.leaving[name]
                elif not agent.running:
                    self._tell_end(agent)
                    self._start_agent(name)
                elif agent.pid in self.gates.doomed:
                    self._end_deaf(agent)
            time.sleep(0.1)

    def _tell_end(self, process: LocalProcess) -> None:
        """Note how a process ended; without a fault it must not."""
        fault = self.gates.forget(process.pid)
        assert process.process is not None
        status = process.process.returncode
        tail = process.log_tail(6)
        if fault is None:
            self.result.problems.append(f"{process.name} ended ({status}) without a fault: {tail}")
            return
        kind = "broker" if process.name == "broker" else "agent"
        self.ends.times[f"{kind}, {'killed' if status == -9 else f'exit status {status}'}"] += 1
        if status != -9:
            said = [line for line in tail.splitlines() if SAYS_WHY[kind] in line]
            self.ends.words[fault] = said[-1] if said else ""
            if status == 0 or not said:
                self.result.problems.append(
                    f"{process.name} ended ({status}) of {fault} without a word for it: {tail}"
                )

    def _end_deaf(self, agent: LocalProcess) -> None:
        """An agent that goes on though its journal failed does nothing, and must not be there."""
        why, since_s = self.gates.doomed[agent.pid]
        if time.monotonic() - since_s > AGENT_END_LIMIT_S:
            self.result.problems.append(f"{agent.name} ({agent.pid}) goes on after {why}")
            agent.kill()

    def _left(self, agent: LocalProcess) -> bool:
        """Have an agent drain and end, once for each of its lives; say whether it has."""
        if not agent.running:
            assert agent.process is not None
            return agent.process.returncode == 0
        if self.leaving[agent.name] != agent.pid and self._ask(agent.name, {"command": "status"}):
            self.leaving[agent.name] = agent.pid
            agent.signal(signal.SIGTERM)
        return False

    # -- the first start ---------------------------------------------------------------------------

    def _first_starts(self) -> None:
        """Start brokers in empty folders, until one meets no fault: what was made half must not be
        in the next one's way, and the key that the first shows is the key that the last has."""
        self.gates.restless = True
        self.gates.enable(True)
        met = -1
        # The first start finds the crash points; before it nothing is known to be due.
        while met != (met := self.gates.met().total()) and (self.gates.left() or not met):
            market = GatedMarket(self.root / f"first-{met}", TIMES)
            market.gate = self.gates.address
            self._until_started(market)
            first = market.broker_id
            assert market.broker is not None
            market.broker.kill()
            self._until_started(market)
            if market.broker_id != first:
                self.result.problems.append(f"{market.root}: another key after a restart")
            market.broker.kill()
        self.gates.enable(False)
        self.gates.restless = False

    def _until_started(self, market: GatedMarket) -> None:
        for _ in range(STARTS_LIMIT):
            try:
                market.start_broker()
            except LocalMarketError:
                assert market.broker is not None
                if market.broker.running:
                    raise
                self._tell_end(market.broker)
            else:
                return
        raise ChurnFailed(f"a broker didn't start in {STARTS_LIMIT} times; logs: {market.root}")

    # -- the market goes on ------------------------------------------------------------------------

    def _kill_away(self) -> None:
        end = time.monotonic() + self.seconds
        told = acted = time.monotonic()
        while (self.gates.left() or not self.jobs) and time.monotonic() < end:
            self._tend()
            self._breathe()
            now = time.monotonic()
            if now - acted > ACTS_S:
                acted = now
                self._act()
            if now - told > 10:
                told = now
                self.say(self._line())
            if now - self.gates.news_s > QUIET_S:
                break
            time.sleep(0.1)

    def _breathe(self) -> None:
        """After so many faults there are none until another job has ended, or for a while: what
        comes late in a job's life is to be met as well."""
        ended, faults = len(self.jobs) - len(self.live), self.gates.met().total()
        rested = not self._hurting and time.monotonic() - self.gates.news_s > BREATH_S
        if ended > self._breath[0] or rested:
            self._breath = ended, faults
        on = faults - self._breath[1] < FAULTS_A_JOB
        if on != self._hurting:
            self._hurting = on
            self.gates.enable(on)
            self.gates.news_s = time.monotonic()

    def _line(self) -> str:
        met = self.gates.met()
        parts = ", ".join(f"{met[name]} {name}" for name in FAULTS)
        ended = len(self.jobs) - len(self.live)
        return (
            f"  {met.total()} faults ({parts}) at {len(self.gates.points)} crash points, "
            f"{len(self.gates.due())} still due; {ended} jobs ended"
        )

    def _tend(self) -> None:
        with self._refused("tending"):
            super()._tend()

    @contextlib.contextmanager
    def _refused(self, what: str) -> Iterator[bool]:
        """Take it as it comes that the broker can't do something now."""
        try:
            yield True
        except BrokerAway:
            self.refusals[f"{what}: away"] += 1
        except SubletError as error:
            # 409: what was to be paused or cancelled has ended meanwhile.
            if error.problem.status < 500 and error.problem.status != 409:
                raise
            self.refusals[f"{what}: {error.problem.status}"] += 1

    def _submit(self) -> None:
        job = self.client.run(
            image="local/python",
            command=[
                "python3",
                "/job/training_job.py",
                "--steps",
                str(STEPS),
                "--every",
                str(EVERY),
                "--pace-s",
                str(PACE_S),
                "--out",
                "/out",
            ],
            gpus="cpu",
            max_price="1.00",
            budget="5",
            patience=PATIENCE,
            wait_for_offer=True,
            inputs={str(JOB_SCRIPT): "/job/training_job.py"},
            outputs="/out",
            name=f"job-{len(self.jobs)}",
            memory="256MB",
            disk="256MB",
            cpus=0.5,
        )
        self.acknowledged.add(job.id)
        self.jobs.append(job)
        self.live.append(job)

    def _act(self) -> None:
        """Do one of the things that people do now and then."""
        acts: tuple[Callable[[], None], ...] = (
            self._reclaim, self._fund, self._pause, self._cancel, self._newcomer, self._stun,
        )  # fmt: skip
        self._acts += 1
        for name in set(self._names()) - set(self.leaving):
            self._ask(name, {"command": "offer"})
        with self._refused("cancelling"):
            for job in self.cancelled:
                if job.view().state not in ENDED_FOR_GOOD:
                    job.cancel()
        with self._refused("an act"):
            acts[self._acts % len(acts)]()

    def _reclaim(self) -> None:
        names = self._names()
        self._ask(names[self._acts % len(names)], {"command": "reclaim", "grace_ms": 5_000})

    def _ask(self, agent: str, command: dict[str, object]) -> bool:
        """Ask an agent as its owner would; say whether it answered."""
        with contextlib.suppress(NoAgent, OSError):
            ask_agent(self.market.root / agent, command)
            return True
        return False

    def _newcomer(self) -> None:
        """Have an agent with an empty folder join; the one before it leaves."""
        for name in self._names():
            if name.startswith("new"):
                self.leaving.setdefault(name, 0)
        self._start_agent(f"new{self._acts}")

    def _stun(self) -> None:
        """Have an agent fall silent: until successors are prepared, or beyond patience."""
        names = self._names()
        agent = self.market.agents[names[self._acts % len(names)]]
        if agent.running:
            agent.signal(signal.SIGSTOP)
            span_s = STUNS_S[len(self._stunned) % len(STUNS_S)]
            self._stunned.append(threading.Timer(span_s, self._go_on, (agent,)))
            self._stunned[-1].start()

    @staticmethod
    def _go_on(agent: LocalProcess) -> None:
        # Killed meanwhile, it is another process that may have its number.
        if agent.running:
            agent.signal(signal.SIGCONT)

    def _pause(self) -> None:
        # _tend resumes it.
        if self.live and self.live[0].view().state == "running":
            self.live[0].pause()

    def _cancel(self) -> None:
        job = self.client.run(
            image="local/python",
            command=["sleep", "600"],
            gpus="cpu",
            max_price="1.00",
            budget="1",
            wait_for_offer=True,
            memory="64MB",
            disk="64MB",
            cpus=0.1,
            name=f"cancelled-{self._acts}",
        )
        self.acknowledged.add(job.id)
        self.cancelled.append(job)

    def _fund(self, credits: int = 1) -> None:
        self.unsure_ucr += credits * 1_000_000
        self.client.fund(self.client.party, credits, operator_key=self.market.operator_key)
        self.unsure_ucr -= credits * 1_000_000
        self.funded_ucr += credits * 1_000_000

    # -- every durable write fails -----------------------------------------------------------------

    def _calm(self) -> None:
        self.gates.enable(False)
        for timer in self._stunned:
            timer.join()
        for error in self.still:
            if "broker" in self.what:
                self._broker_stands_still(error)
            if "agent" in self.what:
                self._agent_stands_still(error)
        # Jobs whose submission was answered with an error, or not at all, may be there.
        known = {job.id for job in self.jobs} | {job.id for job in self.cancelled}
        for view in self._asked(lambda: self.client.jobs(limit=500)).jobs:
            if view.id not in known:
                job = self.client.handle(view)
                (self.cancelled if view.name.startswith("cancelled") else self.jobs).append(job)
                if not view.name.startswith("cancelled"):
                    self.live.append(job)
        self.wanted = 0
        for name in self._names():
            if name.startswith("new"):
                self.leaving.setdefault(name, 0)
        for job in self.cancelled:
            if self._asked(job.view).state not in ENDED_FOR_GOOD:
                self._asked(job.cancel)
        for name in self._names():
            self._ask(name, {"command": "offer"})
        super()._calm()
        self.live = list(self.cancelled)
        super()._calm()

    def _asked(self, ask: Callable[[], T]) -> T:
        """Ask a broker that may be starting, until it answers."""
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while True:
            try:
                return ask()
            except BrokerAway:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _broker_stands_still(self, error: str) -> None:
        """From now on until it's started again no durable write of the broker works: it must
        acknowledge nothing."""
        self._asked(self.client.balance)
        assert self.market.broker is not None
        broker = self.market.broker
        self.gates.faulted[broker.pid] = f"{error} at every durable write"
        strace = Strace(
            broker.pid, error, self.root / "traces" / f"broker-{error}", whole=True, onwards=True
        )
        attempts: tuple[Callable[[], object], ...] = (self._fund, self._submit_new, self._cancel)
        end = time.monotonic() + STILL_S
        while time.monotonic() < end and broker.running:
            for attempt in attempts:
                before = len(self.acknowledged), self.funded_ucr
                with self._refused(f"every write fails with {error}"):
                    attempt()
                self.still_writes += 1
                if (len(self.acknowledged), self.funded_ucr) != before:
                    self.acknowledged_meanwhile += 1
                    self.result.problems.append(f"acknowledged while every fsync failed: {error}")
        self.still_met[f"broker, {error}"] += len(strace.met())
        broker.kill()
        strace.let_go()

    def _submit_new(self) -> None:
        """Submit with an input that the broker has never seen."""
        new = self.root / "new-input"
        new.write_text(secrets.token_hex(1000))
        job = self.client.run(
            image="local/python",
            command=["true"],
            gpus="cpu",
            max_price="1.00",
            budget="1",
            wait_for_offer=True,
            inputs={str(new): "/job/new"},
            memory="64MB",
            disk="64MB",
            cpus=0.1,
            name=f"new-{self.still_writes}",
        )
        self.acknowledged.add(job.id)
        self.jobs.append(job)
        self.live.append(job)

    def _agent_stands_still(self, error: str) -> None:
        """The same for an agent: it must end, and say why."""
        for name in self._names():
            agent = self.market.agents[name]
            if not agent.running:
                continue
            self.gates.faulted[agent.pid] = f"{error} at every durable write"
            out = self.root / "traces" / f"{name}-{error}"
            strace = Strace(agent.pid, error, out, whole=True, onwards=True)
            end = time.monotonic() + AGENT_END_LIMIT_S
            while agent.running and time.monotonic() < end:
                self._ask(name, {"command": "offer"})  # So that there is something to write.
                self._tend()
                time.sleep(0.1)
            self.still_met[f"agent, {error}"] += len(strace.met())
            if agent.running:
                self.result.problems.append(f"{name} goes on while every fsync fails: {error}")
                agent.kill()
            strace.let_go()

    # -- what must be true -------------------------------------------------------------------------

    def _check(self) -> None:
        result = self.result
        charged = 0
        self.cancelled_ids = {job.id for job in self.cancelled}
        for job in (*self.jobs, *self.cancelled):
            view = job.view()
            charged += self._check_bill(job, view)
            if job.id in self.cancelled_ids:
                continue
            result.jobs += 1
            result.finished += view.state == "succeeded"
            self._check_result(job, view)
        there = {view.id for view in self.client.jobs(limit=500).jobs}
        self.gone = len(self.acknowledged - there)
        for lost in self.acknowledged - there:
            result.problems.append(f"job {lost[:10]} was acknowledged and is gone")
        balance = self.client.balance()
        left = balance.available_ucr + balance.held_ucr
        result.discrepancy_ucr = self.funded_ucr - left - charged
        # A deposit that was answered with an error may have been made, whole.
        unsure = -result.discrepancy_ucr
        if 0 <= unsure <= self.unsure_ucr and unsure % 1_000_000 == 0:
            result.discrepancy_ucr = 0
            self.made_ucr = unsure
        if result.discrepancy_ucr:
            result.problems.append(f"receipts and ledger differ by {result.discrepancy_ucr} ucr")
        self._check_audit()
        result.problems += [f"never made durable: {path}" for path in self.gates.still_owed()]
        result.problems += self.gates.troubles

    def _check_result(self, job: Job, view: JobView) -> None:
        if view.state != "succeeded":
            self.result.problems.append(f"{job.name}: {view.state}: {view.says}")
            return
        if job.name.startswith("new"):
            self.result.identical += 1
            return
        self._check_steps(job, view)
        target = self.root / "out" / job.name
        job.download(target)
        same = hashlib.sha256((target / "weights.json").read_bytes()).hexdigest()
        self.result.identical += same == self.reference
        if same != self.reference:
            self.result.problems.append(f"{job.name}: other weights than undisturbed")

    def _before_stop(self) -> None:
        self.gates.enable(False)
        self._keeping.clear()
        if self._keeper is not None:  # else it has not come so far
            self._keeper.join()

    def _judge_loss(self, loss: Loss) -> None:
        """Faults come at any write of anybody here: what was lost is only counted."""

    def play(self) -> Result:
        """See Churn."""
        self.market.before_stop = self._before_stop
        try:
            return super().play()
        finally:
            self.gates.close()

    def record(self) -> dict[str, Any]:
        """Return it for the reliability page."""
        gates, result = self.gates, self.result
        found = {
            point: met
            for point, met in gates.points.items()
            if gates.is_asked_for(point) and (met.faults or not met.move)
        }
        by_process = {}
        for process in sorted({point.process for point in found}):
            mine = {point: met for point, met in found.items() if point.process == process}
            by_process[process] = {
                "points": len(mine),
                "killed_at": sum(met.faults["kill"] > 0 for met in mine.values()),
                "eio_at": sum(met.faults["EIO"] > 0 for met in mine.values()),
                "enospc_at": sum(met.faults["ENOSPC"] > 0 for met in mine.values()),
            }
        return {
            "what": list(self.what),
            "seed": result.seed,
            "processes": by_process,
            "faults": dict(gates.met()),
            "files": [
                {"process": process, "file": file, "fault": fault, "times": times}
                for (process, file, fault), times in sorted(gates.paths.items())
            ],
            "points": [
                {"point": str(point), "passed": met.passed, **met.faults}
                for point, met in sorted(found.items())
            ],
            "not_met": gates.due(),
            "every_write_fails": dict(self.still_met),
            "attempts_meanwhile": self.still_writes,
            "acknowledged_meanwhile": self.acknowledged_meanwhile,
            "acknowledged_and_gone": self.gone,
            "ends": dict(self.ends.times),
            "last_words": self.ends.words,
            "refusals": dict(self.refusals),
            "deposits_unsure_ucr": self.unsure_ucr,
            "of_which_made_ucr": self.made_ucr,
            **{key: value for key, value in result.record().items() if key not in NOT_COUNTED},
        }
