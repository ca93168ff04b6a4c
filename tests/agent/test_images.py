"""Images on an owner's machine: his stay his, renters' come without his logins and go again.

The engine is a real one; the registry is in this process, and in the mood that a test gives it.
"""

from __future__ import annotations

import errno
import functools
import http.server
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import pytest

from sublet_agent.adapters.docker.images import DockerImages, ImageRules
from sublet_agent.adapters.docker.runner import DockerRunner
from sublet_agent.adapters.workspace.disk_space import fault_of
from sublet_agent.core.kept_images import FRESH_MS
from sublet_agent.core.runner_port import (
    ImageNeeds,
    ImageNotAllowed,
    ImageTrouble,
    ImageUnknown,
    PullCancelled,
    PullFailed,
    ResolvedImage,
)
from sublet_contracts.reasons import Reason
from tests.agent.registry_double import Mood, RegistryDouble, layer_of, serving
from tests.agent.runner_world import World, wait_for
from tests.images import base_image
from tests.services import require

pytestmark = pytest.mark.docker

MIB = 2**20
NOTHING_IN_USE = ImageNeeds(in_use=frozenset(), offered_bytes=1)
"""so little is offered that all has to go that can"""


@dataclass
class Machine:
    """An owner's machine with its engine, and the registry that renters use."""

    registry: RegistryDouble
    engine: docker.DockerClient
    state: Path
    now_ms: int = 1_000_000
    said: list[str] = field(default_factory=list)

    def images(self, **changes: Any) -> DockerImages:
        """The agent's images, as a start of the agent makes them."""
        rules = {"registries": ("127.0.0.1",), "stall_s": 20.0, **changes.pop("rules", {})}
        return DockerImages(
            lambda: self.engine,
            **{
                "rules": ImageRules(**rules),
                "state": self.state,
                "now_ms": lambda: self.now_ms,
                **changes,
            },
        )

    def name(self, name: str = "t/img:1") -> str:
        """The full name of an image of the registry."""
        return f"{self.registry.name}/{name}"

    def ensure(self, images: DockerImages, name: str = "t/img:1", **more: Any) -> ResolvedImage:
        """Have an image for a renter."""
        return images.ensure(self.name(name), self.said.append, "any", **more)

    def has(self, image_id: str) -> bool:
        """Whether the engine has it."""
        with suppress(docker.errors.ImageNotFound):
            self.engine.images.get(image_id)
            return True
        return False

    def forget(self) -> None:
        """Let the engine forget what it has from the registry."""
        for image in self.engine.images.list():
            for name in (*image.attrs["RepoTags"], *(image.attrs["RepoDigests"] or ())):
                if name.startswith((self.registry.name, "sublet-test-private")):
                    with suppress(docker.errors.ImageNotFound):
                        self.engine.api.remove_image(name)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    require("docker")
    with serving(RegistryDouble()) as registry, closing(docker.from_env()) as engine:
        made = Machine(registry, engine, tmp_path)
        yield made
        registry.mood = Mood.WELL
        made.forget()


def noise(megabytes: float = 2.0) -> list[bytes]:
    """One layer that nothing makes smaller, nor has been seen before."""
    return [layer_of({"noise": os.urandom(int(megabytes * MIB))})]


# -- the owner's images and logins -----------------------------------------------------------------


