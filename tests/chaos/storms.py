"""The storms by name: what each can be told on the command line, and what it needs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos import loop_disk, namespaces, postgres
from tests.chaos.blackout import Blackout
from tests.chaos.churn import Say
from tests.chaos.clocks import ClockSteps
from tests.chaos.failing_disks import FailingDisks
from tests.chaos.killed_database import KilledDatabase
from tests.chaos.partitions import Partitions
from tests.chaos.rolling import RollingRestart
from tests.chaos.rough_network import RoughNetwork
from tests.chaos.stage import Stage

Option = tuple[Callable[[str], Any], Any, str]
"""Its type, its default, its help."""


def _never() -> str | None:
    return None


@dataclass(frozen=True)
class Storm:
    """One of them."""

    says: str
    stage: Callable[..., Stage]
    options: Mapping[str, Option] = field(default_factory=dict)
    missing: Callable[[], str | None] = _never

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Add its options."""
        parser.add_argument("--seed", type=int, default=1)
        for name, (kind, default, says) in self.options.items():
            if kind is bool:
                parser.add_argument(f"--{name}", action="store_true", help=says)
            else:
                parser.add_argument(f"--{name}", type=kind, default=default, help=says)

    def make(self, options: argparse.Namespace, root: Path, say: Say) -> Stage:
        """Return it as it was asked for. Raises SystemExit where something is missing."""
        if (why := self.missing()) is not None:
            raise SystemExit(why)
        chosen = {name: getattr(options, name) for name in self.options}
        return self.stage(root, options.seed, say, **chosen)

    def command(self, name: str, options: argparse.Namespace) -> str:
        """Return the command that plays it again."""
        words = [f"python -m tests.chaos {name}"]
        for option, (kind, default, _) in self.options.items():
            value = getattr(options, option)
            if value != default:
                words.append(f"--{option}" if kind is bool else f"--{option} {value}")
        return " ".join([*words, f"--seed {options.seed}"])


def _partitions(root: Path, seed: int, say: Say, *, rounds: int) -> Stage:
    return Partitions(root, seed, say, ways=("is not heard", "hears nothing"), rounds=rounds)


STORMS = {
    "network": Storm(
        "Everything goes through delaying, cutting, swallowing proxies.",
        RoughNetwork,
        {"jobs": (int, 8, "how many"), "patience": (str, "20s", "the jobs'")},
    ),
    "blackout": Storm(
        "The broker is gone for minutes; agents compute on.",
        Blackout,
        {
            "minutes": (float, 15.0, "how long"),
            "patience": (str, "20s", "the jobs'"),
            "still": (bool, False, "the broker is stopped by SIGSTOP, not killed"),
        },
    ),
    "rolling": Storm(
        "The broker is restarted by SIGTERM again and again, under load.",
        RollingRestart,
        {"times": (int, 10, "how often"), "patience": (str, "20s", "the jobs'")},
    ),
    "partitions": Storm(
        "Agents in network namespaces are cut off, also in one direction only.",
        _partitions,
        {"rounds": (int, 2, "how often each")},
        namespaces.missing,
    ),
    "disks": Storm(
        "The broker's and a provider's file system fail and become read-only.",
        FailingDisks,
        {"rounds": (int, 2, "how often each")},
        loop_disk.missing,
    ),
    "clocks": Storm(
        "Wall clocks jump by minutes and days while jobs run.",
        ClockSteps,
        {},
    ),
    "database": Storm(
        "PostgreSQL's sessions and server are killed; it stays away for long.",
        KilledDatabase,
        {"kills": (int, 5, "how often each"), "away_s": (float, 30.0, "for how long")},
        postgres.missing,
    ),
}
