"""python -m tests.chaos: real processes meet real faults; every promise must hold.

python -m tests.chaos [churn] [--kills N] [--seed N] [--json FILE]
python -m tests.chaos writes [broker|agent|all|database] [--limit N] [--seed N] [--json FILE]
python -m tests.chaos network|blackout|rolling|partitions|disks|clocks|database [--seed N] ...

Without a name of what to play it is churn. Exit status 0: all promises held; 1: one didn't, and the
logs are kept.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sublet.demo.local import LocalMarketError
from sublet.errors import SubletError
from tests.chaos.churn import Churn, ChurnFailed
from tests.chaos.storms import STORMS
from tests.chaos.strace import missing
from tests.chaos.writes import KINDS, Writes

MINUTES = 60.0


class Played(NamedTuple):
    """What a play came to. `failed`: which promise didn't hold, or ''."""

    record: dict[str, Any]
    failed: str


def _say(text: str) -> None:
    print(text, flush=True)


def _add_churn(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, help="of what is killed when; default: drawn")


def _churn(options: argparse.Namespace, root: Path) -> Played:
    """Kill at random until N kills are done."""
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    _say(f"{options.kills} kills, seed {seed}, in {root}")
    churn = Churn(root, options.kills, seed, _say)
    failed = ""
    try:
        churn.play()
    except (ChurnFailed, LocalMarketError) as error:
        failed = str(error)
    command = f"python -m tests.chaos --kills {options.kills} --seed {seed}"
    return Played({"command": command, **churn.result.record()}, failed)


def _add_writes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=("all", *KINDS, "database"), default="all")
    parser.add_argument("--limit", type=int, help="end after so many faults")
    parser.add_argument("--seed", type=int, default=1, help="of which fault comes when")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="end after so long")


def _writes(options: argparse.Namespace, root: Path) -> Played:
    """Bring kill -9, EIO and ENOSPC to each durable write."""
    if (why := missing()) is not None:
        raise SystemExit(why)
    if options.what == "database":
        return _database(options, root)
    what = tuple(KINDS) if options.what == "all" else (options.what,)
    _say(f"durable writes of {', '.join(what)}, seed {options.seed}, in {root}")
    writes = Writes(
        root, what, options.seed, _say, limit=options.limit, seconds=60 * options.minutes
    )
    failed = ""
    try:
        writes.play()
    except (ChurnFailed, LocalMarketError, SubletError) as error:
        failed = f"{error}; {'; '.join(writes.result.problems)}"
    limit = f" --limit {options.limit}" if options.limit else ""
    minutes = f" --minutes {options.minutes:g}" if options.minutes != MINUTES else ""
    command = f"python -m tests.chaos writes {options.what}{limit}{minutes} --seed {options.seed}"
    return Played({"command": command, **writes.record()}, failed)


def _database(options: argparse.Namespace, root: Path) -> Played:
    from tests.chaos.database_writes import DatabaseWrites, missing

    if (why := missing()) is not None:
        raise SystemExit(why)
    _say(f"durable writes of PostgreSQL, seed {options.seed}, in {root}")
    writes = DatabaseWrites(root, options.seed, _say)
    failed = ""
    try:
        writes.play()
    except (ChurnFailed, LocalMarketError, SubletError) as error:
        failed = f"{error}; {'; '.join(writes.result.problems)}"
    command = f"python -m tests.chaos writes database --seed {options.seed}"
    return Played({"command": command, **writes.record()}, failed)


def _storm(name: str) -> tuple[AddOptions, Play]:
    storm = STORMS[name]

    def play(options: argparse.Namespace, root: Path) -> Played:
        stage = storm.make(options, root, _say)
        _say(f"{storm.says} In {root}")
        failed = ""
        try:
            stage.play()
        except (AssertionError, LocalMarketError, SubletError) as error:
            failed = f"{error}; logs: {root}"
        return Played({"command": storm.command(name, options), **stage.facts.record()}, failed)

    play.__doc__ = storm.says
    return storm.add, play


AddOptions = Callable[[argparse.ArgumentParser], None]
Play = Callable[[argparse.Namespace, Path], Played]
PLAYS: dict[str, tuple[AddOptions, Play]] = {
    "churn": (_add_churn, _churn),
    "writes": (_add_writes, _writes),
    **{name: _storm(name) for name in STORMS},
}
"""By name: what adds its options, and what plays it in an empty folder."""


def main(arguments: list[str]) -> int:
    """Run it. 0: all promises held; 1: one didn't, and its logs are kept."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["churn", *arguments]
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plays = parser.add_subparsers(dest="play", required=True)
    for name, (add_options, play) in PLAYS.items():
        one = plays.add_parser(name, help=(play.__doc__ or "").splitlines()[0])
        add_options(one)
        one.add_argument("--json", type=Path, metavar="FILE", help="write what it came to")
        one.set_defaults(run=play)
    options = parser.parse_args(arguments)
    root = Path(tempfile.mkdtemp(prefix="sublet-chaos-"))
    try:
        played: Played = options.run(options, root)
    except KeyboardInterrupt:
        print(f"\nended before its time; the logs are in {root}", file=sys.stderr)
        return 130
    print(json.dumps(played.record, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(played.record, indent=2) + "\n")
    if played.failed:
        print(f"FAILED: {played.failed}")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
