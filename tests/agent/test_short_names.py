"""A run's temporary folder has a name that leaves room for a socket's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sublet_agent.adapters.process.short_names import MOST_BYTES, forget, short_name


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The machine's folder for temporary files, as short as it is in life, beside pytest's own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        monkeypatch.setattr(tempfile, "tempdir", made)
        yield Path(made)


def deep(tmp_path: Path) -> Path:
    folder = tmp_path / ("x" * 100) / "tmp"
    folder.mkdir(parents=True)
    return folder


def test_a_folder_that_lies_deep_has_a_short_name_until_its_run_is_gone(tmp_path: Path) -> None:
    folder = deep(tmp_path)
    name = short_name("me", "r1", folder)
    assert len(os.fsencode(name)) <= MOST_BYTES
    assert (name.resolve(), short_name("me", "r1", folder)) == (folder.resolve(), name)
    assert short_name("you", "r1", folder) != name
    forget("me", "r1")
    assert not os.path.lexists(name)
    forget("me", "r1")
    assert folder.is_dir()


def test_one_that_does_not_keeps_its_own() -> None:
    assert short_name("me", "r1", Path("/var/lib/sublet/runs/r1/tmp")) == Path(
        "/var/lib/sublet/runs/r1/tmp"
    )


@pytest.mark.parametrize("how", ["writable", "link", "file"])
def test_a_place_that_others_could_change_is_not_used(
    tmp_path: Path, machine: Path, how: str
) -> None:
    place = machine / f"sublet-{os.geteuid()}"
    if how == "writable":
        place.mkdir()
        place.chmod(0o777)
    elif how == "link":
        (tmp_path / "theirs").mkdir()
        place.symlink_to(tmp_path / "theirs")
    else:
        place.touch()
    folder = deep(tmp_path)
    assert short_name("me", "r1", folder) == folder
    forget("me", "r1")
