"""What the process runner can say of a run's end, and that no job can make it say nothing."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sublet_agent.adapters.process import tree
from sublet_agent.adapters.process.runner import WITNESS, ProcessRunner
from sublet_agent.adapters.process.witness import Sender, Sighting, Statement, Witness, statement
from sublet_agent.adapters.run_observer import evidence_of
from sublet_agent.core.exit_reasons import exit_text, reason_of_exit
from sublet_agent.core.runner_port import RunSpec, RunStatus
from sublet_contracts.reasons import Reason
from tests.agent.runner_world import HAS_WORKER, PASSED_ON, World, processes_with, wait_for

HANDLER = """
import os, signal, subprocess, sys, threading, time
def leave(*_):
    print("asked to end", flush=True)
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, leave)
print("up", flush=True)
"""
"""A script that ends with 0 whenever it is asked to, done or not."""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World("process", tmp_path)
    yield made
    made.close()


def started(world: World, code: str, **changes: Any) -> tuple[RunSpec, int]:
    """Start a job that prints `up`; return its process too."""
    spec = world.spec(code, **changes)
    world.runner.start(spec)
    world.shown(spec.run_id, "up")
    return spec, job_process(world, spec)


def run_folder(world: World, spec: RunSpec) -> Path:
    return world.root / "state" / "runs" / spec.run_id


def record(world: World, spec: RunSpec, name: str = "running.json") -> dict[str, Any]:
    return dict(json.loads((run_folder(world, spec) / name).read_text()))


def job_process(world: World, spec: RunSpec) -> int:
    return int(record(world, spec)["job_pid"])


def judged(status: RunStatus, *, finished: bool = False) -> Reason:
    """The agent's verdict, where nobody of us had asked the run to stop."""
    return reason_of_exit(evidence_of(status), None, finished=finished)


# -- a code is not a signal ------------------------------------------------------------------------


@pytest.fixture
def witnessed(world: World) -> World:
    """A world in which the kernel tells how processes end."""
    assert isinstance(world.runner, ProcessRunner)
    if why := world.runner.why_no_witness():
        pytest.skip(f"the kernel's process events can't be followed: {why}")
    return world


@pytest.mark.parametrize("code", [137, 143, 129])
def test_a_code_that_the_job_returned_by_itself_is_its_failure(witnessed: World, code: int) -> None:
    """Case 06, on whatever number a signal's would be."""
    script = f"echo the result is 42; true; exit {code}"
    _, status = witnessed.run("", command=("sh", "-c", script))
    assert (status.exit_code, status.returned, status.signal) == (code, True, None)
    assert judged(status) is Reason.JOB_FAILED


