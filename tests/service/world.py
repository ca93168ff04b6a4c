"""A small world around a real Broker: a clock to turn, agents and renters that sign and speak.

Tests speak in commands and documents; no test looks into the broker's own objects.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sublet_broker.adapters.memory.blobs import MemoryBlobs
from sublet_broker.adapters.memory.matcher import InProcessMatcher
from sublet_broker.adapters.memory.store import MemoryStore
from sublet_broker.adapters.memory.verifier import InProcessVerifier
from sublet_broker.service.broker import Broker, Ports, Settings
from sublet_broker.service.errors import NotYet
from sublet_broker.service.ports import Settler, Store
from sublet_contracts.api import JobView
from sublet_contracts.digests import digest_of
from sublet_contracts.documents import (
    Amendment,
    Checkpoint,
    Deposit,
    Device,
    Job,
    KeyDocument,
    Lease,
    Offer,
    Receipt,
    Resources,
    Signed,
    open_document,
    sign_document,
)
from sublet_contracts.envelope import Envelope
from sublet_contracts.keys import SigningKey
from sublet_contracts.reasons import Reason
from sublet_contracts.rules import charge_ucr
from sublet_contracts.session import SessionProof
from sublet_contracts.tree import Chunk, TreeFile, TreeIndex
from sublet_contracts.wire import (
    Ack,
    Announce,
    Assign,
    CheckpointUploaded,
    CheckpointVerdict,
    Heartbeat,
    LeaseAnswer,
    LogLine,
    Logs,
    LogsWanted,
    Message,
    Order,
    Prepare,
    ReceiptIssued,
    RunCadence,
    RunChanged,
    RunReport,
    RunUpload,
    RunUsage,
    SettlementNotice,
    Unprepare,
    Withdraw,
)
from tests.simulation.store_by_address import StoreByAddress
from tests.walls import Walls

BEGIN_MS = 1_767_225_600_000
PRICE = 3_600_000  # a micro-credit each device-ms


class TurnedClock:
    """A clock that tests turn."""

    def __init__(self) -> None:
        self.ms = BEGIN_MS
        self.held_back_ms = 0

    def now_ms(self) -> int:
        return self.ms

    def stopwatch_ms(self) -> int:
        return self.ms + self.held_back_ms


class CountingEntropy:
    """Randomness that repeats itself in each test."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def hex(self, count_bytes: int) -> str:
        return hashlib.sha256(str(next(self._numbers)).encode()).hexdigest()[: 2 * count_bytes]


def key_named(name: str) -> SigningKey:
    """Return the key that belongs to a name."""
    return SigningKey.from_seed(hashlib.sha256(name.encode()).digest())


def gpu(id: str = "GPU-0", *, memory_bytes: int = 24 * 10**9, hardware: str = "rtx4090") -> Device:
    return Device(
        id=id,
        kind="gpu",
        name="NVIDIA RTX 4090",
        memory_bytes=memory_bytes,
        hardware_class=hardware,
    )


def tree_of(content: dict[str, bytes]) -> tuple[TreeIndex, dict[str, bytes]]:
    """Return the index of a folder with these files, and its chunks."""
    chunks = {digest_of(data): data for data in content.values()}
    files = tuple(
        TreeFile(
            path=path,
            size_bytes=len(data),
            chunks=(Chunk(digest=digest_of(data), size_bytes=len(data)),),
        )
        for path, data in sorted(content.items())
    )
    return TreeIndex(files=files), chunks


