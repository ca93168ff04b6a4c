"""Checkpointing: which saved state counts, and which one a job resumes from.

Rules:
- A checkpoint is admitted only from the holder of the job's epoch, for a step that isn't behind the
  lease's start and after which a folder's name can say another, made with the image that the job is
  pinned to, within the size that the broker takes. It counts once the verifier has seen each chunk;
  if its lease has been closed meanwhile it never counts. What only the renter reads is the
  exception, for the lease was active when it was admitted, and nothing rests on it: partial outputs
  count however late they are verified, outputs where their lease was closed as succeeded.
- A job resumes from the newest durable checkpoint: highest step, then newest epoch. One that turns
  out to be damaged is quarantined, and the one before it is used.
- The newest few are kept, all outputs, and the newest partial outputs; the content of older ones is
  pruned. Their documents stay, because receipts rest on them.
- A job that has ended keeps what it had then for a while; then nothing.
- Partial outputs are what a run had written that didn't finish. No job resumes from them, no
  receipt rests on them, and they take the place of none but older partial outputs.
- Outputs are what a finished run hands over. They are the job's only once its lease was closed as
  succeeded, which pays all of its time. Until then they may be anything: no receipt rests on them,
  nothing is pinned by them, and the outputs of a run that ends otherwise are nobody's.
- One checkpoint that can't be restored by one provider proves nothing: it is verified again. If two
  leases in a row fail on it, it is quarantined whatever the verifier says.
"""

from collections.abc import Iterable
from dataclasses import replace

from sublet_broker.market.facts import CheckpointFact, JobFact, LeaseFact
from sublet_contracts.checkpoint_layouts import MAX_STEP
from sublet_contracts.documents import Checkpoint, CheckpointKind, Job
from sublet_contracts.reasons import Reason
from sublet_contracts.states import CHECKPOINT, CheckpointState, LeaseState, step


def why_refused(
    document: Checkpoint, lease: LeaseFact, *, image: str, max_bytes: int, most_device_ms: int
) -> str | None:
    """Say why a checkpoint of the epoch's holder is refused; None: it is admitted."""
    if document.lease != lease.id or document.job != lease.job:
        return "it names another lease"
    if document.image != image:
        return f"it was made with {document.image or 'no image'}, the job's is {image or 'none'}"
    if document.total_bytes > max_bytes:
        return f"{document.total_bytes} bytes; at most {max_bytes} are taken"
    if document.kind == "checkpoint" and document.step < lease.start_step:
        return f"step {document.step} lies before step {lease.start_step}, where the lease began"
    if document.kind == "checkpoint" and document.step >= MAX_STEP:
        return f"step {document.step}: a job could save nothing after it; at most {MAX_STEP - 1}"
    if document.cum_device_ms > most_device_ms:
        return "it claims more device time than has passed since the lease was made"
    return None


def still_counts(fact: CheckpointFact, lease: LeaseFact, job: JobFact) -> bool:
    """Say whether an uploaded checkpoint counts, if it is whole, for all that became of its lease
    since it was admitted."""
    if fact.kind == "partial-outputs":
        return True
    if fact.kind == "outputs" and lease.state is LeaseState.CLOSED:
        return lease.reason is Reason.SUCCEEDED
    return lease.state is LeaseState.ACTIVE and lease.epoch == job.epoch


def judged(
    fact: CheckpointFact, *, ok: bool, current: bool, detail: str, now_ms: int
) -> CheckpointFact:
    """Return an uploaded checkpoint as the verifier judged it. `current`: it still counts."""
    if ok and current:
        return replace(
            fact,
            state=step(CHECKPOINT, fact.state, CheckpointState.DURABLE),
            durable_ms=now_ms,
            detail="",
        )
    why = detail if not ok else "its lease was closed before it was verified"
    return replace(
        fact, state=step(CHECKPOINT, fact.state, CheckpointState.REJECTED), detail=why[:1024]
    )


def quarantined(fact: CheckpointFact, detail: str) -> CheckpointFact:
    """Return a durable checkpoint as damaged."""
    return replace(
        fact, state=step(CHECKPOINT, fact.state, CheckpointState.QUARANTINED), detail=detail[:1024]
    )


def _age(fact: CheckpointFact) -> tuple[int, int, int, str]:
    return (fact.step, fact.epoch, fact.created_ms, fact.id)


def resume_point(checkpoints: Iterable[CheckpointFact]) -> CheckpointFact | None:
    """Return the checkpoint from which the job goes on; None: from the start."""
    return max(_kept(checkpoints, "checkpoint"), key=_age, default=None)


def handed_over(checkpoints: Iterable[CheckpointFact]) -> CheckpointFact | None:
    """Return the outputs among what a lease has made; None: they aren't here."""
    return max(_kept(checkpoints, "outputs"), key=_run_age, default=None)


def newest_partial_outputs(checkpoints: Iterable[CheckpointFact]) -> CheckpointFact | None:
    """Return the partial outputs that a job has: those of its newest run that left any."""
    return max(_kept(checkpoints, "partial-outputs"), key=_run_age, default=None)


def superseded(checkpoints: Iterable[CheckpointFact], keep: int) -> list[CheckpointFact]:
    """Return the durable checkpoints and partial outputs whose content is no longer kept, oldest
    first."""
    every = list(checkpoints)
    durable = sorted(_kept(every, "checkpoint"), key=_age)
    partial = sorted(_kept(every, "partial-outputs"), key=_run_age)
    return [*durable[: max(0, len(durable) - keep)], *partial[:-1]]


def _kept(checkpoints: Iterable[CheckpointFact], kind: CheckpointKind) -> list[CheckpointFact]:
    durable = CheckpointState.DURABLE
    return [c for c in checkpoints if c.kind == kind and c.state is durable and c.kept]


def _run_age(fact: CheckpointFact) -> tuple[int, int, str]:
    """Partial outputs go by their run, not by a step that the run came to."""
    return (fact.epoch, fact.created_ms, fact.id)


def kept_until_ms(job: JobFact, *, keep_ended_ms: int) -> int | None:
    """Return until when the content of a job is kept; None: as long as it hasn't ended."""
    return None if job.ended_ms is None else job.ended_ms + keep_ended_ms


def needed(
    job: JobFact,
    document: Job,
    checkpoints: Iterable[CheckpointFact],
    *,
    now_ms: int,
    keep_ended_ms: int,
) -> tuple[list[CheckpointFact], list[str]]:
    """Return the checkpoints and outputs whose content a job needs, and the indexes of all trees
    that it needs."""
    usable = (CheckpointState.UPLOADED, CheckpointState.DURABLE)
    there = [c for c in checkpoints if c.kept and c.state in usable]
    if job.ended_ms is None:
        inputs = [entry.index_digest for entry in document.inputs]
        return there, [*inputs, *(c.index_digest for c in there)]
    until_ms = kept_until_ms(job, keep_ended_ms=keep_ended_ms)
    if until_ms is not None and now_ms >= until_ms:
        return [], []
    return there, [c.index_digest for c in there]


def failed_twice(start: str, leases: Iterable[LeaseFact]) -> bool:
    """Say whether two leases have failed to restore the same checkpoint."""
    failed = [
        lease
        for lease in leases
        if lease.start_checkpoint == start and lease.reason is Reason.RESTORE_FAILED
    ]
    return len({lease.provider for lease in failed}) >= 2 or len(failed) >= 2
