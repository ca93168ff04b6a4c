"""`sublet checkpoints`: what a job has saved, and what became of it."""

import json
import shutil
import time
from collections.abc import Sequence

from sublet.cli.errors import SUCCEEDED
from sublet.cli.parser import Parser, open_client, with_broker, with_job, with_json
from sublet.cli.top import current_run
from sublet.terminal.text import clip, paint, safe, table
from sublet.terminal.uploads import short_size, upload_text
from sublet_contracts.amounts import format_ago, format_duration
from sublet_contracts.api import CheckpointsPage, CheckpointView, JobView
from sublet_contracts.keys import short
from sublet_contracts.states import JOB, CheckpointState, is_terminal

SHOWN = 20
_WHYS = 5
_HERE = "→"
_HEADS = ("", "step", "age", "size", "moved", "stall", "took", "state", "run", "on")
_RIGHT = (1, 2, 3, 4, 5, 6, 8)
_STATE = 7
_LEAST_NAME = 6

_EPILOG = """\
MOVED is what was really sent: the rest was there already. STALL is for how long saving it held the
job's loop, if the job says so. TOOK is the time until it was durable, from when the machine saw it
whole.

examples:
  sublet checkpoints ft                   the newest 20, and where a resume would start
  sublet download ft --checkpoint 400     fetch one of them"""


def checkpoints(argv: Sequence[str]) -> int:
    """Show a job's checkpoints."""
    parser = with_job(
        with_json(
            with_broker(
                Parser("checkpoints", "What a job has saved, newest first.", epilog=_EPILOG)
            )
        )
    )
    parser.add_argument("--all", action="store_true", help=f"not only the newest {SHOWN}")
    options = parser.parse_args(argv)
    with open_client(options) as client:
        job = client.job(options.job)
        view = job.view()
        page = job.checkpoints(limit=None if options.all else SHOWN, kind="checkpoint")
    if options.json:
        print(json.dumps(_as_json(view, page), indent=2))
        return SUCCEEDED
    columns = shutil.get_terminal_size().columns
    print(picture(view, page, time.time_ns() // 1_000_000, columns))
    return SUCCEEDED


def _as_json(view: JobView, page: CheckpointsPage) -> dict[str, object]:
    run = current_run(view)
    upload = run.upload if run is not None else None
    return {
        "job": view.id,
        "name": view.name,
        "state": view.state,
        "upload": upload.model_dump(mode="json") if upload is not None else None,
        **page.model_dump(mode="json", exclude={"next_before_ms"}),
    }


def picture(view: JobView, page: CheckpointsPage, now_ms: int, columns: int) -> str:
    """Return what there is, for people, in so many columns."""
    lines = []
    run = current_run(view)
    if run is not None and run.upload is not None:
        lines += [paint(clip(upload_text(run.upload, now_ms), columns), "cyan"), ""]
    shown, start = page.checkpoints, page.resumes_from
    if not shown:
        ended = is_terminal(JOB, view.state)
        lines.append(f"{safe(view.name)} has saved no checkpoint{'' if ended else ' yet'}.")
        return "\n".join(lines)
    rows = [_row(c, now_ms, here=start is not None and c.id == start.id) for c in shown]
    lines.append(
        _fitted(rows, [safe(c.provider_name) or short(c.provider) for c in shown], columns)
    )
    lines += _whys(shown, columns)
    lines.append("")
    if page.total > len(shown):
        older = page.total - len(shown)
        lines.append(f"{older} older: sublet checkpoints {short(view.id)} --all")
    if start is not None:
        lines.append(f"{_HERE} a resume would start from step {start.step}")
    elif not is_terminal(JOB, view.state):
        lines.append("Nothing of it is durable and kept: a resume would start anew.")
    return "\n".join(lines).rstrip("\n")


def _row(found: CheckpointView, now_ms: int, *, here: bool) -> list[str]:
    after_ms = found.durable_after_ms
    return [
        _HERE if here else "",
        str(found.step),
        format_ago(found.created_ms, now_ms).removesuffix(" ago"),
        short_size(found.total_bytes),
        short_size(found.sent_bytes),
        "-" if found.stall_ms is None else format_duration(found.stall_ms),
        "-" if after_ms is None else format_duration(after_ms),
        _state(found),
        str(found.epoch),
    ]


def _state(found: CheckpointView) -> str:
    if found.state is CheckpointState.UPLOADED:
        return "verifying"
    gone = found.state is CheckpointState.DURABLE and not found.kept
    return "pruned" if gone else str(found.state)


def _fitted(rows: Sequence[list[str]], names: Sequence[str], columns: int) -> str:
    """Return the table; the names of machines get what width is left."""
    widths = [
        max([len(head), *(len(row[i]) for row in rows)]) for i, head in enumerate(_HEADS[:-1])
    ]
    left = max(_LEAST_NAME, columns - sum(widths) - 2 * len(widths))
    full = [[*row, clip(name, left)] for row, name in zip(rows, names, strict=True)]
    return table(_HEADS, full, right=_RIGHT, colour=_STATE)


def _whys(shown: Sequence[CheckpointView], columns: int) -> list[str]:
    """Return why those don't count that don't."""
    bad = (CheckpointState.REJECTED, CheckpointState.QUARANTINED)
    found = [c for c in shown if c.state in bad]
    lines = [
        paint(clip(f"  step {c.step}: {c.state}: {safe(c.detail)}", columns), "dim")
        for c in found[:_WHYS]
    ]
    if len(found) > len(lines):
        lines.append(paint(f"  and {len(found) - len(lines)} more: --json has all", "dim"))
    return ["", *lines] if lines else []
