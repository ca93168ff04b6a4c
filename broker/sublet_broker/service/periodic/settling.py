"""Billing: settlements that waited for something, and the renter's signature on receipts."""

from sublet_broker.market.facts import (
    LeaseFact,
    RunFact,
)
from sublet_broker.market.settling import SettlementCase, SettlementDecision, decide
from sublet_broker.service.leases.closing import close_if_due, due
from sublet_broker.service.leases.settlement import case_of
from sublet_broker.service.ports import MatcherAway
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.states import LeaseState, RunState

BATCH = 16
"""From so many on it is worth handing the arithmetic to the settler."""


class Settling:
    """What is paid."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def settle_due(self) -> int:
        """Close the leases whose runs have ended and whose last papers came, or no longer come.

        Most are closed by the message that completes them; this is for the rest. Returns how many.
        """
        ended = self._context.dirty.ended
        # Taken before they are read, so that one which ends meanwhile is not taken off unseen.
        taken = [id for id in list(ended) if ended.pop(id, id) is None]
        if not taken:
            return 0
        try:
            with self._context.read() as snapshot:
                cases = self._cases(snapshot, taken)
        except BaseException:
            ended.update(dict.fromkeys(taken))
            raise
        if not cases:
            return 0
        decided = self._decide(list(cases.values()))
        closed = 0
        for id, case in cases.items():
            with self._context.work() as work:
                lease = work.must(LeaseFact, id)
                # What was decided outside counts only if nothing has come in since.
                same = lease.state is LeaseState.ACTIVE and case == case_of(
                    self._context, work, lease, case.reason
                )
                closed += close_if_due(
                    self._context, work, lease, decided.get(id) if same else None
                )
        return closed

    def _cases(self, snapshot: UnitOfWork, leases: list[str]) -> dict[str, SettlementCase]:
        cases: dict[str, SettlementCase] = {}
        for id in leases:
            lease, run = snapshot.must(LeaseFact, id), snapshot.must(RunFact, id)
            if lease.state is not LeaseState.ACTIVE or run.state is not RunState.EXITED:
                continue
            self._context.dirty.ended[id] = None  # Looked at again, until it is closed.
            why = due(self._context, snapshot, lease, run)
            if why is not None:
                cases[lease.id] = case_of(self._context, snapshot, lease, why[0])
        return cases

    def _decide(self, cases: list[SettlementCase]) -> dict[str, SettlementDecision]:
        settler = self._context.ports.settler
        if settler is not None and len(cases) >= BATCH:
            try:
                return {decision.lease: decision for decision in settler.decide(cases)}
            except MatcherAway:
                pass  # Money doesn't wait for the engine: decided here.
        return {case.lease: decide(case) for case in cases}
