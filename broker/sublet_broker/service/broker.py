"""The bootstrap: one Broker composed of its use-cases, for main.py, for tests and the simulator.

Every method below is synchronous, short, and one transaction, unless it says otherwise. Callers are
party ids that have been authenticated. A refusal is errors.Refusal; nothing has changed then.

    broker.jobs            submit(caller, envelope, *, wait_for_offer=False) -> JobView
                           cancel(caller, job) | pause(caller, job) -> JobView
                           resume(caller, job, amendment: Envelope | None) -> JobView
    broker.accounts        register_key(envelope) -> PartyView
                           deposit(caller, envelope) -> BalanceView
    broker.countersigning  countersign(caller, receipt_id, envelope) -> None
    broker.offers          announce(provider, envelope) | withdraw(provider, sequence) -> None
    broker.sessions        joined(SessionProof) -> Welcome
                           left(party, instance) -> None
                           receive(party, instance, Message) -> list[Message]
                             the list: unreliable answers (LogsWanted). After it returns,
                             acknowledge the message's mid. It raises NotYet: don't acknowledge (it
                             comes again); StaleInstance or another Refusal: send Refused and close.
                             Ack, Announce and Withdraw go through receive as well.
    broker.outbox          pending(party, limit=100) -> list[tuple[mid, Message]]   in order
                           acked(party, mids) -> None      (receive(Ack) calls it too)
                           notices(party) -> list[Message] unreliable; taken off the queue
                           on_new: Callable[[party], None] | None   after commit, any thread
    broker.scheduling      tick() -> int                   proposals -> leases committed
    broker.supervision     started() -> None               once after a start, before agents join
                           sweep() -> None                 every second
                           verdicts() -> int               collect the verifier's results
    broker.settling        settle_due() -> int             every second
    broker.idempotency     begin(Caller, method, target, body_sha256, key) -> Answer | None
                           finish(Caller, method, target, body_sha256, key, status, body)
                           forget_old() -> None            every minute
    broker.blobs           put(caller, scope, epoch, sha256, data) -> None
                           get(caller, scope, epoch, sha256) -> bytes
                           missing(caller, scope, epoch, hashes) -> MissingView
    broker.retention       sweep() -> int                  every minute, until it says less than 500
                           sweep_files() -> int            every minute
    broker.stirred() -> list[str]                   loops that are worth a round before their time
    broker.views           job jobs events logs checkpoints receipts export log
                           info(version) -> BrokerInfo
    broker.market          offers(kind="", region="") -> OffersPage
                           match(caller, MatchRequest) -> MatchView
    broker.money           statement(caller, job) balance(caller) earnings(caller)
    broker.metrics         samples() -> list[Sample]
    broker.ledger_audit    breaches() -> list[str]         reads the whole ledger
    broker.on_job       Callable[[job id], None] | None  after commit: events or log lines are new
"""

from collections.abc import Callable

from sublet_broker.service.content.blobs import Blobs
from sublet_broker.service.content.retention import Retention
from sublet_broker.service.idempotency import Idempotency
from sublet_broker.service.leases.open_offers import OpenOffers
from sublet_broker.service.periodic.scheduling import Scheduling
from sublet_broker.service.periodic.settling import Settling
from sublet_broker.service.periodic.supervision import Supervision
from sublet_broker.service.providers.offers import Offers
from sublet_broker.service.providers.sessions import Sessions
from sublet_broker.service.queries.ledger_audit import LedgerAudit
from sublet_broker.service.queries.market import Market
from sublet_broker.service.queries.metrics import MarketMetrics
from sublet_broker.service.queries.money import Money
from sublet_broker.service.queries.views import Views
from sublet_broker.service.renters.accounts import Accounts
from sublet_broker.service.renters.countersigning import Countersigning
from sublet_broker.service.renters.jobs import Jobs
from sublet_broker.service.settings import Settings
from sublet_broker.service.unit_of_work.context import Context, Ports
from sublet_broker.service.unit_of_work.outbox import Outbox

__all__ = ["Broker", "Ports", "Settings"]


class Broker:
    """All use-cases over one set of ports."""

    def __init__(self, ports: Ports, settings: Settings | None = None) -> None:
        context = Context(ports, settings or Settings())
        self.context = context
        self.party = ports.key.party
        self.outbox: Outbox = context.outbox
        open_offers = OpenOffers(context)

        self.views = Views(context)
        self.market = Market(context, open_offers)
        self.money = Money(context)
        self.metrics = MarketMetrics(context)
        self.ledger_audit = LedgerAudit(context)

        self.jobs = Jobs(context, self.views, open_offers)
        self.accounts = Accounts(context, self.money)
        self.countersigning = Countersigning(context)

        self.offers = Offers(context)
        self.sessions = Sessions(context, self.offers, open_offers)

        self.blobs = Blobs(context)
        self.retention = Retention(context)
        self.idempotency = Idempotency(context)

        self.scheduling = Scheduling(context)
        self.supervision = Supervision(context, self.offers, self.retention, open_offers)
        self.settling = Settling(context)

    def stirred(self) -> list[str]:
        """Return which of scheduling and settling have something new to look at, whatever time it
        is."""
        dirty = self.context.dirty
        scheduling = ["scheduling"] if dirty.providers or dirty.jobs else []
        return scheduling + (["settling"] if dirty.ended else [])

    @property
    def on_job(self) -> Callable[[str], None] | None:
        """Called after a commit with the id of each job that has new events or log lines."""
        return self.context.on_job

    @on_job.setter
    def on_job(self, hook: Callable[[str], None] | None) -> None:
        self.context.on_job = hook
