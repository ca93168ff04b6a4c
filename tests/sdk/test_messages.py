"""What people are told when something is not as they meant it: the words, on a real market."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from sublet.cli.jobs import image_lines, stall_lines
from sublet.cli.main import main
from sublet.client import Job
from sublet_contracts.api import JobView, RunStallView, RunView
from tests.sdk.market import SmallMarket

TERMS = ["--gpus", "cpu", "--max-price", "1", "--budget", "1"]
SMALL = [*TERMS, "--memory", "256MB", "--disk", "256MB", "--cpus", "0.5", "--stop-grace", "1s"]
SLEEPS = ["local/python", "python3", "-c", "import time; time.sleep(600)"]

Capture = pytest.CaptureFixture[str]


def said(capsys: Capture, *arguments: str, code: int = 1) -> list[str]:
    """Run a command that fails; return the lines of its error and its fix."""
    assert main(list(arguments)) == code
    lines = capsys.readouterr().err.splitlines()
    return [line.strip() for line in lines if line.startswith(("error: ", "  fix: "))]


@contextmanager
def asleep(market: SmallMarket, capsys: Capture, name: str) -> Iterator[Job]:
    """A job that holds the only machine."""
    assert main(["run", *SMALL, "--name", name, "-y", "-d", *SLEEPS]) == 0
    job = market.client.job(capsys.readouterr().out.strip())
    try:
        until(lambda: job.view().state == "running")
        yield job
    finally:
        job.cancel()
        until(lambda: job.view().state == "cancelled")


def until(holds: object) -> None:
    deadline = time.monotonic() + 60
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_name_that_cannot_be_one(at_market: SmallMarket, capsys: Capture) -> None:
    run = ["run", *SMALL, "-y", "--name"]
    assert said(capsys, *run, "my job!", *SLEEPS, code=2) == [
        "error: --name: it holds what may not stand there",
        "fix: use letters, digits, spaces and . _ / : @ + -, with a letter or a digit first",
    ]
    assert said(capsys, *run, "x" * 200, *SLEEPS, code=2) == [
        "error: --name: it is too long",
        "fix: at most 128 characters fit",
    ]


def test_a_state_that_there_is_not(at_market: SmallMarket, capsys: Capture) -> None:
    assert said(capsys, "ps", "--state", "bogus") == [
        "error: --state: 'bogus' is not a job's state",
        "fix: one of queued, starting, running, recovering, paused, succeeded, failed, cancelled",
    ]
    assert main(["ps", "--state", "running"]) == 0


def test_a_command_that_needs_a_shell_and_one_that_does_not(
    at_market: SmallMarket, capsys: Capture
) -> None:
    run = ["run", *SMALL, "-y", "--name", "one string", "local/python"]
    assert said(capsys, *run, "python3 a.py && python3 b.py", code=1) == [
        "error: command: '&&' is for a shell, and none reads the command",
        "fix: write it as sh -c 'python3 a.py && python3 b.py'",
    ]
    assert main([*run, "python3 -c 'print(6 * 7)'"]) == 0
    assert capsys.readouterr().out == "42\n"


def test_https_where_http_is_spoken(
    at_market: SmallMarket, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = at_market.local.url.removeprefix("http://")
    assert said(capsys, "ps", "--broker", f"https://{address}") == [
        f"error: https://{address} doesn't speak https: "
        "what answers there speaks http, as it seems",
        f"fix: write http://{address} (--broker, SUBLET_BROKER)",
    ]


class _SpeaksHttps(BaseHTTPRequestHandler):
    """Answers as servers of https do whom one speaks to in http."""

    def do_GET(self) -> None:
        body = b"<center>The plain HTTP request was sent to HTTPS port</center>"
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def test_http_where_https_is_spoken(at_market: SmallMarket, capsys: Capture) -> None:
    with HTTPServer(("127.0.0.1", 0), _SpeaksHttps) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert said(capsys, "ps", "--broker", url) == [
            "error: what answers there speaks https, and was spoken to in http",
            "fix: write its URL with https:// (--broker, SUBLET_BROKER)",
        ]
        server.shutdown()


def test_who_waits_in_line_and_who_does_not(at_market: SmallMarket, capsys: Capture) -> None:
    run = ["run", *SMALL, "-y", "-d", "--name"]
    with asleep(at_market, capsys, "first"):
        assert said(capsys, *run, "hasty", "--no-wait", *SLEEPS) == [
            "error: the only machine that would do is busy",
            "fix: leave out --no-wait, and it waits in line",
        ]
        jobs = []
        for name, words in (
            ("second", "It will be the first in line."),
            ("third", "It will be number 2 in line: 1 job is before it."),
        ):
            # What may be said of it as well is what happens anyway.
            assert main([*run, name, "--wait", *SLEEPS]) == 0
            shown = capsys.readouterr()
            assert f"the only machine that would do is busy\n{words}\n" in shown.err
            job = at_market.client.job(shown.out.strip())
            until(lambda job=job: job.view().place_in_line is not None)
            jobs.append(job)
        assert jobs[0].view().says == "waits for a machine, next in line for a CPU"
        assert jobs[1].view().says == "waits for a machine, number 2 in line for a CPU"
        assert main(["cancel", *(job.id for job in jobs)]) == 0
        capsys.readouterr()
    # A wish that nothing here meets is queued too, and it is said what would be met at once.
    assert main([*run, "wish", "--gpus", "8x80GB", *SLEEPS]) == 0
    shown = capsys.readouterr()
    assert "no offer fits, of 1 on the market" in shown.err
    assert "to be taken by what is there: allow a cpu as device (--gpus cpu)" in shown.err
    assert main(["cancel", shown.out.strip()]) == 0


def test_a_budget_is_not_lowered_and_a_pause_is_said_once(
    at_market: SmallMarket, capsys: Capture
) -> None:
    with asleep(at_market, capsys, "thrifty") as job:
        assert said(capsys, "resume", "thrifty", "--budget", "0.5") == [
            "error: --budget: the budget is 1.00 already and can't be lowered",
            "fix: name a higher total; to spend less, sublet pause or sublet cancel",
        ]
        assert main(["pause", "-y", "thrifty"]) == 0
        assert job.wait().state == "paused"
        capsys.readouterr()
        assert main(["inspect", "thrifty"]) == 0
        head, *rest = capsys.readouterr().out.splitlines()
        assert head == (
            "thrifty  paused: by its renter; sublet resume starts it over: nothing that could be "
            "resumed was saved"
        )
        [wants] = [line for line in rest if line.startswith("wants")]
        assert "0.5 cores" in wants
        assert main(["events", "thrifty"]) == 0
        events = capsys.readouterr().out
    assert " ucr" not in events
    assert "device-ms" not in events
    paid = r"money +sealed → settled +paused_by_renter 0\.\d+ charged for .* of device time"
    assert re.search(paid, events)
    assert re.search(r"job +queued +1\.00 held", events)


def test_one_core_is_one(at_market: SmallMarket, capsys: Capture) -> None:
    run = ["run", *SMALL, "-y", "-d", "--cpus", "1", "--name", "one core", *SLEEPS]
    assert main(run) == 0
    job = capsys.readouterr().out.strip()
    assert main(["inspect", job]) == 0
    assert "1x CPU, 1 core, " in capsys.readouterr().out
    assert main(["cancel", job]) == 0


def test_what_a_job_lacked_is_named_with_what_it_used(
    at_market: SmallMarket, capsys: Capture
) -> None:
    grows = "held = []\nwhile True: held.append(bytearray(b'x' * 10_000_000))"
    run = ["run", *SMALL, "-y", "local/python", "python3", "-c"]
    assert main([*run, grows]) == 100
    told = capsys.readouterr().err
    found = re.search(r"\(([0-9.]+) MB were in use at the peak, 256 MB asked for\)", told)
    assert found is not None, told
    assert float(found[1]) >= 256
    assert "submit it again with --memory above 256 MB" in told

    fills = (
        "import os, time\n"
        "for n in range(40):\n"
        "    file = os.environ['SUBLET_CHECKPOINT_DIR'] + f'/out/{n}.tmp'\n"
        "    open(file, 'wb').write(bytes(10_000_000))\n"
        "time.sleep(600)\n"
    )
    assert main([run[0], *SMALL, "--disk", "100MB", *run[-4:], fills]) == 100
    told = capsys.readouterr().err
    assert re.search(r"\([0-9.]+ MB were on disk, 100 MB were asked for\)", told), told
    assert "submit it again with --disk above 100 MB" in told


def test_a_bar_is_seen_while_it_grows_and_is_one_line_afterwards(
    at_market: SmallMarket, tmp_path: Path, capsys: Capture, request: pytest.FixtureRequest
) -> None:
    """Case 09: carriage returns and no line feed."""
    gate = tmp_path / "gate"
    bar = (
        "import os, sys, time\n"
        "for n in range(60):\n"
        "    sys.stderr.write('\\r épo: %3d%%|████▌ | %d/60' % (n * 100 // 60, n))\n"
        "    sys.stderr.flush()\n"
        "    while n == 30 and not os.path.exists(sys.argv[1]): time.sleep(0.05)\n"
        "print('\\nend', flush=True)\n"
    )
    run = ["run", *SMALL, "-y", "-d", "--name", "bar", "local/python", "python3", "-c", bar]
    assert main([*run, str(gate)]) == 0
    job = at_market.client.job(capsys.readouterr().out.strip())

    def shown() -> str:
        assert main(["logs", "bar"]) == 0
        return capsys.readouterr().err

    # Whatever is wrong, the market's one machine is there for the next test.
    request.addfinalizer(lambda: None if job.view().ended_ms else job.cancel())
    until(lambda: shown() == "\r épo:  50%|████▌ | 30/60\n")
    assert [line.text for line in job.logs(unfinished=True)] == [" épo:  50%|████▌ | 30/60"]
    assert list(job.logs()) == []

    def used() -> str:
        assert main(["top", "bar"]) == 0
        return capsys.readouterr().out

    until(lambda: "MB of 256 MB" in used())
    gate.touch()
    assert job.wait().state == "succeeded"
    lines = [(line.stream, line.text) for line in job.logs(unfinished=True)]
    assert sorted(lines) == [
        *(("stderr", " épo:  98%|████▌ | 59/60"), ("stdout", ""), ("stdout", "end")),
    ]
    assert [line.text for line in job.logs(tail=1)] in (["end"], [" épo:  98%|████▌ | 59/60"])
    assert main(["logs", "bar", "--run", "2"]) == 102
    error = capsys.readouterr().err
    assert "error: --run: the job has no run 2; it has had 1" in error
    assert "fix: sublet inspect JOB lists its runs" in error


class Screen:
    """What is shown on a pseudo-terminal, read as it comes."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self.shown = b""
        self.thread = Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        with suppress(OSError):  # its last process has gone
            while chunk := os.read(self._terminal, 65536):
                self.shown += chunk

    def until(self, words: bytes, limit_s: float = 90.0) -> None:
        """Wait for words."""
        deadline = time.monotonic() + limit_s
        while words not in self.shown:
            assert time.monotonic() < deadline, self.shown
            time.sleep(0.05)


