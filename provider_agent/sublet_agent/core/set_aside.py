"""When a machine takes itself off the market, and when it offers again. Pure. Rules:

1. The starts of FAILS different jobs in a row have failed, with no good start between: it is the
   machine, not the jobs. Nothing is offered from then on, and the owner is told what fails.
2. The machine tests itself by starting something that does nothing, the way a job is started, with
   the offered devices. When that passes it offers again. The first test follows at once, because a
   few odd jobs are no reason to idle; each failed one makes the next wait longer, and so does
   another round of failures after a test that has passed: only a job's good start is believed.
3. The owner's `offer` tries at once.
"""

from dataclasses import dataclass, field

FAILS = 3
FIRST_WAIT_MS = 60_000
MOST_WAIT_MS = 1_800_000


@dataclass
class SetAside:
    """The machine's own judgement of its starts."""

    since_ms: int | None = None
    """since when it is off the market; None: it isn't"""
    why: str = ""
    """what failed last, in the runner's words"""
    next_test_ms: int = 0
    testing: bool = False
    _failed_jobs: list[str] = field(default_factory=list)
    _rounds: int = 0

    @property
    def is_set(self) -> bool:
        """Whether it is off the market."""
        return self.since_ms is not None

    def start_failed(self, job_id: str, detail: str, now_ms: int) -> bool:
        """Count a start that failed. Returns whether the machine is set aside by this one."""
        self.why = detail
        if job_id not in self._failed_jobs:
            self._failed_jobs.append(job_id)
        if self.is_set or len(self._failed_jobs) < FAILS:
            return False
        self._failed_jobs.clear()
        self.since_ms = now_ms
        self._plan(now_ms)
        return True

    def started(self) -> None:
        """A job has started well."""
        self._failed_jobs.clear()
        self._rounds = 0

    def test_is_due(self, now_ms: int) -> bool:
        """Whether a start test is to begin now; it has begun when this returns True."""
        if not self.is_set or self.testing or now_ms < self.next_test_ms:
            return False
        self.testing = True
        return True

    def tested(self, trouble: str, now_ms: int) -> bool:
        """Take a test's outcome, '' for a pass. Returns whether the machine may offer again."""
        self.testing = False
        if not self.is_set:
            return False
        if trouble:
            self.why = trouble
            self._plan(now_ms)
            return False
        self.since_ms = None
        return True

    def try_now(self, now_ms: int) -> None:
        """The owner has mended it, or says so."""
        self._rounds = 0
        if self.is_set:
            self.next_test_ms = now_ms

    def _plan(self, now_ms: int) -> None:
        wait_ms = FIRST_WAIT_MS * 2 ** min(self._rounds - 1, 9) if self._rounds else 0
        self.next_test_ms = now_ms + min(wait_ms, MOST_WAIT_MS)
        self._rounds += 1
