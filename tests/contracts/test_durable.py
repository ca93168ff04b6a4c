"""A folder is durable, name and all, before anything is put into it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from sublet_agent.adapters.session.journal import Journal
from sublet_broker.adapters.data_folder import DataFolder
from sublet_contracts.durable import make_folder
from sublet_contracts.keys import SigningKey


class Fsyncs:
    """The folders that were fsynced, by path below the test's own; one may fail."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.fails_at = ""
        real = os.fsync

        def fsync(descriptor: int) -> None:
            path = os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), root)
            if path == self.fails_at:
                self.fails_at = ""
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self.done.append(path)
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture
def fsyncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fsyncs:
    return Fsyncs(tmp_path, monkeypatch)


def test_each_folder_on_the_way_is_durable_before_the_next(tmp_path: Path, fsyncs: Fsyncs) -> None:
    make_folder(tmp_path / "one" / "two", 0o700)
    assert fsyncs.done == ["..", ".", ".", "one"]
    assert stat.S_IMODE((tmp_path / "one" / "two").stat().st_mode) == 0o700
    fsyncs.done.clear()
    # Who made it may have died before its name was durable.
    make_folder(tmp_path / "one" / "two", 0o700)
    assert fsyncs.done == ["one"]


def test_after_a_failed_fsync_the_folder_is_made_anew(tmp_path: Path, fsyncs: Fsyncs) -> None:
    fsyncs.fails_at = "."
    with pytest.raises(OSError, match="Input/output"):
        make_folder(tmp_path / "one")
    assert list(tmp_path.iterdir()) == []
    make_folder(tmp_path / "one")
    assert fsyncs.done[-1] == "."


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "one").touch()
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "one")


def test_a_folder_in_anothers_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    real = os.open

    def forbidden(path: Path, flags: int) -> int:
        if path == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags)

    monkeypatch.setattr(os, "open", forbidden)
    make_folder(tmp_path / "one")


def test_what_a_first_start_makes_survives_a_power_cut(tmp_path: Path, fsyncs: Fsyncs) -> None:
    DataFolder.open(tmp_path / "broker").close()
    assert fsyncs.done == ["..", "."]
    fsyncs.done.clear()
    Journal(tmp_path / "agent").close()
    assert fsyncs.done[:2] == ["..", "."]
    fsyncs.done.clear()
    SigningKey.load_or_create(tmp_path / "renter" / "key")
    assert fsyncs.done[:2] == ["..", "."]
    assert fsyncs.done[-1] == "renter"
