"""How long `import sublet` and `sublet --help` take, beside the same of modal, in turns.

Each is a process of its own; the four take turns, so that a slow spell of the machine hits all of
them. The ratio of medians is what counts: the machine's own speed cancels out.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROUNDS = 15
IMPORT_RATIO_LIMIT = 1 / 5
HELP_RATIO_LIMIT = 1 / 3


@dataclass(frozen=True)
class Comparison:
    """Ours beside the peer's, seconds of wall time (medians)."""

    what: str
    ours_s: float
    peer_s: float
    limit: float

    @property
    def ratio(self) -> float:
        """Ours as a part of the peer's."""
        return self.ours_s / self.peer_s

    @property
    def holds(self) -> bool:
        """Whether it's within the limit."""
        return self.ratio <= self.limit


def _seconds(command: list[str], environment: dict[str, str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - began


def measure(rounds: int = ROUNDS) -> list[Comparison]:
    """Return both comparisons. Raises CalledProcessError if a peer isn't installed."""
    python = sys.executable
    folder = Path(python).parent
    commands = {
        "bare": [python, "-c", "pass"],
        "ours": [python, "-c", "import sublet"],
        "peer": [python, "-c", "import modal"],
        "our help": [str(folder / "sublet"), "--help"],
        "peer help": [str(folder / "modal"), "--help"],
    }
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "HOME": home, "XDG_CONFIG_HOME": home}
        for command in commands.values():
            _seconds(command, environment)
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                times[name].append(_seconds(command, environment))
    median = {name: statistics.median(values) for name, values in times.items()}
    # An import is what it adds to a bare interpreter; --help is what a person waits for, whole.
    bare = median["bare"]
    return [
        Comparison(
            "import sublet / import modal (above a bare interpreter)",
            max(median["ours"] - bare, 0.0),
            median["peer"] - bare,
            IMPORT_RATIO_LIMIT,
        ),
        Comparison(
            "python -c 'import sublet' / 'import modal' (whole process)",
            median["ours"],
            median["peer"],
            IMPORT_RATIO_LIMIT,
        ),
        Comparison(
            "sublet --help / modal --help",
            median["our help"],
            median["peer help"],
            HELP_RATIO_LIMIT,
        ),
    ]


def report(comparisons: list[Comparison]) -> list[str]:
    """Return the lines to print."""
    return [
        f"  {c.what}: {c.ours_s * 1000:.0f} ms / {c.peer_s * 1000:.0f} ms = {c.ratio:.3f} "
        f"(at most {c.limit:.3f}: {'holds' if c.holds else 'DOES NOT HOLD'})"
        for c in comparisons
    ]
