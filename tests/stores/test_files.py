"""Blobs in a folder: whole and durable or not there, whatever happens in between.

What they share with every other blob store is in test_blobs.py.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sublet_broker.adapters.blobs.file_blobs import FileBlobs
from sublet_broker.adapters.data_folder import DataFolder, FolderInUse
from sublet_broker.service.ports import BlobMissing, StorageFull
from sublet_contracts.digests import digest_of, hex_of

DATA = b"weights" * 1000
NAME = digest_of(DATA)
DIGITS = hex_of(NAME)
PLACE = Path("blake3", DIGITS[:2], DIGITS[2:4], DIGITS)
NEVER = "blake3:" + "0" * 64


@pytest.fixture
def blobs(tmp_path: Path) -> FileBlobs:
    made = FileBlobs(tmp_path / "blobs")
    made.prepare()
    return made


def files(root: Path) -> list[Path]:
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


def test_put_and_get(blobs: FileBlobs, tmp_path: Path) -> None:
    assert not blobs.has(NAME)
    blobs.put(NAME, DATA)
    blobs.put(NAME, DATA)
    assert blobs.has(NAME)
    assert blobs.get(NAME) == DATA
    assert list(blobs.names()) == [NAME]
    assert files(tmp_path / "blobs") == [PLACE]
    mode = (tmp_path / "blobs" / PLACE).stat().st_mode
    assert stat.S_IMODE(mode) == 0o600
    blobs.delete(NAME)
    blobs.delete(NAME)
    assert not blobs.has(NAME)
    with pytest.raises(BlobMissing):
        blobs.get(NAME)


def test_content_that_does_not_match_is_refused(blobs: FileBlobs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="digest"):
        blobs.put(NAME, DATA + b"!")
    assert files(tmp_path / "blobs") == []


@pytest.mark.parametrize(
    "name", ["", "blake3:../" + "a" * 61, DIGITS, NAME.upper(), NAME + "\n", NAME[:-1], "/"]
)
def test_a_name_that_is_not_a_hash_reaches_no_file(blobs: FileBlobs, name: str) -> None:
    for act in (blobs.get, blobs.has, blobs.delete):
        with pytest.raises(ValueError, match="hex"):
            act(name)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_blob_is_quarantined_and_can_be_sent_again(
    blobs: FileBlobs, tmp_path: Path, damage: str
) -> None:
    blobs.put(NAME, DATA)
    path = tmp_path / "blobs" / PLACE
    bad = {"flip": b"W" + DATA[1:], "truncate": DATA[:-1], "empty": b""}[damage]
    path.write_bytes(bad)
    with pytest.raises(BlobMissing, match="damaged"):
        blobs.get(NAME)
    assert not blobs.has(NAME)
    (kept,) = (tmp_path / "blobs" / "quarantine").iterdir()
    assert kept.read_bytes() == bad
    blobs.put(NAME, DATA)
    assert blobs.get(NAME) == DATA


def test_sending_again_heals_damage_that_nobody_has_read_yet(
    blobs: FileBlobs, tmp_path: Path
) -> None:
    blobs.put(NAME, DATA)
    (tmp_path / "blobs" / PLACE).write_bytes(b"W" + DATA[1:])
    blobs.put(NAME, DATA)
    assert blobs.get(NAME) == DATA


@pytest.mark.parametrize("failing", ["open", "write", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_nothing(
    blobs: FileBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, code: int
) -> None:
    def full(*_: Any, **__: Any) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        if failing == "write":
            real = os.write

            def half(descriptor: int, data: memoryview) -> int:
                real(descriptor, data[: len(data) // 2])
                return full()

            patch.setattr(os, "write", half)
        else:
            patch.setattr(os, failing, full)
        with pytest.raises(StorageFull, match="full"):
            blobs.put(NAME, DATA)
    assert files(tmp_path / "blobs") == []
    blobs.put(NAME, DATA)
    assert blobs.get(NAME) == DATA


def test_another_error_of_the_disk_is_not_called_full(
    blobs: FileBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="broken"):
        blobs.put(NAME, DATA)


class Disk:
    """What was made durable, by path below the blobs' root; one fsync may fail."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: list[str] = []
        self.fails_at = ""
        real = os.fsync

        def fsync(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(root.parent)
            name = "/".join(path.parts[:2]) if "tmp" in path.parts else str(path)
            if name == self.fails_at:
                self.fails_at = ""
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self.synced.append(name)
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


FIRST, SECOND = f"blobs/blake3/{DIGITS[:2]}", f"blobs/blake3/{DIGITS[:2]}/{DIGITS[2:4]}"


def test_no_name_counts_that_a_failed_fsync_has_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the simulated disk: the store itself was taken for durable at the second attempt,
    and what a broker before had put without living to see it durable."""
    disk = Disk(tmp_path / "blobs", monkeypatch)
    disk.fails_at = "."
    blobs = FileBlobs(tmp_path / "blobs")
    with pytest.raises(OSError, match="Input/output"):
        blobs.prepare()
    assert list(tmp_path.iterdir()) == []
    blobs.prepare()
    assert disk.synced == ["."]
    blobs.put(NAME, DATA)
    disk.fails_at = SECOND
    with pytest.raises(OSError, match="Input/output"):
        blobs.put(NAME, DATA)
    assert blobs.has(NAME)  # whoever counts on it already does so rightly
    disk.synced.clear()
    blobs.put(NAME, DATA)
    assert disk.synced == ["blobs/tmp", SECOND]


@pytest.mark.parametrize("failing", ["blobs", "blobs/tmp", "blobs/blake3", FIRST, SECOND])
def test_after_a_failed_fsync_it_is_written_anew(
    blobs: FileBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    # The kernel reports a lost write once. A second fsync would succeed over nothing.
    disk = Disk(tmp_path / "blobs", monkeypatch)
    disk.fails_at = failing
    with pytest.raises(OSError, match="Input/output"):
        blobs.put(NAME, DATA)
    assert not disk.fails_at
    assert not blobs.has(NAME)
    disk.synced.clear()
    blobs.put(NAME, DATA)
    assert disk.synced[-2:] == ["blobs/tmp", SECOND]
    assert failing in disk.synced
    assert blobs.get(NAME) == DATA


def test_what_a_killed_broker_wrote_is_made_durable_before_it_counts(
    blobs: FileBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs.put(NAME, DATA)
    disk = Disk(tmp_path / "blobs", monkeypatch)
    # Its successor can't know how far it came: all names on the way are made durable once.
    successor = FileBlobs(tmp_path / "blobs")
    successor.prepare()
    successor.put(NAME, DATA)
    assert disk.synced == [".", "blobs", "blobs/blake3", FIRST, SECOND]
    disk.synced.clear()
    successor.put(NAME, DATA)
    assert disk.synced == [SECOND]


PACK = "ab" * 32


@pytest.mark.parametrize("failing", ["blobs", "blobs/packs", "blobs/tmp", "blobs/packs/ab"])
def test_a_pack_whose_fsync_failed_does_not_count(
    blobs: FileBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    disk = Disk(tmp_path / "blobs", monkeypatch)
    disk.fails_at = failing
    with pytest.raises(OSError, match="Input/output"):
        blobs.put_pack(PACK, [b"abc", DATA])
    assert not disk.fails_at
    assert not blobs.has_pack(PACK)
    disk.synced.clear()
    blobs.put_pack(PACK, [b"abc", DATA])
    assert disk.synced[-2:] == ["blobs/tmp", "blobs/packs/ab"]
    assert failing in disk.synced
    assert blobs.read_pack(PACK, 3, len(DATA)) == DATA


def test_a_pack_costs_two_fsyncs(
    blobs: FileBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs.put_pack("ab" + "0" * 62, [b"before"])
    disk = Disk(tmp_path / "blobs", monkeypatch)
    blobs.put_pack(PACK, [bytes([number]) * 1000 for number in range(200)])
    assert disk.synced == ["blobs/tmp", "blobs/packs/ab"]


def test_a_damaged_pack_is_set_aside(blobs: FileBlobs, tmp_path: Path) -> None:
    blobs.put_pack(PACK, [DATA])
    blobs.set_pack_aside(PACK)
    (kept,) = (tmp_path / "blobs" / "quarantine").iterdir()
    assert kept.read_bytes() == DATA
    assert not blobs.has_pack(PACK)


KILLED_HALF_WAY = """
import os, signal, stat, sys
from pathlib import Path
from sublet_broker.adapters.blobs.file_blobs import FileBlobs

blobs = FileBlobs(Path(sys.argv[1]))
real = os.fsync
def fsync(descriptor):
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
os.fsync = fsync
blobs.put(sys.argv[2], b"weights" * 1000)
"""


def test_what_a_killed_broker_left_is_swept(tmp_path: Path) -> None:
    root = tmp_path / "blobs"
    blobs = FileBlobs(root)
    blobs.prepare()
    done = subprocess.run([sys.executable, "-c", KILLED_HALF_WAY, str(root), NAME])
    assert done.returncode == -signal.SIGKILL
    assert not blobs.has(NAME)
    assert len(files(root)) == 1
    blobs.prepare()
    assert files(root) == []
    assert list(blobs.names()) == []


def test_a_data_folder_has_one_broker(tmp_path: Path) -> None:
    folder = DataFolder.open(tmp_path / "new" / "data")
    assert stat.S_IMODE(folder.root.stat().st_mode) == 0o700
    with pytest.raises(FolderInUse) as refused:
        DataFolder.open(folder.root)
    assert str(folder.root) in str(refused.value)
    assert str(os.getpid()) in str(refused.value)
    assert "--data" in str(refused.value)
    folder.close()
    folder.close()
    DataFolder.open(folder.root).close()


HOLD = """
import sys
from pathlib import Path
from sublet_broker.adapters.data_folder import DataFolder
folder = DataFolder.open(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_killed_broker_lets_go_of_its_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(FolderInUse, match=str(holder.pid)):
        DataFolder.open(tmp_path)
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    DataFolder.open(tmp_path).close()
