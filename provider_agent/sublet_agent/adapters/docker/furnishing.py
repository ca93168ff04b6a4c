"""Fills a run's own folders with what its image has there, and names the job's user.

The image is looked into through a container of it that is never started, so nothing in the image is
needed for it. What comes out is a stranger's: bounded here, and unpacked elsewhere (seeding.py).
What an image has is remembered as long as it is small, so that its next run needs no such
container; a folder that holds too much is not read a second time.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import tarfile
import threading
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import docker
from docker.errors import NotFound

from sublet_agent.adapters.docker import users
from sublet_agent.adapters.docker.container import ImageConfig, folders_of
from sublet_agent.adapters.workspace import folders, seeding
from sublet_agent.core import layout as layouts
from sublet_agent.core.layout import ImageFolders, Layout
from sublet_agent.core.runner_port import Cancel, PullCancelled, RunRefused, RunSpec
from sublet_contracts.amounts import format_bytes

SMALL_BYTES = 256 * 1024
"""An archive of at most so many is remembered."""
MAX_REMEMBERED_IMAGES = 32
_PIECE_BYTES = 1 << 20
_EMPTY_BYTES = 1024
_ENTER = 0o001  # what a folder above must allow to everybody
_ANSWER_S = 60.0
_REFUSAL_BYTES = 4096


@dataclass
class _Known:
    """What was found in an image."""

    archives: dict[str, bytes] = field(default_factory=dict)
    """folder -> archive of what it has; b'': nothing"""
    too_large: dict[str, int] = field(default_factory=dict)
    """folder -> bytes that it has more than"""
    files: dict[str, bytes] = field(default_factory=dict)
    closed: dict[str, bool] = field(default_factory=dict)


class Furnisher:
    """For one agent's runs. Called from several threads."""

    def __init__(self, client: Callable[[], docker.DockerClient], owner: str) -> None:
        self._client = client
        self._owner = owner
        self._lock = threading.Lock()
        self._known: OrderedDict[str, _Known] = OrderedDict()

    def container_name(self, run_id: str) -> str:
        """Return how the container is called through which a run's image is looked into."""
        return f"sublet-{self._owner[:12]}-{run_id}.seed"

    def furnish(
        self,
        spec: RunSpec,
        image_id: str,
        config: ImageConfig,
        user: tuple[int, int],
        hand_over: Callable[[tuple[int, int]], None],
        cancel: Cancel | None,
    ) -> Layout:
        """Fill the folders, which are empty; return the layout. `user`: as whom it runs, unless
        the job has a wish; `hand_over` gives him the folders. Raises what the engine's client
        raises, OSError, RunRefused, PullCancelled."""
        known = self._remembered(image_id)
        with _Image(self._client, image_id, self.container_name(spec.run_id)) as image:
            looked = _Look(image, known)
            chosen = _chosen_user(spec, looked)
            user = chosen or user
            hand_over(user)
            layout = dataclasses.replace(self._planned(spec, config, looked), user_ids=chosen)
            layout = self._filled(spec, layout, looked, user, cancel)
            return self._with_user(spec, layout, looked, user)

    def _remembered(self, image_id: str) -> _Known:
        with self._lock:
            known = self._known.setdefault(image_id, _Known())
            self._known.move_to_end(image_id)
            while len(self._known) > MAX_REMEMBERED_IMAGES:
                self._known.popitem(last=False)
            return known

    def _planned(self, spec: RunSpec, config: ImageConfig, looked: _Look) -> Layout:
        home = config.env.get("HOME") or users.home_of(looked.file("/etc/passwd"), config.user)
        layout = layouts.planned(
            ImageFolders(config.working_dir, home),
            asked_work=spec.workdir,
            asked_home=spec.env.get("HOME", ""),
        )
        own = folders_of(dataclasses.replace(spec, layout=layout)).mounts()
        if looked.is_closed(layout.home_path, own):
            layout = dataclasses.replace(layout, home_path=layouts.HOME_PATH)
            own = folders_of(dataclasses.replace(spec, layout=layout)).mounts()
        if looked.is_closed(layout.work_path, own):
            layout = _moved_work(layout, "lies in a folder that is closed to the job's user")
        return layout

    def _filled(
        self,
        spec: RunSpec,
        layout: Layout,
        looked: _Look,
        user: tuple[int, int],
        cancel: Cancel | None,
    ) -> Layout:
        """Fill one after the other. What is too large is left, with its place, to the image."""
        left_bytes = limit = min(layouts.SEED_BYTES, spec.disk_bytes)
        done: set[str] = set()
        while True:
            seeded = layouts.seeded_folders(layout, spec.outputs_path)
            path = next((path for path in seeded if path not in done), None)
            if path is None:
                return layout
            try:
                left_bytes -= self._fill(spec, layout, path, looked, user, left_bytes, cancel)
            except (seeding.SeedTooLarge, seeding.SeedBroken) as error:
                _emptied(spec, seeded[path], user)
                layout = _without(layout, path, error, limit, spec.disk_bytes)
            done.add(path)

    def _fill(
        self,
        spec: RunSpec,
        layout: Layout,
        path: str,
        looked: _Look,
        user: tuple[int, int],
        max_bytes: int,
        cancel: Cancel | None,
    ) -> int:
        own = folders_of(dataclasses.replace(spec, layout=layout))
        over = {**dict.fromkeys(spec.destinations, ""), **own.mounts()}
        leave_out = tuple(layouts.below(path, over))
        points = tuple(
            (inside, _kind(spec, f"{path.rstrip('/')}/{inside}")) for inside in leave_out
        )
        source = own.input_at(path)
        if source is not None:
            archive: Iterator[bytes] | None = seeding.packed_folder(source)
        else:
            archive = looked.archive(path)
        if archive is None and not points:
            return 0
        try:
            return seeding.seed(
                archive or iter((bytes(_EMPTY_BYTES),)),
                own.mounts()[path],
                user=user,
                max_bytes=max_bytes,
                max_entries=layouts.SEED_ENTRIES,
                leave_out=leave_out,
                mount_points=points,
                cancel=cancel,
            )
        except seeding.SeedTooLarge:
            if source is None:
                looked.was_too_large(path, max_bytes)
            raise
        except seeding.SeedCancelled as error:
            raise PullCancelled("nobody waits for the run any more") from error

    def _with_user(
        self, spec: RunSpec, layout: Layout, looked: _Look, user: tuple[int, int]
    ) -> Layout:
        passwd, name = users.passwd(looked.file("/etc/passwd"), *user, layout.home_path)
        group = users.group(looked.file("/etc/group"), user[1], name)
        etc = spec.run_dir / "etc"
        etc.mkdir(exist_ok=True)
        for file, text in (("passwd", passwd), ("group", group)):
            (etc / file).write_text(text)
            (etc / file).chmod(0o644)
        home = folders_of(dataclasses.replace(spec, layout=layout)).place_of(layout.home_path)
        caches = home is not None and has_entries(home.root / home.inside / ".cache")
        files = ("passwd", "group")
        return dataclasses.replace(layout, user_name=name, user_files=files, has_caches=caches)


