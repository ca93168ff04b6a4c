"""`sublet top`: what a job's run uses of its machine, again and again or once."""

import json
import sys
import time
from collections.abc import Sequence

from sublet.cli.errors import SUCCEEDED, exit_code
from sublet.cli.parser import Parser, open_client, with_broker, with_job, with_json
from sublet.terminal.next_steps import status_text
from sublet.terminal.text import clip, paint, safe, state, table
from sublet.terminal.uploads import upload_text
from sublet_contracts.amounts import format_bytes, format_cores, format_duration
from sublet_contracts.api import DeviceUsageView, JobView, RunUsageView, RunView
from sublet_contracts.keys import short
from sublet_contracts.states import JOB, JobState, RunState, is_terminal

_EVERY_S = 2.0
_OVER = (RunState.EXITED, RunState.LOST)
_HEADS = ("run", "on", "gpu", "gpu memory", "cpu", "memory", "peak", "disk", "age")


def top(argv: Sequence[str]) -> int:
    """Show what a job uses."""
    parser = with_job(
        with_json(
            with_broker(
                Parser(
                    "top",
                    "What a job's run uses of its machine (GPU, cores, memory, disk), and what of\n"
                    "it is on its way to the broker.\n"
                    "On a terminal it is drawn anew until the job ends; Ctrl-C leaves.",
                )
            ),
            "the newest figures as one JSON document, then leave",
        )
    )
    parser.add_argument("--once", action="store_true", help="the newest figures, then leave")
    options = parser.parse_args(argv)
    with open_client(options) as client:
        job = client.job(options.job)
        view = job.view()
        if options.json:
            print(json.dumps(figures(view), indent=2))
            return SUCCEEDED
        if options.once or not sys.stdout.isatty():
            print(picture(view, _now_ms()))
            return SUCCEEDED
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        with Live(console=Console(highlight=False), auto_refresh=False) as live:
            while True:
                live.update(Text.from_ansi(picture(view, _now_ms())), refresh=True)
                if is_terminal(JOB, view.state) or view.state is JobState.PAUSED:
                    return exit_code(view.state)
                time.sleep(_EVERY_S)
                view = job.view()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def current_run(view: JobView) -> RunView | None:
    """Return the run that is under way, if one is."""
    run = view.runs[-1] if view.runs else None
    return run if run is not None and run.run_state not in _OVER else None


def figures(view: JobView) -> dict[str, object]:
    """Return what is known, for programs; null: it isn't."""
    run = current_run(view)
    usage = run.usage if run is not None else None
    upload = run.upload if run is not None else None
    return {
        "job": view.id,
        "name": view.name,
        "state": view.state,
        "run": run.epoch if run is not None else None,
        "provider": run.provider if run is not None else None,
        "provider_name": run.provider_name if run is not None else None,
        "usage": usage.model_dump(mode="json") if usage is not None else None,
        "upload": upload.model_dump(mode="json") if upload is not None else None,
    }


def picture(view: JobView, now_ms: int) -> str:
    """Return what is known, for people."""
    head = f"{paint(safe(view.name), 'bold')} ({short(view.id)})  {state(view.state)}"
    head += f": {status_text(view)}"
    run = current_run(view)
    if run is None:
        return f"{head}\n\nNo run is under way, so nothing is used."
    upload = f"\n\n{upload_text(run.upload, now_ms)}" if run.upload is not None else ""
    if run.usage is None:
        says = f"Run {run.epoch} has told no figures yet; they come every few seconds."
        return f"{head}\n\n{says}{upload}"
    shown = table(_HEADS, _rows(run, run.usage, now_ms), right=(0, 2, 4, 6, 8))
    return f"{head}\n\n{shown}{upload}"


def _rows(run: RunView, usage: RunUsageView, now_ms: int) -> list[list[str]]:
    """Return a row for the run and its first GPU, and one for each further GPU."""
    gpus = [_gpu(device) for device in usage.devices] or [("-", "-")]
    age_ms = max(0, now_ms - usage.measured_ms)
    first = [
        str(run.epoch),
        clip(safe(run.provider_name) or short(run.provider), 14),
        *gpus[0],
        "-" if usage.cpu_millis is None else format_cores(usage.cpu_millis),
        _of(usage.memory_bytes, usage.memory_limit_bytes),
        _size(usage.peak_memory_bytes),
        _of(usage.disk_bytes, usage.disk_limit_bytes),
        format_duration(age_ms),
    ]
    return [first, *(["", "", *gpu, "", "", "", "", ""] for gpu in gpus[1:])]


def _gpu(device: DeviceUsageView) -> tuple[str, str]:
    percent = device.utilization_percent
    busy = "-" if percent is None else f"{percent} %"
    return busy, _of(device.memory_used_bytes, device.memory_bytes)


def _of(used_bytes: int | None, limit_bytes: int | None) -> str:
    if used_bytes is None:
        return "-"
    return _size(used_bytes) + (f" of {_size(limit_bytes)}" if limit_bytes else "")


def _size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_bytes(size_bytes)
