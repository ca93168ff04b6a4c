"""`sublet run`: shows what a job would get and the most it can cost, asks, submits, follows."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sublet.cli.failing import SUCCEEDED, USAGE, CommandError, exit_code
from sublet.cli.options import Parser, client, with_broker, with_json
from sublet.terminal.text import credits, duration, paint, safe

if TYPE_CHECKING:
    from sublet.client import Client, Job
    from sublet.spec import JobSpec
    from sublet_contracts.api import MatchView

_SHOWN_OFFERS = 5
_SUMMARY = "Run a container on somebody's GPU, under a hard price and budget."
_EPILOG = """\
Options after IMAGE belong to the command. Durations: 90s, 2m, 1.5h. Sizes: 24GB, 512MiB.
Exits with 0 succeeded, 100 failed, 101 unfinished (paused, or you left), 103 cancelled."""


def run(argv: Sequence[str]) -> int:
    """Submit a job."""
    options = _parser().parse_args(argv)
    try:
        return _run(options)
    except Exception as error:
        from sublet.cli.failing import expected, say

        known = error if isinstance(error, CommandError) else expected(error)
        if known is None or not options.json:
            raise
        say(known, as_json=True)
        return known.code


def _run(options: argparse.Namespace) -> int:
    spec = _spec(options)
    with client(options, away_limit_s=20.0) as asker:
        _check_inputs(spec.inputs)
        if options.dry_run:
            return _dry_run(asker, spec)
        job = agreed(asker, spec, wait=options.wait, yes=options.yes)
        return result(job, detach=options.detach, as_json=options.json)


def agreed(asker: "Client", spec: "JobSpec", *, wait: bool, yes: bool) -> "Job":
    """Show what the job would get and the most it can cost, ask, send the inputs and submit."""
    from sublet.terminal.progress import announcing

    _show_terms(asker, spec, wait=wait)
    _confirm(yes)
    with announcing() as announce:
        return asker.submit(spec, wait_for_offer=wait, announce=announce)


def result(job: "Job", *, detach: bool, as_json: bool) -> int:
    """Print the id, or follow the job to its end; return the exit code."""
    if detach:
        print(job.view().model_dump_json(indent=2) if as_json else job.id)
        return SUCCEEDED
    if as_json:
        from sublet.cli.watching import waited

        view = waited(job)
        print(view.model_dump_json(indent=2))
    else:
        view = job.follow()
    return exit_code(view.state)


def _parser() -> Parser:
    parser = Parser(
        "run", _SUMMARY, epilog=_EPILOG, usage="sublet run [OPTIONS] IMAGE [COMMAND...]"
    )
    parser.add_argument("image", metavar="IMAGE", help="by digest (name@sha256:...) best of all")
    parser.add_argument("command", metavar="COMMAND", nargs="...", help="default: the image's own")
    terms = parser.add_argument_group("terms")
    terms.add_argument(
        "--max-price", required=True, metavar="CREDITS", help="the most a device-hour may cost"
    )
    terms.add_argument(
        "--budget", required=True, metavar="CREDITS", help="the most the job may cost in all"
    )
    wish = parser.add_argument_group("machine")
    wish.add_argument("--gpus", default="1", metavar="N", help="1 (default), 2x24GB, 1xA100, cpu")
    wish.add_argument("--memory", default="", metavar="SIZE", help="default: 8GB; 1GB for cpu")
    wish.add_argument("--disk", default="10GB", metavar="SIZE", help="default: 10GB")
    wish.add_argument("--cpus", default="1", metavar="N", help="cores; default: 1")
    wish.add_argument("--region", default="", metavar="R", help="only machines there")
    wish.add_argument("--hardware-class", default="", metavar="CLASS", help="exactly this class")
    wish.add_argument("--egress", action="store_true", help="it needs the network")
    content = parser.add_argument_group("content")
    content.add_argument(
        "--input", action="append", default=[], metavar="SRC:DST", help="file or folder to send"
    )
    content.add_argument("--outputs", default="", metavar="DIR", help="folder to bring back")
    content.add_argument(
        "-e", "--env", action="append", default=[], metavar="K=V", help="environment variable"
    )
    content.add_argument("--name", default="", help="to find it by; default: the image's")
    course = parser.add_argument_group("course")
    course.add_argument(
        "--checkpoint-every", default="2m", metavar="T", help="most work at risk; default: 2m"
    )
    course.add_argument(
        "--patience",
        default="20s",
        metavar="T",
        help="silence before going elsewhere; default: 20s",
    )
    course.add_argument(
        "--stop-grace", default="30s", metavar="T", help="to save itself at a stop; default: 30s"
    )
    course.add_argument("--wait", action="store_true", help="queue it even if nobody could take it")
    course.add_argument("-d", "--detach", action="store_true", help="print the id and leave")
    course.add_argument("-y", "--yes", action="store_true", help="submit without asking")
    course.add_argument("--dry-run", action="store_true", help="show the document to be signed")
    return with_broker(with_json(parser))


def _spec(options: argparse.Namespace) -> "JobSpec":
    from sublet.spec import JobSpec

    return JobSpec(
        image=_pinned(options.image),
        command=options.command,
        max_price=options.max_price,
        budget=options.budget,
        gpus=options.gpus,
        checkpoint_every=options.checkpoint_every,
        patience=options.patience,
        stop_grace=options.stop_grace,
        inputs=dict(_input(pair) for pair in options.input),
        outputs=options.outputs,
        env=dict(_env(pair) for pair in options.env),
        name=options.name,
        memory=options.memory,
        disk=options.disk,
        cpus=options.cpus,
        region=options.region,
        hardware_class=options.hardware_class,
        egress=options.egress,
    )


def _input(pair: str) -> tuple[str, str]:
    source, colon, destination = pair.rpartition(":")
    if not colon or not source or not destination.startswith("/"):
        raise CommandError(
            f"--input: {pair!r} is not SRC:DST", "write it like data.csv:/data/data.csv", USAGE
        )
    return source, destination


def _env(pair: str) -> tuple[str, str]:
    import os

    name, equals, value = pair.partition("=")
    if equals and name:
        return name, value
    if name in os.environ:
        return name, os.environ[name]
    raise CommandError(
        f"--env: {pair!r} is neither K=V nor set here", "write it like -e SEED=17", USAGE
    )


def _check_inputs(inputs: object) -> None:
    for source in inputs if isinstance(inputs, dict) else ():
        if not Path(source).expanduser().exists():
            raise CommandError(f"--input: {source}: there is no such file", "check the path")


def _pinned(image: str) -> str:
    """Return `image` by its digest or id where a Docker Engine here knows it, else as it is."""
    if "@" in image or image.startswith("sha256:"):
        return image
    from sublet.cli.images import local_digest

    found = local_digest(image)
    if found is None:
        return image
    print(paint(f"image   {safe(image)} is {found}", "dim", sys.stderr), file=sys.stderr)
    return found


def _dry_run(asker: "Client", spec: "JobSpec") -> int:
    from sublet.transfers import describe_inputs

    document = spec.document(
        renter=asker.party,
        broker=asker.broker,
        now_ms=time.time_ns() // 1_000_000,
        inputs=describe_inputs(spec.inputs),
    )
    print(json.dumps(document.model_dump(mode="json"), indent=2))
    print(paint("Nothing was signed or sent.", "dim", sys.stderr), file=sys.stderr)
    return SUCCEEDED


def _show_terms(asker: "Client", spec: "JobSpec", *, wait: bool) -> None:
    """Show on stderr what the job would get; stdout is for the result."""
    # The whole document is made once before anything is shown: a bad option ends here.
    spec.document(
        renter=asker.party, broker=asker.broker, now_ms=time.time_ns() // 1_000_000, inputs=()
    )
    found = asker.match(spec)
    if found.offers:
        from sublet.cli.market import offers_table

        print(offers_table(found.offers[:_SHOWN_OFFERS]), file=sys.stderr)
        more = len(found.offers) - _SHOWN_OFFERS
        if more > 0:
            print(paint(f"and {more} more", "dim", sys.stderr), file=sys.stderr)
    elif not wait:
        raise CommandError(no_match(found), found.relax or "queue it anyway with --wait")
    else:
        print(f"{no_match(found)}; it will wait for one that fits", file=sys.stderr)
    print("\n" + _cost(spec, found), file=sys.stderr)


def no_match(found: "MatchView") -> str:
    """Return why no offer fits, in words."""
    if not found.considered:
        return "no offer is on the market"
    ranked = sorted(found.failures.items(), key=lambda item: (-item[1], item[0]))
    why = ", ".join(f"{safe(name).replace('_', ' ')} in {count}" for name, count in ranked)
    return f"no offer fits, of {found.considered} on the market; what fails: {why}"


def _cost(spec: "JobSpec", found: "MatchView") -> str:
    text = f"It costs at most {paint(credits(spec.budget_ucr), 'bold', sys.stderr)} credits in all."
    if not found.offers:
        return text
    from sublet_contracts.rules import device_ms_within

    price = found.offers[0].price_ucr_per_device_hour
    lasts_ms = device_ms_within(price * spec.resources().devices, spec.budget_ucr)
    if lasts_ms is None:
        return f"{text} The cheapest offer is free."
    return f"{text} At the cheapest price that lasts {duration(lasts_ms)}."


def _confirm(yes: bool) -> None:
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise CommandError("nobody can be asked here", "add -y to submit without asking", USAGE)
    print("Submit? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CommandError("nothing was submitted")
