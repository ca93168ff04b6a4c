"""Everything that RELIABILITY.md tells of, piece by piece; interrupted, it goes on from there.

    python -m tests.reliability.run [--minutes N] [--only NAME ...] [--anew]

Pieces, in this order: the simulated markets, the planted bugs, the kills, a fault at each durable
write (also PostgreSQL's), the storms, the odd jobs, the benchmark. What a piece came to is taken
into tests/reliability/records/ as soon as it is done, and the page is written. State is kept in
build/reliability/COMMIT: the simulation goes on market by market, the hunt bug by bug, odd jobs by
hundreds; of the others the one that was under way begins again (the longest takes about a quarter
of an hour). A piece that fails is told at the end, and tried again by the next start; but what the
simulator, the hunt and the odd jobs find is a result, and stands on the page. Code of another
commit begins anew: no piece is a mixture.

Needs hours and root. Exit status 0: all is done, and every promise held; 1: one did not; 130: it
was interrupted.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.storms import STORMS
from tests.reliability.__main__ import KINDS, PAGE, commit_here, render, take, take_storm

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / "build" / "reliability"
MODULE = (sys.executable, "-m")
ODD_JOBS = {"process": 10_000, "docker": 500}
"""by runner"""


@dataclass(frozen=True)
class Piece:
    """One command, which writes what it came to into a file."""

    name: str
    kind: str
    """Of record: one of KINDS, or "storm"."""
    command: tuple[str, ...]
    """"{json}" and "{state}" stand for files of this piece's own."""
    failures_are_told: bool = False
    """Whether what it writes when it ends with 1 is for the page, which lists what was found."""


def pieces(minutes: float) -> list[Piece]:
    """Return all of them. `minutes`: of simulated markets."""
    simulate = ("tests.simulation", "--random", "--minutes", f"{minutes:g}", "--processes", "2")
    mutate = ("tests.simulation.mutants.mutate", "--processes", "2", "--resume", "--json", "{json}")
    chaos = (*MODULE, "tests.chaos")
    odd = (*MODULE, "tests.chaos.odd_jobs")
    told = ("--json", "{json}")
    return [
        Piece(
            "simulation",
            "simulation",
            (*MODULE, *simulate, "--keep-going", "--state", "{state}", *told),
            failures_are_told=True,
        ),
        Piece("mutants", "mutants", (*MODULE, *mutate), failures_are_told=True),
        Piece("churn", "chaos", (*chaos, "churn", "--kills", "500", *told)),
        Piece("writes", "writes", (*chaos, "writes", "all", "--minutes", "30", *told)),
        Piece("database-writes", "database", (*chaos, "writes", "database", *told)),
        *(Piece(f"storm-{name}", "storm", (*chaos, name, *told)) for name in STORMS),
        *(
            Piece(
                f"odd-jobs-{runner}",
                f"odd-{runner}",
                (*odd, "--runner", runner, "--jobs", str(jobs), "--state", "{state}", *told),
                failures_are_told=True,
            )
            for runner, jobs in ODD_JOBS.items()
        ),
        Piece("bench", "recovery", (*MODULE, "tests.benchmarks", *told)),
    ]


@dataclass
class Runs:
    """The pieces on one commit: which are done, and the next one to be played."""

    folder: Path
    taken: Callable[[Piece, Path], None]
    """Takes what a piece has written, once."""
    say: Callable[[str], None] = print

    def ended(self, piece: Piece) -> int | None:
        """Return the status with which it came to its end and was taken; None: it is still due."""
        done = self._done(piece)
        return int(done.read_text()) if done.exists() else None

    def play(self, chosen: Sequence[Piece]) -> list[str]:
        """Play what isn't done yet, in order. Return the names of those that failed."""
        failed = []
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, piece in enumerate(chosen, start=1):
            where = f"{number} of {len(chosen)}, {piece.name}"
            if (ended := self.ended(piece)) is not None:
                self.say(f"== {where}: done already")
                if ended != 0:
                    failed.append(piece.name)
                continue
            self.say(f"== {where}")
            began = time.monotonic()
            held = self._play(piece)
            self.say(f"== {where}: {(time.monotonic() - began) / 60:.1f} min")
            if not held:
                failed.append(piece.name)
        return failed

    def _play(self, piece: Piece) -> bool:
        json, state = (self.folder / f"{piece.name}.{kind}" for kind in ("json", "state"))
        files = {"{json}": str(json), "{state}": str(state)}
        command = [files.get(part, part) for part in piece.command]
        self.say(f"   {shlex.join(command)}")
        ended = subprocess.run(command, cwd=ROOT, check=False).returncode
        if ended in (130, -2):
            raise KeyboardInterrupt
        told = ended == 0 or (ended == 1 and piece.failures_are_told)
        if told and json.is_file():
            # A kill between these two takes it once more: taking the same again changes nothing.
            self.taken(piece, json)
            self._done(piece).write_text(str(ended))
        return ended == 0 and json.is_file()

    def _done(self, piece: Piece) -> Path:
        return self.folder / f"{piece.name}.done"


def main(arguments: list[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    everything = pieces(60)
    parser.add_argument("--minutes", type=float, default=60, help="of simulated markets")
    names = [piece.name for piece in everything]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--anew", action="store_true", help="forget what is done on this commit")
    options = parser.parse_args(arguments)
    commit = commit_here()
    folder = STATE / commit
    chosen = [piece for piece in pieces(options.minutes) if piece.name in options.only]
    if options.anew:
        for piece in chosen:
            for left in folder.glob(f"{piece.name}.*"):
                left.unlink()

    def taken(piece: Piece, json: Path) -> None:
        if piece.kind == "storm":
            take_storm(json, commit)
        else:
            assert piece.kind in KINDS
            take(piece.kind, json, commit)
        PAGE.write_text(render())

    runs = Runs(folder, taken, lambda text: print(text, flush=True))
    try:
        failed = runs.play(chosen)
    except KeyboardInterrupt:
        print(f"\nended before its time; started again it goes on ({folder})", file=sys.stderr)
        return 130
    if failed:
        print(f"FAILED at {commit}: {', '.join(failed)}")
        return 1
    print(f"all is done at {commit}, and in {PAGE.relative_to(ROOT)}; --anew begins anew")
    return 0


if __name__ == "__main__":
    sys.exit(main())
