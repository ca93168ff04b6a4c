"""Agents: who is connected, and what comes from them.

Whoever joined last with a key is that provider's agent; an earlier instance's messages are refused.
Every message may come twice, late, or out of order, and each is judged by the epoch it carries:
what belongs to a closed lease changes nothing, and its agent is told to stop.
"""

from dataclasses import replace

from sublet_broker.market.facts import AgentFact, LeaseFact, RunFact
from sublet_broker.market.running import fell_silent, is_over
from sublet_broker.service.leases.candidates import LIVE_LEASE
from sublet_broker.service.leases.open_offers import OpenOffers
from sublet_broker.service.leases.standby import ask_again, prepare_successor
from sublet_broker.service.providers.checkpoints import Checkpoints
from sublet_broker.service.providers.offers import Offers
from sublet_broker.service.providers.receipts import Receipts
from sublet_broker.service.providers.run_reports import RunReports, current_agent
from sublet_broker.service.unit_of_work.context import Context
from sublet_contracts.documents import DocumentRefused
from sublet_contracts.session import SessionProof
from sublet_contracts.states import LeaseState
from sublet_contracts.wire import (
    MAX_RUNS,
    Ack,
    Announce,
    CheckpointUploaded,
    Heartbeat,
    HeldLease,
    LeaseAnswer,
    Logs,
    LogStates,
    Message,
    Prepared,
    ReceiptIssued,
    RunChanged,
    Welcome,
    Withdraw,
)


class Sessions:
    """The agents' side of the broker."""

    def __init__(self, context: Context, offers: Offers, open_offers: OpenOffers) -> None:
        self._context = context
        self._offers = offers
        self._open_offers = open_offers
        self._reports = RunReports(context, open_offers)
        self._checkpoints = Checkpoints(context)
        self._receipts = Receipts(context)

    def joined(self, proof: SessionProof) -> Welcome:
        """Take in an agent that has proven who it is. It replaces an earlier one of its key."""
        self._context.outbox.drop_notices(proof.party)
        with self._context.work() as work:
            known = work.get(AgentFact, proof.party)
            if known is None:
                most = self._context.settings.max_new_parties_an_hour
                self._context.rate_limits.demand("new agents", "", most, work.now_ms)
            agent = known or AgentFact(proof.party, "", False, 0)
            work.put(
                replace(agent, instance=proof.instance, connected=True, last_seen_ms=work.now_ms)
            )
            held = work.find(
                LeaseFact, {"provider": proof.party, "state": LIVE_LEASE}, order_by="proposed_ms"
            )
            work.touch_offer(proof.party)
            ask_again(work, proof.party)
        settings = self._context.settings
        return Welcome(
            heartbeat_ms=settings.heartbeat_ms,
            fee_bps=settings.fee_bps,
            leases=tuple(HeldLease(lease=lease.id, epoch=lease.epoch) for lease in held[:MAX_RUNS]),
        )

    def left(self, party: str, instance: str) -> None:
        """Note that a connection is gone. Its runs are unknown at once, so that successors prepare;
        they are lost by silence only."""
        self._open_offers.refresh()
        with self._context.work() as work:
            agent = work.get(AgentFact, party)
            if agent is None or agent.instance != instance:
                return
            work.put(replace(agent, connected=False))
            work.touch_offer(party)
            for lease in work.find(LeaseFact, {"provider": party, "state": LeaseState.ACTIVE}):
                run = work.get(RunFact, lease.id)
                if run is not None and not is_over(run):
                    silent = work.put_run(run, fell_silent(run, work.now_ms))
                    prepare_successor(self._open_offers, work, lease, silent)

    def steady(self, party: str, instance: str, message: Heartbeat) -> bool:
        """Take a heartbeat that changes nothing but figures, without a transaction: most are such.
        It waits for nothing. False: nothing was done, hand it to `receive`."""
        return self._reports.steady(party, instance, message)

    def log_states(self, party: str, instance: str, message: LogStates) -> None:
        """Take how a run's unfinished lines stand, without a transaction. It waits for nothing."""
        self._reports.log_states(party, instance, message)

    def receive(self, party: str, instance: str, message: Message) -> list[Message]:
        """Act on an agent's message; return unreliable answers.

        Afterwards its mid is to be acknowledged. Raises NotYet: it is not, the agent sends it
        again; StaleInstance and other Refusals: tell the agent why and close the connection.
        """
        if isinstance(message, Heartbeat):
            # By far the most frequent: it checks the instance in its own transaction.
            self._reports.heartbeat(party, instance, message)
            return []
        if isinstance(message, LogStates):
            self.log_states(party, instance, message)
            return []
        self._check_instance(party, instance)
        match message:
            case Ack():
                self._context.outbox.acked(party, message.mids)
            case Announce():
                self._offers.announce(party, message.offer)
            case Withdraw():
                self._offers.withdraw(party, message.offer_sequence)
            case RunChanged():
                self._reports.run_changed(party, message)
            case LeaseAnswer():
                self._drop_if_wrong(party, message)
            case CheckpointUploaded() | ReceiptIssued():
                self._drop_if_wrong(party, message)
            case Prepared():
                self._reports.prepared(party, message)
            case Logs():
                return [self._reports.logs(party, message)]
            case _:
                # The session's table lets no other message of an agent through.
                raise TypeError(f"{message.TYPE} is not an agent's message")
        return []

    def _drop_if_wrong(
        self, party: str, message: LeaseAnswer | CheckpointUploaded | ReceiptIssued
    ) -> None:
        """Act on a signed document. A wrong one is dropped and acknowledged: sent again it would
        be no better, and the agent must not wait for it for ever."""
        try:
            match message:
                case LeaseAnswer():
                    self._reports.lease_answer(party, message)
                case CheckpointUploaded():
                    self._checkpoints.checkpoint(party, message)
                case ReceiptIssued():
                    self._receipts.receipt(party, message.receipt)
        except DocumentRefused as error:
            with self._context.work() as work:
                most = self._context.settings.max_remarks_an_hour
                if not self._context.rate_limits.take("remarks", party, most, work.now_ms):
                    return
                work.event("refused", "", detail=f"{message.TYPE} of {party}: {error}")

    def _check_instance(self, party: str, instance: str) -> None:
        with self._context.read() as snapshot:
            current_agent(snapshot, party, instance)
