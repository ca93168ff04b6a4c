"""`sublet run`: shows what a job would get and the most it can cost, asks, submits, follows."""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sublet.cli.errors import SUCCEEDED, USAGE, CommandError, exit_code
from sublet.cli.job_options import add_job_options, given_options, missing_option
from sublet.cli.parser import Parser, open_client, with_broker, with_json
from sublet.options import OPTIONS
from sublet.options_docs import meaning
from sublet.terminal.text import paint, safe
from sublet_contracts.amounts import format_credits, format_duration
from sublet_contracts.image_references import ReferenceRefused, parse_reference

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
        from sublet.cli.errors import expected, say

        known = error if isinstance(error, CommandError) else expected(error)
        if known is None or not options.json:
            raise
        say(known, as_json=True)
        return known.code


def _run(options: argparse.Namespace) -> int:
    spec = _spec(options)
    with open_client(options, away_limit_s=20.0) as client:
        _check_inputs(spec.inputs)
        if options.dry_run:
            return _dry_run(client, spec)
        job = agreed(client, spec, yes=options.yes)
        return result(job, detach=options.detach, as_json=options.json)


def agreed(client: "Client", spec: "JobSpec", *, yes: bool) -> "Job":
    """Show what the job would get and the most it can cost, ask, send the inputs and submit."""
    from sublet.terminal.progress import announcing

    _show_terms(client, spec)
    _show_code(spec)
    _confirm(yes)
    with announcing("sent") as announce:
        return client.submit(spec, announce=announce)


def result(job: "Job", *, detach: bool, as_json: bool) -> int:
    """Print the id, or follow the job to its end; return the exit code."""
    if detach:
        print(job.view().model_dump_json(indent=2) if as_json else job.id)
        return SUCCEEDED
    if as_json:
        from sublet.cli.wait import wait_for

        view = wait_for(job)
        print(view.model_dump_json(indent=2))
    else:
        view = job.follow()
    return exit_code(view.state)


def _parser() -> Parser:
    usage = "sublet run [OPTIONS] IMAGE [COMMAND...]\n       sublet run -f FILE [OPTIONS]"
    parser = Parser("run", _SUMMARY, epilog=_EPILOG, usage=usage)
    image, command = OPTIONS["image"], OPTIONS["command"]
    parser.add_argument("image", metavar=image.metavar, nargs="?", help=meaning(image))
    parser.add_argument("command", metavar=command.metavar, nargs="...", help=meaning(command))
    from_file = parser.add_argument_group("from a file")
    from_file.add_argument(
        "-f",
        "--file",
        metavar="FILE",
        help="what the job is, as `sublet init` writes it; options given here count more",
    )
    from_file.add_argument(
        "--job-profile", default="", metavar="NAME", help="one of the file's profiles"
    )
    course = add_job_options(parser, or_in_a_file=True)["course"]
    course.add_argument("-d", "--detach", action="store_true", help="print the id and leave")
    course.add_argument("-y", "--yes", action="store_true", help="submit without asking")
    course.add_argument("--dry-run", action="store_true", help="show the document to be signed")
    return with_broker(with_json(parser))


def _spec(options: argparse.Namespace) -> "JobSpec":
    given: dict[str, Any] = dict(given_options(options))
    if options.image is not None:
        given |= {"image": options.image, "command": options.command}
    if options.file is None:
        if options.job_profile:
            raise CommandError("--job-profile is of a file", "name the file with -f", USAGE)
        return _checked(given)
    from sublet.job_file import load
    from sublet.units import UnitError

    file = load(Path(options.file).expanduser(), options.job_profile)
    if options.image is not None and not options.command:
        del given["command"]  # another image, and the file's command
    try:
        return _checked({**file.options, **given})
    except UnitError as error:
        located = error if str(error).partition(":")[0] in given else file.located(error)
        raise located from error


def _checked(given: dict[str, Any]) -> "JobSpec":
    """Return the job, every option of which has been looked at. Raises CommandError, UnitError."""
    from sublet.spec import JobSpec

    missing = missing_option(given)
    if missing is not None:
        raise missing
    given["image"] = _pinned(given["image"])
    spec = JobSpec(**given)
    nobody = "ed25519-" + "0" * 64
    spec.document(renter=nobody, broker=nobody, now_ms=0, inputs=())
    return spec


def _check_inputs(inputs: Mapping[str, str]) -> None:
    for source in inputs:
        if not Path(source).expanduser().exists():
            raise CommandError(f"--input: {source}: there is no such file", "check the path")


