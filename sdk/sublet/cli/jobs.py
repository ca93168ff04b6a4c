"""Commands about jobs that answer at once: ps, inspect, resume."""

import json
import shutil
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sublet.cli.errors import SUCCEEDED
from sublet.cli.parser import Parser, open_client, with_broker, with_job, with_json
from sublet.terminal.cadence_text import cadence_lines
from sublet.terminal.kept import days_left, kept_lines, left_out_lines
from sublet.terminal.next_steps import status_text
from sublet.terminal.text import clip, paint, safe, state, table
from sublet.terminal.warning_text import warning_lines, warning_marks
from sublet_contracts.amounts import (
    format_ago,
    format_bytes,
    format_cores,
    format_credits,
    format_duration,
)
from sublet_contracts.api import CheckpointView, JobView, RunView
from sublet_contracts.documents import Resources
from sublet_contracts.keys import short
from sublet_contracts.reasons import MEANINGS
from sublet_contracts.tree import LeftOut, TreeRefused

if TYPE_CHECKING:
    from sublet.client import Job

_ENDED = frozenset({"succeeded", "failed", "cancelled"})
_MOST_CHECKPOINTS = 1_000
"""that inspect asks for: one answer's"""


def ps(argv: Sequence[str]) -> int:
    """List jobs."""
    parser = with_json(with_broker(Parser("ps", "Your jobs, newest first.")))
    parser.add_argument("-a", "--all", action="store_true", help="also those that have ended")
    parser.add_argument("-q", "--quiet", action="store_true", help="only their ids")
    parser.add_argument("--state", default="", help="only those in this state")
    parser.add_argument("--name", default="", help="only those of this name")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="default: 100")
    options = parser.parse_args(argv)
    with open_client(options) as client:
        page = client.jobs(state=options.state, name=options.name, limit=options.limit)
    every = options.all or options.state or options.name
    shown = [job for job in page.jobs if every or job.state not in _ENDED]
    if options.json:
        print(page.model_copy(update={"jobs": tuple(shown)}).model_dump_json(indent=2))
    elif options.quiet:
        print(*(job.id for job in shown), sep="\n", end="\n" if shown else "")
    elif shown:
        print(_jobs_table(shown, time.time_ns() // 1_000_000))
    else:
        hidden = len(page.jobs)
        print(f"No job is under way ({hidden} ended: sublet ps -a)." if hidden else "No jobs yet.")
    return SUCCEEDED


def _jobs_table(jobs: Sequence[JobView], now_ms: int) -> str:
    rows = []
    for job in jobs:
        run = job.runs[-1] if job.runs else None
        on = run is not None and job.state in ("starting", "running")
        rows.append(
            [
                short(job.id),
                clip(safe(job.name), 15),
                job.state,
                _steps(job),
                format_credits(job.charged_ucr) + " of " + format_credits(job.budget_ucr),
                clip(safe(run.provider_name), 9) if on and run else "-",
                format_ago(job.submitted_ms, now_ms),
            ]
        )
    heads: tuple[str, ...] = ("job", "name", "state", "step", "cost", "on", "age")
    if any(job.warnings for job in jobs):
        heads = (*heads, "warning")
        for row, job in zip(rows, jobs, strict=True):
            row.append(warning_marks(job))
    return table(heads, rows, right=(3,), colour=2)


def _steps(job: JobView) -> str:
    if not job.step and not job.total_steps:
        return "-"
    return f"{job.step}/{job.total_steps}" if job.total_steps else str(job.step)


def inspect(argv: Sequence[str]) -> int:
    """Show a job."""
    parser = with_job(with_json(with_broker(Parser("inspect", "All about a job."))))
    options = parser.parse_args(argv)
    with open_client(options) as client:
        job = client.job(options.job)
        view = job.view()
        saved = job.checkpoints(limit=_MOST_CHECKPOINTS)
        checkpoints = saved.checkpoints
        left_out, left_out_total = _left_out(job)
        origin = job.code_origin()
        if options.json:
            print(_inspect_json(view, checkpoints, left_out, left_out_total))
            return SUCCEEDED
    now_ms = time.time_ns() // 1_000_000
    lines = [
        f"{paint(safe(view.name), 'bold')}  {state(view.state)}: {status_text(view)}",
        "",
        _pair("job", view.id),
        *image_lines(view),
        _pair(
            "command", clip(safe(" ".join(view.command)) or "(the image's own)", _columns() - 12)
        ),
        *([_pair("code", safe(origin.line()))] if origin is not None else []),
        _pair("wants", requirements_text(view.resources)),
        _pair(
            "price",
            f"at most {format_credits(view.max_price_ucr_per_device_hour)} per device-hour",
        ),
        _pair(
            "budget",
            f"{format_credits(view.budget_ucr)}, "
            f"of which {format_credits(view.charged_ucr)} charged, "
            f"{format_credits(view.held_ucr)} held",
        ),
        _pair("submitted", format_ago(view.submitted_ms, now_ms)),
    ]
    kept = kept_lines(view, checkpoints, now_ms)
    lines += [_pair("" if number else "kept", line) for number, line in enumerate(kept)]
    if view.step or view.total_steps:
        metrics = "".join(f", {safe(k)} {v:.4g}" for k, v in sorted(view.metrics.items()))
        lines.append(_pair("step", f"{_steps(view)} (durable: {view.durable_step}){metrics}"))
    lines += [
        _pair("" if number else "saving", text)
        for number, text in enumerate([*cadence_lines(view), *stall_lines(view.runs)])
    ]
    lines += [_pair("warning", text) for text in warning_lines(view)]
    if view.recoveries:
        lost = format_duration(view.lost_device_ms)
        lines.append(_pair("recovered", f"{_times(view.recoveries)}, {lost} of work lost"))
    if view.runs:
        lines += ["", _runs_table(view.runs)]
        lines += _endings(view.runs)
    if checkpoints:
        rows = [
            [
                str(c.step),
                c.kind,
                c.state,
                format_bytes(c.total_bytes),
                format_ago(c.created_ms, now_ms),
            ]
            for c in checkpoints[:5]
        ]
        lines += ["", table(("step", "kind", "state", "size", "made"), rows, right=(0, 3))]
        more = saved.total - len(rows)
        lines += [f"{more} more: sublet checkpoints {short(view.id)}"] if more else []
    if left_out_total:
        lines += ["", f"Left out of its outputs, which could not be carried: {left_out_total}"]
        lines += left_out_lines(left_out, left_out_total)
    if view.outputs_index_digest:
        lines += ["", f"Its outputs: sublet download {short(view.id)}"]
    elif view.partial_outputs_index_digest:
        lines += ["", f"What a run had written: sublet download {short(view.id)}"]
    print("\n".join(lines))
    return SUCCEEDED


def _left_out(job: "Job") -> tuple[Sequence[LeftOut], int]:
    """What its outputs lack. Where they are no longer kept nobody knows."""
    from sublet.errors import SubletError

    try:
        return job.left_out()
    except (SubletError, TreeRefused):
        return (), 0


def _inspect_json(
    view: JobView, checkpoints: Sequence[CheckpointView], left_out: Sequence[LeftOut], total: int
) -> str:
    now_ms = time.time_ns() // 1_000_000
    until_ms = view.kept_until_ms
    return json.dumps(
        {
            **view.model_dump(mode="json"),
            "kept_days_left": None if until_ms is None else days_left(until_ms, now_ms),
            "checkpoints": [c.model_dump(mode="json") for c in checkpoints],
            "left_out": [entry.model_dump(mode="json") for entry in left_out],
            "left_out_total": total,
        },
        indent=2,
    )


def requirements_text(need: Resources) -> str:
    """Return what a job needs, in a line."""
    device = need.device_name or need.device_kind.upper().replace("ANY", "device")
    parts = [f"{need.devices}x {safe(device)}"]
    if need.device_memory_bytes:
        parts[0] += f" of {format_bytes(need.device_memory_bytes)}"
    parts += [format_cores(need.cpu_millis)] if need.cpu_millis else []
    parts.append(f"{format_bytes(need.memory_bytes)} memory")
    parts.append(f"{format_bytes(need.disk_bytes)} disk")
    parts += [f"class {safe(need.hardware_class)}"] if need.hardware_class else []
    parts += [f"region {safe(need.region)}"] if need.region else []
    parts += ["network"] if need.egress else []
    parts += [f"as user {safe(need.user)}"] if need.user else []
    return ", ".join(parts)


def stall_lines(runs: Sequence[RunView]) -> list[str]:
    """Return for how long saving holds the run under way, if its job says so."""
    stall = runs[-1].stall if runs else None
    if stall is None:
        return []
    saves = "save" if stall.saves == 1 else "saves"
    return [
        f"stall per save {stall.stall_per_save_ms / 1000:.3g} s "
        f"(the last one {stall.last_stall_ms / 1000:.3g} s, written in "
        f"{stall.last_write_ms / 1000:.3g} s), {stall.saves} {saves}: "
        f"{stall.stall_share_ppm / 10_000:.2g} % of its time"
    ]


def _runs_table(runs: Sequence[RunView]) -> str:
    rows = [
        [
            str(run.epoch),
            clip(safe(run.provider_name) or short(run.provider), 14),
            format_credits(run.price_ucr_per_device_hour),
            f"{run.start_step}→{run.step}",
            format_duration(run.cum_device_ms),
            format_credits(run.charge_ucr),
            run.reason or run.run_state,
        ]
        for run in runs
    ]
    heads = ("run", "provider", "price/h", "steps", "time", "charge", "now")
    return table(heads, rows, right=(0, 2, 3, 4, 5))


def _endings(runs: Sequence[RunView]) -> list[str]:
    return [
        paint(f"  run {run.epoch}: {MEANINGS[run.reason].says}", "dim")
        + (f" ({safe(run.detail)})" if run.detail else "")
        for run in runs
        if run.reason is not None
    ]


def image_lines(view: JobView) -> list[str]:
    """Return which image a job named, and what it meant: that one whole, to be compared by."""
    lines = [_pair("image", clip(safe(view.image), _columns() - 12))]
    return lines + ([_pair("pinned to", safe(view.image_pinned))] if view.image_pinned else [])


def _pair(name: str, value: str) -> str:
    return f"{paint(name.ljust(10), 'dim')} {value}"


def _columns() -> int:
    return shutil.get_terminal_size().columns


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def resume(argv: Sequence[str]) -> int:
    """Resume a job."""
    parser = with_job(
        with_json(with_broker(Parser("resume", "Go on with a paused job, from where it was.")))
    )
    parser.add_argument("--budget", metavar="CREDITS", help="its new budget, in all")
    options = parser.parse_args(argv)
    with open_client(options) as client:
        show_change(client.job(options.job).resume(budget=options.budget), options.json)
    return SUCCEEDED


def show_change(view: JobView, as_json: bool) -> None:
    """Print how a job stands after a command."""
    if as_json:
        print(view.model_dump_json())
    else:
        print(f"{safe(view.name)} ({short(view.id)}): {state(view.state)}, {status_text(view)}")