@pytest.mark.parametrize("code", [137, 143, 1, 255])
def test_without_the_kernels_word_only_what_may_be_a_signal_is_doubtful(
    world: World, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Who may not follow process events judges as it does for a container there."""
    assert isinstance(world.runner, ProcessRunner)
    monkeypatch.setattr(world.runner, "_blind", "not permitted")
    _, status = world.run("", command=("sh", "-c", f"exit {code}"))
    assert (status.exit_code, status.signal, status.worker_signal) == (code, None, None)
    doubtful = code in (137, 143)
    assert judged(status) is (Reason.KILLED_UNATTRIBUTED if doubtful else Reason.JOB_FAILED)
    if doubtful:
        says = exit_text(evidence_of(status), Reason.KILLED_UNATTRIBUTED)
        assert "or so it said itself; nothing that was seen says who sent it" in says


def worker_of(world: World, spec: RunSpec) -> int:
    wait_for(lambda: len(world.output(spec.run_id)) == 2, "its worker")
    return int(world.output(spec.run_id)[1])


@PASSED_ON
def test_the_end_of_a_worker_that_somebody_killed(
    witnessed: World, code: str, reason: Reason
) -> None:
    """A launcher returns 137 for what it ran: nobody knows whose kill that was."""
    spec = witnessed.spec(HAS_WORKER.format(code=code))
    witnessed.runner.start(spec)
    os.kill(worker_of(witnessed, spec), signal.SIGKILL)
    status = witnessed.ended(spec.run_id)
    assert status.returned
    assert judged(status) is reason
    if reason is Reason.KILLED_UNATTRIBUTED:
        says = exit_text(evidence_of(status), reason)
        assert says.startswith("exit code 137, after SIGKILL had ended another of its processes;")


@pytest.mark.parametrize(
    "script",
    ["sleep 611; exit $?", "(sleep 611; exit $?); exit $?", "setsid -w sleep 611; exit $?"],
    ids=["a shell", "a shell's shell", "in a session of its own"],
)
def test_a_shell_that_passes_on_the_kill_of_what_it_ran(witnessed: World, script: str) -> None:
    spec = witnessed.spec("", command=("sh", "-c", script), pids=20)
    witnessed.runner.start(spec)

    def sleeper() -> int | None:
        below = tree.descendants(int(record(witnessed, spec)["pid"]))
        return next((pid for pid in below if tree.name_of(pid) == "sleep"), None)

    wait_for(sleeper, "its worker")
    os.kill(sleeper() or 0, signal.SIGKILL)
    status = witnessed.ended(spec.run_id)
    assert (status.exit_code, status.worker_signal) == (137, signal.SIGKILL)
    assert judged(status) is Reason.KILLED_UNATTRIBUTED


def test_an_agent_that_came_later_knows_of_the_worker_as_well(witnessed: World) -> None:
    """Its supervisor has watched all the time."""
    spec = witnessed.spec(HAS_WORKER.format(code="128 - ended"))
    witnessed.runner.start(spec)
    worker = worker_of(witnessed, spec)
    witnessed.runner = witnessed.restarted()
    os.kill(worker, signal.SIGTERM)
    status = witnessed.ended(spec.run_id)
    assert (status.exit_code, status.worker_signal) == (143, signal.SIGTERM)
    assert judged(status) is Reason.KILLED_UNATTRIBUTED


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_of_its_own_is_nobodys(world: World, number: int) -> None:
    """It may have been the job's own or an owner's; for KILL even the kernel doesn't say."""
    _, status = world.run(f"import os, time; os.kill(os.getpid(), {number}); time.sleep(60)")
    assert (status.exit_code, status.returned, status.signal) == (128 + number, False, number)
    assert judged(status) is Reason.KILLED_UNATTRIBUTED


def test_a_kill_from_outside_is_unattributed_and_has_words(world: World) -> None:
    spec, process = started(world, HANDLER + "time.sleep(600)")
    os.kill(process, signal.SIGKILL)
    status = world.ended(spec.run_id)
    assert judged(status) is Reason.KILLED_UNATTRIBUTED
    says = exit_text(evidence_of(status), Reason.KILLED_UNATTRIBUTED)
    assert says == "killed by SIGKILL; nothing that was seen says who sent it"


def test_an_end_that_nobody_saw_is_unattributed_and_has_words(world: World) -> None:
    spec, process = started(world, HANDLER + "time.sleep(600)")
    os.kill(record(world, spec)["pid"], signal.SIGKILL)
    status = world.ended(spec.run_id)
    assert (status.exit_code, judged(status)) == (None, Reason.KILLED_UNATTRIBUTED)
    assert "supervisor was killed" in (status.error or "")
    wait_for(lambda: tree.read_process(process) is None, "the job, which may not outlive it")


def test_a_run_that_the_machine_went_down_with_is_the_providers(world: World) -> None:
    spec, _ = started(world, HANDLER + "time.sleep(600)")
    before = record(world, spec) | {"boot": "another"}
    os.kill(int(before["pid"]), signal.SIGKILL)
    (run_folder(world, spec) / "running.json").write_text(json.dumps(before))
    status = world.ended(spec.run_id)
    assert (status.exit_code, judged(status)) == (None, Reason.ENGINE_STOPPED)
    assert "started anew" in exit_text(evidence_of(status), Reason.ENGINE_STOPPED)


# -- a limit that we held it to --------------------------------------------------------------------


def test_too_many_processes_are_the_jobs_failure(world: World) -> None:
    code = "import os, time\nfor _ in range(60):\n    if not os.fork(): time.sleep(600)\n"
    _, status = world.run(code + "time.sleep(600)", pids=20)
    assert status.limit_exceeded == "more than 20 processes"
    assert judged(status) is Reason.JOB_FAILED
    assert exit_text(evidence_of(status), Reason.JOB_FAILED) == "more than 20 processes"


def test_too_much_memory_is_the_jobs_failure(world: World) -> None:
    code = "import time\nkept = b'x' * (200 << 20)\ntime.sleep(600)"
    _, status = world.run(code, memory_bytes=64 << 20)
    assert (status.signal, status.oom_killed) == (signal.SIGKILL, True)
    assert judged(status) is Reason.OUT_OF_MEMORY


# -- who sent the signal ---------------------------------------------------------------------------


def by_this_process(pid: int, number: int) -> None:
    os.kill(pid, number)


def by_a_command(pid: int, number: int) -> None:
    """A sender that is gone, and waited for, at once."""
    subprocess.run(["kill", f"-{number}", str(pid)], check=True)


def to_its_group(pid: int, number: int) -> None:
    subprocess.run(["sh", "-c", f"kill -{number} -{pid}"], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("send", [by_this_process, by_a_command, to_its_group])
def test_asked_to_end_by_somebody_outside_is_not_success(
    world: World, send: Callable[[int, int], None], number: int
) -> None:
    """Case 05: only a job that says that it was done is."""
    spec, process = started(world, HANDLER + "time.sleep(600)")
    send(process, number)
    status = world.ended(spec.run_id)
    assert (status.exit_code, status.returned, status.unknown_signal) == (0, True, "")
    assert status.outside_signal.startswith(signal.Signals(number).name[3:] + " came from outside")
    assert judged(status) is Reason.RUN_KILLED
    assert judged(status, finished=True) is Reason.SUCCEEDED
    assert exit_text(evidence_of(status), Reason.RUN_KILLED) == status.outside_signal


def test_the_sender_is_named(world: World) -> None:
    spec, process = started(world, HANDLER + "time.sleep(600)")
    os.kill(process, signal.SIGTERM)
    says = world.ended(spec.run_id).outside_signal
    assert f"from process {os.getpid()} ({tree.name_of(os.getpid())})" in says


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGABRT])
def test_killed_by_somebody_outside_is_the_providers(world: World, number: int) -> None:
    """Whatever the signal: an abort that somebody else sends is not the program's own mistake."""
    spec, process = started(world, "import time\nprint('up', flush=True)\ntime.sleep(600)")
    os.kill(process, number)
    status = world.ended(spec.run_id)
    assert status.signal == number
    assert judged(status) is Reason.RUN_KILLED


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("os.kill(os.getpid(), 15)", id="itself"),
        pytest.param("subprocess.run(['kill', '-TERM', str(os.getpid())])", id="a-child"),
        pytest.param("subprocess.run(['sh', '-c', 'kill -TERM $PPID'])", id="a-shell"),
        pytest.param(
            "subprocess.run(['sh', '-c', f'/bin/kill -TERM {os.getpid()}; true'])",
            id="a-grandchild",
        ),
        pytest.param(
            "threading.Thread(target=subprocess.run, args=(['kill', '-TERM', str(os.getpid())],))"
            ".start()",
            id="a-child-of-a-thread",
        ),
        pytest.param(
            "subprocess.Popen(['setsid', 'sh', '-c', f'sleep 0.3; kill -TERM {os.getpid()}'])",
            id="a-daemon",
        ),
    ],
)
def test_a_signal_of_the_runs_own_is_not_from_outside(world: World, how: str) -> None:
    _, status = world.run(HANDLER + how + "\ntime.sleep(600)")
    assert (status.exit_code, status.outside_signal) == (0, "")
    # One whose sender is gone for good may be anybody's. That is said, and is not the provider's.
    assert judged(status) is (
        Reason.KILLED_UNATTRIBUTED if status.unknown_signal else Reason.SUCCEEDED
    )


