"""The auditor: a second, independent model of the market that believes nobody.

It shares no code with the broker: documents are read from their signed bytes, the ledger is kept
anew from every transfer, each receipt chain is followed, every charge is computed again, and the
states' tables are its own. It looks at each commit of the broker and at what happened in truth on
the providers' machines, and raises Violation at the first thing that isn't right.
"""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

if TYPE_CHECKING:
    from tests.simulation.jobs import Container
    from tests.simulation.market import Market

TOLERANCE_MS = 1_000
TOLERANCE_IN = 1_000
KEPT = 3
FRUITLESS_LIMIT = 5

_PROVIDERS_FAULT = frozenset(
    [
        "reclaimed",
        "provider_drained",
        "provider_lost",
        "run_killed",
        "run_vanished",
        "start_failed",
        "provider_disk_full",
        "lease_refused",
        "lease_unanswered",
        "evidence_of_fraud",
    ]
)
_BROKERS_FAULT = frozenset(["restore_failed"])

_JOB = {
    "": "queued",
    "queued": "starting paused cancelled failed",
    "starting": "running recovering queued succeeded paused cancelled failed",
    "running": "recovering succeeded paused cancelled failed",
    "recovering": "running succeeded paused cancelled failed",
    "paused": "queued recovering cancelled",
    "succeeded": "", "failed": "", "cancelled": "",
}  # fmt: skip
_RUN_RANK = {
    "assigned": 0, "pulling": 1, "restoring": 2, "running": 3, "draining": 4, "exited": 5,
}  # fmt: skip
_LEASE = {"": "proposed", "proposed": "active closed", "active": "closed", "closed": ""}
_CHECKPOINT = {
    "": "uploaded", "uploaded": "durable rejected", "durable": "quarantined",
    "rejected": "", "quarantined": "",
}  # fmt: skip


class Violation(AssertionError):
    """Something that must never be."""


def read(envelope: Any) -> dict[str, Any]:
    """Return the document in an envelope, from the bytes that were signed."""
    value: dict[str, Any] = json.loads(base64.b64decode(envelope.payload))
    return value


SIGNED: set[tuple[str, bytes, bytes]] = set()
"""Party, signature and message of what a key has signed in this process, noted where it did so:
who looks knows that for certain, and needn't compute it again."""


def is_signed_by(envelope: Any, party: str) -> bool:
    """Say whether `party`'s signature is on these bytes, by its public key alone."""
    payload, kind = base64.b64decode(envelope.payload), envelope.payloadType.encode()
    message = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    for signature in envelope.signatures:
        if signature.keyid == party:
            raw = base64.b64decode(signature.sig)
            if (party, raw, message) in SIGNED:
                return True
            public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(party[8:]))
            try:
                public.verify(raw, message)
            except InvalidSignature:
                return False
            return True
    return False


@dataclass
class JobModel:
    """A job, as its renter's documents say, and what became of it."""

    document: dict[str, Any]
    budget_ucr: int
    accept_ucr: int
    state: str = ""
    epoch: int = 0
    charged_ucr: int = 0
    unsigned_ucr: int = 0
    """Charged without the renter's signature on the receipt."""
    fruitless: int = 0
    live: str = ""
    """The lease that isn't closed."""


@dataclass
class ReceiptModel:
    """A receipt in its chain."""

    id: str
    document: dict[str, Any]
    received_ms: int
    """True time, by which this model measures."""
    received_stopwatch_ms: int
    countersigned: bool


@dataclass
class LeaseModel:
    """A lease, its receipts and its settlement."""

    document: dict[str, Any]
    proposed_ms: int
    """True time, by which this model measures."""
    proposed_stopwatch_ms: int
    state: str = "proposed"
    signed: bool = False
    chain: list[ReceiptModel] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    settled: bool = False
    unsigned_ucr: int = 0
    reason: str = ""
    run: str = ""


@dataclass
class CheckpointModel:
    """A checkpoint or outputs."""

    document: dict[str, Any]
    state: str
    kept: bool = True


