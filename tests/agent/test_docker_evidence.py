"""What the Docker Engine says of a run's end: who stopped it, and whose end it is then."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import docker
import pytest

from sublet_agent.adapters.docker.engine_events import EngineEvents
from sublet_agent.adapters.docker.images import ImageRules
from sublet_agent.adapters.docker.runner import DockerRunner, _require_usable
from sublet_agent.adapters.docker.start_errors import judge_start
from sublet_agent.adapters.process import exit_events
from sublet_agent.adapters.run_observer import evidence_of
from sublet_agent.core import engine_evidence
from sublet_agent.core.engine_evidence import EngineEnd, EngineFact, EngineMemory, Kind
from sublet_agent.core.exit_reasons import exit_text, reason_of_exit
from sublet_agent.core.runner_port import (
    Runner,
    RunnerUnavailable,
    RunSpec,
    RunStatus,
    StartFailed,
)
from sublet_contracts.reasons import Reason
from tests.agent.own_engine import OwnEngine, require_own_engine
from tests.agent.runner_world import HAS_WORKER, LOG_BYTES, PASSED_ON, World, wait_for
from tests.services import require

LEAVES = """
import signal, sys, time
def leave(*_):
    print("asked to end", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print("up", flush=True)
time.sleep(600)
"""
"""A script that ends with 0 whenever it is asked to, done or not."""
SLEEPS = "import time\nprint('up', flush=True)\ntime.sleep(600)"
DEAF = "import signal\nsignal.signal(15, signal.SIG_IGN)\n" + SLEEPS
EATS = "x = bytearray(2**30)"
WORKER_EATS = f"""
import subprocess, sys, time
print(subprocess.run([sys.executable, "-c", {EATS!r}]).returncode, flush=True)
print("up", flush=True)
"""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    require("docker")
    made = World("docker", tmp_path)
    yield made
    made.close()


class Owner:
    """Who owns the machine, and speaks to the engine as well."""

    def __init__(self, world: World, client: docker.DockerClient | None = None) -> None:
        self.api = (client or docker.from_env()).api
        self._prefix = f"sublet-{world.owner[:12]}-"

    def __call__(self, what: str, spec: RunSpec, *arguments: Any) -> Any:
        return getattr(self.api, what)(self._prefix + spec.run_id, *arguments)


def started(world: World, code: str, **changes: Any) -> RunSpec:
    spec = world.spec(code, **changes)
    world.runner.start(spec)
    world.shown(spec.run_id, "up")
    return spec


def judged(status: RunStatus, *, finished: bool = False) -> Reason:
    return reason_of_exit(evidence_of(status), None, finished=finished)


# -- case 05: the engine stopped it --------------------------------------------------------------


@pytest.mark.docker
def test_docker_stop_of_a_script_that_leaves_with_0_is_the_engines(world: World) -> None:
    spec = started(world, LEAVES)
    Owner(world)("stop", spec)
    status = world.ended(spec.run_id)
    assert status.exit_code == 0
    assert judged(status) is Reason.ENGINE_STOPPED
    assert "docker stop" in status.engine_stopped
    # What had finished by its own word has.
    assert judged(status, finished=True) is Reason.SUCCEEDED


@pytest.mark.docker
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGUSR1])
def test_so_is_docker_kill_with_any_signal_that_ends(world: World, number: int) -> None:
    spec = started(world, SLEEPS)
    Owner(world)("kill", spec, number)
    status = world.ended(spec.run_id)
    assert judged(status) is Reason.ENGINE_STOPPED
    assert signal.Signals(number).name in status.engine_stopped


@pytest.mark.docker
def test_a_signal_that_ends_nothing_is_no_ask(world: World) -> None:
    spec = started(world, "import time\nprint('up', flush=True)\ntime.sleep(2)")
    Owner(world)("kill", spec, signal.SIGWINCH)
    status = world.ended(spec.run_id)
    assert (status.exit_code, status.engine_stopped) == (0, "")
    assert judged(status) is Reason.SUCCEEDED


@pytest.mark.docker
def test_our_own_signals_are_not_the_engines_over_a_restart_too(world: World) -> None:
    spec = started(world, LEAVES)
    world.runner.stop(spec.run_id)
    again = world.restarted()
    wait_for(lambda: again.status(spec.run_id).state == "exited", "its end")
    for runner in (again, world.runner):
        assert runner.status(spec.run_id).engine_stopped == ""
    deaf = started(world, DEAF)
    world.runner.stop(deaf.run_id)
    world.runner.kill(deaf.run_id)
    world.ended(deaf.run_id)
    assert world.restarted().status(deaf.run_id).engine_stopped == ""


@pytest.mark.docker
def test_the_owners_stop_after_ours_is_told_apart(world: World) -> None:
    spec = started(world, DEAF)
    world.runner.stop(spec.run_id)
    Owner(world)("kill", spec, signal.SIGKILL)
    status = world.ended(spec.run_id)
    assert "SIGKILL" in status.engine_stopped


@pytest.mark.docker
def test_what_ends_by_itself_is_never_the_engines(world: World) -> None:
    for code in (0, 1, 75, 130, 137, 143):
        _, status = world.run(f"import os; os._exit({code})")
        assert (status.exit_code, status.engine_stopped, status.oom_killed) == (code, "", False)
        assert status.returned or code > 128


# -- case 06: a code is not a signal -------------------------------------------------------------


@pytest.fixture
def witnessed(world: World) -> World:
    """A world in which the kernel tells how processes end."""
    assert isinstance(world.runner, DockerRunner)
    if why := world.runner.why_no_witness():
        pytest.skip(f"the kernel's process events can't be followed: {why}")
    return world


def processes_of(world: World, spec: RunSpec) -> list[int]:
    """The pids of a run, on this machine: its init first, the job's own process then, its worker.

    By who is whose child: numbers begin anew where they end."""
    top = Owner(world)("top", spec, "-eo pid,ppid")
    above = {int(pid): int(parent) for pid, parent in top["Processes"]}

    def depth(pid: int) -> int:
        return 1 + depth(above[pid]) if pid in above else 0

    return sorted(above, key=depth)


@pytest.mark.docker
@pytest.mark.parametrize("code", [137, 143, 129, 139])
def test_a_code_that_the_job_returned_by_itself_is_its_failure(witnessed: World, code: int) -> None:
    spec, status = witnessed.run("", command=("sh", "-c", f"echo the result is 42; exit {code}"))
    assert (status.exit_code, status.returned, status.signal) == (code, True, None)
    assert judged(status) is Reason.JOB_FAILED
    assert exit_text(evidence_of(status), Reason.JOB_FAILED) == f"exit code {code}"
    # An agent that comes later reads it, whatever it has not seen itself.
    assert judged(witnessed.restarted().status(spec.run_id)) is Reason.JOB_FAILED


@pytest.mark.docker
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_of_its_own_is_nobodys(witnessed: World, number: int) -> None:
    _, status = witnessed.run(f"import os, time; os.kill(os.getpid(), {number}); time.sleep(60)")
    assert (status.exit_code, status.returned, status.signal) == (128 + number, False, number)
    assert judged(status) is Reason.KILLED_UNATTRIBUTED


@pytest.mark.docker
@pytest.mark.parametrize("which", [0, 1])
def test_a_kill_from_outside_is_unattributed_and_has_words(witnessed: World, which: int) -> None:
    """Of the job's own process, and of the container's init."""
    spec = started(witnessed, SLEEPS)
    os.kill(processes_of(witnessed, spec)[which], signal.SIGKILL)
    status = witnessed.ended(spec.run_id)
    assert (status.exit_code, status.signal) == (137, signal.SIGKILL)
    assert judged(status) is Reason.KILLED_UNATTRIBUTED
    says = exit_text(evidence_of(status), Reason.KILLED_UNATTRIBUTED)
    assert says == "killed by SIGKILL; nothing that was seen says who sent it"


@pytest.mark.docker
@PASSED_ON
def test_the_end_of_a_worker_that_somebody_killed(
    witnessed: World, code: str, reason: Reason
) -> None:
    """A shell returns 137 for what it ran: nobody knows whose kill that was."""
    spec = started(witnessed, HAS_WORKER.format(code=code))
    wait_for(lambda: len(processes_of(witnessed, spec)) == 3, "its worker")
    os.kill(processes_of(witnessed, spec)[2], signal.SIGKILL)
    status = witnessed.ended(spec.run_id)
    assert status.returned
    assert judged(status) is reason
    if reason is Reason.KILLED_UNATTRIBUTED:
        says = exit_text(evidence_of(status), reason)
        assert says.startswith("exit code 137, after SIGKILL had ended another of its processes;")


@pytest.mark.docker
def test_who_came_later_claims_nothing(witnessed: World) -> None:
    """An agent that is started anew can't know what befell the run's workers meanwhile."""
    code = "import os, sys, time\nprint('up', flush=True)\n"
    code += "while not os.path.exists('/out/go'): time.sleep(0.05)\nsys.exit(137)"
    spec = started(witnessed, code)
    witnessed.runner = witnessed.restarted()
    witnessed.runner.find()
    (witnessed.root / spec.run_id / "outputs" / "go").touch()
    status = witnessed.ended(spec.run_id)
    assert (status.exit_code, status.returned) == (137, False)
    assert judged(status) is Reason.KILLED_UNATTRIBUTED


@pytest.mark.docker
def test_events_that_the_kernel_could_not_hand_over_make_nothing_of_it(
    witnessed: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exit_events, "_BUFFER_BYTES", 1)  # the kernel takes its least for that
    witnessed.runner = witnessed.restarted()
    spec = started(witnessed, HAS_WORKER.format(code="137"))
    wait_for(lambda: len(processes_of(witnessed, spec)) == 3, "its worker")
    with witnessed.runner._witness._lock:  # type: ignore[attr-defined]
        os.kill(processes_of(witnessed, spec)[2], signal.SIGTERM)
        for _ in range(30):
            subprocess.run(["true"], check=True)
    status = witnessed.ended(spec.run_id)
    assert (status.exit_code, status.returned, status.worker_signal) == (137, False, None)
    assert judged(status) is Reason.KILLED_UNATTRIBUTED


@pytest.mark.docker
def test_the_kernel_is_listened_to_only_while_there_are_runs(witnessed: World) -> None:
    spec = started(witnessed, SLEEPS)
    listens = lambda: witnessed.runner._witness._events.listens  # type: ignore[attr-defined]  # noqa: E731
    assert listens()
    witnessed.runner.remove(spec.run_id)
    wait_for(lambda: not listens(), "the end of it")
    _, status = witnessed.run("import os; os._exit(137)")
    assert status.returned


@pytest.mark.docker
def test_docker_restart_ends_the_run_and_what_it_started(world: World) -> None:
    spec = started(world, LEAVES)
    Owner(world)("restart", spec)
    status = world.ended(spec.run_id)
    assert judged(status) is Reason.ENGINE_STOPPED
    assert status.exit_code == 0
    inspect = Owner(world)
    wait_for(lambda: not inspect("inspect_container", spec)["State"]["Running"], "its second end")
    # Whoever comes later sees the same end, at the same time.
    again = world.restarted().status(spec.run_id)
    assert judged(again) is Reason.ENGINE_STOPPED
    assert again.finished_ms == status.finished_ms


@pytest.fixture(scope="module")
def engine() -> Iterator[OwnEngine]:
    require_own_engine()
    own = OwnEngine()
    try:
        own.start()
        own.load_base_image()
        yield own
    finally:
        own.close()


def on(engine: OwnEngine, world: World) -> Runner:
    images = ImageRules(allowed=(world.spec("").image,))
    return DockerRunner(
        world.owner, world.root / "own", log_bytes=LOG_BYTES, client=engine.client(), images=images
    )


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_engine_that_is_ended_ends_its_runs_and_not_their_jobs(
    engine: OwnEngine, world: World, number: signal.Signals
) -> None:
    world.runner = on(engine, world)
    spec = started(world, LEAVES)
    done, _ = world.run("print('done')")
    engine.end(number)
    engine.start()
    # The runner that lived through it, one that remembers by its file, and one without any memory.
    stranger = DockerRunner(world.owner, client=engine.client())
    for runner in (world.runner, on(engine, world), stranger):
        wait_for(lambda: runner.status(spec.run_id).state == "exited", "its end")  # noqa: B023
        status = runner.status(spec.run_id)
        assert status.exit_code == 0
        assert judged(status) is Reason.ENGINE_STOPPED, (runner, status)
        assert judged(status, finished=True) is Reason.SUCCEEDED
    assert "went away" in world.runner.status(spec.run_id).engine_stopped
    assert world.runner.status(done.run_id).engine_stopped == ""


# -- case 12: paused -----------------------------------------------------------------------------


@pytest.mark.docker
def test_paused_time_is_counted_apart_and_a_stop_gets_through(world: World) -> None:
    spec = started(world, LEAVES)
    owner = Owner(world)
    owner("pause", spec)
    time.sleep(1.0)
    status = world.runner.status(spec.run_id)
    assert (status.state, status.paused) == ("running", True)
    assert status.paused_ms >= 900
    owner("unpause", spec)
    time.sleep(0.5)
    first_ms = world.runner.status(spec.run_id).paused_ms
    assert 900 <= first_ms <= 3_000
    owner("pause", spec)
    world.runner.stop(spec.run_id)
    status = world.ended(spec.run_id)
    assert (status.exit_code, status.engine_stopped) == (0, "")
    assert status.paused_ms >= first_ms
    assert "asked to end" in world.output(spec.run_id)


@pytest.mark.docker
def test_a_pause_is_known_over_a_restart_of_the_agent(world: World) -> None:
    spec = started(world, DEAF)
    Owner(world)("pause", spec)
    time.sleep(0.5)
    again = world.restarted()
    assert [found.status.paused for found in again.find()] == [True]
    time.sleep(0.5)
    assert again.status(spec.run_id).paused_ms >= 900
    Owner(world)("unpause", spec)
    wait_for(lambda: not again.status(spec.run_id).paused, "its going on")
    paused_ms = again.status(spec.run_id).paused_ms
    assert world.restarted().status(spec.run_id).paused_ms == pytest.approx(paused_ms, abs=300)
    Owner(world)("pause", spec)
    again.kill(spec.run_id)
    assert world.ended(spec.run_id).exit_code == 137


# -- out of memory -------------------------------------------------------------------------------


@pytest.mark.docker
def test_out_of_memory_of_the_job_and_of_its_worker(world: World) -> None:
    _, status = world.run(EATS)
    assert (status.exit_code, judged(status)) == (137, Reason.OUT_OF_MEMORY)
    _, status = world.run(WORKER_EATS + "sys.exit(3)")
    assert (status.exit_code, judged(status)) == (3, Reason.OUT_OF_MEMORY)
    _, status = world.run(WORKER_EATS)
    assert (status.exit_code, judged(status)) == (0, Reason.SUCCEEDED)


@pytest.mark.docker
def test_a_worker_that_was_survived_is_not_what_ended_it(world: World) -> None:
    spec = started(world, WORKER_EATS + "time.sleep(600)")
    Owner(world)("stop", spec)
    assert judged(world.ended(spec.run_id)) is Reason.ENGINE_STOPPED


# -- the decisions -------------------------------------------------------------------------------

S = 1_000_000_000
ASKED_IT = "the engine was told to stop"
AWAY = "the engine went away"
LIVED = EngineMemory(10, full=False)
FORGOT = EngineMemory(256, full=True)


def at(second: float, kind: Kind, number: int = 0) -> EngineFact:
    return EngineFact(int(second * S), kind, number)


@pytest.mark.parametrize(
    ("facts", "exit_code", "memory", "away", "says"),
    [
        ([at(99, "signal", 15), at(100, "die")], 0, LIVED, [], ASKED_IT),
        ([at(98, "own", 15), at(99, "signal", 15), at(100, "die")], 0, LIVED, [], ""),
        # One ask of ours explains one signal, of its own number, and soon.
        (
            [at(97, "own", 15), at(98, "signal", 15), at(99, "signal", 15), at(100, "die")],
            *(0, LIVED, [], ASKED_IT),
        ),
        ([at(98, "own", 15), at(99, "signal", 9), at(100, "die")], 137, LIVED, [], ASKED_IT),
        ([at(1_000, "own", 15), at(1_500, "signal", 15)], 143, FORGOT, [], ASKED_IT),
        # Who goes on for long had not heard it; unless the code says so.
        ([at(99, "signal", 1), at(5_000, "die")], 1, LIVED, [], ""),
        ([at(99, "signal", 1), at(5_000, "die")], 129, LIVED, [], ASKED_IT),
        ([at(100, "die")], 137, LIVED, [], ""),
        # An engine that did not see the end was started anew since.
        ([], 0, LIVED, [], AWAY),
        ([], 0, EngineMemory(0, full=False), [], AWAY),
        ([], 0, FORGOT, [], ""),
        ([], 0, FORGOT, [(99_000, 130_000)], AWAY),
        ([at(99, "signal", 15), at(100, "die")], 0, LIVED, [(101_000, 130_000)], AWAY),
        ([at(100, "die")], 1, LIVED, [(99_000, 100_500)], ""),
    ],
)
def test_what_the_events_mean(
    facts: list[EngineFact],
    exit_code: int,
    memory: EngineMemory,
    away: list[tuple[int, int]],
    says: str,
) -> None:
    finished_ms = max((fact.at_ms for fact in facts), default=100_000)
    end = engine_evidence.end_evidence(
        facts,
        exit_code=exit_code,
        finished_ms=finished_ms,
        oom_flag=False,
        memory=memory,
        away=away,
    )
    assert end.engine_stopped.startswith(says)
    assert bool(end.unseen) == (not says and exit_code == 0 and not facts)
    assert bool(end.engine_stopped) == bool(says)


@pytest.mark.parametrize(
    ("facts", "exit_code", "out_of_memory"),
    [
        ([at(99, "oom"), at(100, "die")], 137, True),
        ([at(99, "oom"), at(100, "die")], 1, True),
        ([at(99, "oom"), at(100, "die")], 0, False),
        ([at(99, "oom"), at(100, "die")], 75, False),
        ([at(9, "oom"), at(100, "signal", 9), at(100, "die")], 137, False),
        ([at(98, "signal", 15), at(99, "oom"), at(100, "die")], 137, True),
        ([at(9, "oom"), at(9_000, "die")], 137, False),
        ([at(9, "oom"), at(8_999, "oom"), at(9_000, "die")], 137, True),
        ([at(100, "die")], 137, True),  # the engine's flag alone
        ([at(99, "signal", 9), at(100, "die")], 137, False),
    ],
)
def test_what_a_record_of_full_memory_means(
    facts: list[EngineFact], exit_code: int, out_of_memory: bool
) -> None:
    end: EngineEnd = engine_evidence.end_evidence(
        facts,
        exit_code=exit_code,
        finished_ms=facts[-1].at_ms,
        oom_flag=True,
        memory=LIVED,
        away=[],
    )
    assert end.out_of_memory is out_of_memory


def test_a_job_that_runs_out_of_memory_all_the_time_hides_nothing(tmp_path: Path) -> None:
    record = EngineEvents(docker.from_env, "owner", tmp_path)
    record.know("r1")
    for second in range(5_000):
        record._take(event_of("oom", second, "owner"))
    record._take(event_of("kill", 6_000, "owner", signal="15"))
    record._take(event_of("die", 6_001, "owner", exitCode="0"))
    record._take(event_of("kill", 6_000, "another", signal="15"))
    facts = record.facts("r1")
    assert [fact.kind for fact in facts[-3:]] == ["oom", "signal", "die"]
    assert facts[-3].at_ns == 4_999 * S
    assert len(facts) < 1_000
    assert (tmp_path / "r1").stat().st_size < 32_000
    again = EngineEvents(docker.from_env, "owner", tmp_path).facts("r1")
    assert again[-2:] == facts[-2:]
    # Of a run that was removed nothing is noted any more.
    record.forget("r1")
    record._take(event_of("oom", 7_000, "owner"))
    assert not (tmp_path / "r1").exists()


def event_of(action: str, second: int, owner: str, **about: str) -> dict[str, Any]:
    labels = {"sublet.owner": owner, "sublet.run": "r1"}
    return {
        "Type": "container",
        "Action": action,
        "timeNano": second * S,
        "Actor": {"Attributes": {**labels, **about}},
    }


@pytest.mark.parametrize(
    ("facts", "exit_code", "end"),
    [
        ([at(100, "exited", 137)], 137, EngineEnd(returned=True)),
        ([at(100, "killed", 9)], 137, EngineEnd(signal=9)),
        # The kernel's word on something else: another code, another time.
        ([at(100, "exited", 3)], 137, EngineEnd()),
        ([at(100, "killed", 15)], 137, EngineEnd()),
        ([at(50, "exited", 137)], 137, EngineEnd()),
        # Passed on, if it was the same signal, and not long ago.
        (
            [at(99, "worker", 9), at(100, "exited", 137)],
            137,
            EngineEnd("", False, "", True, None, 9),
        ),
        ([at(99, "worker", 15), at(100, "exited", 137)], 137, EngineEnd(returned=True)),
        ([at(-30, "worker", 9), at(100, "exited", 137)], 137, EngineEnd(returned=True)),
        # What may have been unseen.
        ([at(99, "blind"), at(100, "exited", 137)], 137, EngineEnd()),
        ([at(-30, "blind"), at(100, "exited", 137)], 137, EngineEnd(returned=True)),
        ([at(99, "blind"), at(100, "exited", 1)], 1, EngineEnd(returned=True)),
    ],
)
def test_the_kernels_word_on_the_jobs_own_process(
    facts: list[EngineFact], exit_code: int, end: EngineEnd
) -> None:
    found = engine_evidence.end_evidence(
        [*facts, at(100, "die", exit_code)],
        exit_code=exit_code,
        finished_ms=100_000,
        oom_flag=False,
        memory=LIVED,
        away=[],
    )
    assert found == end


def test_facts_are_lines_and_torn_ones_are_left_out() -> None:
    facts = [at(1, "own", 15), at(2, "signal", 15), at(3, "pause"), at(4, "die", 143)]
    text = "".join(map(engine_evidence.to_line, facts))
    assert engine_evidence.from_lines(text) == facts
    assert engine_evidence.from_lines(text + "die 5 1") == facts
    assert engine_evidence.from_lines("x 1 2\nown x 1\nown 1\n\n" + text) == facts


def test_paused_time() -> None:
    facts = [at(1, "pause"), at(3, "unpause"), at(5, "pause")]
    assert engine_evidence.paused_ms(facts, 9_000) == 6_000
    assert engine_evidence.paused_ms([*facts, at(6, "unpause"), at(7, "unpause")], 9_000) == 3_000
    assert engine_evidence.paused_ms([*facts, at(6, "die")], 9_000) == 3_000
    assert engine_evidence.paused_ms([], 9_000) == 0


# -- starts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "exit_code", "says"),
    [
        ('could not select device driver "nvidia" with capabilities: [[gpu]]', None, "GPU"),
        ('could not select device driver "cdi" with capabilities: []', None, "GPU"),
        ("CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=0", None, "GPU"),
        ("OCI runtime create failed: error running hook #0: nvidia-container-cli: x", None, "GPU"),
        ("unknown or invalid runtime name: nvidia", None, "GPU"),
        ('exec: "python9": executable file not found in $PATH: unknown', 127, "not in the image"),
        ('exec: "/job": permission denied: unknown', 126, "may not be executed"),
        ("exec /job: no such file or directory", 127, "not in the image"),
        ("exec /usr/bin/python3: exec format error", None, "processor"),
        ('chdir to cwd ("/root") set in config.json failed: permission denied', 126, "folder"),
        ("No command specified", 127, "no command"),
        ("mkdir /sys/fs/cgroup/memory/docker/1: no space left on device", None, "resources"),
        ("mkdir /var/lib/docker/overlay2/1: no space left on device", None, "disk"),
        ("write /var/lib/docker/1: disk quota exceeded", None, "disk"),
        ('error mounting "proc" to rootfs: permission denied', None, "folders"),
        ("invalid mount config for type bind: bind source path does not exist", None, "folders"),
        ('error mounting "/a/tmp" to rootfs at "/tmp": not a directory', 126, "no folder"),
        ("Cannot mkdir: /work is not a directory", 126, "no folder"),
        (
            'error mounting "/a" to rootfs at "/tmp": "/b/proc" cannot be mounted because it is '
            "not of type proc: unknown",
            126,
            "a link into /proc",
        ),
        ("unable to find user 7: read /x/etc/passwd: is a directory", 126, "list of users"),
        # A job's own words in it don't make it the machine's.
        ('exec: "nvidia-container cgroup": executable file not found', 127, "not in the image"),
        ("something else at /var/lib/docker/secret", None, "could not start"),
    ],
)
def test_whose_matter_a_failed_start_is(text: str, exit_code: int | None, says: str) -> None:
    meant = judge_start(text)
    assert meant.exit_code == exit_code
    assert says in meant.says
    assert "/var" not in meant.says


@pytest.mark.docker
def test_a_start_that_this_machine_fails_is_in_our_words(world: World) -> None:
    info = docker.from_env().info()
    if "nvidia" in info["Runtimes"] or info.get("DiscoveredDevices"):
        pytest.skip("this engine has GPUs: it would start")
    spec = world.spec("pass", device_ids=("GPU-0a1b",))
    for runner in (world.runner, world.restarted()):
        with pytest.raises(StartFailed) as raised:
            runner.start(spec)
        assert "can't hand out its GPU" in str(raised.value)
        assert "could not select device driver" not in str(raised.value)
        assert "could not select device driver" in raised.value.raw
        # No end of the job's: after a restart of the agent it is started again.
        assert runner.status(spec.run_id).state == "created"


@pytest.mark.docker
def test_a_path_that_is_something_else_in_the_image_is_the_jobs(
    world: World, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    spec = world.spec("pass", destinations={"/etc/passwd": tmp_path / "folder"})
    world.runner.start(spec)
    status = world.runner.status(spec.run_id)
    assert (status.state, judged(status)) == ("exited", Reason.JOB_FAILED)
    assert "is no folder in the image" in (status.error or "")
    assert str(tmp_path) not in (status.error or "")


# -- case 13: an engine that maps users ----------------------------------------------------------


@pytest.mark.docker
@pytest.mark.slow
def test_an_engine_that_maps_users_runs_jobs_as_any_other(tmp_path: Path) -> None:
    require_own_engine()
    engine = OwnEngine(mapped=True)
    try:
        engine.start()
        engine.load_base_image()
        world = World("docker", tmp_path)
        world.runner = on(engine, world)
        world.runner.check()
        code = (
            "import os; here = os.environ['SUBLET_CHECKPOINT_DIR']; print(os.getuid());"
            "os.mkdir(here + '/out/step-1'); open('/out/model', 'w').write('x');"
            "open('/tmp/x', 'w'); print(open('/proc/self/uid_map').read().split());"
            "open('x', 'w'); open(os.path.expanduser('~/.bashrc'), 'a').write('x');"
            "print([l.split()[1] for l in open('/proc/self/status') if l.startswith('CapBnd')])"
        )
        spec = world.spec(code)
        spec = dataclasses.replace(spec, layout=world.runner.furnish(spec))
        world.runner.start(spec)
        assert world.ended(spec.run_id).exit_code == 0, world.output(spec.run_id)
        uid, uid_map, caps = world.output(spec.run_id)
        assert int(uid) != 0
        assert uid_map == "['0', '0', '4294967295']"
        assert int(caps.strip("[']"), 16) == 0
        assert (spec.checkpoint_dir / "out" / "step-1").stat().st_uid == int(uid)
        world.close()
    finally:
        engine.close()


class CountedEngine:
    """Answers, or doesn't, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.away = False

    def ping(self) -> bool:
        return bool(self._answer("ping"))

    def info(self) -> dict[str, Any]:
        return self._answer("info")

    def _answer(self, what: str) -> dict[str, Any]:
        self.asked.append(what)
        if self.away:
            raise ConnectionRefusedError(111, "Connection refused")
        options = ["name=seccomp,profile=default"]
        return {"OSType": "linux", "SecurityOptions": options, "MemoryLimit": True} | {
            "PidsLimit": True
        }


def test_what_an_engine_can_do_is_asked_rarely_and_after_it_was_away() -> None:
    engine = CountedEngine()
    runner = DockerRunner("owner", client=cast(Any, engine))
    for _ in range(3):
        runner.check()
    assert engine.asked == ["info", "ping", "ping"]
    engine.away = True
    with pytest.raises(RunnerUnavailable, match="connection refused"):
        runner.check()
    engine.away = False
    runner.check()
    runner.check()
    assert engine.asked[3:] == ["ping", "info", "ping"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["name=seccomp,profile=default", "name=rootless"], "rootless"),
        (["name=apparmor"], "system calls"),
        (["name=seccomp,profile=default", "name=userns"], ""),
    ],
)
def test_engines_that_hold_no_job_are_refused_at_the_start(options: list[str], says: str) -> None:
    info = {
        "OSType": "linux",
        "SecurityOptions": options,
        "MemoryLimit": True,
        "PidsLimit": True,
    }
    if says:
        with pytest.raises(RunnerUnavailable, match=says):
            _require_usable(info, "")
    else:
        _require_usable(info, "")
