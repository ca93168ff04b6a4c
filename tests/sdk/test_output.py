"""A job's output as it is shown: finished lines, and those that are redrawn in their place."""

import io
import time
from typing import Any

import pytest

from sublet.cli.top import figures, picture
from sublet.errors import no_answer
from sublet.terminal.detaching import detached, detached_text
from sublet.terminal.follow import LiveScreen
from sublet.terminal.next_steps import status_text
from sublet.terminal.output import Output
from sublet_contracts.api import JobLogLine, JobView, NextStep
from sublet_contracts.documents import Resources
from sublet_contracts.reasons import Reason
from sublet_contracts.states import JobState, RunState
from tests.sdk.test_follow import job, run

WIPE = "\r\x1b[K"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def line(text: str, stream: str = "stdout", *, unfinished: bool = False) -> JobLogLine:
    return JobLogLine(
        cursor=1, epoch=1, number=0, time_ms=1, stream=stream, text=text, unfinished=unfinished
    )


def state(text: str, stream: str = "stderr") -> JobLogLine:
    return line(text, stream, unfinished=True)


def on_screen(written: str) -> list[str]:
    """Return what a terminal shows after these bytes: carriage returns and wiped lines done."""
    lines = [""]
    for piece in written.replace(WIPE, "\0").replace("\n", "\1").replace("\r", "\0"):
        if piece == "\0":
            lines[-1] = ""
        elif piece == "\1":
            lines.append("")
        else:
            lines[-1] += piece
    return lines


def test_on_a_terminal_a_bar_stays_below_the_lines_that_come_meanwhile() -> None:
    both = Terminal()
    output = Output(both, both)
    output.show(line("begins"))
    output.show(state("10%"))
    assert on_screen(both.getvalue()) == ["begins", "10%"]
    output.show(state("20%\x1b[2J"))
    output.show(line("step 7"))
    assert on_screen(both.getvalue()) == ["begins", "step 7", "20%�[2J"]
    output.note("--- run 2 goes on ---")
    assert on_screen(both.getvalue())[-2:] == ["--- run 2 goes on ---", "20%�[2J"]
    output.show(line("100%", "stderr"))
    output.close()
    assert on_screen(both.getvalue())[-3:] == ["--- run 2 goes on ---", "100%", ""]


def test_a_state_that_is_wiped_leaves_nothing_and_a_last_one_stays() -> None:
    screen = Terminal()
    output = Output(screen, screen)
    output.show(state("Continue?"))
    output.show(state(""))
    assert on_screen(screen.getvalue()) == [""]
    output.show(state("Continue?"))
    output.close()
    assert on_screen(screen.getvalue()) == ["Continue?", ""]


def test_a_state_is_clipped_to_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    screen = Terminal()
    Output(screen, screen).show(state("x" * 50))
    assert on_screen(screen.getvalue()) == ["x" * 18 + "…"]


def test_a_pipe_gets_what_the_job_wrote() -> None:
    out, err = io.StringIO(), io.StringIO()
    output = Output(out, err)
    output.show(line("\x1b[31mred"))
    output.show(state("10%"))
    output.show(state("20%"))
    output.show(line("plain"))
    output.show(line("100%", "stderr"))
    output.show(line("end", "stderr"))
    output.show(state("more"), stamp="08:00  ")
    output.close()
    assert out.getvalue() == "\x1b[31mred\nplain\n"
    assert err.getvalue() == "\r10%\r20%\r100%\nend\n\r08:00  more\n"


def test_a_followed_job_draws_its_unfinished_lines_above_the_status() -> None:
    drawn: list[Any] = []
    scrolled: list[str] = []
    screen = LiveScreen(drawn.append, lambda text, style: scrolled.append(text))
    screen.status(job(JobState.RUNNING, run(1, "alice")), 0.0)

    def texts() -> list[str]:
        return [str(part) for part in drawn[-1].renderables]

    screen.output(state("10%"))
    assert texts()[0] == "10%"
    screen.output(line("100%", "stderr"))
    assert scrolled == ["100%"]
    assert "10%" not in texts()


# -- leaving ---------------------------------------------------------------------------------------


