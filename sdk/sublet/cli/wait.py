"""`sublet wait`: until a job has ended or is paused."""

import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sublet.cli.errors import exit_code
from sublet.cli.parser import Parser, open_client, with_broker, with_job, with_json
from sublet.terminal.detaching import detached
from sublet.terminal.next_steps import status_text
from sublet.terminal.text import paint, safe, state
from sublet_contracts.keys import short

if TYPE_CHECKING:
    from sublet.client import Job
    from sublet_contracts.api import JobView


def wait(argv: Sequence[str]) -> int:
    """Wait for a job's end, or for a pause."""
    parser = with_job(
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
    with open_client(options) as client:
        job = client.job(options.job)
        try:
            view = wait_for(job)
        except KeyboardInterrupt:
            print(detached(job), file=sys.stderr)
            raise
    if options.json:
        print(view.model_dump_json(indent=2))
    else:
        print(f"{safe(view.name)} ({short(view.id)}): {state(view.state)}, {status_text(view)}")
    return exit_code(view.state)


def wait_for(job: "Job") -> "JobView":
    """Wait for a job; say on stderr which receipts were not signed."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: print(
            paint("warning:", "yellow", sys.stderr), safe(str(message)), file=sys.stderr
        )
        return job.wait()
