"""A broker whose content lies in S3: a job is lost in the middle and goes on from there."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sublet.client import Client, Job
from sublet.demo.local import LocalMarket, LocalProcess
from tests import services
from tests.stores import s3_servers
from tests.stores.s3_front import front

pytestmark = pytest.mark.slow

BYTES = 3_000_000
SCRIPT = f"""
import hashlib, os, pathlib, random, time
import sublet_ckpt as ckpt
restored = ckpt.restore()
data = restored.path.joinpath("state").read_bytes() if restored else b""
step = restored.step if restored else 0
print("begins at", step, flush=True)
while step < 4:
    step += 1
    data = random.Random(step).randbytes({BYTES}) + hashlib.sha256(data).digest()
    ckpt.save(step, {{"state": data}}, wait=True)
    while step == HOLD_AT and os.environ["SUBLET_EPOCH"] == "1":
        time.sleep(0.05)
pathlib.Path(os.environ["SUBLET_OUTPUT_DIR"], "end").write_bytes(data)
"""


def expected() -> bytes:
    """What an undisturbed run ends with."""
    data = b""
    for step in range(1, 5):
        data = random.Random(step).randbytes(BYTES) + hashlib.sha256(data).digest()
    return data


@pytest.mark.parametrize("server", ["by address", "moto", "s3rver"])
def test_a_lost_job_goes_on_from_what_lies_in_s3(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if server == "s3rver":
        services.require("s3rver")
        play(s3_servers.s3rver(), tmp_path, monkeypatch)
        return
    with front(s3_servers.moto(), s3_servers.KEY if server == "by address" else None) as before:
        play(before.endpoint, tmp_path, monkeypatch)
        packs = [(method, path) for method, path in before.asked if "/packs/" in path]
    signed = [(method, path) for method, path in packs if "X-Amz-Signature" in path]
    moved = {method for method, _ in signed}
    if server == "by address":
        assert [
            path for method, path in packs if method == "PUT" and (method, path) not in signed
        ] == []
        assert moved == {"PUT", "GET"}
    else:
        assert moved == set()


@contextmanager
def started(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold_at: int = 0
) -> Iterator[tuple[LocalMarket, Client, Job]]:
    """A market with its content there, one agent, and the job, whose first run stops there."""
    place = s3_servers.new_place(endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", place.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_servers.KEY.key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_servers.KEY.secret)
    local = LocalMarket(tmp_path, ("--blobs", place.url), ray="off")
    script = tmp_path / "job.py"
    script.write_text(f"HOLD_AT = {hold_at}\n{SCRIPT}")
    try:
        local.start_broker()
        client = Client(
            broker=local.url, config_dir=Path(local.environment["XDG_CONFIG_HOME"]) / "sublet"
        )
        client.fund(client.party, 5, operator_key=local.operator_key)
        first = provide(local, client, "first")
        local.wait_for(lambda: client.offers().offers, "an offer", first)
        job = client.run(
            "process", ["python3", "/job.py"], gpus="cpu", memory="256MB", disk="256MB", cpus=0.5,
            max_price=1, budget=1, outputs="/out", inputs={str(script): "/job.py"},
            region="here",
        )  # fmt: skip

        yield local, client, job
        log = (tmp_path / "logs" / "broker.log").read_text()
        assert "Traceback" not in log
        assert s3_servers.KEY.secret not in log
    finally:
        local.stop()


def provide(local: LocalMarket, client: Client, name: str) -> LocalProcess:
    """Start an agent."""
    options = ("--runner", "process", "--trust", client.party, "--image-policy", "any")
    return local.start_agent(name, *options, "--region", "here")


def play(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the job, lose it after step 2, and see that it ends as an undisturbed one."""
    with started(endpoint, tmp_path, monkeypatch, hold_at=2) as (local, client, job):

        def durable() -> bool:
            return any(c.step == 2 and c.state == "durable" for c in job.checkpoints().checkpoints)

        first = local.agents["first"]
        local.wait_for(durable, "step 2 to be durable", first)
        provide(local, client, "second")
        first.signal(signal.SIGKILL)
        for pid in local.run_processes(agent="first"):
            os.kill(pid, signal.SIGKILL)
        ended = job.wait()
        said = "\n".join(line.text for line in job.logs())
        assert ended.state == "succeeded", said
        (found,) = job.download(tmp_path / "got")
        assert found.read_bytes() == expected()
        assert "begins at 2" in said
        folder = tmp_path / "broker" / "blobs"
        assert not folder.exists() or not list(folder.rglob("*")), "content in the data folder"
        # A broker that is started anew finds all of it.
        assert local.broker is not None
        local.broker.kill()
        local.restart_broker()
        (again,) = job.download(tmp_path / "again")
        assert again.read_bytes() == expected()


def test_a_broker_killed_around_a_commit_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies while an agent puts a pack by address, and while it reads one to commit it."""
    killed: list[str] = []
    ended = threading.Event()
    with (
        front(s3_servers.moto(), s3_servers.KEY) as before,
        started(before.endpoint, tmp_path, monkeypatch) as (local, _, job),
    ):

        def kill_at(method: str, path: str) -> None:
            if "/packs/" not in path or local.broker is None or not local.broker.running:
                return
            signed = "X-Amz-Signature" in path
            what = {("PUT", True): "put", ("GET", False): "commit"}.get((method, signed), "")
            if what and what not in killed:
                killed.append(what)
                local.broker.signal(signal.SIGKILL)

        def keep_it_running() -> None:
            while not ended.wait(0.1):
                if local.broker is not None and not local.broker.running:
                    local.restart_broker()

        keeper = threading.Thread(target=keep_it_running)
        keeper.start()
        try:
            with before.does(kill_at):
                view = job.wait()
        finally:
            ended.set()
            keeper.join()
        assert view.state == "succeeded", [line.text for line in job.logs()]
        assert len(view.runs) == 1, "the run itself was disturbed"
        (found,) = job.download(tmp_path / "got")
        assert found.read_bytes() == expected()
    assert sorted(killed) == ["commit", "put"]
