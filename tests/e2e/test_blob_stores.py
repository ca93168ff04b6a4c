"""A broker whose content lies in S3: a job is lost in the middle and goes on from there."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from pathlib import Path

import pytest

from sublet.client import Client
from sublet.demo.local import LocalMarket
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
    while step == 2 and os.environ["SUBLET_EPOCH"] == "1":
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


def play(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the job, lose it after step 2, and see that it ends as an undisturbed one."""
    place = s3_servers.new_place(endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", place.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_servers.KEY.key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_servers.KEY.secret)
    local = LocalMarket(tmp_path, ("--blobs", place.url), ray="off")
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    try:
        local.start_broker()
        client = Client(
            broker=local.url, config_dir=Path(local.environment["XDG_CONFIG_HOME"]) / "sublet"
        )
        client.fund(client.party, 5, operator_key=local.operator_key)
        options = ("--runner", "process", "--trust", client.party, "--image-policy", "any")
        first = local.start_agent("first", *options, "--region", "here")
        local.wait_for(lambda: client.offers().offers, "an offer", first)
        job = client.run(
            "process", ["python3", "/job.py"], gpus="cpu", memory="256MB", disk="256MB", cpus=0.5,
            max_price=1, budget=1, outputs="/out", inputs={str(script): "/job.py"},
            region="here",
        )  # fmt: skip

        def durable() -> bool:
            return any(c.step == 2 and c.state == "durable" for c in job.checkpoints().checkpoints)

        local.wait_for(durable, "step 2 to be durable", first)
        local.start_agent("second", *options, "--region", "here")
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
        log = (tmp_path / "logs" / "broker.log").read_text()
        assert "Traceback" not in log
        assert s3_servers.KEY.secret not in log
    finally:
        local.stop()