def test_whoever_leaves_is_told_how_the_job_stands_and_the_way_back() -> None:
    running = job(JobState.RUNNING, run(1, "alice"), says="runs, step 5 of 10", charged_ucr=20_000)
    assert detached_text(running) == (
        "detached, and it goes on; ft is running: runs, step 5 of 10; charged 0.02 of 1.00. "
        "Back: sublet logs -f 0000000000  End it: sublet cancel 0000000000"
    )
    queued = job(JobState.QUEUED, says="waits for a machine, number 3 in line for a GPU")
    assert detached_text(queued).startswith(
        "detached, and it stays in line; ft is queued: waits for a machine, number 3 in line"
    )
    over = job(JobState.SUCCEEDED, says="finished")
    assert "ft is succeeded: finished; charged 0.00 of 1.00" in detached_text(over)
    assert "sublet logs -f" not in detached_text(over)
    paused = job(JobState.PAUSED, says="by its renter", next_step=NextStep.RESUME, durable_step=3)
    assert detached_text(paused).endswith(
        "ft is paused: by its renter; sublet resume goes on from the last checkpoint; "
        "charged 0.00 of 1.00. Go on: sublet resume 0000000000"
    )


def test_where_the_broker_is_away_nothing_is_claimed() -> None:
    class Away:
        id = "0" * 64

        def view(self) -> JobView:
            raise no_answer("http://there", "refused")

    assert detached(Away()) == (
        "detached; how the job stands is not known: The broker doesn't answer. "
        "Ask later: sublet inspect 0000000000"
    )


# -- what a job lacked -----------------------------------------------------------------------------


def test_a_job_that_wanted_more_is_told_which_option() -> None:
    need = Resources(devices=1, device_kind="cpu", memory_bytes=5 * 10**8, disk_bytes=10**8)
    memory = job(
        JobState.FAILED,
        reason=Reason.OUT_OF_MEMORY,
        resources=need,
        says="the job used more memory than it asked for (502.9 MB were in use at the peak, "
        "500 MB asked for)",
    )
    assert status_text(memory) == f"{memory.says}; submit it again with --memory above 500 MB"
    disk = memory.model_copy(update={"reason": Reason.DISK_LIMIT, "says": "it wrote too much"})
    assert status_text(disk) == "it wrote too much; submit it again with --disk above 100 MB"
    failed = memory.model_copy(update={"reason": Reason.JOB_FAILED})
    assert status_text(failed) == failed.says


def test_a_resume_without_anything_saved_is_not_called_going_on() -> None:
    paused = job(JobState.PAUSED, says="by its renter", next_step=NextStep.RESUME)
    assert status_text(paused) == (
        "by its renter; sublet resume starts it over: nothing that could be resumed was saved"
    )


# -- top -------------------------------------------------------------------------------------------

NOW_MS = time.time_ns() // 1_000_000
USAGE = {
    **{"measured_ms": NOW_MS - 2_400, "cpu_millis": 1_250, "memory_bytes": 800_000_000},
    **{"peak_memory_bytes": 10**9, "memory_limit_bytes": 2 * 10**9, "disk_bytes": 12_000_000},
    **{"disk_limit_bytes": 10**10},
}
GPUS = [
    {"id": "GPU-0", "utilization_percent": 97, "memory_used_bytes": 10**10, "memory_bytes": None},
    {"id": "GPU-1", "memory_used_bytes": None},
]


def test_top_shows_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    view = job(JobState.RUNNING, run(2, "ali\x1bce", usage={**USAGE, "devices": GPUS}))
    head, blank, *rows = picture(view, NOW_MS).splitlines()
    assert (head, blank) == ("ft (0000000000)  running: so it is", "")
    assert [row.split("  ")[-1].strip() for row in rows[:2]] == ["AGE", "2.4 s"]
    cells = [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in rows]
    assert cells == [
        ["RUN", "ON", "GPU", "GPU MEMORY", "CPU", "MEMORY", "PEAK", "DISK", "AGE"],
        [
            *("2", "ali�ce", "97 %", "10 GB", "1.25 cores", "800 MB of 2 GB", "1 GB"),
            *("12 MB of 10 GB", "2.4 s"),
        ],
        ["-", "-"],
    ]
    said = figures(view)
    assert said["run"] == 2
    assert said["usage"]["devices"][0]["utilization_percent"] == 97  # type: ignore[index]


def test_top_says_where_nothing_is_known() -> None:
    view = job(JobState.RUNNING, run(1, "alice", usage={"measured_ms": NOW_MS}))
    assert picture(view, NOW_MS).splitlines()[-1].split() == [
        *("1", "alice", "-", "-", "-", "-", "-", "-", "0", "s"),
    ]
    fresh = job(JobState.RUNNING, run(1, "alice"))
    assert "has told no figures yet" in picture(fresh, NOW_MS)
    assert figures(fresh)["usage"] is None
    over = job(JobState.FAILED, run(1, "alice", run_state=RunState.EXITED, usage=USAGE))
    assert "No run is under way" in picture(over, NOW_MS)
    assert figures(over)["run"] is None
    assert "No run is under way" in picture(job(JobState.QUEUED), NOW_MS)
