"""What the broker's REST API takes and returns. All but four calls are signed (see auth.py).

    GET  /v1/broker                      BrokerInfo                      (unsigned)
    GET  /healthz                                                        (unsigned)
    GET  /readyz                                                         (unsigned)
    GET  /metrics                                                        (unsigned)
    POST /v1/keys             SignedRequest(key)      -> PartyView       introduces a party
    GET  /v1/offers?kind=&region=                     -> OffersPage
    POST /v1/offers/match     MatchRequest            -> MatchView       what would this job get?
    PUT  /v1/blobs/{digest}   bytes                   -> 204             the renter's own inputs
    PUT  /v1/packs/{pack}     bytes (packs.py)        -> 204             many chunks of them
    POST /v1/packs/{pack}/address AddressRequest      -> Envelope        where to (addresses.py)
    POST /v1/packs/{pack}/commit  CommitRequest       -> 204             when they have been
    POST /v1/blobs/missing    MissingRequest          -> MissingView
    POST /v1/jobs             SignedRequest(job)      -> JobView         201; holds the budget
    GET  /v1/jobs?state=&name=&limit=                 -> JobsPage
    GET  /v1/jobs/{job}                               -> JobView         id, or its first 8+ digits
    POST /v1/jobs/{job}/cancel                        -> JobView
    POST /v1/jobs/{job}/pause                         -> JobView
    POST /v1/jobs/{job}/resume  ResumeRequest         -> JobView         with an amendment, if any
    GET  /v1/jobs/{job}/events?after=                 -> EventsPage
    GET  /v1/jobs/{job}/logs?after=&follow=&tail=&since_ms=&run=&unfinished= -> NDJSON of JobLogLine
    GET  /v1/jobs/{job}/checkpoints?kind=&before_ms=&limit= -> CheckpointsPage
    GET  /v1/jobs/{job}/statement                     -> StatementView
    GET  /v1/jobs/{job}/export                        -> Export (export.py)
    GET  /v1/jobs/{job}/receipts?unsigned=true        -> ReceiptsPage    to countersign
    POST /v1/receipts/{receipt}/signature SignedRequest(receipt) -> 204
    PUT  /v1/jobs/{job}/blobs/{digest} bytes          -> 204             renter, or lease holder
    PUT  /v1/jobs/{job}/packs/{pack}   bytes          -> 204             likewise
    GET  /v1/jobs/{job}/blobs/{digest}                -> bytes           and its successor
    GET  /v1/jobs/{job}/chunks/{hashes}               -> bytes           many, one after another
    POST /v1/jobs/{job}/packs/{pack}/address AddressRequest -> Envelope  renter, or lease holder
    POST /v1/jobs/{job}/packs/{pack}/commit  CommitRequest  -> 204       likewise
    GET  /v1/jobs/{job}/addresses/{hashes}            -> Envelope        where to read chunks
    POST /v1/jobs/{job}/blobs/missing MissingRequest  -> MissingView     holder: header Sublet-Epoch
    GET  /v1/balance                                  -> BalanceView
    GET  /v1/log?since=                               -> LogView         the log only ever grows
    GET  /v1/earnings                                 -> EarningsView
    POST /v1/deposits         SignedRequest(deposit)  -> BalanceView     the operator's key only
    WS   /v1/agent                                                       the session of session.py

Errors are RFC 9457 problem+json (Problem). A POST with an Idempotency-Key may be sent again: same
body, same answer; another body, 409. Unknown fields in an answer are ignored by the client, so
that a broker may be newer than it.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from sublet_contracts.documents import Device, Resources
from sublet_contracts.envelope import Envelope
from sublet_contracts.fields import Digest
from sublet_contracts.packs import MAX_TABLE_BYTES
from sublet_contracts.problems import FactValue
from sublet_contracts.reasons import Fault, Reason
from sublet_contracts.requirements import Shortfall
from sublet_contracts.states import CheckpointState, JobState, LeaseState, RunState


class View(BaseModel):
    """An answer."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Body(BaseModel):
    """A request's body: nothing in it goes unread."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Problem(View):
    """RFC 9457, with `code`, `field` and `facts` besides; problems.py lists the codes and their
    facts. What to do about it is not the broker's to say: a client knows its own commands."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str = Field(description="which refusal, stable, for programs; a newer broker has more")
    field: str = Field(default="", description="what in the request is wrong")
    facts: dict[str, FactValue] = Field(
        default_factory=dict, description="what it rests on, for programs; by the code"
    )


