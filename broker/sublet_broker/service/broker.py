"""The bootstrap: one Broker composed of its use-cases, for main.py, for tests and the simulator.

Every method below is synchronous, short, and one transaction, unless it says otherwise. Callers are
party ids that have been authenticated. A refusal is errors.Refusal; nothing has changed then.

    broker.intake       register_key(envelope) -> PartyView
                        submit(caller, envelope, *, wait_for_offer=False) -> JobView
                        cancel(caller, job) | pause(caller, job) -> JobView
                        resume(caller, job, amendment: Envelope | None) -> JobView
                        deposit(caller, envelope) -> BalanceView
    broker.board        announce(provider, envelope) | withdraw(provider, offer_sequence) -> None
                        offers(kind="", region="") -> OffersPage
                        match(caller, MatchRequest) -> MatchView
    broker.agents       joined(SessionProof) -> Welcome
                        left(party, instance) -> None
                        receive(party, instance, Message) -> list[Message]
                          the list: unreliable answers (LogsWanted). After it returns, acknowledge
                          the message's mid. It raises NotYet: don't acknowledge (it comes again);
                          StaleInstance or another Refusal: send Refused and close.
                          Ack, Announce and Withdraw go through receive as well.
    broker.outbox       pending(party, limit=100) -> list[tuple[mid, Message]]   in order
                        acked(party, mids) -> None      (receive(Ack) calls it too)
                        notices(party) -> list[Message] unreliable; taken off the queue
                        on_new: Callable[[party], None] | None   after commit, any thread
    broker.scheduling   tick() -> int                   proposals -> leases committed
    broker.supervision  started() -> None               once after a start, before agents may join
                        sweep() -> None                 every second
                        verdicts() -> int               collect the verifier's results
    broker.billing      settle_due() -> int             every second
                        countersign(caller, receipt_id, envelope) -> None
    broker.access       begin(Caller, method, target, body_sha256, idempotency_key) -> Answer | None
                        finish(Caller, method, target, body_sha256, idempotency_key, status, body)
                        put_blob(caller, scope, epoch, sha256, data) -> None
                        get_blob(caller, scope, epoch, sha256) -> bytes
                        missing(caller, scope, epoch, hashes) -> MissingView
                        forget_old() -> None            every minute
    broker.keeping      sweep() -> int                  every minute, until it says less than 500
                        sweep_files() -> int            every minute
    broker.stirred() -> list[str]                   loops that are worth a round before their time
    broker.views        job jobs events logs checkpoints statement export receipts balance earnings
                        info(version) -> BrokerInfo, gauges() -> list[Gauge], audit() -> list[str]
    broker.on_job       Callable[[job id], None] | None  after commit: events or log lines are new
"""

from collections.abc import Callable

from sublet_broker.service.content.retention import Keeping
from sublet_broker.service.idempotency import Access
from sublet_broker.service.periodic.scheduling import Scheduling
from sublet_broker.service.periodic.settling import Billing
from sublet_broker.service.periodic.supervision import Supervision
from sublet_broker.service.providers.offers import Board
from sublet_broker.service.providers.sessions import Agents
from sublet_broker.service.queries.views import Views
from sublet_broker.service.renters.jobs import Intake
from sublet_broker.service.unit_of_work.context import Core, Ports, Settings
from sublet_broker.service.unit_of_work.outbox import Outbox

__all__ = ["Broker", "Ports", "Settings"]


class Broker:
    """All use-cases over one set of ports."""

    def __init__(self, ports: Ports, settings: Settings | None = None) -> None:
        self.core = Core(ports, settings or Settings())
        self.party = ports.key.party
        self.outbox: Outbox = self.core.outbox
        self.views = Views(self.core)
        self.billing = Billing(self.core)
        self.board = Board(self.core)
        self.scheduling = Scheduling(self.core)
        self.keeping = Keeping(self.core)
        self.supervision = Supervision(self.core, self.board, self.keeping)
        self.intake = Intake(self.core, self.views)
        self.agents = Agents(self.core, self.board)
        self.access = Access(self.core)

    def stirred(self) -> list[str]:
        """Return which of scheduling and billing have something new to look at, whatever time it
        is."""
        dirty = self.core.dirty
        scheduling = ["scheduling"] if dirty.providers or dirty.jobs else []
        return scheduling + (["billing"] if dirty.ended else [])

    @property
    def on_job(self) -> Callable[[str], None] | None:
        """Called after a commit with the id of each job that has new events or log lines."""
        return self.core.on_job

    @on_job.setter
    def on_job(self, hook: Callable[[str], None] | None) -> None:
        self.core.on_job = hook
