"""What the use-cases share: ports, settings, and the few acts that several of them do."""

from collections.abc import Callable
from dataclasses import dataclass

from sublet_contracts.keys import SigningKey

from sublet_broker.service.outbox import Outbox
from sublet_broker.service.ports import BlobStore, Clock, Entropy, Matcher, Store, Verifier


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
    skew_ms: int = 300_000
    max_checkpoint_bytes: int = 64 * 1024**3
    max_input_bytes: int = 64 * 1024**3
    max_blob_bytes: int = 16 * 1024**2
    max_job_logs: int = 1_000_000
    """Log lines kept of a job; later ones are dropped and the log says so."""
    image_policy: str = "any"
    """"digest": jobs must name their image by digest. Offers may ask for it on their own."""


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


class Core:
    """Ports, settings and hooks, and what several use-cases do alike."""

    def __init__(self, ports: Ports, settings: Settings) -> None:
        self.ports = ports
        self.settings = settings
        self.on_job: Callable[[str], None] | None = None
        self.outbox = Outbox(ports.store, ports.clock)
