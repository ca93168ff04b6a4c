"""The probe (probe.py) on both runners, and the cases of the world that it came from."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.agent import probe
from tests.agent.runner_world import World
from tests.services import require

PROBE = Path(probe.__file__)
PACKAGES = sysconfig.get_paths()["purelib"]
GIGABYTE = 10**9


@pytest.fixture(params=["process", pytest.param("docker", marks=pytest.mark.docker)])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    if request.param == "docker":
        require("docker")
    made = World(request.param, tmp_path)
    yield made
    made.close()


def probed(world: World, *names: str, **changes: Any) -> dict[str, str]:
    """Return what the checks said."""
    spec = world.spec("", **{"memory_bytes": 2 * GIGABYTE, "disk_bytes": GIGABYTE, **changes})
    script = spec.inputs_dir / "probe.py"
    shutil.copy(PROBE, script)
    placed = {"/app/probe.py": script}
    if world.kind == "docker":
        # Tools of this machine: the image holds nothing but Python.
        placed |= {"/packages": Path(PACKAGES)}
        for tool in ("/usr/bin/git", "/usr/lib/git-core"):
            if Path(tool).exists():
                placed[tool] = Path(tool)
    env = {"PYTHONPATH": "/packages", "PROBE_PYTHON": "/usr/bin/python3"}
    spec = dataclasses.replace(
        spec,
        env={**spec.env, **env} if world.kind == "docker" else spec.env,
        destinations=placed,
        command=("python3", "/app/probe.py", *names),
        pids=512,
    )
    spec = dataclasses.replace(spec, layout=world.runner.furnish(spec))
    world.runner.start(spec)
    assert world.ended(spec.run_id).exit_code == 0, world.output(spec.run_id)
    said: dict[str, str] = json.loads(world.output(spec.run_id)[-1])
    return said


def test_what_frameworks_expect_is_there(world: World) -> None:
    said = probed(world, *(name for name in probe.CHECKS if name not in probe.WITH_TORCH))
    wrong = {name: what for name, what in said.items() if what != "ok"}
    absent = {name for name, what in wrong.items() if what.startswith("absent: ")}
    assert set(wrong) == absent, wrong
    # What the one world has not, the other has: each check is made somewhere.
    assert absent <= ({"compiler", "git"} if world.kind == "docker" else {"compiler", "git", "pip"})


CASE_11 = """
import socket
import socketserver, threading
name = socket.gethostname()
print(name, socket.gethostbyname(name), socket.getfqdn() != "")
# What torchrun --standalone does: listen at the host's own name, and be found there.
with socketserver.TCPServer((name, 0), socketserver.BaseRequestHandler) as server:
    threading.Thread(target=server.handle_request, daemon=True).start()
    socket.create_connection(server.server_address, 5).close()
    print("found")
"""


@pytest.mark.docker
@pytest.mark.parametrize("world", ["docker"], indirect=True)
def test_case_11_the_hosts_own_name_is_the_loopback(world: World) -> None:
    spec, status = world.run(CASE_11)
    assert status.exit_code == 0, world.output(spec.run_id)
    first, found = world.output(spec.run_id)
    assert first.split()[:2] == ["job", "127.0.0.1"]
    assert found == "found"


@pytest.mark.slow
def test_what_torch_expects_is_there(world: World) -> None:
    require("torch")
    assert probed(world, "torchrun", "loader") == {"torchrun": "ok", "loader": "ok"}


@pytest.mark.slow
def test_what_torch_compiles_is_kept_and_loaded(tmp_path: Path) -> None:
    """On plain processes: the base image has no compiler, and its folders are tried above."""
    require("torch")
    require("cc")
    world = World("process", tmp_path)
    try:
        assert probed(world, "compiled") == {"compiled": "ok"}
    finally:
        world.close()