def with_login(folder: Path, registry: str) -> Path:
    """Make the owner's Docker configuration: a login, and a helper that writes down who asks."""
    (folder / "bin").mkdir(parents=True)
    asked = folder / "asked"
    helper = folder / "bin" / "docker-credential-owners"
    helper.write_text(
        f"#!/bin/sh\ncat >>{asked}\necho '"
        '{"ServerURL":"r","Username":"owner","Secret":"owners-secret"}\'\n'
    )
    helper.chmod(helper.stat().st_mode | stat.S_IXUSR)
    config = {
        "auths": {registry: {"auth": "b3duZXI6b3duZXJzLXNlY3JldA=="}},
        "credHelpers": {registry: "owners"},
        "HttpHeaders": {"X-Meta-Owner": "owners-secret"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return asked


def test_pulls_never_carry_the_owners_login(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = with_login(tmp_path / "docker", machine.registry.name)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'docker' / 'bin'}:{os.environ['PATH']}")
    digest = machine.registry.add("t/img", "1")
    machine.registry.mood = Mood.PRIVATE
    with closing(docker.from_env()) as owners:
        rules = ImageRules(registries=("127.0.0.1",))
        images = DockerImages(lambda: owners, rules=rules, state=machine.state)
        for name in ("t/img:1", f"t/img@{digest}"):
            with pytest.raises(ImageUnknown, match="to nobody without a login"):
                machine.ensure(images, name)
        assert machine.registry.asked_for("/v2/") >= 2
        assert machine.registry.logins == []
        assert machine.registry.metadata == []
        assert not asked.exists()
        # The owner himself has it by the same configuration: so the test would see a login.
        owners.images.pull(machine.name("t/img"), tag="1")
        assert machine.registry.logins
        assert asked.exists()
        # Now it is in his engine, and a renter doesn't get it all the same.
        for name in ("t/img:1", f"t/img@{digest}"):
            with pytest.raises(ImageUnknown):
                machine.ensure(images, name)


def test_an_image_of_the_owners_runs_for_nobody_unless_he_lists_it(
    machine: Machine, tmp_path: Path
) -> None:
    private = machine.name("owner/private")
    machine.engine.images.get(base_image()).tag(private, "1")
    images = machine.images()
    for image in (f"{private}:1", base_image()):
        with pytest.raises(ImageUnknown):
            images.ensure(image, print, "any")
        with pytest.raises(ImageTrouble):
            images.id_of(image)
    listed = machine.images(rules={"allowed": (f"{private}:1",)})
    assert listed.ensure(f"{private}:1", print, "any").image_id == base_image()
    assert listed.ensure(base_image(), print, "digest").image_id == base_image()
    # A run that says no more than a name gets no further.
    (tmp_path / "world").mkdir()
    world = World("docker", tmp_path / "world")
    world.runner = world.restarted(images=ImageRules(registries=("127.0.0.1",)))
    with pytest.raises(ImageTrouble):
        world.runner.start(world.spec("print('mine')", image=f"{private}:1"))
    assert world.runner.find() == [] or world.runner.find()[0].status.state == "gone"


def test_a_renters_image_takes_no_name_of_the_owners(machine: Machine) -> None:
    machine.engine.images.get(base_image()).tag(machine.name("t/img"), "1")
    machine.registry.add("t/img", "1")
    found = machine.ensure(machine.images())
    assert found.image_id != base_image()
    assert machine.engine.images.get(machine.name("t/img:1")).id == base_image()


def test_a_tag_is_looked_up_and_run_by_its_id(machine: Machine, tmp_path: Path) -> None:
    with closing(docker.from_env()) as client:
        saved = b"".join(client.images.get(base_image()).save())
    digest = machine.registry.add_saved("t/python", "1", saved)
    (tmp_path / "world").mkdir()
    world = World("docker", tmp_path / "world")
    world.runner = world.restarted(images=ImageRules(registries=(machine.registry.name,)))
    name = machine.name("t/python:1")
    image = world.runner.ensure_image(name, machine.said.append, "any")
    assert image.digest == machine.name(f"t/python@{digest}")
    spec = world.spec("print('by id')", image=name, image_id=image.image_id)
    world.runner.start(spec)
    assert world.ended(spec.run_id).exit_code == 0
    assert world.output(spec.run_id) == ["by id"]
    world.close()


# -- names and registries --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image", ["../images", "UPPER", "a\x00b", "a\x1b[2J", "a/b:c:d", "x" * 500, "y" * 10_240]
)
def test_what_is_no_name_is_unknown_and_asked_of_nobody(machine: Machine, image: str) -> None:
    with pytest.raises(ImageUnknown, match=r"names no image|characters") as failed:
        machine.images().ensure(image, print, "any")
    assert str(failed.value).isprintable()
    assert machine.registry.asked == []


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["10.1.1.1"], ["169.254.169.254"], ["::1"], ["93.184.216.34", "::"]],
)
def test_a_registry_at_home_is_not_asked(machine: Machine, addresses: list[str]) -> None:
    images = machine.images(rules={"registries": ()}, addresses=lambda host, port: addresses)
    with pytest.raises(ImageNotAllowed, match="--allow-registry"):
        images.ensure(machine.name(), print, "any")
    assert machine.registry.asked == []