def has_entries(folder: Path) -> bool:
    """Say whether there is anything in a folder of an image; the image may have made a link of
    it."""
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return os.path.lexists(folder)
    try:
        return bool(os.listdir(held))
    finally:
        os.close(held)


def _chosen_user(spec: RunSpec, looked: _Look) -> tuple[int, int] | None:
    if not spec.user:
        return None
    ids = users.ids_of(looked.file("/etc/passwd"), spec.user)
    if ids is None:
        raise RunRefused(
            f"user {spec.user!a}: root, or nobody that the image knows; name another, or a number"
        )
    return ids


def _kind(spec: RunSpec, path: str) -> Any:
    host = spec.destinations.get(path)
    return "file" if host is not None and host.is_file() else "folder"


def _emptied(spec: RunSpec, name: str, user: tuple[int, int]) -> None:
    """Begin anew with a folder that holds a part of what was too much."""
    folder = spec.run_dir / name
    folders.delete(folder)
    folder.mkdir()
    if os.geteuid() == 0:
        os.chown(folder, *user)


def _moved_work(layout: Layout, why: str) -> Layout:
    notes = (
        *layout.notes,
        f"the working folder is {layouts.WORK_PATH}: {layout.work_path} {why}",
    )
    return dataclasses.replace(layout, work_path=layouts.WORK_PATH, notes=notes)


def _without(layout: Layout, path: str, error: Exception, limit: int, disk_bytes: int) -> Layout:
    """Return a layout in which what the image has at `path` stays the image's."""
    whose = "this job's disk (--disk)" if limit == disk_bytes else "what a run can begin with"
    why = f"holds more than {whose}, {format_bytes(limit)}"
    if isinstance(error, seeding.SeedBroken):
        why = "can't be copied out of the image"
    elif str(error) == "files":
        why = f"holds more than {layouts.SEED_ENTRIES} files"
    if layouts.is_within(layout.work_path, path):
        fix = "; it can be read there, so name its files by their whole path"
        layout = _moved_work(layout, why + fix)
    if layouts.is_within(layout.home_path, path):
        says = f"HOME is {layouts.HOME_PATH}, and empty: the image's {layout.home_path} {why}"
        layout = dataclasses.replace(
            layout, home_path=layouts.HOME_PATH, notes=(*layout.notes, says)
        )
    if path == layouts.TMP_PATH:
        says = f"{layouts.TMP_PATH} is empty: the image's own {why}"
        layout = dataclasses.replace(layout, notes=(*layout.notes, says))
    return layout