def test_among_many_short_lives_an_unseen_sender_is_nobodys(world: World) -> None:
    """Its sender is gone, and so are processes of the run: it may be one of them."""
    spec, process = started(world, HANDLER + "while True: subprocess.run(['true'])")
    by_a_command(process, signal.SIGTERM)
    status = world.ended(spec.run_id)
    assert status.exit_code == 0
    # Where the sender was still to be seen it is known as well.
    assert judged(status) in (Reason.KILLED_UNATTRIBUTED, Reason.RUN_KILLED)
    assert judged(status, finished=True) is Reason.SUCCEEDED


def test_our_own_asking_is_not_from_outside(world: World) -> None:
    spec, _ = started(world, HANDLER + "time.sleep(600)")
    world.restarted().stop(spec.run_id)
    status = world.ended(spec.run_id)
    assert (status.exit_code, status.outside_signal, status.unknown_signal) == (0, "", "")


def test_a_signal_that_the_job_ignores_is_no_evidence(world: World) -> None:
    code = "import signal, time\nsignal.signal(1, signal.SIG_IGN)\nprint('up', flush=True)\n"
    spec, process = started(world, code + "time.sleep(1.5)")
    os.kill(process, signal.SIGHUP)
    status = world.ended(spec.run_id)
    assert (status.exit_code, status.outside_signal) == (0, "")


