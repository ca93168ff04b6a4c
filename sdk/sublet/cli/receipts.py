"""`sublet receipts export` and `verify`: a job's evidence, checked with public keys alone."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from sublet.cli.errors import ERROR, USAGE, CommandError
from sublet.cli.parser import Parser, open_client, with_broker, with_job, with_json
from sublet.terminal.text import paint, safe
from sublet_contracts.amounts import format_credits, format_duration
from sublet_contracts.keys import PARTY_PATTERN, short

_MOST_PROBLEMS = 20


def receipts(argv: Sequence[str]) -> int:
    """Run `export` or `verify`."""
    which = {"export": export, "verify": verify}
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: sublet receipts export JOB > f.json\n       sublet receipts verify f.json")
        print("\nA job's signed documents in one file; and their check, offline.")
        return 0 if argv else USAGE
    if argv[0] not in which:
        raise CommandError(
            f"receipts {argv[0]}: there is no such command", "export or verify", USAGE
        )
    return which[argv[0]](argv[1:])


def export(argv: Sequence[str]) -> int:
    """Print a job's evidence."""
    parser = with_job(with_broker(Parser("receipts export", "A job's signed documents, as JSON.")))
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: stdout")
    options = parser.parse_args(argv)
    with open_client(options) as client:
        data = client.job(options.job).export()
    if options.output:
        options.output.write_bytes(data)
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    return 0


def verify(argv: Sequence[str]) -> int:
    """Check a file of evidence. Asks nobody."""
    parser = with_json(
        Parser(
            "receipts verify",
            "Check signatures, chains, arithmetic, the durable-progress rule and the log.\n"
            "Asks nobody: it needs the file, and the broker's id that you trust.",
        )
    )
    parser.add_argument("file", metavar="FILE", help="from `sublet receipts export`; - is stdin")
    parser.add_argument("--broker", metavar="ID", help="default: those your profile has pinned")
    parser.add_argument("--profile", metavar="NAME", help="whose pins; default: $SUBLET_PROFILE")
    options = parser.parse_args(argv)
    from sublet_contracts.export import verify_export

    data = sys.stdin.buffer.read() if options.file == "-" else Path(options.file).read_bytes()
    broker, trust = _trusted(data, options.broker, options.profile)
    verdict = verify_export(data, broker=broker)
    trusted = broker is not None
    if options.json:
        said = {
            "holds": verdict.holds,
            "job": verdict.job,
            "broker": verdict.broker,
            "broker_trusted": trusted,
            "checks": verdict.checks,
            "leases": verdict.leases,
            "receipts": verdict.receipts,
            "charged_ucr": verdict.charged_ucr,
            "lost_device_ms": verdict.lost_device_ms,
            "lost_work_charged_ucr": verdict.lost_work_charged_ucr,
            "problems": verdict.problems,
        }
        print(json.dumps(said, indent=2))
        return 0 if verdict.holds else ERROR
    against = f"checked against {broker or verdict.broker}, {trust}"
    if not verdict.holds:
        print(paint("It does NOT hold:", "red"))
        for problem in verdict.problems[:_MOST_PROBLEMS]:
            print(f"  - {safe(problem)}")
        more = len(verdict.problems) - _MOST_PROBLEMS
        if more > 0:
            print(f"  and {more} more")
        print(against)
        if broker is not None and verdict.broker and verdict.broker != broker:
            raise CommandError(
                f"the file is of another broker than the one that is trusted: {verdict.broker}",
                "if that is the one you mean, and you know its id from elsewhere than the file: "
                "name it with --broker ID",
            )
        return ERROR
    print(paint("It holds.", "green"), f"{verdict.checks} checks passed.")
    counts = f"{_count(verdict.leases, 'lease')}, {_count(verdict.receipts, 'receipt')}"
    print(f"job      {short(verdict.job)}, {counts}")
    lost = f"; {format_duration(verdict.lost_device_ms)} lost" if verdict.lost_device_ms else ""
    if verdict.lost_device_ms:
        lost += f", charged {format_credits(verdict.lost_work_charged_ucr)}"
    print(f"charged  {format_credits(verdict.charged_ucr)}{lost}")
    print(f"broker   {verdict.broker}")
    print(f"         {trust}")
    return 0


def _count(number: int, what: str) -> str:
    return f"1 {what}" if number == 1 else f"{number} {what}s"


def _trusted(data: bytes, given: str | None, profile: str | None) -> tuple[str | None, str]:
    """Return the broker id to check against, and why it is trusted. None: nobody vouches for it."""
    if given:
        if not re.fullmatch(PARTY_PATTERN, given):
            raise CommandError(
                f"--broker: {given[:80]!r} is no broker's id",
                "it begins with ed25519-; sublet whoami shows your broker's",
                USAGE,
            )
        return given, "as you gave it with --broker"
    from sublet.config import Profile

    pinned = Profile.open(profile).pins()
    try:
        named = json.loads(data).get("broker")
    except (ValueError, AttributeError, RecursionError):
        # verify_export says what is wrong with the file.
        named = None
    for url, broker in pinned.items():
        if broker == named:
            return broker, f"trusted: your profile pinned it when you first used {url}"
    if pinned:
        # A file of a broker that this profile never met must not pass for one of its own.
        url, broker = next(iter(pinned.items()))
        return broker, f"trusted: your profile pinned it when you first used {url}"
    return None, "NOT trusted: only the file names it. Compare it, or name yours with --broker ID"
