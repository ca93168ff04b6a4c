"""A renter's own caches outlive his runs where the owner allows it, and nobody else sees them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from sublet_agent.adapters.workspace import renter_caches
from sublet_agent.adapters.workspace.renter_caches import RenterCaches
from sublet_agent.core.layout import Layout
from tests.agent.runner_world import World
from tests.services import require

KEEP = (
    "import os, pathlib\n"
    "there = pathlib.Path(os.environ['TRITON_CACHE_DIR'], 'kernel')\n"
    "print(there.exists(), flush=True)\n"
    "there.parent.mkdir(exist_ok=True, parents=True)\n"
    "there.write_text('x')\n"
    "print(os.environ.get('XDG_CACHE_HOME') is not None)"
)


def fill(cache: Path | None, size: int) -> Path:
    assert cache is not None
    (cache / "data").write_bytes(b"x" * size)
    return cache


def test_each_renter_has_his_own_and_off_is_off(tmp_path: Path) -> None:
    caches = RenterCaches(tmp_path, 1 << 20)
    ann, bob = caches.folder_of("ann"), caches.folder_of("bob")
    assert ann != bob
    assert caches.folder_of("ann") == ann
    off = RenterCaches(tmp_path / "off", 0)
    assert off.folder_of("ann") is None
    assert off.noted(Layout(), None) == Layout()
    assert not (tmp_path / "off").exists()


def test_the_least_recently_used_goes_first_and_what_is_used_stays(tmp_path: Path) -> None:
    caches = RenterCaches(tmp_path, 250_000)
    held = {}
    for age, renter in enumerate(("ann", "bob", "eve")):
        held[renter] = fill(caches.folder_of(renter), 100_000)
        os.utime(held[renter].parent / "used", ns=(age * 10**9, age * 10**9))
    assert len(caches.tidy(lambda: ["ann"])) == 1
    assert [renter for renter, folder in held.items() if folder.exists()] == ["ann", "eve"]
    # One that is too large by itself goes as well, but not under a run.
    fill(held["ann"], 300_000)
    assert len(caches.tidy(lambda: ["ann"])) == 1
    assert held["ann"].exists()
    assert "let go of a renter's cache" in caches.tidy(lambda: [])[0]
    assert not held["ann"].exists()


def test_what_has_too_many_files_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renter_caches, "MAX_ENTRIES", 10)
    caches = RenterCaches(tmp_path, 1 << 30)
    cache = caches.folder_of("ann")
    assert cache is not None
    for number in range(12):
        (cache / f"f{number}").touch()
    assert "more than 10 files" in caches.tidy(lambda: [])[0]


def test_they_are_deleted_when_the_owner_says_so(tmp_path: Path) -> None:
    caches = RenterCaches(tmp_path, 1 << 20)
    ann, bob = fill(caches.folder_of("ann"), 1000), fill(caches.folder_of("bob"), 1000)
    (bob / "away").symlink_to("/etc")
    assert caches.forget(lambda: ["ann"])[0] == 1
    assert ann.exists()
    assert not bob.exists()
    assert Path("/etc/passwd").exists()
    # Also where they are no longer kept.
    assert RenterCaches(tmp_path, 0).forget(lambda: [])[0] == 1


def test_what_a_run_finds_there_is_not_its_disk(tmp_path: Path) -> None:
    caches = RenterCaches(tmp_path, 1 << 20)
    cache = fill(caches.folder_of("ann"), 100_000)
    noted = caches.noted(Layout(), cache)
    assert noted.cache_dir == str(cache)
    assert 100_000 <= noted.cache_bytes < 120_000


@pytest.mark.parametrize("kind", ["process", pytest.param("docker", marks=pytest.mark.docker)])
def test_a_cache_is_found_again_by_the_same_renters_next_run(kind: Any, tmp_path: Path) -> None:
    if kind == "docker":
        require("docker")
    world = World(kind, tmp_path)
    caches = RenterCaches(tmp_path / "state", 1 << 20)
    try:
        said = []
        for renter in ("ann", "ann", "bob"):
            spec = world.spec(KEEP, cache_dir=caches.folder_of(renter))
            spec = dataclasses.replace(spec, layout=world.runner.furnish(spec))
            world.runner.start(spec)
            assert world.ended(spec.run_id).exit_code == 0, world.output(spec.run_id)
            said.append(world.output(spec.run_id))
        assert said == [["False", "True"], ["True", "True"], ["False", "True"]]
        if kind == "docker":
            # An image's own caches are not hidden, and what the job sets is the job's.
            code = "import os; print(os.environ.get('HF_HOME'), os.environ['PIP_CACHE_DIR'])"
            spec = world.spec(code, cache_dir=caches.folder_of("ann"), env={"PIP_CACHE_DIR": "/x"})
            layout = dataclasses.replace(world.runner.furnish(spec), has_caches=True)
            world.runner.start(dataclasses.replace(spec, layout=layout))
            world.ended(spec.run_id)
            assert world.output(spec.run_id) == ["None /x"]
    finally:
        world.close()