@pytest.mark.parametrize(
    ("sightings", "killed_by", "ended_s", "outside", "unknown"),
    [
        ([("TERM", Sender.OUTSIDE, 0)], None, 39, "TERM", ""),
        ([("TERM", Sender.OUTSIDE, 0)], None, 41, "", ""),
        ([("TERM", Sender.UNKNOWN, 0)], None, 1, "", "TERM"),
        ([("TERM", Sender.OUTSIDE, 0), ("INT", Sender.UNKNOWN, 5)], None, 6, "", "INT"),
        ([("USR1", Sender.OUTSIDE, 0)], None, 1, "", ""),
        ([("USR1", Sender.OUTSIDE, 0)], signal.SIGUSR1, 1, "USR1", ""),
        ([("USR1", Sender.OUTSIDE, 0)], signal.SIGUSR1, 11, "", ""),
        ([("USR1", Sender.OUTSIDE, 0)], signal.SIGSEGV, 1, "", ""),
        ([], signal.SIGKILL, 1, "", ""),
    ],
)
def test_what_was_outlived_did_not_end_it(
    sightings: list[tuple[str, Sender, float]],
    killed_by: int | None,
    ended_s: float,
    outside: str,
    unknown: str,
) -> None:
    """A job that asked for 30 s to save has them, and 10 more."""
    seen = [Sighting(signal.Signals[f"SIG{name}"], who, name, at) for name, who, at in sightings]
    assert statement(seen, killed_by, ended_s, 30) == Statement(outside, unknown)


# -- the witness hinders nobody --------------------------------------------------------------------

SIGNALS = """
import os, signal, subprocess, sys, threading, time
seen = 0
def count(*_):
    global seen
    seen += 1
print("up", flush=True)
"""


@pytest.mark.parametrize(
    "each",
    [
        pytest.param("os.kill(os.getpid(), signal.SIGALRM)", id="ALRM"),
        pytest.param("os.waitpid(os.fork() or os._exit(0), 0)", id="CHLD"),
    ],
)
def test_a_job_of_many_signals_gets_them_all(world: World, each: str) -> None:
    code = textwrap.dedent(f"""
        signal.signal(signal.SIGALRM, count)
        signal.signal(signal.SIGCHLD, count)
        for number in range(2000):
            {each}
            while seen <= number: time.sleep(0.0001)
        print(seen)
    """)
    spec, status = world.run(SIGNALS + code)
    assert status.exit_code == 0, world.output(spec.run_id)
    assert world.output(spec.run_id) == ["up", "2000"]


