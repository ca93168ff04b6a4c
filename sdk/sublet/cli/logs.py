"""`sublet logs` and `sublet events`: what a job has written, and what has happened to it."""

import sys
import time
from collections.abc import Iterator, Sequence

from sublet.cli.errors import SUCCEEDED
from sublet.cli.parser import Parser, open_client, with_broker, with_job, with_json
from sublet.terminal.detaching import detached
from sublet.terminal.output import Output
from sublet.terminal.text import paint, safe
from sublet_contracts.api import EventView, JobLogLine

_POLL_S = 1.0


def logs(argv: Sequence[str]) -> int:
    """Print a job's output."""
    parser = with_job(
        with_json(with_broker(Parser("logs", "A job's output, of all its runs.")), "NDJSON")
    )
    parser.add_argument("-f", "--follow", action="store_true", help="until the job has ended")
    parser.add_argument("-t", "--timestamps", action="store_true", help="when each was written")
    parser.add_argument(
        "-n", "--tail", type=int, metavar="N", help="only the last N lines; with -f, from there on"
    )
    parser.add_argument(
        "--since", metavar="TIME", help="only what was written since: 10m, 2026-11-29T08:00"
    )
    parser.add_argument("--run", type=int, metavar="N", help="only of this run (sublet inspect)")
    parser.add_argument("--after", type=int, default=-1, metavar="CURSOR", help="only later lines")
    options = parser.parse_args(argv)
    with open_client(options) as client:
        job = client.job(options.job)
        lines = job.logs(
            follow=options.follow,
            after=options.after,
            tail=options.tail,
            since=options.since,
            run=options.run,
            unfinished=True,
        )
        try:
            _print(lines, as_json=options.json, timestamps=options.timestamps)
        except KeyboardInterrupt:
            if options.follow:
                print(detached(job), file=sys.stderr)
            raise
    return SUCCEEDED


def _print(lines: Iterator[JobLogLine], *, as_json: bool, timestamps: bool) -> None:
    output, epoch = Output(), 0
    today = time.strftime("%Y-%m-%d")
    try:
        for line in lines:
            if as_json:
                print(line.model_dump_json(), flush=True)
                continue
            if epoch and line.epoch != epoch:
                output.note(paint(f"--- run {line.epoch} goes on ---", "dim", sys.stderr))
            epoch = line.epoch
            output.show(line, _stamp(line.time_ms, today) if timestamps else "")
    finally:
        output.close()


def _stamp(time_ms: int, today: str) -> str:
    """Return when a line was written, with the day where that isn't today."""
    day = time.strftime("%Y-%m-%d", time.localtime(time_ms / 1000))
    return ("" if day == today else day + " ") + _clock(time_ms) + "  "


def events(argv: Sequence[str]) -> int:
    """Print a job's history."""
    parser = with_job(
        with_json(with_broker(Parser("events", "A job's append-only history.")), "NDJSON")
    )
    parser.add_argument("-f", "--follow", action="store_true", help="until the job has ended")
    parser.add_argument("--after", type=int, default=0, metavar="ID", help="only later events")
    options = parser.parse_args(argv)
    after = options.after
    with open_client(options) as client:
        job = client.job(options.job)
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


def _clock(time_ms: int) -> str:
    whole = time.strftime("%H:%M:%S", time.localtime(time_ms / 1000))
    return f"{whole}.{time_ms % 1000:03d}"
