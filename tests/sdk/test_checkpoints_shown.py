"""`sublet checkpoints`, and how far uploads and downloads are: what people see of it."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from sublet import aio
from sublet.cli.checkpoints import SHOWN, picture
from sublet.cli.main import main
from sublet.cli.top import picture as top_picture
from sublet.terminal.progress import announcing
from sublet.terminal.uploads import short_size, upload_text
from sublet_contracts.api import CheckpointsPage, CheckpointView, JobView, RunUploadView
from sublet_contracts.states import CheckpointState, JobState
from tests.contracts.samples import INDEX
from tests.sdk.market import SCRIPT, SmallMarket
from tests.sdk.test_follow import job, run

Capture = pytest.CaptureFixture[str]
NOW_MS = 1_800_000_000_000
GB = 10**9
MB = 10**6


def saved(step: int, **changes: Any) -> CheckpointView:
    values: dict[str, Any] = {
        **{"id": f"{step:064d}", "kind": "checkpoint", "step": step, "epoch": 1},
        **{"provider": "ed25519-a", "provider_name": "alice", "state": CheckpointState.DURABLE},
        **{"index_digest": INDEX, "total_bytes": 4 * GB, "sent_bytes": 210 * MB},
        **{"stall_ms": 300, "created_ms": NOW_MS - 120_000, "durable_ms": NOW_MS - 119_000},
        **{"durable_after_ms": 5_100, "detail": ""},
    }
    return CheckpointView.model_validate({**values, **changes})


def page(*found: CheckpointView, start: CheckpointView | None = None, total: int = 0) -> str:
    shown = CheckpointsPage(checkpoints=found, resumes_from=start, total=total or len(found))
    return picture(job(JobState.RUNNING, run(1, "alice")), shown, NOW_MS, 80)


def uploading(**changes: Any) -> RunUploadView:
    values: dict[str, Any] = {
        **{"measured_ms": NOW_MS - 1_000, "kind": "checkpoint", "step": 400},
        **{"total_bytes": 4 * GB, "there_bytes": 1_234_567_890, "sent_bytes": 200 * MB},
        **{"bytes_per_s": 210 * MB, "left_ms": 12_170},
    }
    return RunUploadView.model_validate({**values, **changes})


# -- the table -------------------------------------------------------------------------------------


def test_each_is_a_row_and_the_one_to_resume_from_is_marked() -> None:
    newest = saved(400)
    older = saved(350, kept=False, created_ms=NOW_MS - 3_600_000, stall_ms=None)
    text = page(newest, older, start=newest)
    head, first, second, _, mark = text.splitlines()
    assert head.split() == ["STEP", "AGE", "SIZE", "MOVED", "STALL", "TOOK", "STATE", "RUN", "ON"]
    assert first.split() == (
        [
            "→",
            "400",
            *["2", "m", "4", "GB", "210", "MB", "300", "ms", "5.1", "s"],
            "durable",
            "1",
            "alice",
        ]
    )
    assert second.split() == (
        ["350", *["1", "h", "4", "GB", "210", "MB", "-", "5.1", "s"], "pruned", "1", "alice"]
    )
    assert mark == "→ a resume would start from step 400"
    assert {line.index("alice") for line in (first, second)} == {head.index("ON")}


def test_why_one_does_not_count_stands_below_and_cannot_move_the_cursor() -> None:
    hidden = "a.bin is not as DONE says\x1b[2J" + " and so on" * 20
    bad = saved(400, state=CheckpointState.REJECTED, detail=hidden, durable_after_ms=None)
    waits = saved(401, state=CheckpointState.UPLOADED, durable_after_ms=None)
    damaged = saved(399, state=CheckpointState.QUARANTINED, detail="two leases could not")
    text = page(waits, bad, damaged)
    assert "verifying" in text
    assert "\x1b" not in text
    assert "  step 400: rejected: a.bin is not as DONE says" in text
    assert "  step 399: quarantined: two leases could not" in text
    assert "Nothing of it is durable and kept: a resume would start anew." in text
    assert max(map(len, text.splitlines())) <= 80


def test_eighty_columns_hold_the_widest_row() -> None:
    wide = saved(
        9_999_999,
        epoch=999,
        provider_name="a-machine-with-a-name-that-is-long",
        state=CheckpointState.QUARANTINED,
        total_bytes=1_234_000_000_000,
        sent_bytes=999_999_999_999,
        stall_ms=59_000,
        durable_after_ms=200_000,
        detail="x",
    )
    lines = page(wide, wide).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].endswith("…")


def test_how_many_more_there_are_is_said() -> None:
    text = page(*(saved(step) for step in range(SHOWN, 0, -1)), total=1_000)
    assert f"980 older: sublet checkpoints {'0' * 10} --all" in text


def test_a_job_that_has_saved_nothing_says_so() -> None:
    assert page() == "ft has saved no checkpoint yet."
    ended = job(JobState.FAILED, run(1, "alice"))
    nothing = CheckpointsPage(checkpoints=(), resumes_from=None, total=0)
    assert picture(ended, nothing, NOW_MS, 80) == "ft has saved no checkpoint."


# -- what is on its way ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("upload", "says"),
    [
        (uploading(), "checkpoint 400: 1.23 of 4 GB on its way, 210 MB/s, 13 s left"),
        (
            uploading(there_bytes=900 * MB, left_ms=400),
            "checkpoint 400: 900 MB of 4 GB on its way, 210 MB/s, 1 s left",
        ),
        (
            uploading(bytes_per_s=0, left_ms=None, measured_ms=NOW_MS - 40_000),
            "checkpoint 400: 1.23 of 4 GB on its way, told 40 s ago",
        ),
        (
            uploading(kind="partial-outputs", there_bytes=0, bytes_per_s=0, left_ms=None),
            "partial outputs: 0 B of 4 GB on its way",
        ),
    ],
)
def test_an_upload_in_words(upload: RunUploadView, says: str) -> None:
    assert upload_text(upload, NOW_MS) == says


def test_sizes_that_move_have_three_digits() -> None:
    assert [short_size(size) for size in (0, 999, 1_234, 12_345_678, 999_999_999_999)] == [
        *("0 B", "999 B", "1.23 kB", "12.3 MB", "999 GB")
    ]


def test_it_is_seen_in_top_and_above_the_checkpoints() -> None:
    view: JobView = job(JobState.RUNNING, run(1, "alice", upload=uploading()))
    line = "checkpoint 400: 1.23 of 4 GB on its way, 210 MB/s, 13 s left"
    assert top_picture(view, NOW_MS).endswith(f"\n\n{line}")
    nothing = CheckpointsPage(checkpoints=(), resumes_from=None, total=0)
    assert picture(view, nothing, NOW_MS, 80).startswith(line)


# -- progress of this side -------------------------------------------------------------------------


def test_a_pipe_gets_one_line_when_something_large_has_arrived(capsys: Capture) -> None:
    with announcing("sent") as announce:
        on_bytes = announce("base\x1b[2J.bin", 8 * MB)
        on_bytes(5 * MB)
        assert capsys.readouterr().err == ""
        on_bytes(3 * MB)
        announce("small.py", 100)(100)
        announce("broken.bin", 8 * MB)(5 * MB)
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("sent base�[2J.bin: 8 MB in ")
    assert line.endswith("/s")


def test_a_terminal_gets_a_bar_with_speed_and_what_is_left(monkeypatch: Any) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with announcing("sent") as announce:
        on_bytes = announce("a-name-that-is-longer-than-a-line-should-hold.safetensors", 400 * MB)
        for _ in range(3):
            on_bytes(100 * MB)
    drawn = screen.getvalue()
    assert "a-name-that-is-longer-t…" in drawn
    assert "300.0/400.0 MB" in drawn


# -- at a market -----------------------------------------------------------------------------------


async def test_a_real_job_shows_what_it_has_saved(at_market: SmallMarket, capsys: Capture) -> None:
    saving = at_market.client.run(
        "local/python",
        [
            *("python3", "/job/training_job.py", "--steps", "4000", "--every", "5"),
            *("--pace-s", "0.05", "--out", "/out"),
        ],
        gpus="cpu", memory="256MB", disk="256MB", cpus=0.5, max_price=1, budget=1,
        inputs={str(SCRIPT): "/job/training_job.py"}, outputs="/out", name="seen",
        stop_grace="5s",
    )  # fmt: skip
    try:
        while saving.view().durable_step < 15 or saving.checkpoints(limit=1).total <= 5:
            pass
        assert main(["inspect", "seen"]) == 0
        assert f" more: sublet checkpoints {saving.id[:10]}" in capsys.readouterr().out
        assert main(["checkpoints", "seen"]) == 0
        text = capsys.readouterr().out
        assert "→ a resume would start from step " in text
        assert main(["checkpoints", "seen", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["job"] == saving.id
        start = told["resumes_from"]
        assert start["step"] >= 15
        assert start["durable_after_ms"] > 0
        assert start["stall_ms"] is not None
        assert 0 < start["sent_bytes"] <= start["total_bytes"]
        assert start["provider_name"] == "alice"
        twin = await aio.AsyncClient(broker=at_market.local.url).job("seen")
        newest = (await twin.checkpoints(limit=1, kind="checkpoint")).checkpoints
        assert len(newest) == 1
        assert main(["checkpoints", "seen", "extra"]) == 2
    finally:
        saving.cancel()
    assert saving.wait().state == "cancelled"
    assert main(["checkpoints", "seen"]) == 0
    assert "a resume" not in capsys.readouterr().out
