"""What a script's folder held at each moment of a run (`tests/e2e/watched.py`), and what the agent
would take of it if the run had been killed there."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sublet_agent.adapters.workspace.outputs_search import OutputsSearch
from sublet_contracts.checkpoint_layouts import QUIET_MS, Snapshot

WATCHED = Path(__file__).parents[1] / "e2e" / "watched.py"
SCRIPTS = WATCHED.parent / "scripts"
JUST_NOW_S = 0.05
SLOWER = 100
QUIET_S = QUIET_MS / 1000 + 1


@dataclass(frozen=True)
class State:
    """The folder at one moment."""

    folder: Path
    at_rest: bool
    """whether nothing was being saved"""

    def found(self, age_s: float) -> Snapshot | None:
        """Return what is found if the newest file was written so long ago, and the run is over."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        newest_ns = max((path.stat().st_mtime_ns for path in files), default=0)
        shift_ns = time.time_ns() - int(age_s * 1e9) - newest_ns
        for path in files:
            at_ns = path.stat().st_mtime_ns + shift_ns
            os.utime(path, ns=(at_ns, at_ns))
        top = os.open(self.folder, os.O_RDONLY)
        try:
            return OutputsSearch().newest(
                top, after_step=0, last_mtime_ms=-1, quiet_ms=0, since_ms=0
            )
        finally:
            os.close(top)

    def taken(self, age_s: float) -> dict[str, str] | None:
        """Return the same as what each file of it holds; None: nothing is found."""
        found = self.found(age_s)
        if found is None:
            return None
        return {
            file.path: hashlib.sha256((self.folder / file.path).read_bytes()).hexdigest()
            for file in found.files
        }

    def beside(self, taken: Iterable[str]) -> dict[str, str]:
        """Return what all files hold that lie in the folders of those."""
        folders = {os.path.dirname(path) for path in taken}
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
            if os.path.dirname(name := str(path.relative_to(self.folder))) in folders
        }

    def newest(self) -> str:
        """Return the path in it of the file that was written last; '': it has none."""
        # Orbax writes one for people, and nobody reads it.
        files = [
            path
            for path in self.folder.rglob("*")
            if path.is_file() and path.name != "commit_success.txt"
        ]
        if not files:
            return ""
        return str(max(files, key=lambda p: p.stat().st_mtime_ns).relative_to(self.folder))

    def torn(self, aside: Path) -> "State":
        """Return it with its newest file cut in half."""
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(self.folder, aside)
        newest = aside / self.newest()
        info = newest.stat()
        os.truncate(newest, info.st_size // 2)
        os.utime(newest, ns=(info.st_mtime_ns, info.st_mtime_ns))
        return State(aside, at_rest=False)


def run_watched(place: Path, script: str, *arguments: str) -> list[State]:
    """Run a script with FOLDER among its arguments; return what its folder held, in order."""
    folder, states = place / "out", place / "states"
    given = [str(folder) if argument == "FOLDER" else argument for argument in arguments]
    folder.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, str(WATCHED), str(folder), str(states), str(SCRIPTS / script), *given],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder, states / "end.rest")
    return states_in(states)


def states_in(folder: Path) -> list[State]:
    """Return the states that were kept, with more time between their saves, as a script has that
    makes real steps."""
    for state in folder.iterdir():
        files = [path for path in state.rglob("*") if path.is_file()]
        newest_ns = max((path.stat().st_mtime_ns for path in files), default=0)
        for path in files:
            at_ns = newest_ns - (newest_ns - path.stat().st_mtime_ns) * SLOWER
            os.utime(path, ns=(at_ns, at_ns))
    return [State(path, path.name.endswith(".rest")) for path in sorted(folder.iterdir())]


def assert_only_whole(states: list[State], aside: Path) -> list[dict[str, str]]:
    """Assert that whenever the run had been killed, nothing would be taken but what its script had
    wholly saved: as it was when nothing was being saved, or in the end. Return what it had saved
    when nothing was being saved, in order."""
    saved: list[dict[str, str]] = []
    for state in states:
        taken = state.taken(QUIET_S) if state.at_rest else None
        if taken is not None and taken not in saved:
            saved.append(taken)
    before = ""
    for state in states:
        newest = state.newest()
        # What is merely deleted between two states tears nothing.
        tears = newest not in ("", before) or state.at_rest
        before = newest
        for each in (state, state.torn(aside)) if newest and tears else (state,):
            taken = each.taken(JUST_NOW_S)
            whole = taken is None or taken in saved or taken == states[-1].beside(taken)
            assert whole, (each.folder.name, state.folder.name, taken)
    return saved
