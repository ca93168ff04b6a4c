"""`sublet logs` and `sublet events`: what a job has written, and what has happened to it."""

import sys
import time
from collections.abc import Sequence

from sublet.cli.errors import SUCCEEDED
from sublet.cli.parser import Parser, open_client, with_broker, with_job, with_json
from sublet.terminal.text import paint, safe
from sublet_contracts.api import EventView

_POLL_S = 1.0


def logs(argv: Sequence[str]) -> int:
    """Print a job's output."""
    parser = with_job(
        with_json(with_broker(Parser("logs", "A job's output, of all its runs.")), "NDJSON")
    )
    parser.add_argument("-f", "--follow", action="store_true", help="until the job has ended")
    parser.add_argument("-t", "--timestamps", action="store_true", help="when each was written")
    parser.add_argument("--after", type=int, default=-1, metavar="CURSOR", help="only later lines")
    options = parser.parse_args(argv)
    with open_client(options) as client:
        job = client.job(options.job)
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
