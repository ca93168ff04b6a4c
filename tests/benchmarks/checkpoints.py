"""How long a checkpoint takes until it is durable off the machine, beside copies and backups of it.

Ours: a job saves 1 GiB by the protocol, then the same with 5 % changed, with a real agent and a
real broker over loopback; from the call of save to the ack. Each peer has the same content to
write down and to put away in a round of its own: `cp` and `sync`; borg in its best mode; restic.
They take turns, so that a slow spell of the machine hits all of them; the ratio of medians counts.
Each begins with memory that was freed just now: a virtual machine may get what it hasn't used
lately from its host, page by page, and whoever is first would pay for the others.
"""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sublet.client import Client
from sublet.demo.local import LocalMarket
from tests.benchmarks.lane import RoundFailed

ROUNDS = 3
SIZE_BYTES = 1 << 30
BLOCK_BYTES = 1 << 20
FREED_TIMES = 4
"""Two contents at the job's, and what is new of both at the broker's, and some more."""
CHANGED_EACH = 20
"""Of so many blocks one is changed: 5 %."""
FIRST_SPEED_LIMIT = 0.6
"""The first save beside `cp` and `sync`: at least so fast."""
CHANGED_LIMITS = {"borg": 1 / 3, "restic": 1 / 8}
"""The changed one beside these: at most such a part of their time."""
SAVER = Path(__file__).with_name("checkpoint_saver.py")
LIMIT_S = 900.0

Say = Callable[[str], None]


@dataclass
class Measured:
    """Seconds, round by round: the first save and the changed one."""

    first_s: list[float] = field(default_factory=list)
    changed_s: list[float] = field(default_factory=list)

    def add(self, first_s: float, changed_s: float) -> None:
        """Note a round."""
        self.first_s.append(round(first_s, 3))
        self.changed_s.append(round(changed_s, 3))

    @property
    def first(self) -> float:
        """The median."""
        return statistics.median(self.first_s)

    @property
    def changed(self) -> float:
        """The median."""
        return statistics.median(self.changed_s)


@dataclass
class Saves:
    """What was measured."""

    size_bytes: int
    ours: Measured = field(default_factory=Measured)
    peers: dict[str, Measured] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    """Peers that this machine lacks."""

    @property
    def first_speed(self) -> float:
        """Of the first save, as a part of the speed of `cp` and `sync`."""
        return self.peers["cp and sync"].first / self.ours.first

    def changed_ratio(self, peer: str) -> float:
        """Ours as a part of the peer's time."""
        return self.ours.changed / self.peers[peer].changed

    @property
    def holds(self) -> bool:
        """Whether all is within the limits; what is absent was not compared."""
        return self.first_speed >= FIRST_SPEED_LIMIT and all(
            self.changed_ratio(peer) <= limit
            for peer, limit in CHANGED_LIMITS.items()
            if peer in self.peers
        )


def measure(say: Say, rounds: int = ROUNDS, size_bytes: int = SIZE_BYTES) -> Saves:
    """Measure. Raises LocalMarketError, CalledProcessError, OSError."""
    result = Saves(size_bytes)
    putters: dict[str, Callable[[Path, Path], Callable[[Path], None]]] = {"cp and sync": _copying}
    for name, makes in (("borg", _borg), ("restic", _restic)):
        if shutil.which(name):
            putters[name] = makes
        else:
            result.absent.append(name)
    with tempfile.TemporaryDirectory(prefix="sublet-bench-") as folder:
        root = Path(folder)
        market = LocalMarket(root / "market", ray="off")
        try:
            client = _opened(market)
            for number in range(rounds):
                first, second = _contents(root, number, size_bytes)
                _free_memory(root, size_bytes)
                _ours(result, market, client, first, second, number)
                for name, makes in putters.items():
                    place = root / f"{name.split()[0]}-{number}"
                    place.mkdir()
                    put = makes(place, place / "model.bin")
                    measured = result.peers.setdefault(name, Measured())
                    _free_memory(root, size_bytes)
                    measured.add(_seconds(put, first), _seconds(put, second))
                    shutil.rmtree(place)
                say(
                    f"  round {number + 1}: first {result.ours.first_s[-1]:.2f} s, changed "
                    f"{result.ours.changed_s[-1]:.2f} s"
                )
        finally:
            market.stop()
    return result


def _seconds(put: Callable[[Path], None], content: Path) -> float:
    os.sync()
    began = time.perf_counter()
    put(content)
    return time.perf_counter() - began


