"""How this broker works: limits, deadlines, fees."""

from dataclasses import dataclass

from sublet_broker.market.facts import LeaseFact, RunFact
from sublet_broker.market.metering import most_device_ms
from sublet_broker.market.resuming import Patience
from sublet_contracts.tree import MAX_TREE_BYTES


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
    max_checkpoint_bytes: int = MAX_TREE_BYTES
    max_input_bytes: int = 64 * 1024**3
    max_blob_bytes: int = 16 * 1024**2
    max_job_logs: int = 1_000_000
    """Log lines kept of a job; what comes later is dropped."""
    max_job_log_bytes: int = 256 * 1024**2
    """Likewise, their text."""
    late_logs_ms: int = 600_000
    """A run that ended by itself may hand in its last lines for so long, whoever runs since."""
    keep_ended_ms: int = 7 * 86_400_000
    """A job's outputs and checkpoints are kept so long after it has ended."""
    keep_inputs_ms: int = 7 * 86_400_000
    """What a renter has uploaded is kept so long after it was last uploaded, asked for or used."""
    upload_grace_ms: int = 3_600_000
    """What has been uploaded, or was said to be here, must be named by a document within this."""
    upload_open_ms: int = 3_600_000
    """What was given an address must be committed within this after that was last asked for."""
    scrub_every_ms: int = 30 * 86_400_000
    """Each pack is read and hashed once in so long: a thirtieth of them a day."""
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

    def most_device_ms(
        self,
        lease: LeaseFact,
        run: RunFact | None,
        stopwatch_ms: int,
        pull_device_ms: int = 0,
    ) -> int:
        """Return the device time that can have been used until the stopwatch showed this;
        `pull_device_ms` of it is said to come before the run's start."""
        return most_device_ms(
            lease,
            stopwatch_ms=stopwatch_ms,
            tolerance_ms=self.clock_tolerance_ms,
            tolerance_ppm=self.clock_tolerance_ppm,
            pull_device_ms=pull_device_ms,
            preparing_ms=run.preparing_ms if run is not None else 0,
        )
