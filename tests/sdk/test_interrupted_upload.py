"""An upload that was cut off goes on where it stopped: only what is missing is sent again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sublet.transfers import PARALLEL, upload_inputs
from sublet_contracts.tree import CHUNK_BYTES
from tests.sdk.market import SmallMarket

CHUNKS = 64
SENT_FIRST = PARALLEL + 2
LIMIT_S = 60.0
IN_SMALL_PACKS = """
import sys
from sublet.cli.main import main
from sublet_contracts import packs, tree
packs.PACK_BYTES = tree.CHUNK_BYTES
sys.exit(main())
"""


def blobs(market: SmallMarket) -> set[str]:
    """The whole packs that the broker holds, here of one chunk each, and indexes."""
    root = market.local.root / "broker" / "blobs"
    whole = [path for path in root.rglob("*") if path.is_file() and path.parent.name != "tmp"]
    return {path.name for path in whole if len(path.name) == 64}


def start_sending(market: SmallMarket, content: Path) -> subprocess.Popen[bytes]:
    """Run `sublet run --input` with this content."""
    command = ["run", "-y", "-d", "--gpus", "cpu", "--max-price", "1", "--budget", "1"]
    command += ["--memory", "100MB", "--disk", "1GB", "--input", f"{content}:/data"]
    return subprocess.Popen(
        [sys.executable, "-c", IN_SMALL_PACKS, *command, "process", "true"],
        env=market.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def announced(market: SmallMarket, content: Path) -> int:
    """Send the rest; return how many bytes were announced as missing."""
    sizes: list[int] = []

    def announce(what: str, total_bytes: int) -> Callable[[int], None]:
        sizes.append(total_bytes)
        return lambda count: None

    upload_inputs(market.client.link, {str(content): "/data"}, announce)
    return sum(sizes)


def one_file(folder: Path) -> Path:
    content = folder / "data.bin"
    content.write_bytes(os.urandom(CHUNKS * CHUNK_BYTES))
    return content


def many_files(folder: Path) -> Path:
    content = folder / "data"
    content.mkdir()
    for number in range(CHUNKS):
        (content / f"part-{number}").write_bytes(os.urandom(CHUNK_BYTES))
    return content


@pytest.mark.parametrize(
    ("make", "dies"), [(one_file, "client"), (many_files, "broker")], ids=["client", "broker"]
)
def test_only_what_is_missing_is_sent_again(
    at_market: SmallMarket, tmp_path: Path, make: Callable[[Path], Path], dies: str
) -> None:
    market, content = at_market, make(tmp_path)
    before = blobs(market)
    sending = start_sending(market, content)
    try:
        market.local.wait_for(
            lambda: len(blobs(market) - before) >= SENT_FIRST, "chunks at the broker"
        )
        if dies == "broker":
            assert market.local.broker is not None
            market.local.broker.kill()
    finally:
        sending.kill()
        sending.wait(LIMIT_S)
    if dies == "broker":
        market.local.restart_broker()
        market.local.wait_for(lambda: market.client.offers().offers, "the agent again")
    there = len(blobs(market) - before)
    # Those that were under way when the broker died it doesn't know of.
    assert SENT_FIRST - PARALLEL <= there < CHUNKS, "it was cut off in the middle"
    rest = announced(market, content)
    assert rest <= (CHUNKS - there) * CHUNK_BYTES
    assert announced(market, content) == 0
