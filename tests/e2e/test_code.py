"""A folder of code goes along as it lies there, by one command, and runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sublet.client import Client
from sublet.demo.local import LocalMarket
from sublet.spec import JobSpec
from sublet.transfers import OnBytes
from tests.services import require

TRAIN = """
import json, os, pathlib
import lib.model
print("loss", lib.model.loss(), os.readlink("lib/now"), open("lib/now").read().split()[1])
pathlib.Path("weights.txt").write_text("trained")
listed = sorted(str(p) for p in pathlib.Path(".").rglob("*") if "__pycache__" not in str(p))
print(json.dumps(listed))
print(json.load(open(".sublet/code.json"))["changed"])
"""
COMMAND = ("python3", "train.py")


@pytest.fixture(
    scope="module",
    params=["process", pytest.param("docker", marks=[pytest.mark.docker, pytest.mark.slow])],
)
def market(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LocalMarket, str]]:
    allowed: tuple[str, ...] = ()
    image = "local/python"
    if request.param == "docker":
        require("docker")
        from tests.images import base_image

        image = base_image()
        allowed = ("--allow-image", image)
    local = LocalMarket(tmp_path_factory.mktemp("code"), ray="off")
    try:
        local.start_broker()
        config = Path(local.environment["XDG_CONFIG_HOME"]) / "sublet"
        client = Client(broker=local.url, config_dir=config)
        local.start_agent("here", "--runner", request.param, *allowed)
        local.wait_for(lambda: client.offers().offers, "an offer", local.agents["here"])
        client.fund(client.party, 5, operator_key=local.operator_key)
        yield local, image
    finally:
        local.stop()


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A small repository with an uncommitted change, a link, and what must stay home."""
    root = tmp_path / "project"
    (root / "lib").mkdir(parents=True)
    (root / "train.py").write_text("print('as committed')")
    (root / "lib" / "model.py").write_text("def loss():\n    return 0.25\n")
    os.symlink("model.py", root / "lib" / "now")
    (root / ".gitignore").write_text("runs/\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", str(root), *identity, *command], check=True)
    (root / "train.py").write_text(TRAIN)
    (root / ".env").write_text("HF_TOKEN=hf_never_sent")
    (root / "runs").mkdir()
    (root / "runs" / "old.bin").write_text("x" * 10_000)
    (root / ".venv").mkdir()
    (root / ".venv" / "pyvenv.cfg").write_text("home = /usr")
    return root


def run(local: LocalMarket, image: str, code: Path, *more: str) -> subprocess.CompletedProcess[str]:
    options = ("--gpus", "cpu", "--memory", "256MB", "--disk", "256MB", "--cpus", "0.5")
    terms = ("--max-price", "1", "--budget", "1", "-y")
    options = (*options, *terms, *more, "--code", ".")
    return subprocess.run(
        [sys.executable, "-m", "sublet.cli.main", "run", *options, image, "--", *COMMAND],
        env={**os.environ, **local.environment},
        cwd=code,
        capture_output=True,
        text=True,
    )


def test_a_folder_of_code_runs_as_it_lies_there_and_secrets_stay_home(
    market: tuple[LocalMarket, str], code: Path, tmp_path: Path
) -> None:
    local, image = market
    done = run(local, image, code, "--json")
    assert done.returncode == 0, done.stderr
    commit = subprocess.run(
        ["git", "-C", str(code), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout[:12]
    assert "code    4 files, " in done.stderr
    assert "left out: 3 by default, 1 by .gitignore" in done.stderr
    assert f"commit {commit}, 1 file changed since" in done.stderr
    job = json.loads(done.stdout)["id"]
    assert f"commit {commit}, 1 file changed since" in local.command("inspect", job)
    logged = local.command("logs", job).splitlines()
    assert "loss 0.25 model.py loss():" in logged
    sent = [".gitignore", ".sublet", ".sublet/code.json", ".sublet/uncommitted.diff", "lib"]
    sent += ["lib/model.py", "lib/now", "train.py", "weights.txt"]
    assert json.dumps(sent) in logged
    assert "['train.py']" in logged
    assert "hf_never_sent" not in "\n".join(logged)
    # What it wrote beside its code comes back; the code itself doesn't.
    local.command("download", job, str(tmp_path / "back"))
    back = [path.name for path in (tmp_path / "back").rglob("*") if path.is_file()]
    assert back == ["weights.txt"]


def test_what_has_not_changed_is_not_sent_again(
    market: tuple[LocalMarket, str], code: Path
) -> None:
    local, image = market
    config = Path(local.environment["XDG_CONFIG_HOME"]) / "sublet"
    client = Client(broker=local.url, config_dir=config)
    moved: list[int] = []

    def announce(what: str, total_bytes: int) -> OnBytes:
        moved.append(total_bytes)
        return lambda count_bytes: None

    def submit() -> None:
        spec = JobSpec(
            image=image, command=COMMAND, code=str(code), gpus="cpu", max_price=1, budget=1
        )
        client.submit(spec, announce=announce).cancel()

    (code / "big.txt").write_bytes(os.urandom(500_000))
    submit()
    submit()
    (code / "train.py").write_text("print('another')")
    submit()
    first, again, changed = moved
    assert first > 500_000
    assert again == 0
    assert 0 < changed < 5_000


def test_what_cannot_go_along_is_told_before_anything_is_asked(
    market: tuple[LocalMarket, str], code: Path
) -> None:
    local, image = market
    os.symlink("/etc/hostname", code / "host")
    done = run(local, image, code)
    assert done.returncode == 1
    assert "--code: host is a link that leads out of the folder, to /etc/hostname" in done.stderr
    assert "fix: leave it out by a line in .subletignore" in done.stderr


def test_a_dry_run_names_the_code_by_its_digest(
    market: tuple[LocalMarket, str], code: Path
) -> None:
    local, image = market
    done = run(local, image, code, "--dry-run")
    document = json.loads(done.stdout)
    assert document["workdir"] == "/work"
    (item,) = document["inputs"]
    assert (item["destination"], item["kind"]) == ("/work", "folder")
