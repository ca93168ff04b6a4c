"""What the use-cases share: settings, ports, hooks, and the unit of work."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import TracebackType

from sublet_broker.market.facts import LeaseFact
from sublet_broker.market.metering import most_device_ms
from sublet_broker.market.resuming import Patience
from sublet_broker.service.ports import (
    BlobStore,
    Clock,
    Entropy,
    Matcher,
    Settler,
    StorageFull,
    Store,
    StoreAway,
    Transaction,
    Verifier,
)
from sublet_broker.service.unit_of_work.heartbeats import Pulses
from sublet_broker.service.unit_of_work.outbox import Outbox
from sublet_broker.service.unit_of_work.rate_limits import Quotas
from sublet_broker.service.unit_of_work.unit_of_work import Dirty, Work
from sublet_contracts.keys import SigningKey


@dataclass(frozen=True)
class Settings:
    """How this broker works. Times in ms."""

    fee_bps: int = 500
    heartbeat_ms: int = 3_000
    unknown_after_ms: int = 9_000
    answer_ms: int = 10_000
    """An agent must sign a lease within this."""
    final_receipt_ms: int = 5_000
    """A run that ended and goes on elsewhere waits so long for its final receipt."""
    stop_overdue_ms: int = 30_000
    """A run that isn't gone so long after it was to stop counts as lost."""
    fruitless_limit: int = 5
    """Attempts in a row without a new durable step; then the job is paused."""
    backoff_ms: int = 2_000
    backoff_max_ms: int = 60_000
    keep_checkpoints: int = 3
    drain_margin_ms: int = 10_000
    """Before the budget's edge the drain begins stop_grace + this early."""
    clock_tolerance_ms: int = 1_000
    """A provider may claim so much more wall time than the broker's clock saw."""
    clock_tolerance_ppm: int = 1_000
    """Device time may go so much faster than the broker's clock. A crystal is off by up to 100, one
    that NTP corrects by up to 500, on either side."""
    skew_ms: int = 300_000
    max_checkpoint_bytes: int = 64 * 1024**3
    max_input_bytes: int = 64 * 1024**3
    max_blob_bytes: int = 16 * 1024**2
    max_job_logs: int = 1_000_000
    """Log lines kept of a job; what comes later is dropped."""
    max_job_log_bytes: int = 256 * 1024**2
    """Likewise, their text."""
    late_logs_ms: int = 600_000
    """A run that ended by itself may hand in its last lines for so long, whoever runs since."""
    keep_ended_ms: int = 7 * 86_400_000
    """A job's outputs and last checkpoint are kept so long after it has ended."""
    keep_inputs_ms: int = 7 * 86_400_000
    """What a renter has uploaded is kept so long after it was last uploaded, asked for or used."""
    upload_grace_ms: int = 3_600_000
    """What has been uploaded, or was said to be here, must be named by a document within this."""
    max_renter_bytes: int = 256 * 1024**3
    """Content that a renter may keep here outside of jobs."""
    max_job_bytes: int = 512 * 1024**3
    """Content of one job: inputs, checkpoints and outputs."""
    max_live_jobs: int = 10_000
    """Jobs of one renter that haven't ended."""
    max_new_parties_an_hour: int = 3_600
    """Strangers taken up, as renters and as agents, each."""
    max_renames_an_hour: int = 60
    max_requests_an_hour: int = 100_000
    """Requests of one party that change something."""
    max_offers_an_hour: int = 3_600
    """Of one provider; only its newest one is open."""
    max_reports_an_hour: int = 36_000
    """Checkpoints and receipts of one provider."""
    max_remarks_an_hour: int = 100
    """Events that tell of one agent's wrong documents."""
    max_offer_ms: int = 7 * 86_400_000
    """An offer is open at most so long after it came."""
    image_policy: str = "any"
    """"digest": jobs must name their image by digest. Offers may ask for it on their own."""

    @property
    def patience(self) -> Patience:
        """How often and how slowly attempts are made."""
        return Patience(self.fruitless_limit, self.backoff_ms, self.backoff_max_ms)

    def most_device_ms(self, lease: LeaseFact, stopwatch_ms: int) -> int:
        """Return the device time that can have been used until the stopwatch showed this."""
        return most_device_ms(
            lease,
            stopwatch_ms=stopwatch_ms,
            tolerance_ms=self.clock_tolerance_ms,
            tolerance_ppm=self.clock_tolerance_ppm,
        )


@dataclass(frozen=True)
class Ports:
    """What the broker needs of the world."""

    store: Store
    blobs: BlobStore
    clock: Clock
    entropy: Entropy
    matcher: Matcher
    verifier: Verifier
    key: SigningKey
    settler: Settler | None = None


class Core:
    """Ports, settings and hooks, and the unit of work."""

    def __init__(self, ports: Ports, settings: Settings) -> None:
        self.ports = ports
        self.settings = settings
        self.party = ports.key.party
        self.on_job: Callable[[str], None] | None = None
        self.outbox = Outbox(ports.store)
        self.quotas = Quotas()
        self.pulses = Pulses()
        self.dirty = Dirty()
        self.kept_out = False
        """Something could not be written down, so maybe what an agent said of its runs: supervision
        must not count its silence before it could say that again."""
        self.started_ms = 0
        """When the broker started: deadlines for what it waits for count from here at the least."""

    def work(self) -> AbstractContextManager[Work]:
        """Begin a unit of work; it is committed when the block ends without an exception."""
        return _Unit(self, self.ports.store.transaction(), writes=True)

    def read(self) -> AbstractContextManager[Work]:
        """Begin to read one consistent state; nothing may be written."""
        return _Unit(self, self.ports.store.snapshot(), writes=False)

    def _tell(self, work: Work) -> None:
        if work.moves:
            self.dirty.moved_by = work.token
        for recipient, message in work.notices:
            self.outbox.add_notice(recipient, message)
        for party in work.told_parties:
            if self.outbox.on_new is not None:
                self.outbox.on_new(party)
        for job in work.told_jobs:
            if job and self.on_job is not None:
                self.on_job(job)


class _Unit:
    """A unit of work around its transaction."""

    def __init__(
        self, core: Core, transaction: AbstractContextManager[Transaction], *, writes: bool
    ) -> None:
        self._core = core
        self._transaction = transaction
        self._writes = writes

    def __enter__(self) -> Work:
        core = self._core
        try:
            tx = self._transaction.__enter__()
        except (StorageFull, StoreAway):
            core.kept_out = True
            raise
        work = Work(tx, core.ports.clock, core.ports.key, core.dirty, core.pulses)
        if self._writes:
            tx.after_commit(partial(core._tell, work))
        return work

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        try:
            return self._transaction.__exit__(kind, error, traceback)
        except (StorageFull, StoreAway):
            self._core.kept_out = True
            raise