def test_a_registry_whose_name_nobody_knows(machine: Machine) -> None:
    with pytest.raises(PullFailed, match="host name was not found"):
        machine.images().ensure("registry.invalid/t/img:1", print, "any")


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mood", "kind", "says"),
    [
        (Mood.BUSY, PullFailed, "is busy"),
        (Mood.DOWN, PullFailed, "an error of its own"),
        (Mood.CHATTY, PullFailed, "an error of its own"),
        (Mood.HALF_MANIFEST, PullFailed, "can't be read"),
        (Mood.NO_BLOBS, PullFailed, "lacks a part"),
        (Mood.RESET, PullFailed, "was cut off|no bytes for"),  # the engine tries five times
        (Mood.DENIED, ImageUnknown, "without a login, or has no such image"),
    ],
)
def test_each_mood_has_its_kind_and_our_words(
    machine: Machine, mood: Mood, kind: type[ImageTrouble], says: str
) -> None:
    machine.registry.add("t/img", "1", noise())
    machine.registry.mood = mood
    images = machine.images(rules={"stall_s": 8.0})
    with pytest.raises(kind, match=says) as failed:
        machine.ensure(images)
    assert type(failed.value) is kind
    for word in ("HTTP", "EOF", "denied:", "toomany", "secret", "http:", "byte range", "JSON"):
        assert word not in str(failed.value)
    if "no bytes" not in str(failed.value):
        assert failed.value.raw, "the owner reads what the engine said"
    assert failed.value.raw.isprintable()
    assert len(failed.value.raw) <= 500
    # Nothing of it stays, and when the registry is well again so is the image.
    machine.registry.mood = Mood.WELL
    assert machine.has(machine.ensure(images).image_id)


def test_what_a_registry_does_not_have(machine: Machine) -> None:
    machine.registry.add("t/img", "1")
    for name in ("t/img:2", "t/other:1", f"t/img@sha256:{'1' * 64}"):
        with pytest.raises(ImageUnknown, match="has no such image"):
            machine.ensure(machine.images(), name)


def test_an_image_for_another_architecture_only(machine: Machine) -> None:
    """In a list of platforms, and alone: that one the engine would even pull."""
    digest = machine.registry.add("t/img", "alone", architecture="s390x")
    machine.registry.add_list("t/img", "listed", digest, "s390x")
    for name in ("t/img:alone", "t/img:listed"):
        with pytest.raises(PullFailed, match="architecture"):
            machine.ensure(machine.images(), name)
    assert machine.registry.asked_for("/blobs/" + digest) == 0


def test_a_registry_that_speaks_no_tls(machine: Machine) -> None:
    """Only the loopback may do without; any other address is another machine's to the engine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect(("192.0.2.1", 9))
        address = str(route.getsockname()[0])
    if address.startswith("127."):
        pytest.skip("this machine has no address but its loopback's")
    server = http.server.HTTPServer((address, 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        images = machine.images(rules={"registries": (address,)})
        with pytest.raises(PullFailed, match="certificate is not to be trusted, or it speaks no"):
            images.ensure(f"{address}:{server.server_address[1]}/t/img:1", print, "any")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("mood", [Mood.STILL, Mood.SILENT])
def test_a_pull_that_stands_still_is_ended(machine: Machine, mood: Mood) -> None:
    machine.registry.add("t/img", "1", noise())
    machine.registry.mood = mood
    images = machine.images(rules={"stall_s": 1.5})
    began = time.monotonic()
    with pytest.raises(PullFailed, match=r"no bytes for 1\.5 s|did not answer in time"):
        machine.ensure(images)
    assert time.monotonic() - began < 10
    machine.registry.mood = Mood.WELL
    assert machine.ensure(images)


def waiting(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Call it in a thread; what it returns or raises is put into the list."""
    outcome: list[object] = []

    def work() -> None:
        try:
            outcome.append(call())
        except Exception as error:  # noqa: BLE001 - the test looks at it
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, outcome


