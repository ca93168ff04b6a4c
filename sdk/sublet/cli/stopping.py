"""`sublet pause` and `sublet cancel`: they say what a stop costs before they stop anything."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sublet.cli.errors import SUCCEEDED, USAGE, CommandError
from sublet.cli.jobs import show_change
from sublet.cli.parser import Parser, open_client, with_broker, with_json
from sublet.terminal.losses import loss_of
from sublet.terminal.text import paint, safe
from sublet_contracts.keys import short

if TYPE_CHECKING:
    from sublet.client import Job


def cancel(argv: Sequence[str]) -> int:
    """End jobs."""
    return _stop(
        "cancel", "End a job. What it has used is paid; the rest of the hold is freed.", argv
    )


def pause(argv: Sequence[str]) -> int:
    """Pause jobs."""
    return _stop("pause", "Checkpoint a job and stop it, until `sublet resume`.", argv)


def _stop(verb: str, summary: str, argv: Sequence[str]) -> int:
    parser = with_json(with_broker(Parser(verb, summary)))
    parser.add_argument("jobs", metavar="JOB", nargs="+", help="id, its first 8 digits, or name")
    parser.add_argument(
        "-y", "--yes", action="store_true", help="without asking, whatever would be lost"
    )
    options = parser.parse_args(argv)
    with open_client(options) as client:
        # All are looked up, and asked about, before any is touched: a typo in the last one, or a
        # no, stops nothing halfway.
        jobs = [client.job(ref) for ref in options.jobs]
        _say_what_is_lost(jobs, verb, yes=options.yes)
        for job in jobs:
            show_change(job.cancel() if verb == "cancel" else job.pause(), options.json)
    return SUCCEEDED


def _say_what_is_lost(jobs: Sequence["Job"], verb: str, *, yes: bool) -> None:
    """Say for each job where a resume would start from; ask, where work would be lost.

    Where nobody can be asked, a pause is refused and a cancel goes on: who ends a job means to.
    """
    worth_asking = False
    for job in jobs:
        view = job.view()
        loss = loss_of(view, time.time_ns() // 1_000_000, verb=verb)
        if not loss.says:
            continue
        text = f"{safe(view.name)} ({short(view.id)}): {loss.says}"
        print(paint(text, "yellow" if loss.worth_asking else "dim", sys.stderr), file=sys.stderr)
        worth_asking = worth_asking or loss.worth_asking
    if yes or not worth_asking:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        if verb == "cancel":
            return
        raise CommandError(
            "work would be lost, and nobody can be asked here", f"add -y to {verb} anyway", USAGE
        )
    print(f"{verb.capitalize()} it anyway? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CommandError("nothing was stopped")