class BrokerInfo(View):
    """Who the broker is and how it works."""

    broker: str = Field(description="its party id; pinned by clients on first use")
    version: str
    time_ms: int
    fee_bps: int
    heartbeat_ms: int
    image_policy: str
    max_blob_bytes: int
    receipt_acceptance: str = "cumulative"


class SignedRequest(Body):
    """A signed document."""

    envelope: Envelope


class PartyView(View):
    """A party the broker knows."""

    party: str
    name: str
    since_ms: int


class OfferView(View):
    """An offer on the market."""

    id: str
    provider: str
    name: str
    devices: tuple[Device, ...]
    free_devices: int
    price_ucr_per_device_hour: int
    cpu_millis: int
    memory_bytes: int
    disk_bytes: int
    region: str
    runner: str
    egress: bool
    expires_ms: int


class OffersPage(View):
    """Offers, cheapest first."""

    offers: tuple[OfferView, ...]


class MatchRequest(Body):
    """A job as it would be signed, in the parts that matter for matching."""

    resources: Resources
    max_price_ucr_per_device_hour: int = Field(ge=0)
    image: str = ""
    budget_ucr: int = Field(default=0, ge=0)


class MatchView(View):
    """The matching offers; where there is none, which constraint fails and what to relax."""

    offers: tuple[OfferView, ...]
    considered: int
    failures: dict[str, int] = Field(description="constraint -> offers that fail on it")
    waiting: int = Field(
        default=0, description="jobs in line before it, for the same kind of device"
    )
    relax: tuple[Shortfall, ...] = Field(
        default=(),
        description="all that the offer lacks that is nearest to fitting, hardest to change first",
    )
    least_budget_ucr: int = Field(
        default=0,
        description="what the budget must be at least, if the one asked is less; else 0",
    )


class MissingRequest(Body):
    """Chunks one would like to upload."""

    digests: tuple[Digest, ...] = Field(max_length=10_000)


class MissingView(View):
    """Those that must be uploaded."""

    missing: tuple[str, ...]
    by_address: bool = Field(
        default=False, description="packs of them are put where /address says, and then committed"
    )