def test_one_pull_for_all_and_who_leaves_harms_nobody(machine: Machine) -> None:
    machine.registry.add("t/img", "1", noise())
    layer = max(machine.registry.blobs, key=lambda digest: len(machine.registry.blobs[digest]))
    machine.registry.mood = Mood.DRIP
    images = machine.images()
    leaves, stays = threading.Event(), threading.Event()
    first = waiting(functools.partial(machine.ensure, images, cancel=leaves))
    second = waiting(functools.partial(machine.ensure, images, cancel=stays))
    wait_for(lambda: machine.registry.asked_for("/blobs/") >= 2, "the pull to begin")
    leaves.set()
    first[0].join(3)
    assert isinstance(first[1][0], PullCancelled)
    second[0].join(60)
    assert isinstance(second[1][0], ResolvedImage), second[1]
    assert machine.registry.ended_early == 0
    assert machine.registry.asked_for(f"GET /v2/t/img/blobs/{layer}") == 1


def test_the_last_who_leaves_ends_the_pull(machine: Machine) -> None:
    machine.registry.add("t/img", "1", noise(16))
    machine.registry.mood = Mood.DRIP
    images = machine.images()
    cancel = threading.Event()
    thread, outcome = waiting(functools.partial(machine.ensure, images, cancel=cancel))
    wait_for(lambda: machine.registry.asked_for("/blobs/") >= 2, "the pull to begin")
    cancel.set()
    thread.join(3)
    assert isinstance(outcome[0], PullCancelled)
    wait_for(lambda: machine.registry.ended_early > 0, "the engine to let go")
    assert images.tidy(NOTHING_IN_USE) == []


# -- how big ---------------------------------------------------------------------------------------


def test_an_image_that_is_too_big_is_not_fetched_to_its_end(machine: Machine) -> None:
    machine.registry.add("t/img", "1", noise(16))
    machine.registry.mood = Mood.DRIP
    images = machine.images(rules={"cap_bytes": 4 * MIB})
    with pytest.raises(PullFailed, match="bigger than this machine's owner lets images be"):
        machine.ensure(images)
    wait_for(lambda: machine.registry.ended_early > 0, "the engine to let go")


def test_an_image_that_unpacks_to_too_much_does_not_stay(machine: Machine) -> None:
    machine.registry.add("t/img", "1", [layer_of({"zeros": bytes(32 * MIB)})])
    images = machine.images(rules={"cap_bytes": 8 * MIB})
    with pytest.raises(PullFailed, match="bigger"):
        machine.ensure(images)
    assert not machine.engine.images.list(machine.name("t/img"))


def test_a_pull_ends_before_the_disk_is_full(machine: Machine) -> None:
    machine.registry.add("t/img", "1", noise(16))
    machine.registry.mood = Mood.DRIP
    free = iter([100 * MIB, 90 * MIB])
    images = machine.images(free_bytes=lambda: next(free, 40 * MIB))
    with pytest.raises(PullFailed, match="no room") as failed:
        machine.ensure(images)
    assert failed.value.errno == errno.ENOSPC
    assert fault_of(failed.value, failed.value.reason) is Reason.PROVIDER_DISK_FULL


# -- what stays and what goes ----------------------------------------------------------------------


def test_images_go_again_the_least_recently_used_first(machine: Machine) -> None:
    images = machine.images(free_bytes=lambda: 100 * 2**30)
    found = []
    for number in (1, 3, 4):
        machine.now_ms += 1_000
        machine.registry.add("t/img", str(number), noise(4))
        found.append(machine.ensure(images, f"t/img:{number}"))
    machine.now_ms += 1_000
    machine.ensure(images, "t/img:1")
    # There is room for two of them beside what a run may write.
    needs = ImageNeeds(frozenset(), offered_bytes=30 * MIB, reserved_bytes=21 * MIB)
    assert len(images.tidy(needs)) == 1
    assert [machine.has(one.image_id) for one in found] == [True, False, True]
    # After a restart the rest is known, and what is needed stays, by each of its names.
    again = machine.images()
    for in_use in (found[0].image_id, machine.name("t/img:1"), found[0].digest or ""):
        needed = ImageNeeds(frozenset({in_use}), offered_bytes=1)
        again.tidy(needed)
        assert [machine.has(one.image_id) for one in found] == [True, False, False]
    assert machine.ensure(again, "t/img:1") == found[0]
    assert len(again.tidy(NOTHING_IN_USE)) == 1
    assert not machine.engine.images.list(machine.name("t/img"))