def test_after_a_storm_of_signals_the_witness_is_back(world: World) -> None:
    code = "signal.signal(14, count)\nfor _ in range(5000): os.kill(os.getpid(), 14)\n"
    spec, process = started(world, HANDLER.replace("up", "on") + SIGNALS + code + "time.sleep(600)")
    wait_for(lambda: tree.tracer_of(process) == 0, "the witness to rest")
    wait_for(lambda: tree.tracer_of(process) != 0, "the witness to be back")
    os.kill(process, signal.SIGTERM)
    assert judged(world.ended(spec.run_id)) is Reason.RUN_KILLED


def test_a_job_can_be_stopped_and_continued(world: World) -> None:
    code = "for i in range(600): print(i, flush=True); time.sleep(0.05)"
    spec, process = started(world, SIGNALS + code)
    for _ in range(2):
        os.kill(process, signal.SIGSTOP)
        wait_for(lambda: _state(process) in "Tt", "the job to stand still")
        time.sleep(0.3)
        before = len(world.output(spec.run_id))
        time.sleep(0.5)
        assert len(world.output(spec.run_id)) == before
        os.kill(process, signal.SIGCONT)
        wait_for(lambda: len(world.output(spec.run_id)) > before, "the job to go on")  # noqa: B023
    world.runner.kill(spec.run_id)
    assert world.ended(spec.run_id).signal == signal.SIGKILL


def test_a_stopped_job_can_be_killed(world: World) -> None:
    spec, process = started(world, SIGNALS + "time.sleep(600)")
    os.kill(process, signal.SIGSTOP)
    wait_for(lambda: _state(process) in "Tt", "the job to stand still")
    world.runner.kill(spec.run_id)
    assert world.ended(spec.run_id).signal == signal.SIGKILL


def _state(pid: int) -> str:
    found = tree.read_process(pid)
    return found.state if found else ""


@pytest.mark.parametrize(
    "by", ["{exec}", "threading.Thread(target=lambda: {exec}).start(); time.sleep(60)"]
)
def test_a_job_that_becomes_another_program_is_still_witnessed(world: World, by: str) -> None:
    """A thread that calls exec takes the place of the one that was seized."""
    new = "print('it', flush=True); time.sleep(600)"
    call = f"os.execv(sys.executable, ['python3', '-c', {HANDLER + new!r}])"
    spec, process = started(world, SIGNALS + by.format(exec=call))
    world.shown(spec.run_id, "it")
    wait_for(lambda: tree.tracer_of(process) != 0, "the witness")
    os.kill(process, signal.SIGTERM)
    assert judged(world.ended(spec.run_id)) is Reason.RUN_KILLED


def test_a_job_may_trace_its_own_children(world: World) -> None:
    code = textwrap.dedent("""
        import ctypes
        libc = ctypes.CDLL(None)
        child = os.fork()
        if child == 0:
            assert libc.ptrace(0, 0, None, None) == 0  # PTRACE_TRACEME
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(7)
        _, status = os.waitpid(child, 0)
        assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGUSR1, status
        assert libc.ptrace(7, child, None, None) == 0  # PTRACE_CONT, without the signal
        print(os.WEXITSTATUS(os.waitpid(child, 0)[1]))
    """)
    spec, status = world.run(SIGNALS + code)
    assert status.exit_code == 0, world.output(spec.run_id)
    assert world.output(spec.run_id) == ["up", "7"]


def test_the_owner_can_do_without_the_witness(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WITNESS, "off")
    spec, process = started(world, HANDLER + "time.sleep(600)")
    assert tree.tracer_of(process) == 0
    os.kill(process, signal.SIGTERM)
    status = world.ended(spec.run_id)
    assert (status.exit_code, status.outside_signal) == (0, "")