class AddressRequest(Body):
    """A pack that is to be uploaded past the broker."""

    table: str = Field(max_length=4 * (MAX_TABLE_BYTES + 2) // 3, description="base64")
    body_sha256: str = Field(
        pattern="^[0-9a-f]{64}$", description="SHA-256 of the chunks, one after another"
    )


class CommitRequest(Body):
    """A pack that has been put where an address said."""

    pack: str = Field(pattern="^[0-9a-f]{64}$", description="its id, as the address had it")


class ResumeRequest(Body):
    """Resume a paused job, perhaps with a larger budget."""

    amendment: Envelope | None = None


class DeviceUsageView(View):
    """How busy one GPU of a run is; null: its driver doesn't tell."""

    id: str
    utilization_percent: int | None = None
    memory_used_bytes: int | None = None
    memory_bytes: int | None = None


class RunUploadView(View):
    """What of a run is on its way to the broker, as its agent said last."""

    measured_ms: int = Field(description="when, by the broker's clock")
    kind: str = Field(description="checkpoint, outputs, partial-outputs")
    step: int
    total_bytes: int
    there_bytes: int = Field(description="of them, what is at the broker: sent, or there before")
    sent_bytes: int = Field(description="of them, what was sent")
    bytes_per_s: int = Field(description="how fast it was sent lately; 0: nothing was")
    left_ms: int | None = Field(
        description="how long the rest takes at that speed, at the most: of it too some may be "
        "there already; null: nothing moves"
    )


class RunUsageView(View):
    """What a run uses of its machine, as its agent said last; null: it can't be measured there."""

    measured_ms: int = Field(description="when, by the broker's clock")
    cpu_millis: int | None = Field(default=None, description="thousandths of a core")
    memory_bytes: int | None = None
    peak_memory_bytes: int | None = None
    memory_limit_bytes: int | None = None
    disk_bytes: int | None = None
    disk_limit_bytes: int | None = None
    devices: tuple[DeviceUsageView, ...] = ()


class RunStallView(View):
    """For how long saving has held a run's loop, as its job says in its newest checkpoint."""

    saves: int
    all_stall_ms: int = Field(description="of all saves, from the call to its return")
    stall_per_save_ms: int = Field(description="on average")
    stall_share_ppm: int = Field(description="of the time that the run has taken, in millionths")
    last_stall_ms: int
    last_write_ms: int = Field(description="how long the newest took to be written")


class RunCadenceView(View):
    """How often a run is asked for a checkpoint, and the most that a loss of its machine costs."""

    interval_ms: int
    auto: bool = Field(description="whether the agent chooses it")
    rests_on: str = Field(
        description="job, first, measured, link, least or most; a newer agent may know others"
    )
    cost_ms: int = Field(description="what a checkpoint costs the run; 0: not known yet")
    durable_after_ms: int = Field(
        description="how old a checkpoint is when it is durable; 0: not known yet"
    )
    unanswered_ms: int = Field(description="for how long one has been asked for and none came")
    most_lost_ms: int = Field(
        description="the most work that a loss costs: by what was measured, and never less than "
        "what is not durable now"
    )
    most_lost_ucr: int = Field(
        description="what that work costs; nothing where the machine is at fault"
    )


class RunView(View):
    """One lease of a job and the run under it."""

    lease: str
    epoch: int
    offer: str
    provider: str
    provider_name: str
    device_ids: tuple[str, ...]
    hardware_class: str
    price_ucr_per_device_hour: int
    lease_state: LeaseState
    run_state: RunState
    reason: Reason | None
    fault: Fault | None
    detail: str
    start_step: int
    step: int
    total_steps: int
    metrics: dict[str, float]
    durable_step: int
    cum_device_ms: int
    payable_device_ms: int
    charge_ucr: int = Field(description="so far; final once the lease is settled")
    started_ms: int
    last_seen_ms: int
    ended_ms: int | None
    upload: RunUploadView | None = Field(
        default=None, description="what is on its way to the broker; null: nothing"
    )
    usage: RunUsageView | None = Field(
        default=None, description="while it runs; null: nothing was measured yet"
    )
    stall: RunStallView | None = Field(
        default=None, description="while it runs; null: its job has not said so"
    )
    cadence: RunCadenceView | None = Field(
        default=None, description="while it runs; null: its agent has not said so"
    )


class WarningView(View):
    """Something that will hurt, said while the job goes on. job_warnings.py has the codes, their
    facts and the words; what to do about it is the client's to say."""

    code: str = Field(description="which, stable, for programs; a newer broker has more")
    since_ms: int
    epoch: int
    says: str = Field(description="in words")
    facts: dict[str, int] = Field(description="what it rests on now; the unit stands in the name")
    about: str = Field(
        default="",
        description="nothing_saved: the file that the job seems to save its state to; a guess",
    )


class NextStep(StrEnum):
    """What a job waits for its renter to do. The words, with the commands, are the client's."""

    NONE = "none"
    DOWNLOAD_OUTPUTS = "download_outputs"
    DOWNLOAD_PARTIAL_OUTPUTS = "download_partial_outputs"
    """It ended without finishing; what its last run had written is there."""
    SIGN_RECEIPTS = "sign_receipts"
    """Its charges wait for the renter's signature; after that it can be resumed."""
    RAISE_BUDGET = "raise_budget"
    READ_LOGS = "read_logs"
    """It made no progress: its logs should say why; then it can be resumed."""
    RESUME = "resume"


class JobView(View):
    """A job as its renter sees it."""

    id: str
    name: str
    renter: str
    state: JobState
    reason: Reason | None
    says: str = Field(description="the state in words")
    place_in_line: int | None = Field(
        default=None,
        description="from 1, among the jobs that wait for the same kind of device; null: it "
        "doesn't wait, or that isn't known yet",
    )
    next_step: Annotated[NextStep | str, Field(union_mode="left_to_right")] = Field(
        default=NextStep.NONE, description="what it waits for; a newer broker may know others"
    )
    image: str
    image_pinned: str = Field(
        default="",
        description="what its tag meant when it first ran, by content: each run uses that; '': "
        "it has not run, has no tag, or its runner uses no image",
    )
    command: tuple[str, ...]
    resources: Resources
    max_price_ucr_per_device_hour: int
    budget_ucr: int
    held_ucr: int
    charged_ucr: int = Field(description="settled, plus what the running lease would charge now")
    settled_ucr: int
    submitted_ms: int
    started_ms: int | None
    ended_ms: int | None
    step: int
    total_steps: int
    metrics: dict[str, float]
    durable_step: int
    durable_ms: int | None = Field(
        default=None, description="when the checkpoint that a resume starts from became durable"
    )
    unsaved_device_ms: int = Field(
        default=0,
        description="device time of the run under way since its newest durable checkpoint",
    )
    unsaved_ucr: int = Field(default=0, description="what that time costs")
    warnings: tuple[WarningView, ...] = Field(
        default=(), description="of the run under way, oldest first"
    )
    recoveries: int
    lost_device_ms: int
    outputs: str | None = Field(description="document id of the outputs, once they are durable")
    outputs_index_digest: str | None
    partial_outputs: str | None = Field(
        default=None,
        description="document id of what a run had written that ended without finishing, the "
        "newest that is kept",
    )
    partial_outputs_index_digest: str | None = None
    kept_until_ms: int | None = Field(
        default=None,
        description="when outputs and checkpoints are let go; null: not before the job has ended",
    )
    document: Envelope
    runs: tuple[RunView, ...] = Field(description="in order of epochs")


class JobsPage(View):
    """Jobs, newest first."""

    jobs: tuple[JobView, ...]


class EventView(View):
    """One entry of the append-only history."""

    id: int
    time_ms: int
    job: str
    lease: str | None
    epoch: int
    kind: str = Field(description="job, run, order, lease, checkpoint, receipt, warning, money")
    before: str
    after: str
    reason: Reason | None
    detail: str


class EventsPage(View):
    """Events in order, from `after` on."""

    events: tuple[EventView, ...]
    next_after: int


class JobLogLine(View):
    """One line of a job's output. `cursor` rises over all of the job's leases."""

    cursor: int
    epoch: int
    number: int
    time_ms: int
    stream: str
    text: str
    unfinished: bool = Field(
        default=False,
        description="how a line stands that the job is still writing, such as a progress bar: the "
        "next state of its stream, or the finished line, takes its place; `cursor` is the line's "
        "before it",
    )


class CheckpointView(View):
    """One checkpoint of a job, or its outputs."""

    id: str
    kind: str = Field(description="checkpoint, outputs, partial-outputs")
    step: int
    epoch: int = Field(description="the run's that made it")
    provider: str = Field(description="whose machine that run was on")
    provider_name: str
    state: CheckpointState
    index_digest: str
    total_bytes: int
    sent_bytes: int = Field(
        description="what was sent for it, by the agent's word: the rest was here already"
    )
    stall_ms: int | None = Field(
        description="for how long saving it held the job's loop, as the job says; null: it doesn't"
    )
    created_ms: int = Field(description="when all of it was here")
    durable_ms: int | None
    durable_after_ms: int | None = Field(
        description="from when it was whole on the provider's disk, by the agent's word, until it "
        "was durable; null: it never was. What a broken connection kept back of the agent's word "
        "is not in it"
    )
    detail: str
    kept: bool = Field(default=True, description="whether its content is still here")
    kept_until_ms: int | None = Field(
        default=None,
        description="when it is let go; null: while the job hasn't ended, by newer ones alone",
    )


class CheckpointsPage(View):
    """Checkpoints, newest first: so many of them, or all."""

    checkpoints: tuple[CheckpointView, ...]
    next_before_ms: int | None = Field(
        default=None, description="asks for those before these; null: there are none"
    )
    total: int = Field(description="how many there are of the kind that was asked for")
    resumes_from: CheckpointView | None = Field(
        description="where the job would go on from now; null: from the start, or it has ended"
    )


class ReceiptsPage(View):
    """Receipts of a job, oldest first."""

    receipts: tuple[Envelope, ...]
    leases: dict[str, Envelope] = Field(description="the leases they belong to, by id")


class Charge(View):
    """One line of a statement."""

    time_ms: int
    lease: str
    epoch: int
    provider: str
    price_ucr_per_device_hour: int
    reason: Reason
    fault: Fault
    cum_device_ms: int
    payable_device_ms: int
    lost_device_ms: int
    charged_ucr: int
    fee_ucr: int
    receipt: str | None
    settlement: str
    accepted_by: str


class StatementView(View):
    """Every charge of a job with the receipt it rests on."""

    job: str
    name: str
    state: JobState
    budget_ucr: int
    held_ucr: int
    charged_ucr: int
    released_ucr: int
    lost_work_charged_ucr: int = Field(description="always 0 where the provider was at fault")
    charges: tuple[Charge, ...]


class LedgerLine(View):
    """One transfer as an account's owner sees it."""

    time_ms: int
    account: str
    amount_ucr: int = Field(description="positive: credited")
    cites: str
    memo: str


class BalanceView(View):
    """A party's account."""

    party: str
    available_ucr: int
    held_ucr: int
    earned_ucr: int
    lines: tuple[LedgerLine, ...] = ()


class LogView(View):
    """The broker's log as it stands, and that it begins with what was seen of it before."""

    tree_head: Envelope
    consistency: tuple[str, ...] = Field(
        description="RFC 6962 proof from the size asked for; empty where the log is shorter"
    )


class EarningsView(View):
    """What a provider has earned."""

    party: str
    earned_ucr: int
    pending_ucr: int
    charges: tuple[Charge, ...]