def test_what_the_owner_had_or_lists_is_not_let_go(machine: Machine) -> None:
    digest = machine.registry.add("t/img", "1", noise())
    machine.registry.add("t/img", "2", noise())
    machine.engine.images.pull(machine.name("t/img"), tag="1")
    images = machine.images(rules={"allowed": (machine.name("t/img:2"),)})
    had = machine.ensure(images, f"t/img@{digest}")
    listed = machine.ensure(images, "t/img:2")
    machine.engine.images.get(listed.image_id).tag(machine.name("t/img"), "2")
    assert images.tidy(NOTHING_IN_USE) == []
    assert machine.has(had.image_id)
    assert machine.has(listed.image_id)


def test_what_the_owner_tagged_since_stays_his(machine: Machine) -> None:
    machine.registry.add("t/img", "1", noise())
    images = machine.images()
    found = machine.ensure(images)
    machine.engine.images.get(found.image_id).tag("sublet-test-private", "1")
    assert len(images.tidy(NOTHING_IN_USE)) == 1
    assert machine.engine.images.get("sublet-test-private:1").id == found.image_id


def test_what_runs_is_not_let_go(machine: Machine, tmp_path: Path) -> None:
    """The engine holds on to it even where nobody said that it is needed."""
    machine.registry.add("t/img", "1", noise(), command=("/noise",))
    images = machine.images()
    found = machine.ensure(images)
    container = machine.engine.api.create_container(found.image_id)
    try:
        assert images.tidy(NOTHING_IN_USE) == []
        assert machine.has(found.image_id)
    finally:
        machine.engine.api.remove_container(container, force=True)
    assert len(images.tidy(NOTHING_IN_USE)) == 1


def test_an_agent_that_died_in_the_middle_knows_what_it_began(machine: Machine) -> None:
    machine.registry.add("t/img", "1", noise())
    found = machine.ensure(machine.images())
    file = machine.state / "images.json"
    known = json.loads(file.read_text())
    known[0].update(image_id="", size_bytes=0, tags=[])
    known.append({**known[0], "pinned": machine.name("t/img@sha256:" + "2" * 64)})
    file.write_text(json.dumps(known))
    again = machine.images()
    assert len(again.tidy(NOTHING_IN_USE)) == 1
    assert not machine.has(found.image_id)
    assert json.loads(file.read_text()) == []


@pytest.mark.parametrize("damage", ["", "[{", '{"a": 1}', '[{"pinned": 1}]', "[[[" * 10_000])
def test_a_list_that_can_not_be_read_gives_nothing_away(machine: Machine, damage: str) -> None:
    machine.registry.add("t/img", "1", noise())
    found = machine.ensure(machine.images())
    (machine.state / "images.json").write_text(damage)
    again = machine.images()
    assert "could not be read" in again.tidy(NOTHING_IN_USE)[0]
    assert again.tidy(NOTHING_IN_USE) == []
    assert machine.has(found.image_id)
    machine.registry.mood = Mood.DOWN
    with pytest.raises(PullFailed):
        machine.ensure(again)
    machine.registry.mood = Mood.WELL
    assert machine.ensure(again).image_id == found.image_id


def test_a_tag_is_looked_up_again_after_a_while(machine: Machine) -> None:
    images = machine.images()
    machine.registry.add("t/img", "1")
    before = machine.ensure(images)
    machine.registry.add("t/img", "1")
    asked = len(machine.registry.asked)
    assert machine.ensure(images) == before
    assert len(machine.registry.asked) == asked
    machine.now_ms += FRESH_MS
    machine.registry.mood = Mood.DOWN
    assert machine.ensure(images) == before
    assert "the image that it had for this name before is used" in machine.said[-1]
    machine.registry.mood = Mood.WELL
    after = machine.ensure(images)
    assert after.image_id != before.image_id
    assert machine.ensure(machine.images()) == after


def test_what_the_owner_deleted_is_pulled_anew(machine: Machine) -> None:
    digest = machine.registry.add("t/img", "1")
    images = machine.images()
    found = machine.ensure(images, f"t/img@{digest}")
    machine.engine.images.remove(found.image_id, force=True)
    assert machine.ensure(images, f"t/img@{digest}") == found
    assert machine.has(found.image_id)


def test_the_runner_hands_it_all_on(machine: Machine) -> None:
    runner = DockerRunner(
        "images", machine.state, images=ImageRules(registries=("127.0.0.1",), stall_s=20.0)
    )
    machine.registry.add("t/img", "1")
    assert runner.ensure_image(machine.name(), machine.said.append, "any", threading.Event())
    assert len(runner.tidy_images(NOTHING_IN_USE)) == 1


