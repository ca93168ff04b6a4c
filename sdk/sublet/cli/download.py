"""`sublet download`: outputs, what a run had written that did not finish, and checkpoints."""

import json
import os
import sys
from collections.abc import Sequence

from sublet.cli.errors import SUCCEEDED
from sublet.cli.parser import Parser, open_client, with_broker, with_job, with_json
from sublet.downloads import Downloaded
from sublet.terminal.kept import left_out_lines
from sublet.terminal.text import paint, safe
from sublet_contracts.amounts import format_bytes

_EXAMPLES = """\
examples:
  sublet download ft                           what it made, into ./ft
  sublet download ft out --checkpoint best     the best checkpoint that HF Trainer names
  sublet download ft out --include '*.csv' --include logs

Interrupted, it goes on when it is called again. `sublet inspect` says what is kept, how long."""


def download(argv: Sequence[str]) -> int:
    """Fetch outputs or a checkpoint."""
    parser = Parser(
        "download",
        "Fetch a job's outputs, in whatever state it is; where it has none, what a run had written "
        "that ended without finishing. Each file is checked.",
        epilog=_EXAMPLES,
    )
    parser = with_job(with_json(with_broker(parser)))
    parser.add_argument("target", metavar="DEST", nargs="?", help="a folder; default: ./NAME")
    parser.add_argument(
        "--checkpoint", metavar="N|best|latest", help="a durable checkpoint instead, by its step"
    )
    parser.add_argument(
        "--include",
        metavar="GLOB",
        action="append",
        default=[],
        help="only files or folders of this name; several times",
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="what a run had written that did not finish, even where there are outputs",
    )
    options = parser.parse_args(argv)
    from sublet.terminal.progress import announcing

    with open_client(options) as client:
        job = client.job(options.job)
        target = options.target or f"./{job.name}"
        with announcing("fetched") as announce:
            found = job.download(
                target,
                announce,
                checkpoint=options.checkpoint,
                include=options.include,
                partial=options.partial,
            )
    if options.json:
        print(json.dumps(_as_json(job.id, found), indent=2))
        return SUCCEEDED
    for file in found:
        print(f"{safe(os.fspath(file))}  {format_bytes(file.stat().st_size)}")
    for line in _remarks(found, target):
        print(line, file=sys.stderr)
    return SUCCEEDED


def _as_json(job: str, found: Downloaded) -> dict[str, object]:
    return {
        "job": job,
        "kind": found.kind,
        "partial": found.kind == "partial-outputs",
        "step": found.step,
        "run": found.epoch,
        "files": [str(file) for file in found],
        "left_out": [entry.model_dump(mode="json") for entry in found.left_out],
        "left_out_total": found.left_out_total,
    }


def _remarks(found: Downloaded, target: str) -> list[str]:
    lines = []
    count = "1 file" if len(found) == 1 else f"{len(found)} files"
    if found.kind == "partial-outputs":
        what = f"these are partial: run {found.epoch} did not finish"
        lines.append(paint(f"{count} in {safe(target)}; {what}", "yellow", sys.stderr))
    elif found.kind == "checkpoint":
        lines.append(f"{count} in {safe(target)}: the checkpoint of step {found.step}")
    elif not found.files:
        lines.append("the job's outputs hold no file")
    if found.left_out_total:
        lines.append(f"{found.left_out_total} left out, which could not be carried:")
        lines += left_out_lines(found.left_out, found.left_out_total)
    return lines
