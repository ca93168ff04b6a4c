"""A run that has started once its lease is gone: it is ended, and the agent goes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sublet_agent.adapters.shell import Shell
from sublet_agent.adapters.workspace.workspace import run_id
from sublet_agent.core.runner_port import ResolvedImage

LEASE = "ab" * 32


async def test_a_run_whose_lease_ended_while_it_started_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = SimpleNamespace(image="local/python")
    record = SimpleNamespace(is_over=False, job=job, lease_id=LEASE, stop=None)
    runs = {LEASE: SimpleNamespace(record=record)}
    removed: list[str] = []

    def start(_spec: object) -> None:
        runs.clear()  # as where it is cancelled meanwhile

    unused = cast(Any, None)
    shell = Shell(
        state=tmp_path,
        core=cast(Any, SimpleNamespace(runs=runs)),
        journal=unused,
        spool=unused,
        runner=cast(Any, SimpleNamespace(start=start, remove=removed.append)),
        transfer=unused,
        helper=tmp_path,
        now_ms=lambda: 0,
        say=print,
    )
    shell.images[LEASE] = ResolvedImage("local/python", "local/python")
    workspace = SimpleNamespace(spec=lambda *_: "spec")
    monkeypatch.setattr(shell, "_workspace", lambda _lease: workspace)
    await shell._start(LEASE)
    assert removed == [run_id(LEASE)]
    assert shell.failed is None
    shell.close()