class _Look:
    """What an image has, as far as it was asked for: remembered where it is small."""

    def __init__(self, image: _Image, known: _Known) -> None:
        self._image = image
        self._known = known

    def file(self, path: str) -> bytes:
        """Return a small file's content; b'' where it is none, or isn't there."""
        if path not in self._known.files:
            self._known.files[path] = _only_file(self._image.archive(path))
        return self._known.files[path]

    def archive(self, folder: str) -> Iterator[bytes] | None:
        """Return what is in a folder; None: nothing. Raises SeedTooLarge."""
        if folder in self._known.too_large:
            raise seeding.SeedTooLarge
        remembered = self._known.archives.get(folder)
        if remembered is not None:
            return iter((remembered,)) if remembered else None
        pieces = self._image.archive(folder.rstrip("/") + "/.")
        begin = b""
        for piece in pieces:
            begin += piece
            if len(begin) > SMALL_BYTES:
                return itertools.chain((begin,), pieces)
        if seeding.is_empty_folder(begin):
            begin = b""
        self._known.archives[folder] = begin
        return iter((begin,)) if begin else None

    def was_too_large(self, folder: str, max_bytes: int) -> None:
        """Remember it, where no job could have it."""
        if max_bytes >= layouts.SEED_BYTES:
            self._known.too_large[folder] = max_bytes

    def is_closed(self, path: str, own: Iterable[str]) -> bool:
        """Say whether the job's user couldn't come to a path: a folder of the image's on the way
        lets nobody else through. `own`: the folders that are the user's."""
        for folder in map(str, list(PurePosixPath(path).parents)[:-1]):
            if any(layouts.is_within(folder, each) for each in own):
                continue
            if folder not in self._known.closed:
                self._known.closed[folder] = self._image.is_closed(folder)
            if self._known.closed[folder]:
                return True
        return False


class _Image:
    """An image's files, through a container that is made when it is first needed."""

    def __init__(
        self, client: Callable[[], docker.DockerClient], image_id: str, container: str
    ) -> None:
        self._client = client
        self._image_id = image_id
        self._container = container
        self._made = False

    def __enter__(self) -> _Image:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._made:
            self._remove()

    def archive(self, path: str) -> Iterator[bytes]:
        """Return the archive of a path; nothing where it isn't there."""
        api = self._api()
        with api.get(
            self._url(), params={"path": path}, stream=True, timeout=_ANSWER_S
        ) as response:
            if response.status_code == 404 or _is_no_folder(response):
                return
            response.raise_for_status()
            yield from response.iter_content(_PIECE_BYTES)

    def is_closed(self, path: str) -> bool:
        """Say whether a folder is there and lets not everybody through."""
        api = self._api()
        with api.head(self._url(), params={"path": path}, timeout=_ANSWER_S) as response:
            if response.status_code != 200:
                return False
            told = json.loads(b64decode(response.headers["X-Docker-Container-Path-Stat"]))
            return not int(told["mode"]) & _ENTER

    def _url(self) -> str:
        api = self._client().api
        return f"{api.base_url}/v{api.api_version}/containers/{self._container}/archive"

    def _api(self) -> Any:
        api = self._client().api
        if not self._made:
            self._remove()  # of an agent that died in the middle
            self._made = True
            api.create_container(
                self._image_id, command=["none"], name=self._container, network_disabled=True
            )
        return api

    def _remove(self) -> None:
        with suppress(NotFound):
            self._client().api.remove_container(self._container, force=True, v=True)


def _is_no_folder(response: Any) -> bool:
    """Say whether a path was asked for as a folder and is something else: a trouble of the
    image's, which engines call one of the request or of their own."""
    if response.status_code not in (400, 500):
        return False
    return b"not a directory" in response.raw.read(_REFUSAL_BYTES, decode_content=True)


def _only_file(pieces: Iterator[bytes]) -> bytes:
    """Return the content of an archive's one plain file; b'' where it is something else."""
    packed = b""
    for piece in pieces:
        packed += piece
        if len(packed) > users.MAX_BYTES + 16 * 1024:
            return b""
    if not packed:
        return b""
    try:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            entry = archive.next()
            content = archive.extractfile(entry) if entry is not None and entry.isreg() else None
            return content.read(users.MAX_BYTES) if content is not None else b""
    except (tarfile.TarError, ValueError, OSError, EOFError, RecursionError):
        return b""
