"""The broker's disk, under the real FileBlobs: what was not fsynced may be gone after a power cut.

POSIX's promises and no others. The data of a file is there once the file was fsynced, a name once
its folder was; of the rest each is drawn by itself, and a file may be back empty, torn, or with
garbage. A process that is killed leaves the page cache behind, and so everything that it did. An
fsync that fails tells once: what was to be written is lost, and the next one finds nothing to do.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from sublet_broker.adapters.blobs.file_blobs import FileBlobs
from sublet_broker.market.facts import ContentFact, Fact
from tests.simulation.doom import CrashPoints, Doom
from tests.simulation.engine import Crashed

if TYPE_CHECKING:
    from tests.simulation.market import Market
    from tests.simulation.store import SimStore

ABOVE = "/data"
ROOT = f"{ABOVE}/blobs"
SOME = 0.25
"""How often a full disk has no room for a name, or for what an fsync needs."""
OF_A_BLOB, OF_ITS_NAME = "fsync of a blob", "fsync of a blob's name"
OF_A_PACKS_NAME, OF_A_FOLDERS_NAME = "fsync of a pack's name", "fsync of a folder's name"
FSYNCS = (OF_A_BLOB, OF_ITS_NAME, OF_A_PACKS_NAME, OF_A_FOLDERS_NAME)
"""What an fsync is for, in the names of crash points."""
SHORT = 0.03
"""How often a write takes only a part."""


class _File:
    """An inode: what the page cache has, and what the platters have."""

    __slots__ = ("_digest", "_hashed", "_pieces", "clean", "data", "kept")
    st_mode = stat.S_IFREG | 0o600
    fsync = OF_A_BLOB

    def __init__(self) -> None:
        self.data = b""
        self.kept: bytes | None = None
        self.clean = False
        """Nothing waits to be written: it was, or it was lost."""
        self._hashed: bytes | None = None
        self._digest = ""
        self._pieces: dict[tuple[int, int], str] = {}

    @property
    def st_size(self) -> int:
        return len(self.data)

    def keep(self) -> None:
        if not self.clean:
            self.kept = self.data
            self.clean = True

    def lose(self) -> None:
        self.clean = True

    def digest(self) -> str:
        """Hash the same bytes once."""
        if self._hashed is not self.data:
            self._hashed, self._digest = self.data, _digest_of(self.data)
            self._pieces.clear()
        return self._digest

    def piece_digest(self, content: ContentFact) -> str:
        """Likewise, a piece of it."""
        self.digest()
        place = (content.offset_bytes, content.size_bytes)
        known = self._pieces.get(place)
        if known is None:
            known = self._pieces[place] = _digest_of(self.piece(content))
        return known

    def piece(self, content: ContentFact) -> bytes:
        return self.data[content.offset_bytes :][: content.size_bytes]


class _Folder:
    """A folder: its names as everybody sees them, and as the platters have them."""

    __slots__ = ("dirty", "fsync", "kept", "names")
    st_mode = stat.S_IFDIR | 0o700
    st_size = 0

    def __init__(self, fsync: str) -> None:
        self.fsync = fsync
        """What an fsync of it is for."""
        self.names: dict[str, _File | _Folder] = {}
        self.kept: dict[str, _File | _Folder] = {}
        self.dirty: dict[str, None] = {}
        """The names whose changes wait to be written."""

    def keep(self) -> None:
        for name in self.dirty:
            self._keep(name)
        self.dirty.clear()

    def _keep(self, name: str) -> None:
        node = self.names.get(name)
        if node is None:
            self.kept.pop(name, None)
        else:
            self.kept[name] = node

    def lose(self) -> None:
        self.dirty.clear()

    def draw(self, disk: SimDisk) -> None:
        """The power was cut: each change that waited was written or not."""
        for name in self.dirty:
            if disk.engine.happens(0.5):
                self._keep(name)
        self.dirty.clear()
        self.names = dict(self.kept)


class SimDisk:
    """sublet_broker.adapters.blobs.disk.Disk, with crash points before and after each change."""

    def __init__(self, market: Market) -> None:
        self._market = market
        self.engine = market.engine
        self._folders: dict[str, _Folder] = {}
        self._open: dict[int, _File | _Folder] = {}
        self._descriptors = 2
        self._store: SimStore
        self._top = _Folder(OF_A_FOLDERS_NAME)
        self._folders[ABOVE] = self._top
        self.doom = Doom(market.points)
        self.fsync_fails_in = 0
        """So many fsyncs from now the platters can't be written; 0: they can."""
        self.fsync_fails_of = ""
        """Only those of this kind are counted; "": all are."""
        self.power_fails = False
        """When the process dies next it is because the power is cut."""
        self._damaged: set[tuple[str, str]] = set()
        """What a fault has damaged, and in which pack; "": in a file of its own."""
        self.damaged_ms: dict[str, int] = {}
        """When each content was damaged last; true time."""
        self._dead = False
        self._failed_in = -1

    # -- what befalls it ----------------------------------------------------------------------

    def boot(self) -> None:
        """Another process begins to use it."""
        self._open.clear()
        self._dead = False
        self._store = self._market.broker.store

    def died(self) -> None:
        """The process that used it is gone, and what it had armed with it; where the power was cut,
        everything that wasn't written as well."""
        self.doom.countdown = 0
        if self.power_fails:
            self.power_fails = False
            self.cut_power()

    def calm(self) -> None:
        """Nothing that was to befall it does."""
        self.doom.lift()
        self.fsync_fails_in = 0
        self.power_fails = False

    @contextmanager
    def of_a_store(self) -> Iterator[None]:
        """What is put meanwhile is put by a store of its own, which keeps it whole or not at all:
        it doesn't die with the broker, nor does its disk fail."""
        mine = self.doom, self.fsync_fails_in
        self.doom, self.fsync_fails_in = Doom(CrashPoints()), 0
        try:
            yield
        finally:
            self.doom, self.fsync_fails_in = mine

    def cut_power(self) -> None:
        """Forget what wasn't fsynced, or some of it."""
        self.engine.say("the broker's machine loses power")
        self._folders = {}
        self._settle(ABOVE, self._top)
        self._market.auditor.power_was_cut()

    def _settle(self, path: str, folder: _Folder) -> None:
        folder.draw(self)
        self._folders[path] = folder
        for name, node in folder.names.items():
            if isinstance(node, _Folder):
                self._settle(f"{path}/{name}", node)
            elif node.kept is not node.data:
                node.data = node.kept = self._remains(node)
                node.clean = True

    def _remains(self, file: _File) -> bytes:
        """Return what of a file's content is found after a power cut."""
        draw, data = self.engine.random, file.data
        if file.kept is not None and (file.clean or self.engine.happens(0.5)):
            return file.kept
        torn = data[: draw.randint(0, len(data))]
        ways = [b"", torn, torn + bytes(len(data) - len(torn)), draw.randbytes(len(data))]
        if not file.clean:
            ways.append(data)
        return draw.choice(ways)

    def flip(self, digest: str) -> None:
        """Flip a bit of what lies there."""
        content = self._place_of(digest)
        pack, at = (content.pack, content.offset_bytes) if content else ("", 0)
        file = self._file(_pack_path(pack) if pack else _path(digest))
        assert file is not None
        data = file.data
        bad = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if data else b"\0"
        if file.kept is not None:
            file.kept = bad
        file.data = bad
        self._damaged.add((pack, digest))
        self.damaged_ms[digest] = self.engine.now_ms

    def sent_again(self, digest: str) -> None:
        """It lies in a file of its own that is new."""
        self._damaged.discard(("", digest))

    @property
    def damaged(self) -> set[str]:
        """What a fault has damaged and nobody has sent again since: a piece that has come again
        lies in another pack."""
        found = set()
        for pack, digest in self._damaged:
            content = self._place_of(digest)
            if content is None or content.pack == pack:
                found.add(digest)
        return found

    # -- what the auditor and the faults see --------------------------------------------------

    def names(self) -> list[str]:
        """Return the hashes of all content: in files of its own, and in packs."""
        alone = {
            name
            for path, folder in self._folders.items()
            if len(path) == len(ROOT) + len("/ab/cd") and not path.endswith("/packs")
            for name in folder.names
        }
        packed = {
            content.digest
            for content in self._contents.values()
            if isinstance(content, ContentFact)
            and content.pack
            and self._file(_pack_path(content.pack)) is not None
        }
        return sorted(alone | packed)

    def whole(self, digest: str) -> bytes | None:
        """Return content if it is what its name says."""
        content = self._place_of(digest)
        if content is not None and content.pack:
            file = self._file(_pack_path(content.pack))
            whole = file is not None and file.piece_digest(content) == digest
            return file.piece(content) if file is not None and whole else None
        file = self._file(_path(digest))
        return file.data if file is not None and file.digest() == digest else None

    def survives(self, digest: str) -> bool:
        """Say whether content would be whole if the power were cut now."""
        node: _File | _Folder | None = self._top
        content = self._place_of(digest)
        packed = content is not None and content.pack
        path = _pack_path(content.pack) if content and packed else _path(digest)
        for name in path.removeprefix(f"{ABOVE}/").split("/"):
            if not isinstance(node, _Folder) or name in node.dirty:
                return False
            node = node.kept.get(name)
        if not isinstance(node, _File) or node.kept is not node.data:
            return False
        return (node.piece_digest(content) if content and packed else node.digest()) == digest

    def has_pack(self, pack: str) -> bool:
        """Say whether a pack's file is there."""
        return self._file(_pack_path(pack)) is not None

    @property
    def _contents(self) -> Mapping[tuple[str | int, ...], Fact]:
        return self._store.committed(ContentFact)

    def _place_of(self, digest: str) -> ContentFact | None:
        found = self._contents.get((digest,))
        return found if isinstance(found, ContentFact) else None

    def _file(self, path: str) -> _File | None:
        above, _, name = path.rpartition("/")
        folder = self._folders.get(above)
        node = folder.names.get(name) if folder is not None else None
        return node if isinstance(node, _File) else None

    # -- the calls ----------------------------------------------------------------------------

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        node: _File | _Folder
        if flags & os.O_CREAT:
            folder, name = self._place(path)
            if name in folder.names:
                raise _error(errno.EEXIST, path)
            if self._store.full_until_ms > self.engine.now_ms:
                self._may_lack_room()
            self._begin("create of a blob")
            node = folder.names[name] = _File()
            folder.dirty[name] = None
            self._point("after create of a blob")
        else:
            node = self._node(path)
            if flags & os.O_DIRECTORY and not isinstance(node, _Folder):
                raise _error(errno.ENOTDIR, path)
        self._descriptors += 1
        self._open[self._descriptors] = node
        return self._descriptors

    def read(self, descriptor: int, length: int, /) -> bytes:
        # The whole of it: who reads asks for more than there is.
        node = self._open[descriptor]
        assert isinstance(node, _File)
        assert length > len(node.data)
        return node.data

    def pread(self, descriptor: int, length: int, offset: int, /) -> bytes:
        node = self._open[descriptor]
        assert isinstance(node, _File)
        return node.data[offset : offset + length]

    def write(self, descriptor: int, data: memoryview, /) -> int:
        node = self._open[descriptor]
        assert isinstance(node, _File)
        self._begin("write of a blob")
        if self._store.full_until_ms > self.engine.now_ms:
            if len(data) == 1 or self.engine.happens(0.5):
                raise _error(errno.ENOSPC, "")
            data = data[: len(data) // 2]
        elif self.engine.happens(SHORT):
            data = data[: 1 + len(data) // 2]
        node.data += data
        node.clean = False
        self._point("after write of a blob")
        return len(data)

    def fsync(self, descriptor: int, /) -> None:
        node = self._open[descriptor]
        self._begin(node.fsync)
        code = 0
        if self._store.full_until_ms > self.engine.now_ms and self.engine.happens(SOME):
            code = errno.ENOSPC
        if self.fsync_fails_in and self.fsync_fails_of in ("", node.fsync):
            self.fsync_fails_in -= 1
            if not self.fsync_fails_in:
                code = errno.EIO
        if code:
            node.lose()
            self._failed_in = self.engine.steps
            raise _error(code, "")
        node.keep()
        self._point(f"after {node.fsync}")

    def fstat(self, descriptor: int, /) -> _File | _Folder:
        return self._open[descriptor]

    def close(self, descriptor: int, /) -> None:
        del self._open[descriptor]

    def stat(self, path: str) -> _File | _Folder:
        return self._node(path)

    def listdir(self, path: str) -> list[str]:
        node = self._node(path)
        if not isinstance(node, _Folder):
            raise _error(errno.ENOTDIR, path)
        return list(node.names)

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        folder, name = self._place(path)
        if name in folder.names:
            raise _error(errno.EEXIST, path)
        if self._store.full_until_ms > self.engine.now_ms:
            self._may_lack_room()
        self._begin("mkdir of a folder")
        leaf = len(path) == len(ROOT) + len("/ab/cd") and not path.endswith("/packs")
        if _is_in_packs(path):
            made = _Folder(OF_A_PACKS_NAME)
        else:
            made = _Folder(OF_ITS_NAME if leaf else OF_A_FOLDERS_NAME)
        folder.names[name] = self._folders[path] = made
        folder.dirty[name] = None
        self._point("after mkdir of a folder")

    def rmdir(self, path: str) -> None:
        folder, name = self._place(path)
        node = self._node(path)
        if not isinstance(node, _Folder):
            raise _error(errno.ENOTDIR, path)
        if node.names:
            raise _error(errno.ENOTEMPTY, path)
        self._begin("rmdir of a folder")
        del folder.names[name], self._folders[path]
        folder.dirty[name] = None
        self._point("after rmdir of a folder")

    def rename(self, path: str, to: str) -> None:
        (old, name), (new, new_name) = self._place(path), self._place(to)
        node = old.names.get(name)
        if not isinstance(node, _File):
            raise _error(errno.ENOENT, path)
        if self._store.full_until_ms > self.engine.now_ms:
            self._may_lack_room()
        what = "a pack" if _is_in_packs(to) else "a blob"
        self._begin(f"rename of {what}")
        del old.names[name]
        old.dirty[name] = None
        new.names[new_name] = node
        new.dirty[new_name] = None
        self._point(f"after rename of {what}")

    def unlink(self, path: str) -> None:
        folder, name = self._place(path)
        if not isinstance(folder.names.get(name), _File):
            raise _error(errno.ENOENT, path)
        what = "a pack" if _is_in_packs(path) else "a blob"
        self._begin(f"unlink of {what}")
        del folder.names[name]
        folder.dirty[name] = None
        self._point(f"after unlink of {what}")

    # -- how it does them ---------------------------------------------------------------------

    def _place(self, path: str) -> tuple[_Folder, str]:
        above, _, name = path.rpartition("/")
        folder = self._folders.get(above)
        if folder is None:
            raise _error(errno.ENOENT, path)
        return folder, name

    def _node(self, path: str) -> _File | _Folder:
        found = self._folders.get(path)
        if found is not None:
            return found
        above, _, name = path.rpartition("/")
        folder = self._folders.get(above)
        node = folder.names.get(name) if folder is not None else None
        if node is None:
            raise _error(errno.ENOENT, path)
        return node

    def _may_lack_room(self) -> None:
        if self.engine.happens(SOME):
            raise _error(errno.ENOSPC, "")

    def _begin(self, call: str) -> None:
        """A change is about to be made."""
        if self._dead:
            # An exception handler of a process that is no more.
            raise Crashed(call)
        self._point(f"before {call}")

    def _point(self, where: str) -> None:
        """The process may die here. Nobody dies between a failed fsync and what is done about it:
        whoever comes next could not know, for the kernel has told."""
        if self._failed_in == self.engine.steps:
            return
        if self.doom.strikes(f"broker {where}"):
            self.engine.say(f"broker dies {where}")
            self._dead = True
            raise Crashed(where)


class SimBlobs(FileBlobs):
    """The real thing, as one process of the broker has it."""

    def __init__(self, disk: SimDisk) -> None:
        super().__init__(Path(ROOT), disk)
        self._sim = disk
        self.whole = disk.whole
        self.survives = disk.survives
        self.sweeps_in = 0
        """So many looks or writes from now the sweeper comes, as another thread would."""
        self.sweep: Callable[[], object]

    @property
    def damaged(self) -> set[str]:
        """What a fault has damaged and nobody has sent again since."""
        return self._sim.damaged

    def put(self, digest: str, data: bytes) -> None:
        super().put(digest, data)
        self._sim.sent_again(digest)
        self._meanwhile()

    def put_pack(self, pack: str, parts: Iterable[bytes]) -> None:
        super().put_pack(pack, parts)
        self._meanwhile()

    def read_pack(self, pack: str, offset_bytes: int, size_bytes: int) -> bytes:
        found = super().read_pack(pack, offset_bytes, size_bytes)
        self._meanwhile()
        return found

    def has_pack(self, pack: str) -> bool:
        found = super().has_pack(pack)
        self._meanwhile()
        return found

    def has(self, digest: str) -> bool:
        found = super().has(digest)
        self._meanwhile()
        return found

    def _meanwhile(self) -> None:
        if self.sweeps_in:
            self.sweeps_in -= 1
            if not self.sweeps_in:
                self.sweep()


def _digest_of(data: bytes) -> str:
    return f"blake3:{blake3(data).hexdigest()}"


def _path(digest: str) -> str:
    algorithm, _, digits = digest.partition(":")
    return f"{ROOT}/{algorithm}/{digits[:2]}/{digits[2:4]}/{digits}"


def _pack_path(pack: str) -> str:
    return f"{ROOT}/packs/{pack[:2]}/{pack}"


def _is_in_packs(path: str) -> bool:
    return path.startswith(f"{ROOT}/packs/")


def _error(code: int, path: str) -> OSError:
    return OSError(code, os.strerror(code), path)
