"""The auditor: a second, independent model of the market that believes nobody.

It shares no code with the broker: documents are read from their signed bytes, the ledger is kept
anew from every transfer, each receipt chain is followed, every charge is computed again, and the
states' tables are its own. It looks at each commit of the broker and at what happened in truth on
the providers' machines, and raises Violation at the first thing that isn't right.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from tests.simulation.charges import Charges
from tests.simulation.images import Images
from tests.simulation.jobs import state_at
from tests.simulation.ledger import Ledger
from tests.simulation.models import (
    CheckpointModel,
    JobModel,
    LeaseModel,
    is_signed_by,
    never,
    read,
)
from tests.simulation.pulls import Pulls
from tests.simulation.saved_folders import job_saves, never_saved
from tests.simulation.set_aside import SetAside
from tests.simulation.truth import Truth

if TYPE_CHECKING:
    from tests.simulation.jobs import Container
    from tests.simulation.market import Market

KEPT = 3
LAST_STEP = 10**15 - 1
"""A folder of this step can be told, and none after it."""
ENDED = ("succeeded", "failed", "cancelled")
FRUITLESS_LIMIT = 5
UNSTARTED_LIMIT = 20

_ITS_OWN = (
    "job_failed", "out_of_memory", "disk_limit", "image_unavailable", "input_unavailable",
    "checkpoint_invalid", "killed_too_often",
)  # fmt: skip
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
        self.ledger = Ledger(self.documents)
        self.charges = Charges(self)
        self.truth = Truth(self)
        self.set_aside = SetAside(self)
        self.images = Images(self)
        self.pulls = Pulls(self)
        self.heard_ms: dict[str, int] = {}
        self.started_ms = 0
        self.clock_ms = 0
        self.runs: dict[str, Container] = {}
        self.took: set[tuple[str, str]] = set()
        self.saved: dict[str, tuple[int, str]] = {}
        """Checkpoint -> what it holds of a folder that its job named: step and state."""
        self._closed_now: list[str] = []
        """Signed leases that this commit closes."""
        self.checks = 0
        self.claims: dict[str, int] = defaultdict(int)
        """How many scopes count on a content's being here."""

    # -- what is told from outside the broker -------------------------------------------------

    def broker_started(self, now_ms: int) -> None:
        """The broker's process begins: everyone has a period of grace from here. Its first commit
        shows its clock; where that fails, it ends before anybody has seen it."""
        self.started_ms = now_ms
        self.heard_ms.clear()
        self.market.stalls.broker_started()

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
        never(current and lease.run == "unknown", "a run was heard from and stays unknown")

    def _no_second_history(self, envelope: Any) -> None:
        """A receipt that contradicts the chain ends its lease: it was not just left aside."""
        document = read(envelope)
        lease = self.leases.get(document["lease"])
        if lease is None or lease.state != "active" or document["sequence"] > len(lease.chain):
            return
        other = lease.chain[document["sequence"] - 1].id != envelope.id
        never(other, f"a second receipt {document['sequence']} changed nothing")

    def power_was_cut(self) -> None:
        """The broker's disk has forgotten what it may: what anybody was told is there is there."""
        disk = self.market.broker.disk
        for digest, scopes in self.claims.items():
            gone = scopes and disk.whole(digest) is None and digest not in disk.damaged
            never(bool(gone), f"content {digest[:17]} did not survive a power cut")
        for id, model in self.checkpoints.items():
            if model.kept and model.state == "durable":
                lost = set(self._lacking(model.document)) - disk.damaged
                never(bool(lost), f"checkpoint {id[:8]} did not survive a power cut")

    def taken(self, party: str, mid: str, message: Any) -> None:
        """An agent has a message of the broker's on its disk."""
        self.took.add((party, mid))
        if message.TYPE == "checkpoint_verdict" and self.market.agents_by_party[party].honest:
            never("device time" in message.detail, f"honest work is refused: {message.detail}")

    def run_began(self, lease_id: str, container: Container, image: str) -> None:
        """A container has started, in truth, on an image, by its content."""
        never(lease_id in self.runs, "one lease was started twice")
        self.runs[lease_id] = container
        lease = self.leases.get(lease_id)
        self.images.began(lease_id, lease, image)
        self.pulls.ended(lease_id)
        if lease is None or lease.document["start_checkpoint"] is None:
            never(container.begin[0] != 0, "a fresh run began in the middle")
            return
        if container.folder is not None:
            saved = self.saved.get(lease.document["start_checkpoint"], container.begin)
            never(container.begin != saved, f"the run began at {container.begin}, not at {saved}")
            return
        never(
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
        never(not found, f"step {step} was acknowledged to the job and isn't durable")

    def _checkpoints_of_lease(self, lease_id: str) -> list[CheckpointModel]:
        lease = self.leases.get(lease_id)
        if lease is None:
            return []
        return [self.checkpoints[id] for id in self.of_job[lease.document["job"]]]

    # -- each commit --------------------------------------------------------------------------

    def committed(self, now_ms: int, before: dict[Any, Any], sheet: dict[Any, Any]) -> None:
        """The broker has committed this change: look at all of it."""
        never(now_ms < self.clock_ms, f"the broker's clock went back {self.clock_ms - now_ms}")
        self.clock_ms = now_ms
        self.checks += 1
        for kind in (kind for kind in sheet if kind.__name__ == "RunFact"):
            for fact in filter(None, sheet[kind].values()):
                # What the lease is settled by, in this very commit.
                self.leases[fact.id].preparing_ms = fact.preparing_ms
        looks = sorted((rank, kind) for kind in before for rank in _RANKS[kind.__name__])
        for rank, kind in looks:
            look, olds = _ORDER[rank][1], before[kind]
            for key, fact in sheet[kind].items():
                look(self, olds[key], fact)
        closed, self._closed_now = self._closed_now, []
        for id in closed:
            self.truth.closed(id, self.leases[id], now_ms)

    def _log_entry(self, old: Any, new: Any) -> None:
        never(old is not None or new is None, "the log was changed")
        never(new.id != self.log_size, f"log entry {new.id} follows {self.log_size - 1}")
        never(new.document in self.documents, "a document was logged twice")
        self.log_size += 1
        self.documents.add(new.document)

    def _event(self, old: Any, new: Any) -> None:
        never(old is not None or new is None, "the history was changed")
        self.events += 1
        never(new.id != self.events, f"event {new.id} follows {self.events - 1}")
        name = self.market.names.get(new.job, new.job[:8])
        arrow = f"{new.before} -> {new.after}" if new.before else new.after
        why = f" ({new.reason})" if new.reason else ""
        what = new.kind if new.kind == "job" else f"{new.kind} (epoch {new.epoch})"
        self.market.engine.say(f"{name}: {what} {arrow}{why} {new.detail}".rstrip())

    def _deposit(self, old: Any, new: Any) -> None:
        never(old is not None or new is None, "a deposit was changed")

    def _amendment(self, old: Any, new: Any) -> None:
        never(old is not None or new is None, "an amendment was changed")
        document = read(new.envelope)
        job = self.jobs[new.job]
        never(document["budget_ucr"] < job.budget_ucr, "a budget was lowered")
        job.budget_ucr = document["budget_ucr"]
        job.accept_ucr = document["accept_receipts_up_to_ucr"]

    def _job_is_new(self, old: Any, new: Any) -> None:
        never(new is None, "a job was deleted")
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
                self.claims[old.digest] -= 1
            return
        if old is None:
            self.claims[new.digest] += 1
        disk = self.market.broker.disk
        safe = disk.survives(new.digest) or new.digest in disk.damaged
        never(not safe, "content counts as kept that a power cut would take")

    def _content_lies(self, old: Any, new: Any) -> None:
        """Content lies somewhere from now on, elsewhere, or nowhere any more."""
        disk = self.market.broker.disk
        if new is None:
            held = old is not None and self.claims[old.digest]
            lost = held and old.digest not in disk.damaged
            never(bool(lost), "content was forgotten that somebody has a claim to")
            return
        never(not self.claims[new.digest], "content lies here that nobody has a claim to")
        safe = disk.survives(new.digest) or new.digest in disk.damaged
        never(not safe, "content is said to lie where a power cut would take it")

    def _pack(self, old: Any, new: Any) -> None:
        """A pack's file is there before it counts, and never goes before it is forgotten."""
        if new is not None:
            never(not self.market.broker.disk.has_pack(new.id), "a pack counts that isn't there")

    def _upload(self, old: Any, new: Any) -> None:
        self.market.awaited.changed(old, new)

    def _checkpoint(self, old: Any, new: Any) -> None:
        never(new is None, "a checkpoint was deleted")
        model = self.checkpoints.get(new.id)
        if model is None:
            document = read(new.envelope)
            self._never_stale(document, "is taken up")
            self.images.checkpoint(document)
            last = document["kind"] == "checkpoint" and document["step"] >= LAST_STEP
            never(last, "a checkpoint is taken up after which no step can be told")
            model = self.checkpoints[new.id] = CheckpointModel(document, "")
            self.of_job[document["job"]].append(new.id)
        state = str(new.state)
        if state != model.state:
            self._edge("checkpoint", _CHECKPOINT, model.state, state)
            model.state = state
            if state == "durable":
                self._durable(new.id, model)
            elif state == "rejected":
                self._thrown_away(model.document)
            elif state == "quarantined":
                self._quarantined(new.id, model)
        if model.kept and not new.kept:
            model.kept = False
            if state == "durable":
                self._let_go(model)

    def _let_go(self, model: CheckpointModel) -> None:
        """Content that counted as durable is no longer kept: newer ones are."""
        never(model.document["kind"] == "outputs", "outputs were let go before their time")
        if model.document["kind"] == "partial-outputs":
            self._let_go_partial(model)
            return
        newer = [
            c
            for id in self.of_job[model.document["job"]]
            if (c := self.checkpoints[id]).kept
            and c.state == "durable"
            and c.document["kind"] == "checkpoint"
            and (c.document["step"], c.document["epoch"])
            >= (model.document["step"], model.document["epoch"])
        ]
        never(len(newer) < KEPT, f"a checkpoint was let go with {len(newer)} newer ones")

    def _let_go_partial(self, model: CheckpointModel) -> None:
        newer = [
            c
            for id in self.of_job[model.document["job"]]
            if (c := self.checkpoints[id]) is not model
            and c.kept
            and c.state == "durable"
            and c.document["kind"] == "partial-outputs"
            and c.document["epoch"] >= model.document["epoch"]
        ]
        never(not newer, "a job's newest partial outputs were let go")

    def _never_stale(self, document: dict[str, Any], becomes: str) -> None:
        """Whoever has lost a job writes nothing more."""
        lease, job = self.leases[document["lease"]], self.jobs[document["job"]]
        never(
            lease.state != "active" or document["epoch"] != job.epoch,
            f"a checkpoint of epoch {document['epoch']} {becomes}, the job is at "
            f"{job.epoch}, its lease {lease.state}",
        )

    def _still_counts(self, document: dict[str, Any]) -> None:
        """What only the renter reads may be verified late; nobody goes on from it or is paid for
        it."""
        lease = self.leases[document["lease"]]
        late = {"partial-outputs": True, "outputs": lease.reason == "succeeded"}
        if lease.state != "closed" or not late.get(document["kind"], False):
            self._never_stale(document, "counts")

    def _thrown_away(self, document: dict[str, Any]) -> None:
        """What an honest machine has brought back of a run isn't refused, once it was taken up,
        while it is whole."""
        disk, lease = self.market.broker.disk, self.leases[document["lease"]]
        reads = document["kind"] == "partial-outputs" or (
            document["kind"] == "outputs" and lease.reason == "succeeded"
        )
        if reads and self.market.agents_by_party[document["provider"]].honest:
            whole = not self._lacking(document) and not self._named(document) & set(disk.damaged_ms)
            never(whole, f"{document['kind'].replace('-', ' ')} were thrown away that were whole")

    def _durable(self, id: str, model: CheckpointModel) -> None:
        document = model.document
        self._still_counts(document)
        self._handed_over(document)
        self.market.stalls.saved(document["lease"])
        # Chunks were hashed when they came, and the index when it was verified; a verdict may wait
        # for the database. What was damaged since is found when it is read.
        verified_ms = self.market.verified_ms.get(id, 0)
        disk = self.market.broker.disk
        damaged, index = disk.damaged, document["index_digest"]
        since = damaged if disk.damaged_ms.get(index, 0) > verified_ms else damaged - {index}
        bad = [digest for digest in self._lacking(document) if digest not in since]
        never(bool(bad), "a checkpoint counts that can't be restored")
        self._folder_durable(id, document)
        self._survived(document)
        job = self.jobs[document["job"]]
        if document["kind"] == "checkpoint" and not job.threads:
            job.threads = self.leases[document["lease"]].document["threads"]

    def _folder_durable(self, id: str, document: dict[str, Any]) -> None:
        """What counts of a folder that a job named is a state that it was in, whole; a file that
        only grows never counts."""
        job = self.jobs[document["job"]].document
        way = job_saves(job)
        agent = self.market.agents_by_party[document["provider"]]
        if document["kind"] != "checkpoint" or not way or not agent.honest:
            return
        grows = never_saved(way, self.runs[document["lease"]])
        never(grows, "a file that only grows counts as a checkpoint")
        if self._lacking(document):
            return  # damaged since it was verified
        step, state = self.saved[id] = self._content(document)
        right = state_at(job["nonce"], step)
        never(state != right, f"a checkpoint counts whose file is torn, at step {step}")

    def _survived(self, document: dict[str, Any]) -> None:
        """What a job saved by the protocol is on no disk for sure, nor are its outputs. So of a
        machine that lost its power nothing counts that isn't the state that the job was in."""
        run, kind = self.runs.get(document["lease"]), document["kind"]
        if run is None or not run.lost_power or kind == "partial-outputs":
            return
        agent = self.market.agents_by_party[document["provider"]]
        if not agent.honest or self._lacking(document):
            return
        if kind == "outputs":
            result = self._file(document, "result.txt").decode()
            never(result != run.state[1], "outputs count that a power cut has torn")
            return
        if run.folder:
            return
        step, state = self._content(document)
        right = state_at(self.jobs[document["job"]].document["nonce"], step)
        never(state != right, f"a checkpoint counts that a power cut has torn, at step {step}")

    def _content(self, document: dict[str, Any]) -> tuple[int, str]:
        said = json.loads(self._file(document, "state.json"))
        return int(said["step"]), str(said["state"])

    def _file(self, document: dict[str, Any], path: str) -> bytes:
        blobs = self.market.broker.blobs
        index = json.loads(blobs.whole(document["index_digest"]) or b"")
        listed = next(file for file in index["files"] if file["path"] == path)
        return b"".join(blobs.whole(c["digest"]) or b"" for c in listed["chunks"])

    def _handed_over(self, document: dict[str, Any]) -> None:
        """What an honest machine hands over as outputs, its run has finished; as partial outputs,
        one that has ended otherwise."""
        if document["kind"] == "checkpoint":
            return
        agent = self.market.agents_by_party[document["provider"]]
        container = self.runs.get(document["lease"])
        if not agent.honest or container is None:
            return
        kind = document["kind"].replace("-", " ")
        never(container.running, f"{kind} of a run that goes on")
        finished = container.truth == "finished"
        never(kind == "outputs" and not finished, f"outputs of a run that has {container.truth}")

    def _is_restorable(self, document: dict[str, Any]) -> bool:
        return not self._lacking(document)

    def _lacking(self, document: dict[str, Any]) -> list[str]:
        whole = self.market.broker.blobs.whole
        return sorted(digest for digest in self._named(document) if whole(digest) is None)

    def _named(self, document: dict[str, Any]) -> set[str]:
        """Return what a checkpoint's content is made of: its index, and all that this names."""
        index = self.market.broker.blobs.whole(document["index_digest"])
        files = [] if index is None else json.loads(index)["files"]
        chunks = {chunk["digest"] for file in files for chunk in file["chunks"]}
        return {document["index_digest"], *chunks}

    def _quarantined(self, id: str, model: CheckpointModel) -> None:
        failed = [
            lease
            for lease in self.leases.values()
            if lease.document["start_checkpoint"] == id and lease.reason == "restore_failed"
        ]
        sound = self._is_restorable(model.document) and len(failed) < 2
        never(sound, "a sound checkpoint was taken out of use")

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
        never(new is None, "a lease was deleted")
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
            never(not both, "a lease is active that its provider hasn't signed")
            model.signed = True
        else:
            model.reason = str(new.reason)
            self.market.cadences.closed(new)
            never(job.live != new.id, "a lease was closed that wasn't the job's one")
            job.live = ""
            never(model.signed and not model.settled, "a signed lease was closed unsettled")
            progressed = any(
                c.document["lease"] == new.id
                and c.state == "durable"
                and c.document["kind"] == "checkpoint"
                and c.document["step"] > model.document["start_step"]
                for c in self._checkpoints_of_lease(new.id)
            )
            if model.signed:
                self._closed_now.append(new.id)
            if model.signed or self.images.refused(new.id, model):
                self._count_attempt(job, ran=model.ran, progressed=progressed)
            self.set_aside.closed(model, self.clock_ms)

    def _count_attempt(self, job: JobModel, *, ran: bool, progressed: bool) -> None:
        if not ran:
            job.unstarted += 1
            return
        job.unstarted = 0
        job.fruitless = 0 if progressed else job.fruitless + 1

    def _lease_is_new(self, new: Any) -> LeaseModel:
        document = read(new.envelope)
        model = self.leases[new.id] = LeaseModel(
            document, self.market.engine.now_ms, new.proposed_stopwatch_ms
        )
        self.heard_ms[new.id] = self.clock_ms
        self.market.matching.leased(document)
        self.market.cadences.leased(new.id)
        self.set_aside.leased(document["provider"], self.clock_ms)
        job = self.jobs[document["job"]]
        never(bool(job.live), "a job has two holders")
        job.live = new.id
        never(document["epoch"] != job.epoch + 1, f"epoch {document['epoch']} follows {job.epoch}")
        job.epoch = document["epoch"]
        left = job.budget_ucr - job.charged_ucr
        never(
            document["hold_ucr"] > left,
            f"a lease may charge {document['hold_ucr']} ucr, {left} of the budget are left",
        )
        highest = job.document["max_price_ucr_per_device_hour"]
        never(document["price_ucr_per_device_hour"] > highest, "a lease above the job's price")
        self._threads_are_right(job, document)
        for other in self.leases.values():
            if other is not model and other.state != "closed":
                shared = set(other.document["device_ids"]) & set(document["device_ids"])
                both = other.document["provider"] == document["provider"] and shared
                never(bool(both), f"device {shared} is leased twice")
        step, id = self._resume_point(document["job"])
        found = (document["start_step"], document["start_checkpoint"])
        never(found[0] != step, f"a lease starts at step {found[0]}, step {step} is durable")
        if id is not None and found[1] is not None:
            start = self.checkpoints[found[1]]
            self.images.leased(document, start.document)
            never(start.state != "durable", "a lease starts at a checkpoint that isn't durable")
            gone = set(self._lacking(start.document)) - self.market.broker.blobs.damaged
            never(bool(gone), "a lease starts at a checkpoint that was let go")
        never(id is None and found[1] is not None, "a lease starts at a checkpoint of nowhere")
        return model

    def _threads_are_right(self, job: JobModel, lease: dict[str, Any]) -> None:
        """Another number of threads gives other bits: once something is durable it stays."""
        threads, cores = lease["threads"], self.market.matching.cores_of(lease)
        never(
            job.threads not in (0, threads),
            f"a lease of {threads} threads, and what is durable was made with {job.threads}",
        )
        asked = job.document["resources"]["cpu_millis"]
        expected = max(1, (asked or cores) // 1000)
        never(not job.threads and threads != expected, f"{threads} threads, not {expected}")
        never(threads > 1 and cores < 1000 * threads, f"{threads} threads on {cores} / 1000 cores")

    def _epoch(self, old: Any, new: Any) -> None:
        self.market.matching.epoch(old, new)

    # -- jobs and runs ------------------------------------------------------------------------

    def _job(self, old: Any, new: Any) -> None:
        model = self.jobs[new.id]
        state = str(new.state)
        never(new.epoch != model.epoch, f"the job is at epoch {new.epoch}, leased {model.epoch}")
        if state != model.state:
            self._edge("job", _JOB, model.state, state)
            if model.state == "paused":
                model.fruitless = model.unstarted = 0
                self.set_aside.resumed(new.id)
            model.state = state
            self._given_up(new, state)
        waits = state in ("queued", "recovering") and not model.live
        never(
            waits and model.fruitless >= FRUITLESS_LIMIT,
            f"tried again after {model.fruitless} attempts without a new step",
        )
        never(
            waits and model.unstarted >= UNSTARTED_LIMIT,
            f"tried again after {model.unstarted} attempts that never ran",
        )

    def _given_up(self, new: Any, state: str) -> None:
        """A job fails by what is its own, and what has something durable never for its image, or
        for who kills it; what has nothing never waits for these. It is paused only after as many
        attempts as were promised."""
        reason, model = str(new.reason), self.jobs[new.id]
        never(state == "failed" and reason not in _ITS_OWN, f"a job has failed as {reason}")
        tried = model.fruitless >= FRUITLESS_LIMIT or model.unstarted >= UNSTARTED_LIMIT
        never(
            state == "paused" and reason == "no_progress" and not tried,
            f"no progress after {model.fruitless} attempts, and {model.unstarted} that never ran",
        )
        if reason == "image_unavailable":
            self.set_aside.image_given_up(new.id, self.clock_ms)
        if reason in ("image_unavailable", "killed_too_often"):
            durable = self._resume_point(new.id)[1] is not None
            lost, kept = state == "failed" and durable, state == "paused" and not durable
            never(lost, f"a job has failed as {reason} that has something durable")
            never(kept, f"a job waits, {reason}, and has nothing durable")

    def _agent(self, old: Any, new: Any) -> None:
        never(new is None, "an agent was deleted")
        self.set_aside.agent(new)

    def _job_adds_up(self, old: Any, new: Any) -> None:
        if new is None:
            return
        model = self.jobs[new.id]
        if new.outputs is not None:
            outputs = self.checkpoints[new.outputs]
            final = outputs.document["kind"] == "outputs"
            never(not final, f"{outputs.document['kind']} count as a job's outputs")
            ended = self.leases[outputs.document["lease"]].reason
            never(ended != "succeeded", f"a job's outputs are of a run that ended as {ended!r}")
        never(
            new.settled_ucr != model.charged_ucr,
            f"it says {new.settled_ucr} ucr, {model.charged_ucr} were charged",
        )
        held = self.ledger.held(new.id)
        ended = model.state in ENDED
        right = 0 if ended else model.budget_ucr - model.charged_ucr
        never(held != right, f"{held} ucr are held for a job that is {model.state}, not {right}")
        never(ended and bool(model.live), "a job has ended and is still leased")

    def _run(self, old: Any, new: Any) -> None:
        never(new is None, "a run was deleted")
        model = self.leases[new.id]
        if new.running_ms is not None and not model.ran:
            self._began_to_run(new, model)
        self.market.stalls.ordered(new)
        state = str(new.state)
        if state == model.run:
            return
        before, model.run = model.run, state
        never(before in ("exited", "lost"), f"a run that was {before} became {state}")
        if before in _RUN_RANK and state in _RUN_RANK:
            never(_RUN_RANK[state] < _RUN_RANK[before], f"a run went from {before} to {state}")
        if state == "lost" and str(new.reason) in ("provider_lost", "run_vanished"):
            if str(new.desired) == "stop":
                return
            patience_ms = self.jobs[new.job].document["patience_ms"]
            # What the broker could not write down may have been what was said.
            failed_ms = self.market.broker.store.failed_ms
            heard_ms = max(self.heard_ms.get(new.id, 0), self.started_ms, failed_ms)
            silent_ms = self.clock_ms - heard_ms
            never(
                silent_ms < patience_ms,
                f"a run was given up after {silent_ms} ms of silence; {patience_ms} are promised",
            )

    def _began_to_run(self, new: Any, model: LeaseModel) -> None:
        model.ran = True
        provider = model.document["provider"]
        honest = self.market.agents_by_party[provider].honest
        never(honest and new.id not in self.runs, "a run counts as begun that never was")
        self.set_aside.started(provider)

    def _outbox(self, old: Any, new: Any) -> None:
        if new is None and old is not None:
            lost = (old.recipient, old.id) not in self.took
            never(lost, f"{old.type} {old.id} was forgotten before its agent had it")

    # -- the end ------------------------------------------------------------------------------

    def finished(self, *, at_rest: bool) -> None:
        """The faults have stopped and time was given: everything must have come to its end.

        `at_rest`: what may still be under way when the last job ends has had its time too.
        """
        for id, job in self.jobs.items():
            ended = job.state in ENDED
            name = self.market.names.get(id, id[:8])
            never(not ended, f"{name} is {job.state} long after the last fault")
            never(bool(job.live), f"{name} has ended and is still leased")
        for id, checkpoint in self.checkpoints.items():
            unjudged = at_rest and checkpoint.state == "uploaded"
            never(unjudged, f"checkpoint {id[:8]} was never judged")
        self.ledger.finished()

    def _edge(self, what: str, table: dict[str, str], before: str, after: str) -> None:
        never(after not in table[before].split(), f"a {what} went from {before} to {after}")


_ORDER: tuple[tuple[str, Any], ...] = (
    ("LogEntryFact", Auditor._log_entry),
    ("EventFact", Auditor._event),
    ("JobFact", Auditor._job_is_new),
    ("DepositFact", Auditor._deposit),
    ("AmendmentFact", Auditor._amendment),
    ("BlobFact", Auditor._blob),
    ("ContentFact", Auditor._content_lies),
    ("PackFact", Auditor._pack),
    ("UploadFact", Auditor._upload),
    ("ShardFact", Auditor._epoch),
    ("CheckpointFact", Auditor._checkpoint),
    ("ReceiptFact", lambda a, old, new: a.charges.receipt(old, new)),
    ("ChainFact", lambda a, old, new: a.charges.chain(old, new)),
    ("SettlementFact", lambda a, old, new: a.charges.settlement(old, new)),
    ("LeaseFact", Auditor._lease),
    ("RunFact", Auditor._run),
    ("TransferFact", lambda a, old, new: a.ledger.transfer(old, new)),
    ("PendingFact", lambda a, old, new: a.ledger.pending(old, new)),
    ("AccountFact", lambda a, old, new: a.ledger.account(old, new)),
    ("JobFact", Auditor._job),
    ("OutboxFact", Auditor._outbox),
    ("JobFact", Auditor._job_adds_up),
    ("AgentFact", Auditor._agent),
)
_RANKS = {
    name: [rank for rank, (other, _) in enumerate(_ORDER) if other == name] for name, _ in _ORDER
}
LOOKED_AT = frozenset(name for name, _ in _ORDER)
"""The kinds of fact that an auditor looks at."""
