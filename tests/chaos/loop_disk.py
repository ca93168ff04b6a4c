"""A real file system of our own, ext4 on a loop device, that fills, fails and is mended."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

USERS_LIMIT_S = 30.0


def missing() -> str | None:
    """Say why there can be no such disk here, or None."""
    if os.geteuid() != 0:
        return "loop devices need root"
    for tool in ("mkfs.ext4", "fsck.ext4", "mount", "umount"):
        if shutil.which(tool) is None:
            return f"no {tool}: apt-get install e2fsprogs mount"
    with tempfile.TemporaryDirectory() as folder:
        try:
            disk = LoopDisk(Path(folder) / "image", Path(folder) / "disk", 8 << 20)
        except RuntimeError as error:
            return f"no ext4 can be mounted from a loop device here ({error})"
        try:
            trigger = disk.trigger.exists()
        finally:
            disk.close()
    return None if trigger else "this kernel's ext4 can't be made to fail (trigger_fs_error)"


class LoopDisk:
    """An ext4 file system in a file, mounted at `folder`; on an error it becomes read-only."""

    def __init__(self, image: Path, folder: Path, size_bytes: int) -> None:
        """Raises RuntimeError where that isn't allowed."""
        self.image, self.folder = image, folder
        image.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        with image.open("wb") as file:
            file.truncate(size_bytes)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", str(image))
        self._mount()

    @property
    def trigger(self) -> Path:
        """Writing here is a failure of the file system."""
        return Path("/sys/fs/ext4") / self._device / "trigger_fs_error"

    def fail(self) -> None:
        """Have the file system fail: it's read-only from now on."""
        self.trigger.write_text("1")

    def kill_users(self) -> None:
        """kill -9 who still has files open on it, as a reboot does."""
        deadline = time.monotonic() + USERS_LIMIT_S
        while (users := self._users()) and time.monotonic() < deadline:
            for pid in users:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def _users(self) -> set[int]:
        below = str(self.folder) + os.sep
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                links = [process / "cwd", *(process / "fd").iterdir()]
                if any(f"{os.readlink(link)}/".startswith(below) for link in links):
                    found.add(int(process.name))
        return found

    def mend(self) -> None:
        """Check it and mount it again; nobody may have files open on it."""
        _run("umount", str(self.folder))
        done = subprocess.run(
            ["fsck.ext4", "-f", "-y", str(self.image)], capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, 1):  # 1: errors were corrected
            raise RuntimeError(f"fsck: {done.stdout[-300:]}")
        self._mount()

    def close(self) -> None:
        """Take it away."""
        _run("umount", "--lazy", str(self.folder))

    def _mount(self) -> None:
        _run("mount", "-o", "loop,errors=remount-ro", str(self.image), str(self.folder))
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        device = next(words[0] for words in reversed(mounts) if words[1] == str(self.folder))
        self._device = device.rsplit("/", 1)[-1]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