def test_where_seizing_is_refused_nothing_else_changes() -> None:
    witness = Witness(os.getpid(), lambda _: False)  # nobody may trace himself
    witness.attend()
    witness.attend()
    assert witness.sightings == []


# -- nothing of a run is left ----------------------------------------------------------------------

RUNAWAYS = {
    "left.py": """
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.closerange(0, 3)
                os.execvp("sleep", ["sleep", TOKEN])
            os._exit(0)
    """,
    "with nothing of ours": """
        if os.fork() == 0:
            os.setsid()
            os.chdir("/")
            os.umask(0)
            if os.fork() == 0:
                os.setpgid(0, 0)
                os.closerange(0, 1024)
                os.execve("/bin/sleep", ["sleep", TOKEN], {})
            os._exit(0)
    """,
    "deaf and many": """
        for _ in range(5):
            if os.fork() == 0:
                os.setsid()
                for number in (1, 2, 3, 15):
                    signal.signal(number, signal.SIG_IGN)
                if os.fork() == 0:
                    os.execve("/bin/sleep", ["sleep", TOKEN], {"A": "b"})
                os._exit(0)
    """,
}
BEGIN = "import os, signal, sys, time\nTOKEN = sys.argv[1]\n"


def _runaway(world: World, name: str, then: str) -> tuple[RunSpec, str]:
    token = str(7_000_000 + int.from_bytes(os.urandom(3), "big"))
    code = BEGIN + textwrap.dedent(RUNAWAYS[name]) + then
    spec = world.spec(code)
    spec = world.spec(code, run_id=spec.run_id, command=("python3", "-c", code, token))
    world.runner.start(spec)
    return spec, f"sleep\0{token}"


@pytest.mark.parametrize("name", RUNAWAYS)
def test_a_worker_that_left_is_gone_when_the_run_is_over(world: World, name: str) -> None:
    """Case 22."""
    spec, token = _runaway(world, name, "time.sleep(1); print('main is done')")
    wait_for(lambda: processes_with(token) != [], "the worker")
    status = world.ended(spec.run_id)
    assert (status.exit_code, judged(status, finished=True)) == (0, Reason.SUCCEEDED)
    assert processes_with(token) == []


@pytest.mark.parametrize("name", RUNAWAYS)
def test_a_job_that_kills_its_supervisor_goes_with_it(world: World, name: str) -> None:
    """Nobody is left to see its end or to hold its workers: the next look finds and ends them."""
    spec, token = _runaway(
        world, name, "time.sleep(1)\nos.kill(os.getppid(), 9)\nprint('up')\ntime.sleep(600)"
    )
    wait_for(lambda: processes_with(token) != [], "the worker")
    status = world.ended(spec.run_id)
    assert (status.exit_code, judged(status)) == (None, Reason.KILLED_UNATTRIBUTED)
    assert processes_with(token) == []
    assert processes_with(f"runs/{spec.run_id}") == []


def test_a_job_that_stops_its_supervisor_can_be_killed(world: World) -> None:
    code = "import os, time\nprint('up', flush=True)\ntime.sleep(1)\nos.kill(os.getppid(), 19)\n"
    spec, _ = started(world, code + "time.sleep(600)")
    supervisor = int(record(world, spec)["pid"])
    wait_for(lambda: _state(supervisor) in "Tt", "the supervisor to stand still")
    world.runner.kill(spec.run_id)
    assert world.ended(spec.run_id).signal == signal.SIGKILL


def test_a_job_that_says_it_has_ended_has_not(world: World) -> None:
    """What it forged stands until its supervisor writes down how it was."""
    forged: dict[str, Any] = {"exit_code": 0, "returned": True, "signal": None, "error": None}
    forged |= {
        "worker_signal": None,
        "oom_killed": False,
        "limit_exceeded": "",
        "outside_signal": "TERM",
        "unknown_signal": "",
    }
    forged |= {"started_ms": 0, "finished_ms": 1}
    code = f"import json, time\njson.dump({forged}, open('../exit.json', 'w'))\n"
    spec, _ = started(world, code + "print('up', flush=True)\ntime.sleep(1)\nraise SystemExit(3)")
    assert world.runner.status(spec.run_id).state == "running"
    status = world.ended(spec.run_id)
    assert (status.exit_code, status.outside_signal) == (3, "")


