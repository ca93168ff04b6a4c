"""Pulling from a registry: a real one, on this machine's loopback, which holds one small image."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import docker
import httpx
import pytest

from sublet.cli.images import local_digest
from sublet_agent.adapters.docker.images import ImageRules
from sublet_agent.adapters.docker.runner import DockerRunner
from sublet_agent.core.runner_port import ImageNotPinned, ImageUnknown
from tests.agent.runner_world import World
from tests.images import base_image
from tests.services import require

pytestmark = pytest.mark.docker

HERE = ImageRules(registries=("127.0.0.1",))
CONFIG = """
version: 0.1
storage: {{filesystem: {{rootdirectory: {folder}}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


@dataclass
class Registry:
    """A registry with one image, which the engine here has forgotten."""

    name: str
    digest: str
    folder: Path

    @property
    def pinned(self) -> str:
        """The image by its digest."""
        return f"{self.name}@{self.digest}"

    def forget(self) -> None:
        """Make the engine know the image by no name of this registry."""
        with closing(docker.from_env()) as client:
            for image in client.images.list(self.name):
                # The tests' base image has other names, which stay.
                for name in (*image.attrs["RepoTags"], *image.attrs["RepoDigests"]):
                    if name.startswith(self.name):
                        # The last tag takes the digests of its repository along.
                        with contextlib.suppress(docker.errors.ImageNotFound):
                            client.api.remove_image(name)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    require("docker")
    require("registry")
    folder = tmp_path_factory.mktemp("registry")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = folder / "config.yml"
    config.write_text(CONFIG.format(folder=folder / "data", port=port))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(config)], stdout=log, stderr=log
        )
    try:
        until_it_answers(f"http://127.0.0.1:{port}/v2/", process)
        made = Registry(f"127.0.0.1:{port}/sublet/base", "", folder)
        with closing(docker.from_env()) as client:
            client.images.get(base_image()).tag(made.name, "1")
            for event in client.api.push(made.name, "1", stream=True, decode=True):
                assert "error" not in event, event
                made.digest = event.get("aux", {}).get("Digest", made.digest)
        assert made.digest.startswith("sha256:")
        made.forget()
        yield made
        made.forget()
    finally:
        process.terminate()
        process.wait()


def until_it_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, "the registry did not start"
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("the registry does not answer")


@pytest.fixture
def runner(registry: Registry) -> DockerRunner:
    registry.forget()
    return DockerRunner("pulls", images=HERE)


def test_it_pulls_by_digest_and_runs_what_it_pulled(registry: Registry, tmp_path: Path) -> None:
    world = World("docker", tmp_path)
    world.runner = world.restarted(images=HERE)
    registry.forget()
    said: list[str] = []
    image = world.runner.ensure_image(registry.pinned, said.append, "digest")
    assert image.digest == registry.pinned
    assert said == [f"pulling the image {registry.pinned}"]
    spec = world.spec("print('pulled')", image=registry.pinned, image_id=image.image_id)
    world.runner.start(spec)
    assert world.ended(spec.run_id).exit_code == 0
    # Once it is here, the registry is not asked again.
    again: list[str] = []
    assert world.runner.ensure_image(registry.pinned, again.append, "digest") == image
    assert again == []
    world.runner.remove(spec.run_id)


def test_a_tag_where_a_digest_is_wanted(registry: Registry, runner: DockerRunner) -> None:
    with pytest.raises(ImageNotPinned, match=r"use .*@sha256:<digest>"):
        runner.ensure_image(f"{registry.name}:1", print, "digest")
    resolved = runner.ensure_image(f"{registry.name}:1", print, "any")
    assert resolved.digest == registry.pinned
    # Now that it is known here, the error says what to write instead, and so does the SDK.
    with pytest.raises(ImageNotPinned, match=f"use {registry.pinned}"):
        runner.ensure_image(f"{registry.name}:1", print, "digest")
    assert local_digest(registry.pinned) == registry.pinned


def test_what_the_registry_does_not_have(registry: Registry, runner: DockerRunner) -> None:
    for absent in (f"{registry.name}:2", f"{registry.name}@sha256:{'0' * 64}"):
        with pytest.raises(ImageUnknown, match="the registry has no such image"):
            runner.ensure_image(absent, print, "any")


def test_a_layer_that_is_not_what_its_digest_says(registry: Registry, runner: DockerRunner) -> None:
    """An image of its own, so that the engine has to fetch its layer."""
    name = f"{registry.name}-damaged"
    with closing(docker.from_env()) as client:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            entry = tarfile.TarInfo("noise")
            entry.size = 100_000
            tar.addfile(entry, io.BytesIO(os.urandom(entry.size)))
        client.api.import_image_from_data(content.getvalue(), repository=name, tag="1")
        client.api.push(name, "1")
        client.images.remove(f"{name}:1")
    layer = max(
        registry.folder.rglob("data"),
        key=lambda path: (
            path.stat().st_mtime_ns if path.is_file() and path.stat().st_size > 100_000 else 0
        ),
    )
    whole = layer.read_bytes()
    layer.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ImageUnknown, match="does not fit its digest"):
        runner.ensure_image(f"{name}:1", print, "any")
    layer.write_bytes(whole)
    pinned = runner.ensure_image(f"{name}:1", print, "any").digest
    assert pinned
    with closing(docker.from_env()) as client:
        client.images.remove(pinned)
