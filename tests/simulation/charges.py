"""The auditor's model of receipts and settlements: every charge is computed again."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from tests.simulation.models import LeaseModel, ReceiptModel, is_signed_by, never, read
from tests.simulation.saved_folders import check_paid

if TYPE_CHECKING:
    from tests.simulation.auditor import Auditor

TOLERANCE_MS = 1_000
TOLERANCE_IN = 1_000

_PROVIDERS_FAULT = frozenset(
    [
        "pull_failed",
        "image_not_allowed",
        "reclaimed",
        "provider_drained",
        "provider_lost",
        "run_killed",
        "run_vanished",
        "run_quarantined",
        "device_failed",
        "engine_stopped",
        "start_failed",
        "provider_disk_full",
        "lease_refused",
        "lease_unanswered",
        "evidence_of_fraud",
    ]
)
_BROKERS_FAULT = frozenset(["restore_failed"])
_FREE_KILLS_A_JOB, _FREE_KILLS_A_RENTER, _WEEK_MS = 2, 10, 604_800_000
_NOBODY_SEEN = frozenset(["killed_unattributed", "image_unknown"])


class Charges:
    """Follows the chains of one market's leases, to the micro-credit."""

    def __init__(self, auditor: Auditor) -> None:
        self._auditor = auditor
        self._market = auditor.market
        self.charged_ucr = 0
        self.lost_device_ms = 0
        self.reasons: Counter[str] = Counter()
        """How often leases were settled by each."""
        self.free_kills: list[tuple[str, str, int]] = []
        """Job, renter and time of each settlement that a kill without a known sender made free."""

    def receipt(self, old: Any, new: Any) -> None:
        never(new is None, "a receipt was deleted")
        lease = self._auditor.leases[new.lease]
        if old is not None:
            if new.countersigned and not old.countersigned:
                renter = lease.document["renter"]
                signed = is_signed_by(new.envelope, renter)
                never(not signed, "a receipt counts as countersigned and isn't")
                for held in lease.chain:
                    if held.id == new.id:
                        held.countersigned = True
                if lease.chain and lease.chain[-1].id == new.id:
                    self._auditor.jobs[new.job].unsigned_ucr -= lease.unsigned_ucr
                    lease.unsigned_ucr = 0
            return
        document = read(new.envelope)
        provider = lease.document["provider"]
        never(not is_signed_by(new.envelope, provider), "a receipt that nobody signed")
        if lease.state == "closed" or new.id in lease.seen:
            return
        lease.seen.add(new.id)
        chain = lease.chain
        sequence = document["sequence"]
        head = chain[-1] if chain else None
        if sequence == len(chain) + 1 and document["previous"] == (head.id if head else None):
            self._fits(lease, document, head)
            true_ms, stopwatch_ms = self._market.engine.now_ms, new.received_stopwatch_ms
            countersigned = bool(new.countersigned)
            chain.append(ReceiptModel(new.id, document, true_ms, stopwatch_ms, countersigned))
            return
        never(sequence > len(chain) + 1, "a receipt was taken before the one it follows")
        agreed = sequence - 1 if sequence <= len(chain) else len(chain) - 1
        del chain[max(0, agreed) :]

    def _fits(self, lease: LeaseModel, document: dict[str, Any], head: ReceiptModel | None) -> None:
        terms = lease.document
        same = (document["lease"], document["epoch"]) == (
            self._auditor.jobs[terms["job"]].live,
            terms["epoch"],
        )
        never(not same, "a receipt of another lease was taken")
        owed = terms["price_ucr_per_device_hour"] * document["cum_device_ms"] // 3_600_000
        expected = min(owed, terms["hold_ucr"])
        never(
            document["charge_ucr"] != expected,
            f"a receipt says {document['charge_ucr']}, {expected} is right",
        )
        self._auditor.pulls.claimed(document["lease"], lease, document)
        if head is not None:
            back = document["cum_device_ms"] < head.document["cum_device_ms"]
            never(back or head.document["final"], "a receipt goes back, or follows the final")
        if document["durable_checkpoint"] is None:
            never(document["durable_device_ms"] != 0, "durable time out of nowhere")
            return
        found = self._auditor.checkpoints.get(document["durable_checkpoint"])
        ok = (
            found is not None
            and found.state in ("durable", "quarantined")
            and found.document["lease"] == document["lease"]
            and found.document["cum_device_ms"] == document["durable_device_ms"]
            and found.document["kind"] == "checkpoint"
        )
        never(not ok, "a receipt rests on a checkpoint that doesn't count")

    def chain(self, old: Any, new: Any) -> None:
        never(new is None, "a chain was deleted")
        chain = self._auditor.leases[new.id].chain
        mine = (len(chain), chain[-1].id if chain else None)
        never(
            mine != (new.sequence, new.head),
            f"a chain has {new.sequence} receipts, {mine[0]} were taken",
        )

    def settlement(self, old: Any, new: Any) -> None:
        never(old is not None or new is None, "a settlement was changed")
        document = read(new.envelope)
        lease, job = self._auditor.leases[document["lease"]], self._auditor.jobs[document["job"]]
        terms = lease.document
        never(lease.settled, "a lease was settled twice")
        never(not lease.signed, "a lease was settled that nobody signed")
        never(document["epoch"] != job.epoch, "an epoch was paid that isn't the job's")
        lease.settled = True
        reason = document["reason"]
        self.reasons[reason] += 1
        if reason in ("killed_unattributed", "killed_too_often"):
            self._kill(document, terms["renter"])
        devices = len(terms["device_ids"])
        head = lease.chain[-1] if lease.chain else None
        cum = durable = bound = 0
        if head is not None:
            passed_ms = head.received_stopwatch_ms - lease.proposed_stopwatch_ms
            truly_ms = head.received_ms - lease.proposed_ms
            never(
                abs(passed_ms - truly_ms) > 10 + truly_ms // 1_000,
                f"the broker's stopwatch says {passed_ms} ms where {truly_ms} passed",
            )
            pulled_ms = head.document.get("pull_device_ms", 0)
            not_begun_ms = self._auditor.pulls.heard(document["lease"], lease)
            free_ms = self._auditor.pulls.free_ms(lease, pulled_ms, not_begun_ms)
            tolerated_ms = TOLERANCE_MS + passed_ms // TOLERANCE_IN
            bound = (max(0, passed_ms - free_ms) + tolerated_ms) * devices
            cum = min(head.document["cum_device_ms"], bound)
            durable = head.document["durable_device_ms"]
        durable_only = reason in _PROVIDERS_FAULT | _BROKERS_FAULT | _NOBODY_SEEN
        payable = min(durable, cum) if durable_only else cum
        price, hold = terms["price_ucr_per_device_hour"], terms["hold_ucr"]
        charge = min(price * payable // 3_600_000, hold)
        fee = charge * terms["fee_bps"] // 10_000
        signed = head is not None and head.countersigned
        by = "none" if charge == 0 else "renter" if signed else "job"
        expected = {
            "receipt": head.id if head else None,
            "cum_device_ms": cum,
            "payable_device_ms": payable,
            "charged_ucr": charge,
            "lost_device_ms": cum - payable,
            "fee_ucr": fee,
            "provider_ucr": charge - fee,
            "accepted_by": by,
        }
        for name, value in expected.items():
            never(
                document[name] != value,
                f"a settlement ({reason}) says {name} {document[name]}, {value} is right",
            )
        moved = {(t["debit"], t["credit"]): t["amount_ucr"] for t in document["transfers"]}
        held = f"job:{document['job']}:held"
        right = {
            (held, f"party:{terms['provider']}:earned"): charge - fee,
            (held, "broker:fees"): fee,
        }
        never(moved != {k: v for k, v in right.items() if v}, f"a settlement moves {moved}")
        self._in_truth(document, lease, payable, bound)
        if self._market.agents_by_party[terms["provider"]].honest:
            says = check_paid(
                self._auditor, lease, document["lease"], payable, durable_only=durable_only
            )
            never(bool(says), says)
        job.charged_ucr += charge
        if by == "job":
            lease.unsigned_ucr = charge
            job.unsigned_ucr += charge
            over = job.unsigned_ucr - job.accept_ucr
            never(over > 0, f"{over} ucr were charged beyond what the renter accepts unsigned")
        self.charged_ucr += charge
        self.lost_device_ms += cum - payable
        over = job.charged_ucr - job.budget_ucr
        never(over > 0, f"{over} ucr were charged beyond the budget")

    def _kill(self, document: dict[str, Any], renter: str) -> None:
        """Two kills a job and ten a renter and week are free; from then on they are paid."""
        now_ms = document["issued_ms"]
        of_job = sum(job == document["job"] for job, _, _ in self.free_kills)
        of_renter = sum(
            whose == renter and now_ms - when_ms < _WEEK_MS for _, whose, when_ms in self.free_kills
        )
        free = of_job < _FREE_KILLS_A_JOB and of_renter < _FREE_KILLS_A_RENTER
        never(
            free != (document["reason"] == "killed_unattributed"),
            f"a lease is settled by {document['reason']} after {of_job} free kills of its job and "
            f"{of_renter} of its renter's week",
        )
        if free:
            self.free_kills.append((document["job"], renter, now_ms))

    def _in_truth(
        self, document: dict[str, Any], lease: LeaseModel, payable: int, bound: int
    ) -> None:
        """Compare with what the machine really did, where its owner is honest."""
        agent = self._market.agents_by_party[lease.document["provider"]]
        if not agent.honest:
            return
        container = self._auditor.runs.get(document["lease"])
        ran = container.clocked_ms() * len(lease.document["device_ids"]) if container else 0
        least, most = self._auditor.pulls.paid_ms(document["lease"], lease)
        least, most = ran + least, ran + most
        never(payable > most, f"{payable} device-ms are paid, the run had {most}")
        claimed = lease.chain[-1].document["cum_device_ms"] if lease.chain else 0
        never(claimed > bound, f"{claimed} device-ms were honestly used, {bound} are believed")
        head = lease.chain[-1].document if lease.chain else None
        if document["reason"] == "succeeded":
            done = container is not None and container.truth == "finished"
            never(not done, "a job counts as succeeded that didn't")
            if head is not None and head["final"]:
                never(
                    not least <= payable <= most,
                    f"{payable} device-ms are paid of {least} to {most} that were due",
                )
