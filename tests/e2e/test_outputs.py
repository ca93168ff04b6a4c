"""What a container has written comes back, with odd entries and from a run that fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sublet.client import Client
from sublet.demo.local import LocalMarket
from tests.services import require

pytestmark = [pytest.mark.slow, pytest.mark.docker]

WRITES = """
import os, socket
o = os.environ.get('SUBLET_OUTPUT_DIR', '.')
os.makedirs(o + '/wandb/run-1')
open(o + '/model.bin', 'w').write('w' * 100)
open(o + '/wandb/run-1/log.txt', 'w').write('hello')
os.symlink('run-1', o + '/wandb/latest-run')
open(o + '/loss\\\\acc.png', 'w').write('x')
open(os.fsencode(o) + b'/caf\\xe9.txt', 'w').write('x')
os.mkfifo(o + '/pipe')
os.mkdir(o + '/closed', 0)
os.chdir(o)
socket.socket(socket.AF_UNIX).bind('s.sock')
"""
ODD = ["caf\\xe9.txt", "loss\\acc.png", "pipe", "s.sock", "wandb/latest-run"]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    require("docker")
    from tests.images import base_image

    local = LocalMarket(tmp_path_factory.mktemp("outputs"), ray="off")
    try:
        local.start_broker()
        config = Path(local.environment["XDG_CONFIG_HOME"]) / "sublet"
        client = Client(broker=local.url, config_dir=config)
        local.start_agent("dock", "--runner", "docker", "--allow-image", base_image())
        local.wait_for(lambda: client.offers().offers, "an offer", local.agents["dock"])
        client.fund(client.party, 5, operator_key=local.operator_key)
        yield client
    finally:
        local.stop()


@pytest.mark.parametrize("outputs", ["/out", ""])
@pytest.mark.parametrize("end", ["succeeded", "failed"])
def test_a_container_gives_back_what_it_has_written(
    client: Client, outputs: str, end: str, tmp_path: Path
) -> None:
    from tests.images import base_image

    code = WRITES + ("raise RuntimeError('eval: division by zero')" if end == "failed" else "")
    job = client.run(
        base_image(), ["python3", "-c", code], gpus="cpu", memory="256MB", disk="256MB", cpus=0.5,
        max_price=1, budget=1, outputs=outputs, name=f"{end}-{outputs[1:] or 'work'}",
    )  # fmt: skip
    assert job.wait().state == end
    found = job.download(tmp_path)
    assert found.kind == ("outputs" if end == "succeeded" else "partial-outputs")
    content = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in found}
    assert content == {"model.bin": "w" * 100, "wandb/run-1/log.txt": "hello"}
    assert [entry.path for entry in found.left_out] == ODD
