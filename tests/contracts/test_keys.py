"""A key is made once, and durable before it signs anything."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sublet_contracts.keys import SigningKey


@pytest.mark.parametrize("failing", ["key", "folder"])
def test_a_key_that_is_not_durable_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "folder" / "key"
    synced = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.partition(".")[0]
        if name == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        synced.append(name)
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="Input/output"):
            SigningKey.load_or_create(path)
    assert list(path.parent.iterdir()) == []
    failing = ""
    monkeypatch.setattr(os, "fsync", fsync)
    synced.clear()
    made = SigningKey.load_or_create(path)
    assert synced == [tmp_path.name, "key", "folder"]
    # Who finds it can't know how far its maker came.
    assert SigningKey.load_or_create(path).party == made.party
    assert synced == [tmp_path.name, "key", "folder", "folder"]
    assert list(path.parent.iterdir()) == [path]