class Auditor:
    """Follows one market. Times are the broker's clock unless they say otherwise."""

    def __init__(self, market: Market) -> None:
        self.market = market
        self.jobs: dict[str, JobModel] = {}
        self.leases: dict[str, LeaseModel] = {}
        self.checkpoints: dict[str, CheckpointModel] = {}
        self.of_job: dict[str, list[str]] = defaultdict(list)
        self.documents: set[str] = set()
        self.log_size = 0
        self.events = 0
        self.transfers: dict[str, Any] = {}
        self.debits: dict[str, int] = defaultdict(int)
        self.credits: dict[str, int] = defaultdict(int)
        self.reserved: dict[str, int] = defaultdict(int)
        self.pendings: dict[str, list[Any]] = {}
        self.heard_ms: dict[str, int] = {}
        self.started_ms = 0
        self.clock_ms = 0
        self.runs: dict[str, Container] = {}
        self.took: set[tuple[str, str]] = set()
        self.charged_ucr = 0
        self.lost_device_ms = 0
        self.checks = 0
        self.claims: dict[str, int] = defaultdict(int)
        """How many scopes count on a content's being here."""

    # -- what is told from outside the broker -------------------------------------------------

    def broker_started(self, now_ms: int) -> None:
        """The broker's process begins: everyone has a period of grace from here. Its first commit
        shows its clock; where that fails, it ends before anybody has seen it."""
        self.started_ms = now_ms
        self.heard_ms.clear()

    def joined(self, party: str) -> None:
        """An agent's session is live."""
        self.market.matching.touched(party)

    def heard(self, party: str, message: Any) -> None:
        """The broker has acted on an agent's message."""
        kind = message.TYPE
        if kind == "heartbeat":
            for run in message.runs:
                self.heard_ms[run.lease] = self.market.broker.now_ms()
                self._is_known(party, run)
        elif kind == "run_changed":
            self.heard_ms[message.lease] = self.market.broker.now_ms()
        elif kind == "receipt_issued":
            self._no_second_history(message.receipt)

    def _is_known(self, party: str, report: Any) -> None:
        """Whoever was heard from under the job's epoch is unknown no longer."""
        lease = self.leases.get(report.lease)
        if lease is None or lease.state != "active" or lease.document["provider"] != party:
            return
        current = report.epoch == self.jobs[lease.document["job"]].epoch
        self._no(current and lease.run == "unknown", "a run was heard from and stays unknown")

    def _no_second_history(self, envelope: Any) -> None:
        """A receipt that contradicts the chain ends its lease: it was not just left aside."""
        document = read(envelope)
        lease = self.leases.get(document["lease"])
        if lease is None or lease.state != "active" or document["sequence"] > len(lease.chain):
            return
        other = lease.chain[document["sequence"] - 1].id != envelope.id
        self._no(other, f"a second receipt {document['sequence']} changed nothing")

    def power_was_cut(self) -> None:
        """The broker's disk has forgotten what it may: what anybody was told is there is there."""
        disk = self.market.broker.disk
        for sha256, scopes in self.claims.items():
            gone = scopes and disk.whole(sha256) is None and sha256 not in disk.damaged
            self._no(bool(gone), f"content {sha256[:10]} did not survive a power cut")
        for id, model in self.checkpoints.items():
            if model.kept and model.state == "durable":
                lost = set(self._lacking(model.document)) - disk.damaged
                self._no(bool(lost), f"checkpoint {id[:8]} did not survive a power cut")

    def taken(self, party: str, mid: str, message: Any) -> None:
        """An agent has a message of the broker's on its disk."""
        self.took.add((party, mid))
        if message.TYPE == "checkpoint_verdict" and self.market.agents_by_party[party].honest:
            self._no("device time" in message.detail, f"honest work is refused: {message.detail}")

    def run_began(self, lease_id: str, container: Container) -> None:
        """A container has started, in truth."""
        self._no(lease_id in self.runs, "one lease was started twice")
        self.runs[lease_id] = container
        lease = self.leases.get(lease_id)
        if lease is None or lease.document["start_checkpoint"] is None:
            self._no(container.begin[0] != 0, "a fresh run began in the middle")
            return
        self._no(
            container.begin[0] != lease.document["start_step"],
            f"the run began at step {container.begin[0]}, its lease at "
            f"{lease.document['start_step']}",
        )

    def step_acknowledged(self, lease_id: str, step: int) -> None:
        """A job has been told that its step is durable."""
        found = any(
            c.document["lease"] == lease_id
            and c.document["step"] == step
            and c.document["kind"] == "checkpoint"
            and c.state in ("durable", "quarantined")
            for c in self._checkpoints_of_lease(lease_id)
        )
        self._no(not found, f"step {step} was acknowledged to the job and isn't durable")

    def _checkpoints_of_lease(self, lease_id: str) -> list[CheckpointModel]:
        lease = self.leases.get(lease_id)
        if lease is None:
            return []
        return [self.checkpoints[id] for id in self.of_job[lease.document["job"]]]

    # -- each commit --------------------------------------------------------------------------

    def committed(self, now_ms: int, before: dict[Any, Any], sheet: dict[Any, Any]) -> None:
        """The broker has committed this change: look at all of it."""
        self._no(now_ms < self.clock_ms, f"the broker's clock went back {self.clock_ms - now_ms}")
        self.clock_ms = now_ms
        self.checks += 1
        looks = sorted((rank, kind) for kind in before for rank in _RANKS[kind.__name__])
        for rank, kind in looks:
            look, olds = _ORDER[rank][1], before[kind]
            for key, fact in sheet[kind].items():
                look(self, olds[key], fact)

    def _log_entry(self, old: Any, new: Any) -> None:
        self._no(old is not None or new is None, "the log was changed")
        self._no(new.id != self.log_size, f"log entry {new.id} follows {self.log_size - 1}")
        self._no(new.document in self.documents, "a document was logged twice")
        self.log_size += 1
        self.documents.add(new.document)

    def _event(self, old: Any, new: Any) -> None:
        self._no(old is not None or new is None, "the history was changed")
        self.events += 1
        self._no(new.id != self.events, f"event {new.id} follows {self.events - 1}")
        name = self.market.names.get(new.job, new.job[:8])
        arrow = f"{new.before} -> {new.after}" if new.before else new.after
        why = f" ({new.reason})" if new.reason else ""
        what = new.kind if new.kind == "job" else f"{new.kind} (epoch {new.epoch})"
        self.market.engine.say(f"{name}: {what} {arrow}{why} {new.detail}".rstrip())

    def _deposit(self, old: Any, new: Any) -> None:
        self._no(old is not None or new is None, "a deposit was changed")

    def _amendment(self, old: Any, new: Any) -> None:
        self._no(old is not None or new is None, "an amendment was changed")
        document = read(new.envelope)
        job = self.jobs[new.job]
        self._no(document["budget_ucr"] < job.budget_ucr, "a budget was lowered")
        job.budget_ucr = document["budget_ucr"]
        job.accept_ucr = document["accept_receipts_up_to_ucr"]

    def _job_is_new(self, old: Any, new: Any) -> None:
        self._no(new is None, "a job was deleted")
        if old is None:
            document = read(new.envelope)
            self.jobs[new.id] = JobModel(
                document, document["budget_ucr"], document["accept_receipts_up_to_ucr"]
            )

    # -- checkpoints --------------------------------------------------------------------------

    def _blob(self, old: Any, new: Any) -> None:
        """A scope may use content from now on, or no longer."""
        if new is None:
            if old is not None:  # or it came and went in one transaction
                self.claims[old.sha256] -= 1
            return
        if old is None:
            self.claims[new.sha256] += 1
        disk = self.market.broker.disk
        safe = disk.survives(new.sha256) or new.sha256 in disk.damaged
        self._no(not safe, "content counts as kept that a power cut would take")

    def _checkpoint(self, old: Any, new: Any) -> None:
        self._no(new is None, "a checkpoint was deleted")
        model = self.checkpoints.get(new.id)
        if model is None:
            document = read(new.envelope)
            model = self.checkpoints[new.id] = CheckpointModel(document, "")
            self.of_job[document["job"]].append(new.id)
        state = str(new.state)
        if state != model.state:
            self._edge("checkpoint", _CHECKPOINT, model.state, state)
            model.state = state
            if state == "durable":
                self._durable(model)
            elif state == "quarantined":
                self._quarantined(new.id, model)
        if model.kept and not new.kept:
            model.kept = False
            newer = [
                c
                for id in self.of_job[model.document["job"]]
                if (c := self.checkpoints[id]).kept
                and c.state == "durable"
                and c.document["kind"] == "checkpoint"
                and (c.document["step"], c.document["epoch"])
                >= (model.document["step"], model.document["epoch"])
            ]
            self._no(len(newer) < KEPT, f"a checkpoint was let go with {len(newer)} newer ones")

    def _durable(self, model: CheckpointModel) -> None:
        document = model.document
        lease, job = self.leases[document["lease"]], self.jobs[document["job"]]
        stale = lease.state != "active" or document["epoch"] != job.epoch
        self._no(stale, f"a checkpoint of epoch {document['epoch']} counts, the job is at "
                        f"{job.epoch}, its lease {lease.state}")  # fmt: skip
        self._no(not self._is_restorable(document), "a checkpoint counts that can't be restored")

    def _is_restorable(self, document: dict[str, Any]) -> bool:
        return not self._lacking(document)

    def _lacking(self, document: dict[str, Any]) -> list[str]:
        blobs = self.market.broker.blobs
        index = blobs.whole(document["index_sha256"])
        if index is None:
            return [document["index_sha256"]]
        return [
            chunk["sha256"]
            for file in json.loads(index)["files"]
            for chunk in file["chunks"]
            if blobs.whole(chunk["sha256"]) is None
        ]

    def _quarantined(self, id: str, model: CheckpointModel) -> None:
        failed = [
            lease
            for lease in self.leases.values()
            if lease.document["start_checkpoint"] == id and lease.reason == "restore_failed"
        ]
        sound = self._is_restorable(model.document) and len(failed) < 2
        self._no(sound, "a sound checkpoint was taken out of use")

    def _resume_point(self, job: str) -> tuple[int, str | None]:
        usable = [
            (c.document["step"], c.document["epoch"], id)
            for id in self.of_job[job]
            if (c := self.checkpoints[id]).state == "durable"
            and c.kept
            and c.document["kind"] == "checkpoint"
        ]
        if not usable:
            return 0, None
        newest = max(usable)
        return newest[0], newest[2]

    # -- leases -------------------------------------------------------------------------------

    def _lease(self, old: Any, new: Any) -> None:
        self._no(new is None, "a lease was deleted")
        self.market.matching.touched(new.provider)
        model = self.leases.get(new.id)
        if model is None:
            model = self._lease_is_new(new)
        state = str(new.state)
        if state == model.state:
            return
        self._edge("lease", _LEASE, model.state, state)
        model.state = state
        job = self.jobs[new.job]
        if state == "active":
            self.heard_ms[new.id] = self.clock_ms
            both = is_signed_by(new.envelope, new.provider)
            self._no(not both, "a lease is active that its provider hasn't signed")
            model.signed = True
        else:
            model.reason = str(new.reason)
            self._no(job.live != new.id, "a lease was closed that wasn't the job's one")
            job.live = ""
            self._no(model.signed and not model.settled, "a signed lease was closed unsettled")
            progressed = any(
                c.document["lease"] == new.id
                and c.state == "durable"
                and c.document["kind"] == "checkpoint"
                and c.document["step"] > model.document["start_step"]
                for c in self._checkpoints_of_lease(new.id)
            )
            job.fruitless = 0 if progressed else job.fruitless + (1 if model.signed else 0)

    def _lease_is_new(self, new: Any) -> LeaseModel:
        document = read(new.envelope)
        model = self.leases[new.id] = LeaseModel(
            document, self.market.engine.now_ms, new.proposed_stopwatch_ms
        )
        self.heard_ms[new.id] = self.clock_ms
        self.market.matching.leased(document)
        job = self.jobs[document["job"]]
        self._no(bool(job.live), "a job has two holders")
        job.live = new.id
        self._no(
            document["epoch"] != job.epoch + 1, f"epoch {document['epoch']} follows {job.epoch}"
        )
        job.epoch = document["epoch"]
        left = job.budget_ucr - job.charged_ucr
        self._no(
            document["hold_ucr"] > left,
            f"a lease may charge {document['hold_ucr']} ucr, {left} of the budget are left",
        )
        highest = job.document["max_price_ucr_per_device_hour"]
        self._no(document["price_ucr_per_device_hour"] > highest, "a lease above the job's price")
        for other in self.leases.values():
            if other is not model and other.state != "closed":
                shared = set(other.document["device_ids"]) & set(document["device_ids"])
                both = other.document["provider"] == document["provider"] and shared
                self._no(bool(both), f"device {shared} is leased twice")
        step, id = self._resume_point(document["job"])
        found = (document["start_step"], document["start_checkpoint"])
        self._no(found[0] != step, f"a lease starts at step {found[0]}, step {step} is durable")
        if id is not None and found[1] is not None:
            start = self.checkpoints[found[1]]
            self._no(start.state != "durable", "a lease starts at a checkpoint that isn't durable")
            gone = set(self._lacking(start.document)) - self.market.broker.blobs.damaged
            self._no(bool(gone), "a lease starts at a checkpoint that was let go")
        self._no(id is None and found[1] is not None, "a lease starts at a checkpoint of nowhere")
        return model

    def _epoch(self, old: Any, new: Any) -> None:
        self.market.matching.epoch(old, new)

    # -- money --------------------------------------------------------------------------------

    def _receipt(self, old: Any, new: Any) -> None:
        self._no(new is None, "a receipt was deleted")
        lease = self.leases[new.lease]
        if old is not None:
            if new.countersigned and not old.countersigned:
                renter = lease.document["renter"]
                signed = is_signed_by(new.envelope, renter)
                self._no(not signed, "a receipt counts as countersigned and isn't")
                for held in lease.chain:
                    if held.id == new.id:
                        held.countersigned = True
                if lease.chain and lease.chain[-1].id == new.id:
                    self.jobs[new.job].unsigned_ucr -= lease.unsigned_ucr
                    lease.unsigned_ucr = 0
            return
        document = read(new.envelope)
        provider = lease.document["provider"]
        self._no(not is_signed_by(new.envelope, provider), "a receipt that nobody signed")
        if lease.state == "closed" or new.id in lease.seen:
            return
        lease.seen.add(new.id)
        chain = lease.chain
        sequence = document["sequence"]
        head = chain[-1] if chain else None
        if sequence == len(chain) + 1 and document["previous"] == (head.id if head else None):
            self._fits(lease, document, head)
            true_ms, stopwatch_ms = self.market.engine.now_ms, new.received_stopwatch_ms
            countersigned = bool(new.countersigned)
            chain.append(ReceiptModel(new.id, document, true_ms, stopwatch_ms, countersigned))
            return
        self._no(sequence > len(chain) + 1, "a receipt was taken before the one it follows")
        agreed = sequence - 1 if sequence <= len(chain) else len(chain) - 1
        del chain[max(0, agreed) :]

    def _fits(self, lease: LeaseModel, document: dict[str, Any], head: ReceiptModel | None) -> None:
        terms = lease.document
        same = (document["lease"], document["epoch"]) == (_id_of(lease, self), terms["epoch"])
        self._no(not same, "a receipt of another lease was taken")
        owed = terms["price_ucr_per_device_hour"] * document["cum_device_ms"] // 3_600_000
        expected = min(owed, terms["hold_ucr"])
        self._no(document["charge_ucr"] != expected, f"a receipt says {document['charge_ucr']}, "
                                                     f"{expected} is right")  # fmt: skip
        if head is not None:
            back = document["cum_device_ms"] < head.document["cum_device_ms"]
            self._no(back or head.document["final"], "a receipt goes back, or follows the final")
        if document["durable_checkpoint"] is None:
            self._no(document["durable_device_ms"] != 0, "durable time out of nowhere")
            return
        found = self.checkpoints.get(document["durable_checkpoint"])
        ok = (
            found is not None
            and found.state in ("durable", "quarantined")
            and found.document["lease"] == document["lease"]
            and found.document["cum_device_ms"] == document["durable_device_ms"]
        )
        self._no(not ok, "a receipt rests on a checkpoint that doesn't count")

    def _chain(self, old: Any, new: Any) -> None:
        self._no(new is None, "a chain was deleted")
        chain = self.leases[new.id].chain
        mine = (len(chain), chain[-1].id if chain else None)
        self._no(mine != (new.sequence, new.head), f"a chain has {new.sequence} receipts, "
                                                   f"{mine[0]} were taken")  # fmt: skip

    def _settlement(self, old: Any, new: Any) -> None:
        self._no(old is not None or new is None, "a settlement was changed")
        document = read(new.envelope)
        lease, job = self.leases[document["lease"]], self.jobs[document["job"]]
        terms = lease.document
        self._no(lease.settled, "a lease was settled twice")
        self._no(not lease.signed, "a lease was settled that nobody signed")
        self._no(document["epoch"] != job.epoch, "an epoch was paid that isn't the job's")
        lease.settled = True
        reason = document["reason"]
        devices = len(terms["device_ids"])
        head = lease.chain[-1] if lease.chain else None
        cum = durable = bound = 0
        if head is not None:
            passed_ms = head.received_stopwatch_ms - lease.proposed_stopwatch_ms
            truly_ms = head.received_ms - lease.proposed_ms
            self._no(
                abs(passed_ms - truly_ms) > 10 + truly_ms // 1_000,
                f"the broker's stopwatch says {passed_ms} ms where {truly_ms} passed",
            )
            bound = (passed_ms + TOLERANCE_MS + passed_ms // TOLERANCE_IN) * devices
            cum = min(head.document["cum_device_ms"], bound)
            durable = head.document["durable_device_ms"]
        at_fault = reason in _PROVIDERS_FAULT or reason in _BROKERS_FAULT
        payable = min(durable, cum) if at_fault else cum
        price, hold = terms["price_ucr_per_device_hour"], terms["hold_ucr"]
        charge = min(price * payable // 3_600_000, hold)
        fee = charge * terms["fee_bps"] // 10_000
        signed = head is not None and head.countersigned
        by = "none" if charge == 0 else "renter" if signed else "job"
        expected = {
            "receipt": head.id if head else None,
            "cum_device_ms": cum, "payable_device_ms": payable, "charged_ucr": charge,
            "lost_device_ms": cum - payable, "fee_ucr": fee, "provider_ucr": charge - fee,
            "accepted_by": by,
        }  # fmt: skip
        for name, value in expected.items():
            self._no(
                document[name] != value,
                f"a settlement ({reason}) says {name} {document[name]}, {value} is right",
            )
        moved = {
            (t["debit"], t["credit"]): t["amount_ucr"] for t in document["transfers"]
        }  # fmt: skip
        held = f"job:{document['job']}:held"
        right = {
            (held, f"party:{terms['provider']}:earned"): charge - fee,
            (held, "broker:fees"): fee,
        }  # fmt: skip
        self._no(moved != {k: v for k, v in right.items() if v}, f"a settlement moves {moved}")
        self._in_truth(document, lease, payable, bound)
        job.charged_ucr += charge
        if by == "job":
            lease.unsigned_ucr = charge
            job.unsigned_ucr += charge
            over = job.unsigned_ucr - job.accept_ucr
            self._no(over > 0, f"{over} ucr were charged beyond what the renter accepts unsigned")
        self.charged_ucr += charge
        self.lost_device_ms += cum - payable
        over = job.charged_ucr - job.budget_ucr
        self._no(over > 0, f"{over} ucr were charged beyond the budget")

    def _in_truth(
        self, document: dict[str, Any], lease: LeaseModel, payable: int, bound: int
    ) -> None:
        """Compare with what the machine really did, where its owner is honest."""
        agent = self.market.agents_by_party[lease.document["provider"]]
        if not agent.honest:
            return
        container = self.runs.get(document["lease"])
        ran = container.clocked_ms() * len(lease.document["device_ids"]) if container else 0
        self._no(payable > ran, f"{payable} device-ms are paid, the run had {ran}")
        claimed = lease.chain[-1].document["cum_device_ms"] if lease.chain else 0
        self._no(claimed > bound, f"{claimed} device-ms were honestly used, {bound} are believed")
        head = lease.chain[-1].document if lease.chain else None
        if document["reason"] == "succeeded":
            done = container is not None and container.exit_code == 0
            self._no(not done, "a job counts as succeeded that didn't")
            if head is not None and head["final"]:
                self._no(payable != ran, f"{payable} device-ms are paid of {ran} that were due")

    def _transfer(self, old: Any, new: Any) -> None:
        self._no(old is not None or new is None, "a transfer was changed")
        self._no(new.amount_ucr <= 0, "a transfer of nothing")
        self._no(new.cites not in self.documents, "a transfer cites no logged document")
        self.transfers[new.id] = new
        self.debits[new.debit] += new.amount_ucr
        self.credits[new.credit] += new.amount_ucr

    def _pending(self, old: Any, new: Any) -> None:
        self._no(new is None, "a reservation was deleted")
        known = self.pendings.get(new.id)
        if known is None:
            self._no(new.state != "open", "a reservation began resolved")
            self.pendings[new.id] = [new.account, new.amount_ucr, "open"]
            self.reserved[new.account] += new.amount_ucr
            return
        self._no((known[0], known[1]) != (new.account, new.amount_ucr), "a reservation changed")
        if known[2] != new.state:
            self._no(known[2] != "open", f"a reservation resolved again: {known[2]}, {new.state}")
            known[2] = new.state
            self.reserved[new.account] -= new.amount_ucr

    def _account(self, old: Any, new: Any) -> None:
        self._no(new is None, "an account was deleted")
        mine = (self.debits[new.id], self.credits[new.id], self.reserved[new.id])
        stored = (new.debits_ucr, new.credits_ucr, new.pending_ucr)
        self._no(mine != stored, f"account {new.id} is {stored}, its transfers give {mine}")
        free = mine[1] - mine[0] - mine[2]
        self._no(new.id != "world" and free < 0, f"account {new.id} is overdrawn by {-free}")

    # -- jobs and runs ------------------------------------------------------------------------

    def _job(self, old: Any, new: Any) -> None:
        model = self.jobs[new.id]
        state = str(new.state)
        self._no(new.epoch != model.epoch, f"the job is at epoch {new.epoch}, leased {model.epoch}")
        if state != model.state:
            self._edge("job", _JOB, model.state, state)
            if model.state == "paused":
                model.fruitless = 0
            model.state = state
        waits = state in ("queued", "recovering") and not model.live
        self._no(waits and model.fruitless >= FRUITLESS_LIMIT,
                 f"tried again after {model.fruitless} attempts without a new step")  # fmt: skip

    def _job_adds_up(self, old: Any, new: Any) -> None:
        if new is None:
            return
        model = self.jobs[new.id]
        self._no(new.settled_ucr != model.charged_ucr,
                 f"it says {new.settled_ucr} ucr, {model.charged_ucr} were charged")  # fmt: skip
        account = f"job:{new.id}:held"
        held = self.credits[account] - self.debits[account]
        ended = model.state in ("succeeded", "failed", "cancelled")
        right = 0 if ended else model.budget_ucr - model.charged_ucr
        self._no(held != right, f"{held} ucr are held for a job that is {model.state}, not {right}")
        self._no(ended and bool(model.live), "a job has ended and is still leased")

    def _run(self, old: Any, new: Any) -> None:
        self._no(new is None, "a run was deleted")
        model = self.leases[new.id]
        state = str(new.state)
        if state == model.run:
            return
        before, model.run = model.run, state
        self._no(before in ("exited", "lost"), f"a run that was {before} became {state}")
        if before in _RUN_RANK and state in _RUN_RANK:
            self._no(_RUN_RANK[state] < _RUN_RANK[before], f"a run went from {before} to {state}")
        if state == "lost" and str(new.reason) in ("provider_lost", "run_vanished"):
            if str(new.desired) == "stop":
                return
            patience_ms = self.jobs[new.job].document["patience_ms"]
            heard_ms = max(self.heard_ms.get(new.id, 0), self.started_ms)
            silent_ms = self.clock_ms - heard_ms
            self._no(
                silent_ms < patience_ms,
                f"a run was given up after {silent_ms} ms of silence; {patience_ms} are promised",
            )

    def _outbox(self, old: Any, new: Any) -> None:
        if new is None and old is not None:
            lost = (old.recipient, old.id) not in self.took
            self._no(lost, f"{old.type} {old.id} was forgotten before its agent had it")

    # -- the end ------------------------------------------------------------------------------

    def finished(self, *, at_rest: bool) -> None:
        """The faults have stopped and time was given: everything must have come to its end.

        `at_rest`: what may still be under way when the last job ends has had its time too.
        """
        for id, job in self.jobs.items():
            ended = job.state in ("succeeded", "failed", "cancelled")
            name = self.market.names.get(id, id[:8])
            self._no(not ended, f"{name} is {job.state} long after the last fault")
            self._no(bool(job.live), f"{name} has ended and is still leased")
        for id, checkpoint in self.checkpoints.items():
            unjudged = at_rest and checkpoint.state == "uploaded"
            self._no(unjudged, f"checkpoint {id[:8]} was never judged")
        for id, pending in self.pendings.items():
            self._no(pending[2] == "open", f"reservation {id[:8]} was never resolved")
        total = sum(self.credits.values()) - sum(self.debits.values())
        self._no(total != 0, f"debits and credits differ by {total}")

    def _edge(self, what: str, table: dict[str, str], before: str, after: str) -> None:
        self._no(after not in table[before].split(), f"a {what} went from {before} to {after}")

    def _no(self, wrong: bool, what: str) -> None:
        if wrong:
            raise Violation(what)


def _id_of(lease: LeaseModel, auditor: Auditor) -> str:
    return auditor.jobs[lease.document["job"]].live


_ORDER: tuple[tuple[str, Any], ...] = (
    ("LogEntryFact", Auditor._log_entry),
    ("EventFact", Auditor._event),
    ("JobFact", Auditor._job_is_new),
    ("DepositFact", Auditor._deposit),
    ("AmendmentFact", Auditor._amendment),
    ("BlobFact", Auditor._blob),
    ("ShardFact", Auditor._epoch),
    ("CheckpointFact", Auditor._checkpoint),
    ("ReceiptFact", Auditor._receipt),
    ("ChainFact", Auditor._chain),
    ("SettlementFact", Auditor._settlement),
    ("LeaseFact", Auditor._lease),
    ("RunFact", Auditor._run),
    ("TransferFact", Auditor._transfer),
    ("PendingFact", Auditor._pending),
    ("AccountFact", Auditor._account),
    ("JobFact", Auditor._job),
    ("OutboxFact", Auditor._outbox),
    ("JobFact", Auditor._job_adds_up),
)
_RANKS = {
    name: [rank for rank, (other, _) in enumerate(_ORDER) if other == name] for name, _ in _ORDER
}
LOOKED_AT = frozenset(name for name, _ in _ORDER)
"""The kinds of fact that an auditor looks at."""