class World:
    """A broker, its operator and time."""

    new_store: ClassVar[Callable[[], Store]] = MemoryStore
    """test_on_databases.py runs stories on other stores."""

    def __init__(
        self,
        settings: Settings | None = None,
        settler: Settler | None = None,
        *,
        by_address: bool = False,
    ) -> None:
        self.clock = TurnedClock()
        self.store = type(self).new_store()
        self.settler = settler
        self.blobs = MemoryBlobs()
        self.store_by_address = StoreByAddress(self.blobs)
        self._by_address = by_address
        self.key = key_named("broker")
        self.settings = settings or Settings()
        self.numbers = itertools.count(1)
        self.agents: list[AgentDouble] = []
        self.broker = self._compose()
        self.broker.supervision.started()

    def _compose(self) -> Broker:
        ports = Ports(
            store=self.store,
            blobs=self.blobs,
            clock=self.clock,
            entropy=CountingEntropy(),
            matcher=InProcessMatcher(self.store, self.clock),
            verifier=InProcessVerifier(self.blobs),
            key=self.key,
            settler=self.settler,
            addresses=self.store_by_address if self._by_address else None,
        )
        return Broker(Walls().around(ports), self.settings)

    def restart_broker(self) -> None:
        """The broker dies and comes back on the same database; connections are gone."""
        self.broker = self._compose()
        for agent in self.agents:
            agent.connected = False
        self.broker.supervision.started()

    @property
    def now_ms(self) -> int:
        return self.clock.ms

    def nonce(self) -> str:
        return f"{next(self.numbers):032x}"

    def step(self) -> None:
        """One round of the broker's loops."""
        self.broker.supervision.verdicts()
        self.broker.supervision.sweep()
        self.broker.settling.settle_due()
        self.broker.scheduling.tick()

    def settle_down(self, rounds: int = 6) -> None:
        """Let messages and loops run until everybody has answered."""
        for _ in range(rounds):
            self.step()
            for agent in self.agents:
                agent.pump()

    def pass_ms(self, span_ms: int, *, every_ms: int = 1_000) -> None:
        """Let time pass: each second the loops run; agents that are awake send heartbeats."""
        end = self.clock.ms + span_ms
        while self.clock.ms < end:
            self.clock.ms = min(end, self.clock.ms + every_ms)
            for agent in self.agents:
                agent.beat()
            self.settle_down(1)

    def agent(self, name: str, **offer: Any) -> AgentDouble:
        agent = AgentDouble(self, name)
        self.agents.append(agent)
        agent.join()
        agent.announce(**offer)
        return agent

    def renter(self, name: str = "renter", credits_ucr: int = 100_000_000) -> RenterDouble:
        renter = RenterDouble(self, name)
        renter.introduce()
        if credits_ucr:
            self.fund(renter.party, credits_ucr)
        return renter

    def fund(self, party: str, amount_ucr: int) -> None:
        deposit = Deposit(
            broker=self.key.party,
            party=party,
            amount_ucr=amount_ucr,
            memo="fund",
            nonce=self.nonce(),
            issued_ms=self.now_ms,
        )
        self.broker.accounts.deposit(self.key.party, sign_document(deposit, self.key).envelope)

    def audit(self) -> None:
        """Every invariant holds."""
        assert self.broker.ledger_audit.breaches() == []