def test_a_run_can_be_killed_without_its_agent_and_its_files(world: World) -> None:
    """What is to be ended stands in no file: a watchdog needs the agent's id and the run's."""
    spec, token = _runaway(world, "with nothing of ours", "print('up', flush=True); time.sleep(9)")
    world.shown(spec.run_id, "up")
    for file in run_folder(world, spec).glob("*.json"):
        file.unlink()
    watchdog = textwrap.dedent("""
        import sys
        from pathlib import Path
        from sublet_agent.adapters.process.runner import ProcessRunner
        ProcessRunner(sys.argv[1], Path(sys.argv[2])).kill(sys.argv[3])
    """)
    where = (world.owner, str(world.root / "state"), spec.run_id)
    subprocess.run([sys.executable, "-c", watchdog, *where], check=True, timeout=60)
    assert processes_with(token) == []


def test_a_run_in_a_run_is_branded_as_far_as_it_can_be(world: World) -> None:
    """Whose limit of file locks is lower already may not raise it: it is started all the same."""
    code = textwrap.dedent(f"""
        import resource
        print(*resource.getrlimit({tree.RLIMIT_LOCKS}))
    """)
    spec, status = world.run(code)
    brand = tree.mark_of(world.owner, spec.run_id).brand
    assert status.exit_code == 0
    assert world.output(spec.run_id) == [f"{brand} {brand}"]
    assert resource.getrlimit(tree.RLIMIT_LOCKS)[0] != brand


def test_a_name_that_is_no_text_confuses_nobody(world: World) -> None:
    """The kernel's list of processes holds the names that they give themselves."""
    code = textwrap.dedent("""
        import ctypes, time
        ctypes.CDLL(None).prctl(15, b"\\xff) Z\\xfe\\n(", 0, 0, 0)  # PR_SET_NAME
        print("up", flush=True)
        time.sleep(600)
    """)
    spec, process = started(world, code)
    time.sleep(0.3)
    assert world.runner.status(spec.run_id).state == "running"
    assert tree.name_of(process).isprintable()
    world.runner.stop(spec.run_id)
    assert world.ended(spec.run_id).signal == signal.SIGTERM


# -- files that a job could have written -----------------------------------------------------------


def _hole(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**36)


ODD: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "an endless file": lambda path: path.symlink_to("/dev/zero"),
    "a link in a circle": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: path.touch(),
    "a hole of 64 GB": _hole,
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "deep brackets": lambda path: path.write_text("[" * 200_000),
    "a list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "another's numbers": lambda path: path.write_text(
        json.dumps(
            {"pid": -1, "started": 0, "job_pid": -1, "job_started": 0, "started_ms": -(2**70)}
            | {"exit_code": 2**80, "error": "x" * 10**6, "finished_ms": 1e308, "owner": 5}
        )
    ),
    "this process": lambda path: path.write_text(json.dumps(_this_process())),
    "closed": lambda path: path.touch(mode=0),
}


def _this_process() -> dict[str, Any]:
    found = tree.read_process(os.getpid())
    assert found is not None
    pid = {"pid": found.pid, "started": found.started}
    job = {"job_pid": found.pid, "job_started": found.started, "started_ms": 0, "boot": ""}
    whose = {"owner": "x", "job_id": "x", "lease_id": "x", "epoch": 1, "checkpoint_dir": "/tmp"}
    return pid | job | whose | {"mark": "", "exit_code": None}