def test_ctrl_c_shows_how_the_job_stands_now(at_market: SmallMarket) -> None:
    """A child on a pseudo-terminal: what it says last is what the broker knows, and how to come
    back."""
    command = [sys.executable, "-m", "sublet.cli.main", "run", *SMALL, "--name", "left", "-y"]
    says = "import time; print('begun', flush=True); time.sleep(600)"
    master, slave = pty.openpty()
    environment = {**at_market.environment, "TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen(
        [*command, "local/python", "python3", "-c", says],
        stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
    ) as child:  # fmt: skip
        os.close(slave)
        screen = Screen(master)
        try:
            screen.until(b"begun")
            child.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                child.wait(60)
        finally:
            child.kill()  # nothing, where it has ended
        screen.thread.join(10)
        assert child.wait() == 101
    job = at_market.client.job("left")
    shown = screen.shown.decode()
    last = shown[shown.rindex("begun") :]
    try:
        assert job.view().state == "running"
        assert re.search(r"detached, and it goes on; left is \w+: .*; charged 0\.", last)
        assert f"Back: sublet logs -f {job.id[:10]}  End it: sublet cancel {job.id[:10]}" in last
    finally:
        job.cancel()


def test_inspect_shows_for_how_long_saving_holds_the_loop() -> None:
    stall = RunStallView(
        saves=3,
        all_stall_ms=360,
        stall_per_save_ms=120,
        stall_share_ppm=4_000,
        last_stall_ms=90,
        last_write_ms=2_500,
    )
    run = RunView.model_construct(stall=stall)
    assert stall_lines([run]) == [
        "stall per save 0.12 s (the last one 0.09 s, written in 2.5 s), 3 saves: 0.4 % of its time"
    ]
    assert stall_lines([run, RunView.model_construct(stall=None)]) == []
    assert stall_lines([]) == []


def test_inspect_shows_what_a_tag_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    pinned = "docker.io/library/train@sha256:" + "a" * 64
    tagged = JobView.model_construct(image="train:1", image_pinned=pinned)
    assert [line.split()[-1] for line in image_lines(tagged)] == ["train:1", pinned]
    by_digest = JobView.model_construct(image="train@sha256:1", image_pinned="")
    assert len(image_lines(by_digest)) == 1