def _free_memory(root: Path, size_bytes: int) -> None:
    """Use as much memory as a round does, and let go of it."""
    filled, block = root / "filled", bytes(range(256)) * (BLOCK_BYTES // 256)
    with filled.open("wb", buffering=0) as file:
        for _ in range(FREED_TIMES * size_bytes // BLOCK_BYTES):
            file.write(block)
    filled.unlink()


def _opened(market: LocalMarket) -> Client:
    market.start_broker()
    config = Path(market.environment["XDG_CONFIG_HOME"]) / "sublet"
    client = Client(broker=market.url, config_dir=config)
    market.start_agent(
        *("alice", "--runner", "process", "--trust", client.party),
        *("--region", "here", "--image-policy", "any"),
    )
    market.wait_for(lambda: client.offers().offers, "an offer", market.agents["alice"])
    client.fund(client.party, 5, operator_key=market.operator_key)
    return client


def _contents(root: Path, number: int, size_bytes: int) -> tuple[Path, Path]:
    """Write both contents, and read them once: they are in memory for everybody."""
    draw = random.Random(number)
    first, second = root / "first", root / "second"
    with first.open("wb") as one, second.open("wb") as two:
        for block in range(size_bytes // BLOCK_BYTES):
            data = draw.randbytes(BLOCK_BYTES)
            one.write(data)
            two.write(draw.randbytes(BLOCK_BYTES) if block % CHANGED_EACH == 0 else data)
    return first, second


def _ours(
    result: Saves, market: LocalMarket, client: Client, first: Path, second: Path, number: int
) -> None:
    times = first.with_name(f"times-{number}.json")
    os.sync()
    job = client.run(
        "none",
        [sys.executable, str(SAVER), str(first), str(second), str(times)],
        gpus="cpu",
        max_price=1,
        budget=1,
        memory="4GB",
        disk="8GB",
    )
    try:
        market.wait_for(
            lambda: times.exists() or job.view().state in ("failed", "paused"),
            "both saves",
            market.agents["alice"],
            LIMIT_S,
        )
        if not times.exists():
            view = job.view()
            raise RoundFailed(f"the job is {view.state}: {view.reason} {view.says}")
        found = json.loads(times.read_text())
    finally:
        job.cancel()
    result.ours.add(*(save["durable_s"] for save in found))


def _copying(_: Path, target: Path) -> Callable[[Path], None]:
    def put(content: Path) -> None:
        _run("cp", content, target)
        _run("sync", target)

    return put


def _borg(place: Path, target: Path) -> Callable[[Path], None]:
    environment = {"BORG_BASE_DIR": str(place), "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes"}
    archives = iter(("one", "two"))
    _run("borg", "init", "-e", "none", place / "repository", **environment)

    def put(content: Path) -> None:
        _run("cp", content, target)
        options = ("-C", "none", "--chunker-params", "fixed,1048576")
        archive = f"{place / 'repository'}::{next(archives)}"
        _run("borg", "create", *options, archive, target, **environment)

    return put


def _restic(place: Path, target: Path) -> Callable[[Path], None]:
    environment = {"RESTIC_PASSWORD": "bench", "RESTIC_CACHE_DIR": str(place / "cache")}
    at = ("-q", "-r", place / "repository")
    _run("restic", *at, "init", **environment)

    def put(content: Path) -> None:
        _run("cp", content, target)
        _run("restic", *at, "backup", target, **environment)

    return put


def _run(*command: str | Path, **environment: str) -> None:
    subprocess.run(
        [str(part) for part in command],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


def report(result: Saves) -> list[str]:
    """Return the lines to print."""
    ours = result.ours
    lines = [
        f"  ours: {ours.first:.2f} s to durable at first, {ours.changed:.2f} s with 5 % changed "
        f"({result.size_bytes >> 20} MiB, median of {len(ours.first_s)})"
    ]
    for name, theirs in result.peers.items():
        lines.append(
            f"  {name}: {theirs.first:.2f} s, {theirs.changed:.2f} s; ours / theirs = "
            f"{ours.first / theirs.first:.2f}, {ours.changed / theirs.changed:.2f}"
        )
    lines.append(
        f"  first, as a part of the speed of cp and sync: {result.first_speed:.2f} (at least "
        f"{FIRST_SPEED_LIMIT}: {_says(result.first_speed >= FIRST_SPEED_LIMIT)})"
    )
    for peer, limit in CHANGED_LIMITS.items():
        if peer in result.absent:
            lines.append(f"  {peer} is not installed here: not compared")
            continue
        ratio = result.changed_ratio(peer)
        lines.append(
            f"  5 % changed / {peer}: {ratio:.2f} (at most {limit:.2f}: {_says(ratio <= limit)})"
        )
    return lines


def _says(holds: bool) -> str:
    return "holds" if holds else "DOES NOT HOLD"