def _pinned(image: str) -> str:
    """Return `image` by its digest or id where a Docker Engine here knows it, else as it is.

    Raises CommandError: it names no image.
    """
    if image.startswith("sha256:"):
        return image
    try:
        parse_reference(image)
    except ReferenceRefused as error:
        fix = "name it as `docker pull` does: registry/repository:tag, or ...@sha256:DIGEST"
        raise CommandError(f"IMAGE: {error}", fix, USAGE) from error
    if "@" in image:
        return image
    from sublet.cli.images import local_digest

    found = local_digest(image)
    if found is None:
        return image
    print(paint(f"image   {safe(image)} is {found}", "dim", sys.stderr), file=sys.stderr)
    return found


def _dry_run(client: "Client", spec: "JobSpec") -> int:
    from sublet.transfers import describe_inputs

    inputs = describe_inputs(spec.inputs)
    if spec.code is not None:
        from sublet.code_tree import describe_code

        inputs = (*inputs, describe_code(spec.code, spec.code_destination))
    document = spec.document(
        renter=client.party,
        broker=client.broker,
        now_ms=time.time_ns() // 1_000_000,
        inputs=inputs,
    )
    print(json.dumps(document.model_dump(mode="json"), indent=2))
    print(paint("Nothing was signed or sent.", "dim", sys.stderr), file=sys.stderr)
    return SUCCEEDED


def _show_terms(client: "Client", spec: "JobSpec") -> None:
    """Show on stderr what the job would get; stdout is for the result."""
    # The whole document is made once before anything is shown: a bad option ends here.
    spec.document(
        renter=client.party, broker=client.broker, now_ms=time.time_ns() // 1_000_000, inputs=()
    )
    found = client.match(spec)
    if found.offers:
        from sublet.cli.market import offers_table

        print(offers_table(found.offers[:_SHOWN_OFFERS]), file=sys.stderr)
        more = len(found.offers) - _SHOWN_OFFERS
        if more > 0:
            print(paint(f"and {more} more", "dim", sys.stderr), file=sys.stderr)
    else:
        from sublet.shortfalls import advice

        says, fix = no_match(found), advice(found.relax)
        if not spec.options["wait_for_offer"]:
            raise CommandError(says, fix or "leave out --no-wait, and it waits in line")
        # Only a wish that nothing on the market meets needs another word: the rest is patience.
        wish = f"; to be taken by what is there: {fix}" if fix and not busy_offers(found) else ""
        print(f"{says}{wish}\n{place(found)}", file=sys.stderr)
    print("\n" + _cost(spec, found), file=sys.stderr)


def _show_code(spec: "JobSpec") -> None:
    """Show on stderr what of a folder of code would be sent."""
    if spec.code is None:
        return
    from sublet.code_tree import preview

    for number, line in enumerate(preview(spec.code)):
        print(f"{'code' if not number else '':8}{safe(line)}", file=sys.stderr)


def no_match(found: "MatchView") -> str:
    """Return why no offer fits, as text."""
    if not found.considered:
        return "no offer is on the market"
    busy = busy_offers(found)
    if busy:
        return (
            "the only machine that would do is busy"
            if busy == 1
            else f"all {busy} machines that would do are busy"
        )
    ranked = sorted(found.failures.items(), key=lambda item: (-item[1], item[0]))
    why = ", ".join(f"{safe(name).replace('_', ' ')} in {count}" for name, count in ranked)
    return f"no offer fits, of {found.considered} on the market; what fails: {why}"


def busy_offers(found: "MatchView") -> int:
    """Return how many offers would do and are taken."""
    return found.failures.get("busy", 0)


def place(found: "MatchView") -> str:
    """Return where in line a job would stand that came now, as text."""
    if not found.waiting:
        return "It will be the first in line."
    jobs = "1 job is" if found.waiting == 1 else f"{found.waiting} jobs are"
    return f"It will be number {found.waiting + 1} in line: {jobs} before it."


def _cost(spec: "JobSpec", found: "MatchView") -> str:
    most = paint(format_credits(spec.budget_ucr), "bold", sys.stderr)
    text = f"It costs at most {most} credits in all."
    if not found.offers:
        return text
    from sublet_contracts.rules import device_ms_within

    price = found.offers[0].price_ucr_per_device_hour
    lasts_ms = device_ms_within(price * spec.resources().devices, spec.budget_ucr)
    if lasts_ms is None:
        return f"{text} The cheapest offer is free."
    return f"{text} At the cheapest price that lasts {format_duration(lasts_ms)}."


def _confirm(yes: bool) -> None:
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise CommandError("nobody can be asked here", "add -y to submit without asking", USAGE)
    print("Submit? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CommandError("nothing was submitted")
