"""The owner's door."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

from sublet_agent.adapters.owner.control import Control, ask_agent


async def test_an_owner_is_told_when_the_disk_takes_nothing(tmp_path: Path) -> None:
    def answer(_asked: dict[str, Any]) -> dict[str, Any]:
        raise sqlite3.OperationalError("disk I/O error")

    control = Control(tmp_path, answer)
    await control.open()
    try:
        said = await asyncio.to_thread(ask_agent, tmp_path, {"command": "reclaim"})
    finally:
        await control.close()
    assert "disk I/O error" in said["error"]
    assert "start it again" in said["error"]
