"""The bootstrap: one Broker composed of its use-cases, for main.py, for tests and the simulator.

Every use-case is synchronous, short, and one transaction, unless it says otherwise. Callers are
party ids that have been authenticated. A refusal is errors.Refusal; nothing has changed then.

Who calls what:
- `jobs`, `accounts`, `countersigning`, `blobs`, `uploads`: renters and the operator, through the
  edge.
- `sessions`: the agents' connections: joined, left, receive. When `receive` returns, acknowledge
  the message's mid and send the list, unreliable answers. When it raises NotYet, don't acknowledge:
  the message comes again; StaleInstance or another Refusal: say so and close. Everything that an
  agent says goes through it, offers and acknowledgements too.
- `outbox`: reliable messages in order (`pending`, `acked`), and `notices`, which may be lost.
- `scheduling.tick`, `settling.settle_due`, `supervision.sweep`: each second, or when `stirred`
  names them; `supervision.verdicts` when the verifier has results; `idempotency.forget_old`,
  `retention.sweep` and `sweep_files`, `uploads.sweep`: each minute; `packs.scrub`: every few
  seconds.
  `supervision.started`: once after a start, before agents join.
- `views`, `market`, `money`, `metrics`, `ledger_audit`: whoever looks.
- `idempotency.begin` and `finish`: around each signed request.
"""

from collections.abc import Callable

from sublet_broker.service.content.blobs import Blobs
from sublet_broker.service.content.packs import Packs
from sublet_broker.service.content.retention import Retention
from sublet_broker.service.content.uploads import Uploads
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

        self.packs = Packs(context)
        self.views = Views(context)
        self.market = Market(context, open_offers)
        self.money = Money(context)
        self.metrics = MarketMetrics(context)
        self.ledger_audit = LedgerAudit(context)

        self.jobs = Jobs(context, self.views, open_offers, self.packs)
        self.accounts = Accounts(context, self.money)
        self.countersigning = Countersigning(context)

        self.offers = Offers(context)
        self.sessions = Sessions(context, self.offers, open_offers)

        self.blobs = Blobs(context, self.packs)
        self.uploads = Uploads(context, self.blobs, self.packs)
        self.retention = Retention(context, self.packs)
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