# -- what a tag means, before a lease is signed ----------------------------------------------------


def test_a_tag_is_looked_up_without_pulling_and_then_pulled_as_it_was(machine: Machine) -> None:
    images = machine.images()
    digest = machine.registry.add("t/img", "1", noise())
    pinned = images.look_up(machine.name())
    assert pinned == machine.name(f"t/img@{digest}")
    assert machine.registry.asked_for("/blobs/") <= 1, "its configuration, for the platform"
    # Somebody moves the tag before it is pulled: the job has what was looked up.
    moved = machine.registry.add("t/img", "1", noise())
    assert moved != digest
    found = images.ensure(pinned, machine.said.append, "any")
    assert found.digest == pinned
    # What was looked up holds for a while, also after a restart of the agent.
    asked = machine.registry.asked_for("/manifests/1")
    assert machine.images().look_up(machine.name()) == pinned
    assert machine.registry.asked_for("/manifests/1") == asked
    machine.now_ms += FRESH_MS
    assert images.look_up(machine.name()) == machine.name(f"t/img@{moved}")


def test_an_image_that_the_owner_lists_is_pinned_by_its_id(machine: Machine) -> None:
    private = machine.name("owner/private")
    machine.engine.images.get(base_image()).tag(private, "1")
    listed = machine.images(rules={"allowed": (f"{private}:1",)})
    pinned = listed.look_up(f"{private}:1")
    assert pinned == base_image(), "no registry knows it, and its other names are the owner's"
    assert listed.ensure(pinned, print, "any").image_id == base_image()
    # A successor without it says so, in words.
    with pytest.raises(ImageUnknown, match="goes on only where the owner allows that image too"):
        machine.images().ensure(pinned, print, "any")


def test_an_image_that_the_owner_pulled_and_lists_is_pinned_by_its_digest(machine: Machine) -> None:
    digest = machine.registry.add("t/img", "1", noise())
    machine.engine.images.pull(machine.name("t/img"), tag="1")
    machine.engine.images.get(machine.name("t/img:1")).tag(machine.name("owner/secret"), "1")
    listed = machine.images(rules={"allowed": (machine.name("t/img:1"),)})
    assert listed.look_up(machine.name("t/img:1")) == machine.name(f"t/img@{digest}")
    assert listed.ensure(machine.name(f"t/img@{digest}"), print, "any").image_id


@pytest.mark.parametrize(
    ("mood", "kind"),
    [(Mood.BUSY, PullFailed), (Mood.DOWN, PullFailed), (Mood.PRIVATE, ImageUnknown)],
)
def test_a_registry_in_a_mood_is_told_before_the_lease(
    machine: Machine, mood: Mood, kind: type[ImageTrouble]
) -> None:
    images = machine.images()
    machine.registry.add("t/img", "1", noise())
    machine.registry.mood = mood
    with pytest.raises(kind) as refused:
        images.look_up(machine.name())
    assert type(refused.value) is kind
    assert machine.name() in str(refused.value)
    machine.registry.mood = Mood.WELL
    pinned = images.look_up(machine.name())
    images.ensure(pinned, machine.said.append, "any")
    # What is here goes on being used while its registry is busy, but not once it is private.
    machine.registry.mood = mood
    machine.now_ms += FRESH_MS
    if kind is ImageUnknown:
        with pytest.raises(ImageUnknown):
            images.look_up(machine.name())
    else:
        assert images.look_up(machine.name()) == pinned


def test_an_image_for_another_architecture_is_told_before_the_lease(machine: Machine) -> None:
    digest = machine.registry.add("t/img", "alone", architecture="s390x")
    machine.registry.add_list("t/img", "listed", digest, "s390x")
    with pytest.raises(PullFailed, match="architecture"):
        machine.images().look_up(machine.name("t/img:listed"))


def test_registries_that_the_owner_does_not_allow_are_not_asked(machine: Machine) -> None:
    machine.registry.add("t/img", "1", noise())
    with pytest.raises(ImageNotAllowed):
        machine.images(rules={"registries": ()}).look_up(machine.name())
    assert machine.registry.asked_for("/v2/") == 0
