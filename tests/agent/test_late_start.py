"""A run that has started once its lease is gone is ended, and the agent goes on; one that had not
started when its machine was started anew is placed once more."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sublet_agent.adapters.shell import Shell
from sublet_agent.adapters.workspace.workspace import run_id
from sublet_agent.core.run_phases import RunPhase
from sublet_agent.core.runner_port import ResolvedImage, RunStatus

LEASE = "ab" * 32


def shell_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: object, runner: SimpleNamespace
) -> Shell:
    """An agent's shell on a machine that is up for the second time, with this one run."""
    unused = cast(Any, None)
    core = SimpleNamespace(runs={LEASE: SimpleNamespace(record=record)}, boot="second")
    shell = Shell(
        state=tmp_path,
        core=cast(Any, core),
        journal=unused,
        spool=unused,
        runner=cast(Any, runner),
        transfer=unused,
        helper=tmp_path,
        now_ms=lambda: 0,
        say=print,
    )
    shell.images[LEASE] = ResolvedImage("local/python", "local/python")
    workspace = SimpleNamespace(spec=lambda *_: "spec")
    monkeypatch.setattr(shell, "_workspace", lambda _lease: workspace)
    return shell


def record_of(boot: str) -> SimpleNamespace:
    job = SimpleNamespace(image="local/python")
    phase = RunPhase.STARTING
    return SimpleNamespace(
        is_over=False, job=job, lease_id=LEASE, stop=None, phase=phase, boot=boot
    )


async def test_a_run_whose_lease_ended_while_it_started_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []

    def start(_spec: object) -> None:
        cast(Any, shell.core.runs).clear()  # as where it is cancelled meanwhile

    runner = SimpleNamespace(start=start, remove=removed.append)
    shell = shell_of(tmp_path, monkeypatch, record_of("second"), runner)
    await shell._start(LEASE)
    assert removed == [run_id(LEASE)]
    assert shell.failed is None
    shell.close()


@pytest.mark.parametrize(
    ("boot", "state", "done"),
    [
        ("first", "gone", ["placed", "started"]),
        ("first", "created", ["placed", "started"]),
        ("first", "exited", ["started"]),  # which finds that it has run
        ("second", "gone", ["started"]),
    ],
)
async def test_what_a_restart_of_the_machine_may_have_torn_is_placed_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boot: str, state: Any, done: list[str]
) -> None:
    found: list[str] = []
    record = record_of(boot)

    async def restore(_lease: str) -> None:
        found.append("placed")
        record.boot = "second"

    def start(_spec: object) -> None:
        found.append("started")
        cast(Any, shell.core.runs).clear()

    runner = SimpleNamespace(
        start=start, status=lambda _run: RunStatus(state), remove=lambda _run: None
    )
    shell = shell_of(tmp_path, monkeypatch, record, runner)
    monkeypatch.setattr(shell, "_restore", restore)
    await shell._start(LEASE)
    assert found == done
    shell.close()