class RenterDouble:
    """A renter's client."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.key = key_named(name)
        self.party = self.key.party

    def introduce(self) -> None:
        document = KeyDocument(
            party=self.party,
            broker=self.world.key.party,
            name=self.name,
            issued_ms=self.world.now_ms,
        )
        self.world.broker.accounts.register_key(sign_document(document, self.key).envelope)

    def job(self, **changes: Any) -> Signed[Job]:
        resources = {
            "devices": 1,
            "device_kind": "gpu",
            "cpu_millis": 1000,
            "memory_bytes": 10**9,
            "disk_bytes": 10**9,
        }
        resources.update(changes.pop("resources", {}))
        fields: dict[str, Any] = {
            "renter": self.party,
            "broker": self.world.key.party,
            "nonce": self.world.nonce(),
            "name": "train",
            "image": "train@sha256:" + "0" * 64,
            "command": ("python", "train.py"),
            "env": {},
            "resources": Resources(**resources),
            "max_price_ucr_per_device_hour": PRICE,
            "budget_ucr": 10_000_000,
            "checkpoint_interval_ms": 60_000,
            "patience_ms": 20_000,
            "stop_grace_ms": 30_000,
            "inputs": (),
            "outputs": "",
            "issued_ms": self.world.now_ms,
            "expires_ms": self.world.now_ms + 86_400_000,
        }
        fields.update(changes)
        fields.setdefault("accept_receipts_up_to_ucr", fields["budget_ucr"])
        return sign_document(Job(**fields), self.key)

    def submit(self, *, wait_for_offer: bool = True, **changes: Any) -> str:
        signed = self.job(**changes)
        submit = self.world.broker.jobs.submit
        return submit(self.party, signed.envelope, wait_for_offer=wait_for_offer).id

    def run(self, **changes: Any) -> str:
        """Submit a job and let it be leased."""
        job = self.submit(**changes)
        self.world.settle_down()
        return job

    def view(self, job: str) -> JobView:
        return self.world.broker.views.job(self.party, job)

    def amendment(self, job: str, budget_ucr: int) -> Envelope:
        document = Amendment(
            renter=self.party,
            broker=self.world.key.party,
            job=job,
            budget_ucr=budget_ucr,
            accept_receipts_up_to_ucr=budget_ucr,
            issued_ms=self.world.now_ms,
        )
        return sign_document(document, self.key).envelope

    def cosign(self, job: str) -> int:
        page = self.world.broker.views.receipts(self.party, job, unsigned=True)
        for envelope in page.receipts:
            self.world.broker.countersigning.countersign(
                self.party, envelope.id, envelope.countersigned(self.key)
            )
        return len(page.receipts)

    def balance_ucr(self) -> int:
        return self.world.broker.money.balance(self.party).available_ucr


@dataclass
class RunDouble:
    """A run as its agent has it."""

    lease: Lease
    id: str
    job: Job
    job_id: str
    started_ms: int
    state: str = "running"
    image: str = ""
    pull_device_ms: int = 0
    step: int = 0
    sequence: int = 0
    head: str | None = None
    durable: tuple[str, int, int] | None = None
    verdicts: list[CheckpointVerdict] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)
    stopped_ms: int | None = None
    total_steps: int = 1000
    opened: bool | None = None
    """Whether the job has opened what it was restored from."""
    usage: RunUsage | None = None
    uploads: RunUpload | None = None
    """What of it is on its way."""
    saved_file: str = ""
    cadence: RunCadence | None = None

    def cum_ms(self, now_ms: int) -> int:
        end = self.stopped_ms if self.stopped_ms is not None else now_ms
        ran_ms = max(0, end - self.started_ms) * len(self.lease.device_ids)
        return self.pull_device_ms + ran_ms


class AgentDouble:
    """An agent: signs leases, runs, saves, meters. It does only what tests tell it, but keeps the
    protocol's word: reliable messages are sent until they are taken."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.key = key_named(name)
        self.party = self.key.party
        self.instance = "0" * 32
        self.first_state = "running"
        """in which a run is right after its lease was signed"""
        self.total_steps = 1000
        """as its jobs tell it; 0: they tell no steps"""
        self.sequence = 0
        self.connected = False
        self.awake = True
        self.accepts_leases = True
        self.tag_means = ""
        """what a job's tag means by its look"""
        self.image_trouble: Reason | None = None
        """why it can't look a tag up"""
        self.answers = True
        self.obeys = True
        self.runs: dict[str, RunDouble] = {}
        self.past: dict[str, RunDouble] = {}
        self.prepared: list[str] = []
        self.loss_every_ms: list[int] = []
        self.prepared_image = ""
        self.settled: list[SettlementNotice] = []
        self.waiting: list[Message] = []
        self.held_at_welcome: list[tuple[str, int]] = []
        self.broker_reads: dict[str, tuple[int, ...]] | None = None
        """What it believes that its broker reads; None: the newest of all."""

    def join(self) -> None:
        """Dial out (again)."""
        proof = SessionProof(
            party=self.party,
            broker=self.world.key.party,
            nonce="1" * 32,
            instance=self.instance,
            agent_version="test",
            issued_ms=self.world.now_ms,
        )
        welcome = self.world.broker.sessions.joined(proof)
        self.held_at_welcome = [(held.lease, held.epoch) for held in welcome.leases]
        self.connected = True

    def leave(self) -> None:
        """The connection breaks."""
        self.connected = False
        self.world.broker.sessions.left(self.party, self.instance)

    def die(self) -> None:
        """kill -9 of the agent and its runs, without a word: the socket stays open for a while."""
        self.awake = False
        self.connected = False

    def announce(self, **changes: Any) -> Signed[Offer]:
        self.sequence += 1
        fields: dict[str, Any] = {
            "provider": self.party,
            "broker": self.world.key.party,
            "sequence": self.sequence,
            "name": self.name,
            "devices": (gpu(f"GPU-{self.name}"),),
            "price_ucr_per_device_hour": PRICE,
            "cpu_millis": 8000,
            "memory_bytes": 32 * 10**9,
            "disk_bytes": 100 * 10**9,
            "region": "home",
            "runner": "docker",
            "image_policy": "any",
            "egress": False,
            "accepts": (),
            "grace_ms": 30_000,
            "issued_ms": self.world.now_ms,
            "expires_ms": self.world.now_ms + 86_400_000,
        }
        fields.update(changes)
        signed = sign_document(Offer(**fields), self.key)
        self.tell(Announce(offer=signed.envelope))
        return signed

    def withdraw(self) -> None:
        self.tell(Withdraw(offer_sequence=self.sequence))

    def tell(self, message: Message) -> list[Message]:
        """Send a message now."""
        return self.world.broker.sessions.receive(self.party, self.instance, message)

    def send(self, message: Message) -> None:
        """Send a reliable message: now if connected and taken, else again later."""
        self.waiting.append(message)
        self.flush()

    def flush(self) -> None:
        left: list[Message] = []
        for message in self.waiting:
            if not self.connected:
                left.append(message)
                continue
            try:
                self.tell(message)
            except NotYet:
                left.append(message)
        self.waiting = left

    def beat(self) -> None:
        if self.awake and self.connected:
            self.tell(Heartbeat(runs=tuple(self.report(run) for run in self.runs.values())))

    def report(self, run: RunDouble) -> RunReport:
        return RunReport(
            lease=run.id,
            epoch=run.lease.epoch,
            state=run.state,  # type: ignore[arg-type]
            cum_device_ms=run.cum_ms(self.world.now_ms),
            step=run.step,
            total_steps=run.total_steps,
            metrics={"loss": 0.5},
            checkpoint_opened=run.opened,
            usage=run.usage,
            upload=run.uploads,
            saved_file=run.saved_file,
            cadence=run.cadence,
        )

    def pump(self) -> None:
        """Take the broker's messages and act on them."""
        if not (self.awake and self.connected):
            return
        self.flush()
        for notice in self.world.broker.outbox.notices(self.party):
            match notice:
                case Prepare() if notice.job.id not in self.prepared:
                    self.prepared.append(notice.job.id)
                    self.prepared_image = notice.image
                case Unprepare() if notice.job in self.prepared:
                    self.prepared.remove(notice.job)
                case _:
                    pass  # Said before, or the other notice was lost: both may happen.
        for mid, message in self.world.broker.outbox.pending(self.party):
            self.take(message)
            self.tell(Ack(mids=(mid,)))

    def take(self, message: Message) -> None:
        match message:
            case Assign():
                self.assigned(message)
            case Order():
                self.ordered(message)
            case CheckpointVerdict():
                self.judged(message)
            case SettlementNotice():
                self.settled.append(message)
            case _:
                raise AssertionError(f"unexpected {message.TYPE}")

    def assigned(self, message: Assign) -> None:
        if not self.answers or message.lease.id in self.runs or message.lease.id in self.past:
            return
        lease = open_document(message.lease, Lease, signed_by=(self.world.key.party,))
        if not self.accepts_leases:
            self.send(LeaseAnswer(lease=lease.id, signed=None, refusal="the owner plays"))
            return
        if self.image_trouble is not None:
            says = "image 'train:1': the registry says so"
            refused = LeaseAnswer(
                lease=lease.id, signed=None, refusal=says, reason=self.image_trouble
            )
            self.send(refused)
            return
        self.loss_every_ms.append(message.loss_every_ms)
        image = lease.document.image or self.tag_means
        self.runs[lease.id] = RunDouble(
            lease.document,
            lease.id,
            open_document(message.job, Job).document,
            message.job.id,
            self.world.now_ms,
            state=self.first_state,
            step=lease.document.start_step,
            total_steps=self.total_steps,
            image=image,
        )
        signed = message.lease.countersigned(self.key)
        self.send(LeaseAnswer(lease=lease.id, signed=signed, image=image))
        self.beat()

    def ordered(self, order: Order) -> None:
        run = self.runs.get(order.lease)
        if run is None:
            return
        run.orders.append(order)
        if order.desired == "stop" and order.grace_ms == 0 and self.obeys:
            # Settled elsewhere, or too late to be nice.
            self.exit(run, order.reason)

    def judged(self, verdict: CheckpointVerdict) -> None:
        run = self.runs.get(verdict.lease) or self.past.get(verdict.lease)
        if run is None:
            return
        run.verdicts.append(verdict)

    @property
    def the_run(self) -> RunDouble:
        assert len(self.runs) == 1, f"{self.name} has {len(self.runs)} runs"
        return next(iter(self.runs.values()))

    def upload(self, run: RunDouble, content: dict[str, bytes]) -> tuple[str, int]:
        index, chunks = tree_of(content)
        raw = index.to_bytes()
        digest = digest_of(raw)
        blobs = self.world.broker.blobs
        missing = blobs.missing(self.party, run.job_id, run.lease.epoch, [*chunks, digest]).missing
        for name, data in [*chunks.items(), (digest, raw)]:
            if name in missing:
                blobs.put(self.party, run.job_id, run.lease.epoch, name, data)
        return digest, index.total_bytes

    def checkpoint(
        self,
        run: RunDouble,
        step: int,
        *,
        kind: str = "checkpoint",
        upload: bool = True,
        content: dict[str, bytes] | None = None,
        cum_device_ms: int | None = None,
        uploaded: tuple[str, int] | None = None,
        **said: int | None,
    ) -> Signed[Checkpoint]:
        """Save a step: upload it and say so. `uploaded`: the digest of an index that is there, and
        how many bytes it is said to hold. `said`: what is told beside the document."""
        content = content or {"model.bin": f"step {step} of {run.job_id}".encode()}
        if uploaded is not None:
            digest, total = uploaded
        elif upload:
            digest, total = self.upload(run, content)
        else:
            index, _ = tree_of(content)
            digest = digest_of(index.to_bytes())
            total = index.total_bytes
        cum = run.cum_ms(self.world.now_ms) if cum_device_ms is None else cum_device_ms
        signed = sign_document(
            Checkpoint(
                provider=self.party,
                job=run.job_id,
                lease=run.id,
                epoch=run.lease.epoch,
                kind=kind,
                step=step,
                index_digest=digest,  # type: ignore[arg-type]
                total_bytes=total,
                cum_device_ms=cum,
                image=run.image,
                issued_ms=self.world.now_ms,
            ),
            self.key,
        )
        run.step = step
        self.send(CheckpointUploaded.model_validate({"checkpoint": signed.envelope, **said}))
        return signed

    def durable(self, run: RunDouble, step: int, **options: Any) -> Signed[Checkpoint]:
        """Save a step, wait until it is durable, and send the receipt for it."""
        signed = self.checkpoint(run, step, **options)
        self.world.settle_down(2)
        verdict = next(v for v in run.verdicts if v.checkpoint == signed.id)
        assert verdict.durable, verdict.detail
        if signed.document.kind == "checkpoint":
            run.durable = (signed.id, step, signed.document.cum_device_ms)
        self.receipt(run)
        return signed

    def make_receipt(
        self, run: RunDouble, *, final: Reason | None = None, **changes: Any
    ) -> Signed[Receipt]:
        cum = run.cum_ms(self.world.now_ms)
        lease = run.lease
        durable = run.durable or (None, lease.start_step, 0)
        cum = changes.get("cum_device_ms", cum)
        charge = min(charge_ucr(lease.price_ucr_per_device_hour, cum), lease.hold_ucr)
        fields: dict[str, Any] = {
            "provider": self.party,
            "job": run.job_id,
            "lease": run.id,
            "epoch": lease.epoch,
            "sequence": run.sequence + 1,
            "previous": run.head,
            "cum_device_ms": cum,
            "pull_device_ms": min(cum, run.pull_device_ms),
            "durable_step": durable[1],
            "durable_checkpoint": durable[0],
            "durable_device_ms": durable[2],
            "charge_ucr": charge,
            "final": final is not None,
            "reason": final,
            "issued_ms": self.world.now_ms,
        }
        fields.update(changes)
        fields.setdefault("reached_step", fields["durable_step"])
        return sign_document(Receipt(**fields), self.key, reads=self.broker_reads)

    def receipt(
        self, run: RunDouble, *, final: Reason | None = None, **changes: Any
    ) -> Signed[Receipt]:
        """Sign the next receipt and send it."""
        signed = self.make_receipt(run, final=final, **changes)
        run.sequence, run.head = signed.document.sequence, signed.id
        self.send(ReceiptIssued(receipt=signed.envelope))
        return signed

    def starts(self, run: RunDouble, pull_device_ms: int = 0) -> None:
        """The run begins now, and its pull has cost so much already."""
        run.state, run.started_ms, run.pull_device_ms = "running", self.world.now_ms, pull_device_ms
        self.beat()

    def exit(self, run: RunDouble, reason: Reason, code: int | None = None) -> None:
        """The run ends: say so, and send the final receipt."""
        run.stopped_ms = self.world.now_ms
        run.state = "exited"
        self.past[run.id] = self.runs.pop(run.id)
        self.send(
            RunChanged(
                lease=run.id,
                epoch=run.lease.epoch,
                state="exited",
                cum_device_ms=run.cum_ms(self.world.now_ms),
                reason=reason,
                exit_code=code,
            )
        )
        self.receipt(run, final=reason)

    def succeed(self, run: RunDouble, outputs: bytes = b"weights") -> None:
        """The command exits with 0: outputs first, then the end."""
        run.stopped_ms = self.world.now_ms
        if run.job.outputs:
            self.durable(run, run.step, kind="outputs", content={"model.bin": outputs})
        self.exit(run, Reason.SUCCEEDED, 0)

    def log(self, run: RunDouble, first: int, *texts: str) -> int:
        lines = tuple(
            LogLine(number=first + n, time_ms=self.world.now_ms, stream="stdout", text=text)
            for n, text in enumerate(texts)
        )
        (answer,) = self.tell(Logs(lease=run.id, epoch=run.lease.epoch, lines=lines))
        assert isinstance(answer, LogsWanted)
        return answer.next_number
