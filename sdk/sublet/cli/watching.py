"""Commands that watch a job: logs, events, wait."""

import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

from sublet.cli.failing import SUCCEEDED, exit_code
from sublet.cli.options import Parser, a_job, client, with_broker, with_json
from sublet.terminal.text import paint, safe, state
from sublet_contracts.api import EventView
from sublet_contracts.keys import short

_POLL_S = 1.0


def logs(argv: Sequence[str]) -> int:
    """Print a job's output."""
    parser = a_job(
        with_json(with_broker(Parser("logs", "A job's output, of all its runs.")), "NDJSON")
    )
    parser.add_argument("-f", "--follow", action="store_true", help="until the job has ended")
    parser.add_argument("-t", "--timestamps", action="store_true", help="when each was written")
    parser.add_argument("--after", type=int, default=-1, metavar="CURSOR", help="only later lines")
    options = parser.parse_args(argv)
    with client(options) as asker:
        job = asker.job(options.job)
        epoch = 0
        for line in job.logs(follow=options.follow, after=options.after):
            if options.json:
                print(line.model_dump_json(), flush=True)
                continue
            if epoch and line.epoch != epoch:
                print(
                    paint(f"--- run {line.epoch} goes on ---", "dim", sys.stderr), file=sys.stderr
                )
            epoch = line.epoch
            stamp = _clock(line.time_ms) + "  " if options.timestamps else ""
            out = sys.stderr if line.stream == "stderr" else sys.stdout
            # A terminal is protected from control sequences; a file gets what the job wrote.
            print(stamp + (safe(line.text) if out.isatty() else line.text), file=out, flush=True)
    return SUCCEEDED


def events(argv: Sequence[str]) -> int:
    """Print a job's history."""
    parser = a_job(
        with_json(with_broker(Parser("events", "A job's append-only history.")), "NDJSON")
    )
    parser.add_argument("-f", "--follow", action="store_true", help="until the job has ended")
    parser.add_argument("--after", type=int, default=0, metavar="ID", help="only later events")
    options = parser.parse_args(argv)
    after = options.after
    with client(options) as asker:
        job = asker.job(options.job)
        while True:
            # Asked before the events, so that none after the end is left out.
            ended = not options.follow or job.view().state in ("succeeded", "failed", "cancelled")
            while found := job.events(after).events:
                for event in found:
                    print(event.model_dump_json() if options.json else _event(event), flush=True)
                after = found[-1].id
            if ended:
                return SUCCEEDED
            time.sleep(_POLL_S)


def _event(event: EventView) -> str:
    change = f"{event.before} → {event.after}" if event.before else event.after
    run = f"run {event.epoch}" if event.epoch else ""
    why = " ".join(part for part in (event.reason or "", safe(event.detail)) if part)
    clock = paint(_clock(event.time_ms), "dim")
    return f"{clock}  {run:<6} {event.kind:<10} {change:<22} {why}".rstrip()


def wait(argv: Sequence[str]) -> int:
    """Wait for a job's end, or for a pause."""
    parser = a_job(
        with_json(
            with_broker(
                Parser(
                    "wait",
                    "Wait until a job has ended or is paused; sign its receipts meanwhile.\n"
                    "Exits with 0 succeeded, 100 failed, 101 unfinished (paused, or you left),\n"
                    "102 not found, 103 cancelled.",
                )
            )
        )
    )
    options = parser.parse_args(argv)
    with client(options) as asker:
        job = asker.job(options.job)
        view = waited(job)
    if options.json:
        print(view.model_dump_json(indent=2))
    else:
        print(f"{safe(view.name)} ({short(view.id)}): {state(view.state)}, {safe(view.says)}")
    return exit_code(view.state)


def waited(job: Any) -> Any:
    """Wait for a job; say on stderr which receipts were not signed. Returns its JobView."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: print(
            paint("warning:", "yellow", sys.stderr), safe(str(message)), file=sys.stderr
        )
        return job.wait()


def _clock(time_ms: int) -> str:
    whole = time.strftime("%H:%M:%S", time.localtime(time_ms / 1000))
    return f"{whole}.{time_ms % 1000:03d}"