@pytest.mark.parametrize("file", ["spec.json", "running.json", "exit.json", "lock", "stop.json"])
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_file_is_an_unknown_end_at_worst(world: World, file: str, odd: str) -> None:
    spec, process = started(world, HANDLER + "time.sleep(600)")
    place = run_folder(world, spec) / file
    place.unlink(missing_ok=True)
    ODD[odd](place)
    # Its supervisor may still write down how it ended. Without its lock it's taken for ended.
    for known in ((None, 137), (None, 0, 137)):
        status = world.runner.status(spec.run_id)
        assert status.state in ("running", "exited")
        assert status.exit_code in known
        assert [found.run_id for found in world.runner.find()] in ([spec.run_id], [])
        world.runner.stop(spec.run_id)
        world.runner.read_logs(spec.run_id, None, 10_000)
        world.runner.kill(spec.run_id)
        wait_for(lambda: tree.read_process(process) is None, "the job's end")
    wait_for(lambda: world.runner.status(spec.run_id).state == "exited", "the end to be seen")
    world.runner.remove(spec.run_id)
    assert world.runner.status(spec.run_id).state == "gone"
    assert processes_with(f"runs/{spec.run_id}") == []


@pytest.mark.parametrize("odd", ODD)
def test_odd_output_files_are_left_out(world: World, odd: str) -> None:
    spec, _ = world.run("print('a line')")
    folder = run_folder(world, spec)
    ODD[odd](folder / "log-1")
    for name in ("log-²", "log-x", "log-" + "9" * 200, "log-"):
        (folder / name).write_text("[]\n")
    cursor, more, texts = None, True, []
    for _ in range(20):
        batch = world.runner.read_logs(spec.run_id, cursor, 64 * 1024)
        cursor, more = batch.cursor, batch.more
        texts += [line.text for line in batch.lines]
    assert texts[0] == "a line"
    assert all("damaged" in text for text in texts[1:])
    assert len(texts) < 50
    assert odd == "a hole of 64 GB" or not more


def test_lines_that_the_writer_never_wrote_are_left_out(world: World) -> None:
    spec, _ = world.run("print('a line')")
    bad = [
        '[1, 7, 0, "stdout", 5]',
        '[1, 7, 0, "stdout", "\\ud800"]',
        '[1, 7, 0, "elsewhere", "x"]',
        '[1, 7, 1e999, "stdout", "x"]',
        '[-1, 7, 0, "stdout", "x"]',
        '[true, 7, 0, "stdout", "x"]',
        '{"0": 1}',
        "[" * 30_000,
        "1" * 5_000,
    ]
    good = '[1, 7, 5, "stdout", "the next"]'
    with (run_folder(world, spec) / "log-0").open("a") as log:
        log.write("\n".join([*bad, good]) + "\n")
    texts = [line.text for line in world.lines(spec.run_id)]
    assert (texts[0], texts[-1]) == ("a line", "the next")
    assert len(texts) == 3


def test_what_lies_in_the_way_of_a_file_is_not_written_into(world: World) -> None:
    """A pipe that nobody reads would hold its writer for ever."""
    code = "import os\nos.mkfifo('../exit.tmp'); os.mkfifo('../stop.tmp')\n" + HANDLER
    spec, _ = started(world, code + "time.sleep(600)")
    world.runner.stop(spec.run_id)
    assert world.ended(spec.run_id).exit_code == 0


def test_a_job_that_kills_its_supervisor_at_once_has_started_and_nobody_knows_its_end(
    world: World,
) -> None:
    """The machine has started it as it should: it isn't to be set aside for that."""
    for _ in range(10):
        spec = world.spec("", command=("sh", "-c", "kill -KILL $PPID; sleep 60"))
        world.runner.start(spec)
        status = world.ended(spec.run_id)
        assert judged(status) is Reason.KILLED_UNATTRIBUTED
        assert "supervisor was killed" in (status.error or "")
        world.runner.start(spec)  # an agent that was started anew does it again: it is over
        assert world.runner.status(spec.run_id).state == "exited"
        world.runner.remove(spec.run_id)
