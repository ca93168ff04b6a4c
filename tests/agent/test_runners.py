"""What every runner must do: one suite for Docker and for plain processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from sublet_agent.adapters.docker.runner import DockerRunner
from sublet_agent.adapters.workspace import folders
from sublet_agent.core.runner_port import ImageNotPinned, RunnerUnavailable, RunRefused
from tests.agent.runner_world import LOG_BYTES, World, processes_with, wait_for
from tests.services import require

SLEEP = "import time\nprint('up', flush=True)\ntime.sleep(600)"
DEAF = "import signal\nsignal.signal(15, signal.SIG_IGN)\n" + SLEEP


@pytest.fixture(params=["process", pytest.param("docker", marks=pytest.mark.docker)])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    if request.param == "docker":
        require("docker")
    made = World(request.param, tmp_path)
    yield made
    made.close()


def test_check_passes(world: World) -> None:
    world.runner.check()


def test_a_run_from_start_to_gone(world: World) -> None:
    spec, status = world.run("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert (status.state, status.exit_code, status.oom_killed) == ("exited", 3, False)
    assert status.started_ms is not None
    assert status.finished_ms is not None
    assert status.finished_ms >= status.started_ms
    lines = world.lines(spec.run_id)
    assert sorted((line.stream, line.text) for line in lines) == [
        ("stderr", "err"),
        ("stdout", "out"),
    ]
    assert all(spec_ms.time_ms >= status.started_ms - 1000 for spec_ms in lines)
    world.runner.remove(spec.run_id)
    assert world.runner.status(spec.run_id).state == "gone"
    assert world.runner.find() == []


def test_without_an_image_a_jobs_python_is_the_agents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever starts the agent by its path, its environment not activated, has it all the same."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    world = World("process", tmp_path)
    code = "import shutil; print(shutil.which('python3'))"
    spec, status = world.run(code, command=("python3", "-c", code))
    assert status.exit_code == 0
    assert world.output(spec.run_id) == [str(Path(sys.executable).parent / "python3")]
    world.close()


def test_where_no_engine_answers_the_agent_says_why_in_a_few_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    with pytest.raises(RunnerUnavailable) as raised:
        DockerRunner("owner").check()
    assert "no Docker Engine answers (no such file or directory)" in str(raised.value)


def test_calls_on_a_run_that_is_gone_do_nothing(world: World) -> None:
    for call in (world.runner.stop, world.runner.kill, world.runner.remove):
        call("never-1")
    assert world.runner.read_logs("never-1", None, 1000).lines == ()


def test_start_twice_is_one_run(world: World) -> None:
    spec = world.spec(
        "open('/out/runs' if 0 else __import__('os').environ['SUBLET_OUTPUT_DIR'] + "
        "'/runs', 'a').write('x')"
    )
    world.runner.start(spec)
    world.restarted().start(spec)
    world.ended(spec.run_id)
    world.runner.start(spec)
    assert spec.outputs_dir is not None
    assert (spec.outputs_dir / "runs").read_text() == "x"
    assert len(world.runner.find()) == 1


def test_what_the_job_sees(world: World) -> None:
    code = textwrap.dedent("""
        import json, os, sys
        import sublet_ckpt
        here = os.environ["SUBLET_CHECKPOINT_DIR"]
        open(here + "/out/x", "w").write("kept")
        open(sys.argv[2] + "/model", "w").write("result")
        print(json.dumps({
            "env": {k: os.environ.get(k) for k in ("SUBLET_JOB_ID", "SUBLET_EPOCH", "COLOUR",
                    "OMP_NUM_THREADS")},
            "in": open(here + "/in/step-1").read(),
            "input": open(os.environ["SUBLET_INPUT_DIR"] + "/data.csv").read(),
            "placed": open(sys.argv[1]).read(),
        }))
    """)
    spec = world.spec(code)
    (spec.checkpoint_dir / "in" / "step-1").write_text("restored")
    data = spec.inputs_dir / "data.csv"
    data.write_text("a,b")
    data.chmod(0o600)
    spec = world.spec(
        code,
        run_id=spec.run_id,
        destinations={"/data/data.csv": data},
        command=("python3", "-c", code, "/data/data.csv", "/out"),
        env={"COLOUR": "green", "SUBLET_EPOCH": "99"},
    )
    world.runner.start(spec)
    status = world.ended(spec.run_id)
    assert status.exit_code == 0, world.output(spec.run_id)
    seen = json.loads(world.output(spec.run_id)[0])
    assert seen["env"] == {
        "SUBLET_JOB_ID": "job-1",
        "SUBLET_EPOCH": "7",
        "COLOUR": "green",
        "OMP_NUM_THREADS": "2",
    }
    assert (seen["in"], seen["input"], seen["placed"]) == ("restored", "a,b", "a,b")
    assert (spec.checkpoint_dir / "out" / "x").read_text() == "kept"
    assert spec.outputs_dir is not None
    assert (spec.outputs_dir / "model").read_text() == "result"


def test_stop_asks_by_file_and_by_signal(world: World) -> None:
    code = textwrap.dedent("""
        import os, signal, sys, time
        def leave(*_):
            stop = os.path.exists(os.environ["SUBLET_CHECKPOINT_DIR"] + "/STOP")
            sys.exit(75 if stop else 1)
        signal.signal(signal.SIGTERM, leave)
        print("up", flush=True)
        time.sleep(600)
    """)
    spec = world.spec(code)
    world.runner.start(spec)
    world.shown(spec.run_id, "up")
    world.runner.stop(spec.run_id)
    assert world.ended(spec.run_id).exit_code == 75
    world.runner.stop(spec.run_id)


def test_a_job_that_knows_nothing_of_us_ends_by_the_signal(world: World) -> None:
    """TERM does what it always does: the job inherits no ignoring of it."""
    spec = world.spec("import time; print('up', flush=True); time.sleep(600)")
    world.runner.start(spec)
    world.shown(spec.run_id, "up")
    world.runner.stop(spec.run_id)
    assert world.ended(spec.run_id).exit_code == 128 + signal.SIGTERM


def test_a_job_that_ignores_term_is_killed(world: World) -> None:
    spec = world.spec(DEAF)
    world.runner.start(spec)
    world.shown(spec.run_id, "up")
    world.runner.stop(spec.run_id)
    assert world.runner.status(spec.run_id).state == "running"
    world.runner.kill(spec.run_id)
    assert world.ended(spec.run_id).exit_code == 137


def test_a_command_that_is_not_there(world: World) -> None:
    spec = world.spec("", command=("no-such-command-anywhere",))
    world.runner.start(spec)
    status = world.ended(spec.run_id)
    assert status.exit_code == 127
    assert "no-such-command-anywhere" in " ".join([status.error or "", *world.output(spec.run_id)])


def test_kill_ends_stragglers_that_left_the_session(world: World) -> None:
    token = f"straggler-{os.urandom(6).hex()}"
    code = textwrap.dedent(f"""
        import os, time
        for i in range(3):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    wait = "import time; time.sleep(600)"
                    os.execvpe("python3", ["python3", "-c", wait, "{token}"],
                               {{"PATH": os.environ["PATH"]}} if i else os.environ)
                os._exit(0)
        print("up", flush=True)
        time.sleep(600)
    """)
    spec = world.spec(code)
    world.runner.start(spec)
    world.shown(spec.run_id, "up")
    wait_for(lambda: len(processes_with(token)) >= 4, "the stragglers")
    world.runner.kill(spec.run_id)
    world.ended(spec.run_id)
    wait_for(lambda: processes_with(token) == [], "the end of the stragglers")


def test_the_jobs_end_is_the_end_of_what_it_left_behind(world: World) -> None:
    token = f"daemon-{os.urandom(6).hex()}"
    code = f"import subprocess; subprocess.Popen(['sleep', '600', ], env={{'T': '{token}'}})"
    _, status = world.run(code)
    assert status.exit_code == 0
    assert processes_with(token) == []


def test_a_worker_that_left_the_session_is_gone_when_the_run_is_over(world: World) -> None:
    """Nobody's child, in nobody's session, with nothing open."""
    token = str(7_000_000 + int.from_bytes(os.urandom(3), "big"))
    code = textwrap.dedent(f"""
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.closerange(0, 3)
                os.execvp("sleep", ["sleep", "{token}"])
            os._exit(0)
        time.sleep(1)
        print("main is done")
    """)
    spec = world.spec(code)
    world.runner.start(spec)
    wait_for(lambda: processes_with(f"sleep\0{token}") != [], "the worker")
    assert world.ended(spec.run_id).exit_code == 0
    assert processes_with(f"sleep\0{token}") == []


def test_remove_of_a_running_job_leaves_nothing(world: World) -> None:
    spec = world.spec(DEAF)
    world.runner.start(spec)
    world.shown(spec.run_id, "up")
    world.runner.remove(spec.run_id)
    assert world.runner.status(spec.run_id).state == "gone"
    wait_for(lambda: processes_with(spec.run_id) == [], "the end of its processes")


def test_a_fork_bomb_is_held_and_killed(world: World) -> None:
    code = textwrap.dedent("""
        import os, time
        print("up", flush=True)
        while True:
            try:
                os.fork()
            except OSError:
                time.sleep(0.1)
    """)
    spec = world.spec(code, pids=40)
    world.runner.start(spec)
    world.shown(spec.run_id, "up")
    if world.kind == "docker":  # held by the kernel until the agent ends it
        wait_for(lambda: _pids_in(world, spec.run_id) >= 30, "the bomb")
        assert _pids_in(world, spec.run_id) <= 40
    with _busy_machine():
        world.runner.kill(spec.run_id)
        assert world.ended(spec.run_id).exit_code == 137
        world.runner.remove(spec.run_id)
    wait_for(lambda: processes_with(spec.run_id) == [], "the end of its processes")


@contextlib.contextmanager
def _busy_machine() -> Iterator[None]:
    """A bomb is slow where it has to share the machine; so is whoever looks for its processes."""
    spin = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(spin) for _ in range(8 * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def _pids_in(world: World, run_id: str) -> int:
    name = f"sublet-{world.owner[:12]}-{run_id}"
    asked = subprocess.run(["docker", "top", name], capture_output=True, text=True, check=True)
    return len(asked.stdout.splitlines()) - 1


def test_a_job_that_takes_too_much_memory(world: World) -> None:
    code = "import time\nkept = []\nwhile True: kept.append(b'x' * (8 << 20)); time.sleep(0.01)"
    _, status = world.run(code, memory_bytes=96 * 2**20)
    assert status.oom_killed
    assert status.exit_code == 137


def test_a_job_that_fills_its_disk(world: World) -> None:
    code = textwrap.dedent("""
        import os, time
        here = os.environ["SUBLET_CHECKPOINT_DIR"] + "/out/"
        try:
            with open(here + "one", "wb") as file:
                while True:
                    file.write(b"x" * (1 << 20))
        except OSError as error:
            print("one file:", error.errno, flush=True)
        for i in range(3):
            open(here + f"part-{i}", "wb").write(b"x" * (4 << 20))
        print("written", flush=True)
        time.sleep(600)
    """)
    limit = 8 * 2**20
    spec = world.spec(code, disk_bytes=limit)
    world.runner.start(spec)
    world.shown(spec.run_id, "written")
    assert (spec.checkpoint_dir / "out" / "one").stat().st_size <= limit
    assert folders.usage([spec.checkpoint_dir]) > limit  # what the agent ends it by
    world.runner.kill(spec.run_id)
    world.ended(spec.run_id)


def test_usage_follows_no_link_and_counts_once(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * 2**20)
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path / "big")
    (inside / "a").write_bytes(b"x" * 2**18)
    os.link(inside / "a", inside / "b")
    once = folders.usage([inside])
    assert 2**18 <= once < 2**19
    assert folders.usage([inside, inside, tmp_path / "absent"]) == once
    assert folders.usage([tmp_path], stop_at_bytes=1) <= folders.usage([tmp_path])


def test_stop_writes_through_no_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (tmp_path / "STOP").symlink_to(victim)
    folders.ask(tmp_path, "STOP")
    assert not victim.exists()


def test_100_mb_of_output_are_bounded_and_the_loss_is_told(world: World) -> None:
    code = textwrap.dedent("""
        import sys
        line = "x" * 999 + "\\n"
        for i in range(100):
            sys.stdout.write(line * 1000)
        print("the end", flush=True)
    """)
    spec, status = world.run(code)
    assert status.exit_code == 0
    lines = world.lines(spec.run_id)
    assert lines[-1].text == "the end"
    assert sum(len(line.text) for line in lines) < 2 * LOG_BYTES
    remarks = [line.text for line in lines if line.stream == "sublet"]
    assert len(remarks) == 1
    assert "dropped" in remarks[0]
    if world.kind == "process":
        assert folders.usage([world.root / "state"]) < 2 * LOG_BYTES
        kept = len([line for line in lines if line.stream == "stdout"])
        lost = 100_001 - kept
        assert f"{lost} lines, {lost * 1000} bytes" in remarks[0]


def test_a_reader_that_comes_back_misses_no_line(world: World) -> None:
    code = textwrap.dedent("""
        import sys, time
        for i in range(400):
            print(i, file=(sys.stdout, sys.stderr)[i % 3 == 0], flush=True)
            if i % 40 == 0: time.sleep(0.02)
    """)
    spec = world.spec(code)
    world.runner.start(spec)
    cursor: str | None = None
    seen: list[tuple[str, int]] = []
    ended = False
    while True:
        # A new runner each time, as an agent that is killed and started all the time.
        batch = world.restarted().read_logs(spec.run_id, cursor, 50)
        seen += [(line.stream, int(line.text)) for line in batch.lines]
        cursor = batch.cursor
        if ended and not batch.lines:
            break
        ended = world.runner.status(spec.run_id).state == "exited"
    assert [n for s, n in seen if s == "stderr"] == list(range(0, 400, 3))
    assert [n for s, n in seen if s == "stdout"] == [n for n in range(400) if n % 3]
    again = world.runner.read_logs(spec.run_id, cursor, 1000)
    assert again.lines == ()


def test_long_and_broken_lines_come_in_pieces(world: World) -> None:
    code = "import sys; sys.stdout.buffer.write(b'y' * 40000 + b'\\n\\xff\\xfe\\nno newline')"
    spec, _ = world.run(code)
    texts = world.output(spec.run_id)
    assert "".join(texts[:-2]) == "y" * 40000
    assert max(map(len, texts)) <= 16 * 1024
    assert texts[-2:] == ["\ufffd\ufffd", "no newline"]


def test_a_restarted_agent_finds_its_runs_and_their_ends(world: World) -> None:
    going = world.spec(SLEEP)
    world.runner.start(going)
    over, _ = world.run("raise SystemExit(4)")
    stranger = World(world.kind, world.root, owner="f" * 16)
    found = {run.run_id: run for run in world.restarted().find()}
    assert set(found) == {going.run_id, over.run_id}
    assert found[going.run_id].status.state == "running"
    assert found[over.run_id].status.exit_code == 4
    assert (found[over.run_id].lease_id, found[over.run_id].job_id) == ("lease-1", "job-1")
    assert found[over.run_id].epoch == 7
    assert stranger.runner.find() == []


AGENT = """
import pickle, sys, time
world_kind, root, owner, run_id = sys.argv[1:]
from pathlib import Path
from tests.agent.runner_world import World
world = World(world_kind, Path(root), owner)
code = "import time, sys\\nfor i in range(60): print(i, flush=True); time.sleep(0.05)\\nsys.exit(9)"
world.runner.start(world.spec(code, run_id=run_id))
print("started", flush=True)
time.sleep(600)
"""


def test_the_job_outlives_kill_9_of_its_agent(world: World) -> None:
    run_id = "adopted-1"
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, world.kind, str(world.root), world.owner, run_id],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )
    assert agent.stdout is not None
    assert agent.stdout.readline() == b"started\n"
    first = world.runner.read_logs(run_id, None, 10)
    os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()
    agent.stdout.close()
    assert world.ended(run_id).exit_code == 9
    rest = world.runner.read_logs(run_id, first.cursor, 10_000)
    assert [int(line.text) for line in (*first.lines, *rest.lines)] == list(range(60))


def test_an_image_must_be_pinned_where_the_policy_wants_it(world: World) -> None:
    said: list[str] = []
    with pytest.raises(ImageNotPinned, match="@sha256:"):
        world.runner.ensure_image("name:latest", said.append, "digest")
    pinned = world.spec("").image
    assert world.runner.ensure_image(pinned, said.append, "digest").image_id == pinned


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"run_id": "../x"}, "run_id"),
        ({"pids": 0}, "pids"),
        ({"env": {"A=B": "c"}}, "env"),
        ({"command": ("a\0b",)}, "NUL"),
        ({"outputs_path": "/sublet/helper"}, "/sublet/helper"),
        ({"outputs_path": "/a/../etc"}, "'..'"),
        ({"outputs_path": "/"}, "'/'"),
        ({"outputs_path": None}, "outputs_path"),
        ({"device_ids": ()}, "device_ids"),
    ],
)
def test_a_bad_spec_is_refused_by_field(
    world: World, change: dict[str, object], field: str
) -> None:
    spec = dataclasses.replace(world.spec("pass"), **change)  # type: ignore[arg-type]
    with pytest.raises(RunRefused, match=field):
        world.runner.start(spec)
    assert world.runner.find() == []
