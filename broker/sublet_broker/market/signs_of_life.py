"""Signs of life: what a run's reports say of whether its job moves on.

Rules:
- A step is the job's own word. It has moved when it is another one than before, forwards or back. A
  job tells steps once it has told one that isn't where its run began, or how many there are.
- A sign of life is a step that moved, a checkpoint that became durable, a line of output, and
  computing: a GPU that isn't at 0 %, and of a run without one a twentieth of a core. Where its
  machine can't tell whether it computes, it counts as computing: silence alone is no proof.
- Time counts only as far as the agent has been heard, by the broker's clock, and only while the
  run's own time went on: neither silence nor a machine that holds the run still is the job's.
- A job that tells steps is judged by steps and durable checkpoints alone: it may go on writing and
  computing for ever, as where one worker waits for another. Once it has told its last step, or
  where it tells none, every sign counts.
- What is noted is kept in memory. After a restart of the broker everything counts anew.
"""

from dataclasses import dataclass, replace

from sublet_contracts.wire import RunCadence, RunReport, RunUsage

COMPUTES_CPU_MILLIS = 50


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment: by the broker's clock, and by the run's device time."""

    ms: int
    device_ms: int


@dataclass(frozen=True, slots=True)
class Signs:
    """What is known of one run. Times in ms of the broker's clock."""

    first_ms: int
    """The first report since the broker started: what was before isn't known."""
    heard: Mark
    """The newest report."""
    step: int
    moved: Mark
    """When a step was new, or a checkpoint became durable."""
    alive: Mark
    """When there was any sign of life."""
    tells_steps: bool = False
    last_step_told: bool = False
    longest_step_ms: int = 0
    behind_since_ms: int | None = None
    """Since when it has told steps that lie before the one that its run began with."""
    was_behind: bool = False
    """It has been so before, and has caught up: to fall back again is no news."""
    idle: bool | None = None
    """Whether all its GPUs are at 0 %; None: nothing was measured yet."""
    idle_since_ms: int | None = None
    opened: bool | None = None
    """Whether the job has opened what it was restored from; None: not known."""
    saved_file: str = ""
    """What it seems to save to, where that is no checkpoint."""
    cadence: RunCadence | None = None
    """How often it is asked for a checkpoint, as its agent said last."""


def reported(signs: Signs | None, report: RunReport, start_step: int, now_ms: int) -> Signs:
    """Return what is known after a report of the run's agent."""
    here = Mark(now_ms, report.cum_device_ms)
    usage = report.usage
    if signs is None:
        signs = Signs(now_ms, here, report.step, here, here)
    moved = report.step != signs.step
    behind = report.step < start_step
    idle = signs.idle if usage is None else _idle(usage)
    longest_ms = signs.longest_step_ms
    if moved and signs.tells_steps:
        longest_ms = max(longest_ms, now_ms - signs.moved.ms)
    return replace(
        signs,
        heard=here,
        step=report.step,
        moved=here if moved else signs.moved,
        alive=here if moved or _may_compute(usage) else signs.alive,
        tells_steps=signs.tells_steps or report.step != start_step or report.total_steps > 0,
        last_step_told=0 < report.total_steps <= report.step,
        longest_step_ms=longest_ms,
        behind_since_ms=_since(signs.behind_since_ms, behind, now_ms),
        was_behind=signs.was_behind or (signs.behind_since_ms is not None and not behind),
        idle=idle,
        idle_since_ms=_since(signs.idle_since_ms, idle is True, now_ms),
        opened=True if signs.opened else report.checkpoint_opened,
        saved_file=report.saved_file,
        cadence=report.cadence,
    )


def wrote(signs: Signs, now_ms: int) -> Signs:
    """Return what is known after lines of the run's output came."""
    return replace(signs, alive=Mark(now_ms, signs.heard.device_ms))


def saved(signs: Signs, now_ms: int) -> Signs:
    """Return what is known after one of the run's checkpoints became durable."""
    here = Mark(now_ms, signs.heard.device_ms)
    return replace(signs, moved=here, alive=here)


def returned(signs: Signs, now_ms: int) -> Signs:
    """Return what is known when the run is heard again after a silence: what it wrote meanwhile
    comes only now."""
    return wrote(signs, now_ms)


def judged_by_steps(signs: Signs) -> bool:
    """Say whether only steps and durable checkpoints are signs of this job's life."""
    return signs.tells_steps and not signs.last_step_told


def still_ms(signs: Signs, devices: int) -> int:
    """Return for how long there has been no sign of life."""
    last = signs.moved if judged_by_steps(signs) else signs.alive
    by_clock_ms = signs.heard.ms - last.ms
    by_run_ms = (signs.heard.device_ms - last.device_ms) // max(1, devices)
    return max(0, min(by_clock_ms, by_run_ms))


def _since(before_ms: int | None, holds: bool, now_ms: int) -> int | None:
    if not holds:
        return None
    return now_ms if before_ms is None else before_ms


def _idle(usage: RunUsage) -> bool:
    return bool(usage.devices) and all(d.utilization_percent == 0 for d in usage.devices)


def _may_compute(usage: RunUsage | None) -> bool:
    if usage is None:
        return True
    if usage.devices:
        return not _idle(usage)
    return usage.cpu_millis is None or usage.cpu_millis >= COMPUTES_CPU_MILLIS
