"""The world that a job finds: folders of its own with what the image has, a user, a host's name.

Layout and users are pure; the unpacker is a process; the rest is asked from inside a container.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import tarfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from sublet_agent.adapters.docker import users
from sublet_agent.adapters.docker.limits_told import told_by
from sublet_agent.adapters.workspace import seeding
from sublet_agent.adapters.workspace.layout_file import read_layout, write_layout
from sublet_agent.core import layout as layouts
from sublet_agent.core.cores import cores_for, from_text, to_text
from sublet_agent.core.layout import (
    WORK_PATH,
    ImageFolders,
    Layout,
    RunFolders,
    own_folders,
    planned,
)
from sublet_agent.core.runner_port import RunRefused, RunSpec
from tests.agent.runner_world import World
from tests.images import base_image
from tests.services import require

ME = (os.geteuid(), os.getegid())

# -- pure ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "asked", "work", "home"),
    [
        (ImageFolders("/app", "/root"), "", "/app", "/root"),
        (ImageFolders("/app/", "/root/."), "", "/app", "/root"),
        (ImageFolders("/app", "/root"), "/srv/x", "/srv/x", "/root"),
        (ImageFolders("", ""), "", "/work", "/home/job"),
        (ImageFolders("/", "/"), "", "/work", "/home/job"),
        (ImageFolders("/app/..", "//"), "", "/work", "/home/job"),
        (ImageFolders("app", "home"), "", "/work", "/home/job"),
        (ImageFolders("/proc/self", "/sys"), "", "/work", "/home/job"),
        (ImageFolders("/sublet/checkpoint/out", "/inputs/x"), "", "/work", "/home/job"),
        (ImageFolders("/a:b", "/a\nb"), "", "/work", "/home/job"),
        (ImageFolders("/" + "a" * 600, "/x"), "", "/work", "/x"),
        (ImageFolders("/tmp", "/tmp"), "", "/tmp", "/tmp"),
    ],
)
def test_where_the_folders_are(image: ImageFolders, asked: str, work: str, home: str) -> None:
    found = planned(image, asked_work=asked)
    assert (found.work_path, found.home_path) == (work, home)
    # Whoever gets another working folder than the image's is told.
    assert bool(found.notes) == (work == "/work")


@pytest.mark.parametrize(
    ("work", "home", "outputs", "expected"),
    [
        ("/app", "/root", None, {"/app": "work", "/root": "home", "/tmp": "tmp"}),
        ("/root/app", "/root", None, {"/root/app": "work", "/root": "home", "/tmp": "tmp"}),
        ("/app", "/app/home", None, {"/app": "work", "/app/home": "home", "/tmp": "tmp"}),
        ("/app", "/app", None, {"/app": "work", "/tmp": "tmp"}),
        ("/tmp", "/tmp", None, {"/tmp": "work"}),
        ("/app", "/root", "/app", {"/app": "outputs", "/root": "home", "/tmp": "tmp"}),
        ("/app/src", "/app", "/app", {"/app": "outputs", "/tmp": "tmp"}),
        ("/app", "/root", "/tmp", {"/app": "work", "/root": "home", "/tmp": "outputs"}),
        (
            "/app",
            "/root",
            "/app/out",
            {"/app": "work", "/root": "home", "/tmp": "tmp", "/app/out": "outputs"},
        ),
    ],
)
def test_what_is_mounted_where(
    work: str, home: str, outputs: str | None, expected: dict[str, str]
) -> None:
    assert own_folders(Layout(work, home), outputs) == expected


def test_any_path_of_the_container_is_found_on_disk(tmp_path: Path) -> None:
    folders = RunFolders(
        tmp_path, Layout("/app/src", "/root"), "/app/out", {"/app/src/data": Path("/in/data")}
    )

    def at(path: str) -> tuple[str, str] | None:
        place = folders.place_of(path)
        return None if place is None else (place.name, place.inside)

    assert at("ckpt") == ("work", "ckpt")
    assert at(".") == ("work", "")
    assert at("../out/x") == ("outputs", "x")
    assert at("/app/src/../src/a/b") == ("work", "a/b")
    assert at("/root/.cache") == ("home", ".cache")
    assert at("/tmp/x") == ("tmp", "x")
    assert at("/app/src/data/x") == ("input", "x")
    assert at("/app/other") is None  # the image's
    assert at("/etc/passwd") is None
    assert at("../../../../etc") is None
    assert folders.work.root == tmp_path / "work"
    inside = RunFolders(tmp_path, Layout("/app/src", "/root"), "/app")
    assert (inside.work.root, inside.work.inside) == (tmp_path / "outputs", "src")


def test_the_layout_is_kept_and_what_makes_no_sense_is_none(tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    assert read_layout(path) is None
    kept = Layout("/app", "/root", user_files=("passwd",), notes=("a",))
    write_layout(path, kept)
    assert read_layout(path) == kept
    for odd in (b"{", b"[]", b'{"work_path": "/"}', b'{"work_path": "../x"}', b" " * 100_000):
        path.write_bytes(odd)
        assert read_layout(path) is None
    path.unlink()
    path.mkdir()
    assert read_layout(path) is None


def test_the_jobs_user_has_a_name_and_the_images_lines_stay() -> None:
    image = b"root:x:0:0:root:/root:/bin/bash\njob:x:1000:1000::/home/j:/bin/sh\nbroken\n"
    text, name = users.passwd(image, 65532, 65532, "/home/u")
    assert name == "job-1"
    assert text.splitlines() == [
        "job-1:x:65532:65532::/home/u:/bin/sh",
        "root:x:0:0:root:/root:/bin/bash",
        "job:x:1000:1000::/home/j:/bin/sh",
    ]
    assert users.passwd(b"", 7, 7, "/h")[0].splitlines() == [
        "job:x:7:7::/h:/bin/sh",
        "root:x:0:0:root:/root:/bin/sh",
    ]
    assert users.group(b"root:x:0:\nstaff:x:50:job\n", 7, "job").splitlines() == [
        "job:x:7:",
        "root:x:0:",
        "staff:x:50:job",
    ]
    assert users.home_of(image, "") == "/root"
    assert users.home_of(image, "1000:5") == "/home/j"
    assert users.home_of(image, "nobody") == ""


# -- the unpacker ----------------------------------------------------------------------------------


def entry(name: str, content: bytes = b"", **more: Any) -> tuple[tarfile.TarInfo, bytes]:
    made = tarfile.TarInfo(name)
    made.size = len(content)
    for key, value in more.items():
        setattr(made, key, value)
    return made, content


def packed(*entries: tuple[tarfile.TarInfo, bytes]) -> Iterator[bytes]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content))
    yield buffer.getvalue()


def unpacked(folder: Path, archive: Iterator[bytes], **more: Any) -> int:
    options = {"user": ME, "max_bytes": 1 << 20, "max_entries": 100, **more}
    return seeding.seed(archive, folder, **options)


@pytest.fixture
def top(tmp_path: Path) -> Path:
    made = tmp_path / "top"
    made.mkdir()
    return made


def test_what_an_image_has_is_taken_along(top: Path) -> None:
    archive = packed(
        entry("./", type=tarfile.DIRTYPE, mode=0o700),
        entry("./sub", type=tarfile.DIRTYPE, mode=0o555, mtime=1000),
        entry("./sub/run.sh", b"#!/bin/sh\n", mode=0o4755, mtime=2000),
        entry("./closed", b"mine", mode=0o400, mtime=2**40),
        entry("./link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        entry("./hard", type=tarfile.LNKTYPE, linkname="./sub/run.sh"),
    )
    assert unpacked(top, archive) == 14
    assert (top / "sub/run.sh").read_text() == "#!/bin/sh\n"
    assert (top / "sub/run.sh").stat().st_mode & 0o7777 == 0o755  # not as somebody else
    assert (top / "sub/run.sh").stat().st_mtime == 2000
    assert (top / "sub").stat().st_mode & 0o777 == 0o755
    assert (top / "sub").stat().st_mtime == 1000
    assert (top / "closed").stat().st_mode & 0o777 == 0o600
    assert (top / "closed").stat().st_mtime < 2**33  # not from the future
    assert os.readlink(top / "link") == "/etc/passwd"
    assert (top / "hard").samefile(top / "sub/run.sh")


@pytest.mark.parametrize(
    "hostile",
    [
        [entry("../out", b"x")],
        [entry("/../out", b"x")],
        [entry("a/../../out", b"x")],
        [entry("a", type=tarfile.SYMTYPE, linkname=".."), entry("a/out", b"x")],
        [entry("a", type=tarfile.SYMTYPE, linkname="/"), entry("a/tmp/sublet-out", b"x")],
        [
            entry("d", type=tarfile.DIRTYPE),
            entry("d/a", type=tarfile.SYMTYPE, linkname="../.."),
            entry("d/a/out", b"x"),
        ],
        [entry("hard", type=tarfile.LNKTYPE, linkname="../secret")],
        [
            entry("a", type=tarfile.SYMTYPE, linkname=".."),
            entry("hard", type=tarfile.LNKTYPE, linkname="a/secret"),
        ],
        [entry("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
        [entry("pipe", type=tarfile.FIFOTYPE)],
    ],
)
def test_nothing_of_an_archive_leads_out_or_is_a_device(
    top: Path, hostile: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    (top.parent / "secret").write_text("s")
    before = sorted(os.listdir(top.parent))
    try:
        unpacked(top, packed(*hostile, entry("fine", b"y")))
    except (seeding.SeedBroken, OSError):
        pass  # refusing all of it is right as well
    else:
        assert (top / "fine").read_bytes() == b"y"
    assert sorted(os.listdir(top.parent)) == before
    assert not os.path.lexists("/tmp/sublet-out")
    assert not any((top / name).exists() for name in ("null", "pipe", "hard"))


@pytest.mark.parametrize(
    ("archive", "what"),
    [
        ([entry("big", b"x" * 1001)], "bytes"),
        ([entry(f"f{n}", b"x" * 400) for n in range(3)], "bytes"),
        ([entry(f"f{n}") for n in range(11)], "files"),
        ([entry(f"{n}" + "/d" * 9 + "/f") for n in range(3)], "files"),
    ],
)
def test_what_is_too_much_is_told(
    top: Path, archive: list[tuple[tarfile.TarInfo, bytes]], what: str
) -> None:
    with pytest.raises(seeding.SeedTooLarge, match=what):
        unpacked(top, packed(*archive), max_bytes=1000, max_entries=10)


def test_what_is_no_archive_is_told(top: Path) -> None:
    for data in (b"x" * 10_000, b"\xff" * 512 + b"y"):
        with pytest.raises(seeding.SeedBroken):
            unpacked(top, iter((data,)))


def test_a_cancelled_copy_ends(top: Path) -> None:
    class Cancelled:
        def is_set(self) -> bool:
            return True

    with pytest.raises(seeding.SeedCancelled):
        unpacked(top, packed(entry("f", b"x")), cancel=Cancelled())


def test_what_is_mounted_over_is_left_out_and_has_a_place(top: Path) -> None:
    archive = packed(entry("data/big", b"x" * 5000), entry("datas", b"y"))
    points: tuple[seeding.MountPoint, ...] = (("data", "folder"), ("in/a.csv", "file"))
    unpacked(top, archive, max_bytes=1000, leave_out=("data",), mount_points=points)
    assert os.listdir(top / "data") == []
    assert (top / "in/a.csv").read_bytes() == b""
    assert (top / "datas").read_bytes() == b"y"


def test_an_input_is_packed_as_it_is(top: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "a/b").mkdir(parents=True)
    (source / "a/b/x.py").write_bytes(b"z" * 700)
    (source / "run").write_bytes(b"#!/bin/sh\n")
    (source / "run").chmod(0o755)
    (source / "away").symlink_to("/etc")
    unpacked(top, seeding.packed_folder(source))
    assert (top / "a/b/x.py").read_bytes() == b"z" * 700
    assert (top / "run").stat().st_mode & 0o777 == 0o755
    assert os.readlink(top / "away") == "/etc"


# -- from inside -----------------------------------------------------------------------------------

LOOK = textwrap.dedent("""
    import getpass, grp, json, os, pwd, socket
    home = os.path.expanduser("~")
    def write(path):
        try:
            open(path, "w").write("x")
        except OSError as error:
            return type(error).__name__
        return "written"
    print(json.dumps({
        "cwd": os.getcwd(), "home": home, "user": getpass.getuser(),
        "pwd": list(pwd.getpwuid(os.getuid()))[5], "group": grp.getgrgid(os.getgid()).gr_name,
        "here": sorted(os.listdir(".")), "there": sorted(os.listdir(home)),
        "tmp": sorted(os.listdir("/tmp")),
        "writes": [write("new"), write(home + "/new"), write("/tmp/new"), write("/new")],
        "host": socket.gethostbyname(socket.gethostname()),
        "env": {k: os.environ.get(k) for k in ("USER", "LOGNAME", "PATH", "PYTHONPATH", "OWN")},
        "owner": os.stat(".").st_uid == os.getuid(),
    }))
""")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    require("docker")
    made = World("docker", tmp_path_factory.mktemp("surroundings"))
    yield made
    made.close()


class Images:
    """Images made for one test, by a Dockerfile on the base image."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: list[str] = []

    def make(self, dockerfile: str, **files: bytes) -> str:
        """Return the id of an image."""
        context = self._folder / f"context-{len(self._made)}"
        context.mkdir()
        for name, content in files.items():
            (context / name).write_bytes(content)
        (context / "Dockerfile").write_text(f"FROM {base_image()}\n{dockerfile}\n")
        # Nothing of it needs a network, and the engine's bridge may be somebody else's matter.
        build = docker.from_env().images.build
        image, _ = build(path=str(context), rm=True, network_mode="none")
        self._made.append(str(image.id))
        return str(image.id)

    def close(self) -> None:
        """Delete them."""
        for image in self._made:
            docker.from_env().api.remove_image(image, force=True)


@pytest.fixture
def images(tmp_path: Path) -> Iterator[Images]:
    made = Images(tmp_path)
    yield made
    made.close()


def furnished(world: World, image: str, code: str = LOOK, **changes: Any) -> RunSpec:
    """Start a run as the agent does: furnished first."""
    spec = world.spec(code, image=image, image_id=image, **changes)
    spec = dataclasses.replace(spec, layout=world.runner.furnish(spec))
    world.runner.start(spec)
    return spec


def seen(world: World, image: str, **changes: Any) -> tuple[dict[str, Any], RunSpec]:
    spec = furnished(world, image, **changes)
    status = world.ended(spec.run_id)
    assert status.exit_code == 0, world.output(spec.run_id)
    found: dict[str, Any] = json.loads(world.output(spec.run_id)[0])
    return found, spec


@pytest.mark.docker
def test_an_images_own_world_is_kept_and_can_be_written(world: World, images: Images) -> None:
    image = images.make(
        "RUN mkdir -p /srv/app /home/u/.cache && echo hi > /home/u/.cache/model "
        "&& echo 1 > /srv/app/train.py && echo 2 > /tmp/left && chmod 700 /home/u /srv/app\n"
        "WORKDIR /srv/app\nENV HOME=/home/u PYTHONPATH=/srv/lib OWN=kept"
    )
    found, spec = seen(world, image)
    assert found["cwd"] == "/srv/app"
    assert found["home"] == found["pwd"] == "/home/u"
    assert (found["user"], found["group"]) == ("job", "job")
    assert found["here"] == ["train.py"]
    assert found["there"] == [".cache"]
    assert found["tmp"] == ["left"]
    assert found["writes"] == ["written", "written", "written", "OSError"]
    assert found["owner"]
    assert found["host"] == "127.0.0.1"
    assert found["env"]["OWN"] == "kept"
    assert found["env"]["PYTHONPATH"] == "/sublet/helper:/srv/lib"
    assert found["env"]["PATH"].endswith(":/home/u/.local/bin")
    assert "/usr/bin" in found["env"]["PATH"].split(":")
    assert spec.layout.notes == ()
    # On disk they are the run's own.
    assert (spec.run_dir / "work" / "new").read_text() == "x"
    assert (spec.run_dir / "home" / ".cache" / "model").read_text() == "hi\n"


CASE_10 = textwrap.dedent("""
    import ctypes, getpass, glob, os, shutil
    import ourlib
    print(getpass.getuser() != "", ourlib.x, open(os.path.expanduser("~/.cache/model")).read())
    for folder in ("/tmp", os.path.expanduser("~")):
        library = glob.glob("/lib/*-linux-gnu/libm.so.6")[0]
        ctypes.CDLL(shutil.copy(library, folder + "/libx.so"))
    print("loaded")
""")


@pytest.mark.docker
def test_case_10_what_an_image_brings_is_found(world: World, images: Images) -> None:
    """With the Dockerfile of the case: a library on PYTHONPATH, a cache in the image's HOME."""
    image = images.make(
        "COPY ourlib.py /srv/lib/ourlib.py\nENV PYTHONPATH=/srv/lib\n"
        "COPY model /home/u/.cache/model\nENV HOME=/home/u",
        **{"ourlib.py": b"x = 42\n", "model": b"weights"},
    )
    spec = furnished(world, image, CASE_10)
    assert world.ended(spec.run_id).exit_code == 0, world.output(spec.run_id)
    assert world.output(spec.run_id) == ["True 42 weights", "loaded"]
    # Beside it: the job's own paths and home are added, and hide nothing of the image's.
    env = {"PYTHONPATH": f"{WORK_PATH}/mine", "HOME": "/home/u", "MPLCONFIGDIR": "/tmp/mpl"}
    spec = furnished(world, image, CASE_10 + "print(os.environ['PYTHONPATH'])", env=env)
    assert world.ended(spec.run_id).exit_code == 0, world.output(spec.run_id)
    assert world.output(spec.run_id)[-1] == f"/sublet/helper:{WORK_PATH}/mine:/srv/lib"


@pytest.mark.docker
def test_an_image_without_any_of_it_gets_ours(world: World) -> None:
    found, spec = seen(world, base_image())
    assert (found["cwd"], found["home"]) == ("/work", "/root")
    assert found["writes"][:3] == ["written"] * 3
    assert spec.layout.notes == ("the working folder is /work: the image names none of its own",)


@pytest.mark.docker
@pytest.mark.parametrize(
    ("lines", "cwd", "home"),
    [
        ("WORKDIR /root/app\nRUN touch /root/app/here /root/there", "/root/app", "/root"),
        ("WORKDIR /opt/closed/app\nRUN chmod 700 /opt/closed", "/work", "/root"),
        ("WORKDIR /srv\nENV HOME=/srv/home", "/srv", "/srv/home"),
        ("WORKDIR /srv\nENV HOME=/srv", "/srv", "/srv"),
        ("WORKDIR /\nENV HOME=/", "/work", "/home/job"),
        ("WORKDIR /tmp/x", "/tmp/x", "/root"),
        (
            "RUN mkdir -p /srv/v/w && touch /srv/v/a\nVOLUME /srv/v /srv/v/w\nWORKDIR /srv/v",
            "/srv/v",
            "/root",
        ),
        ("RUN rmdir /tmp; mkdir /opt/r; ln -s /opt/r /opt/l\nWORKDIR /opt/l", "/opt/l", "/root"),
        ("RUN useradd -m ann || echo 'ann:x:7:7::/home/ann:' >> /etc/passwd; mkdir -p /home/ann\n"
         "USER ann\nWORKDIR /srv", "/srv", "/home/ann"),
    ],
)  # fmt: skip
def test_folders_within_each_other(
    world: World, images: Images, lines: str, cwd: str, home: str
) -> None:
    image = images.make(lines)
    found, spec = seen(world, image)
    assert (spec.layout.work_path, spec.layout.home_path) == (cwd, home)
    assert os.path.realpath(found["cwd"]) == cwd or found["cwd"] in (cwd, "/opt/r")
    assert found["home"] == home
    assert found["writes"][:3] == ["written"] * 3
    assert (spec.layout.notes != ()) == (cwd == "/work")


@pytest.mark.docker
@pytest.mark.parametrize("lines", ["RUN rmdir /tmp; ln -s /proc /tmp", "RUN touch /work"])
def test_an_image_in_which_no_run_can_have_its_folders_is_not_the_machines_matter(
    world: World, images: Images, lines: str
) -> None:
    """Else three such jobs would set a machine aside."""
    image = images.make(lines)
    if "touch" in lines:
        with pytest.raises(RunRefused, match="no folder in the image"):
            furnished(world, image)
        return
    spec = furnished(world, image)
    status = world.ended(spec.run_id)
    assert status.exit_code == 126
    assert "a link into /proc" in (status.error or "")


@pytest.mark.docker
def test_a_working_folder_that_is_too_large_stays_the_images(world: World, images: Images) -> None:
    image = images.make(
        "RUN mkdir /app && head -c 9000000 /dev/zero > /app/big && echo 1 > /app/train.py\n"
        "WORKDIR /app"
    )
    disk_bytes = 8_000_000
    found, spec = seen(world, image, disk_bytes=disk_bytes)
    assert found["cwd"] == "/work"
    assert found["here"] == []
    (note,) = spec.layout.notes
    assert (
        "the working folder is /work: /app holds more than this job's disk (--disk), 8 MB" in note
    )
    assert "whole path" in note
    assert os.listdir(spec.run_dir / "home") != []  # what fits is there all the same
    roomy, spec = seen(world, image)
    assert roomy["here"] == ["big", "train.py"]


@pytest.mark.docker
def test_inputs_in_and_over_the_working_folder(world: World, images: Images) -> None:
    image = images.make("RUN mkdir -p /app/data && touch /app/own\nWORKDIR /app")
    spec = world.spec(LOOK, image=image, image_id=image)
    (spec.inputs_dir / "data.csv").write_text("a")
    placed = {"/app/data/data.csv": spec.inputs_dir / "data.csv"}
    code = "import os; print(open('data/data.csv').read(), os.path.exists('own')); open('n', 'w')"
    spec = furnished(world, image, code, run_id=spec.run_id, destinations=placed)
    assert world.ended(spec.run_id).exit_code == 0, world.output(spec.run_id)
    assert world.output(spec.run_id) == ["a True"]

    # The input is the working folder itself: a copy of it, which can be written.
    spec = world.spec(LOOK, image=image, image_id=image)
    source = spec.inputs_dir / "project"
    (source / "pkg").mkdir(parents=True)
    (source / "pkg" / "m.py").write_text("print('mine')")
    code = "import os, runpy; runpy.run_path('pkg/m.py'); open('pkg/n', 'w'); os.unlink('pkg/m.py')"
    spec = furnished(world, image, code, run_id=spec.run_id, destinations={"/app": source})
    assert world.ended(spec.run_id).exit_code == 0, world.output(spec.run_id)
    assert world.output(spec.run_id) == ["mine"]
    assert (source / "pkg" / "m.py").exists()


@pytest.mark.docker
def test_the_outputs_folder_may_be_the_working_folder(world: World, images: Images) -> None:
    image = images.make("RUN mkdir -p /out/src && touch /out/src/own\nWORKDIR /out/src")
    found, spec = seen(world, image)
    assert (found["cwd"], found["here"]) == ("/out/src", ["own"])
    assert spec.outputs_dir is not None
    assert (spec.outputs_dir / "src" / "new").read_text() == "x"


@pytest.mark.docker
def test_programs_in_tmp_and_home_can_be_loaded_and_run(world: World) -> None:
    code = textwrap.dedent("""
        import ctypes, glob, os, shutil, subprocess
        library = glob.glob("/lib/*-linux-gnu/libm.so.6")[0]
        for folder in ("/tmp", os.path.expanduser("~"), "."):
            copied = shutil.copy(library, folder + "/libx.so")
            ctypes.CDLL(os.path.abspath(copied))
            shutil.copy("/bin/true", folder + "/t")
            subprocess.run([os.path.abspath(folder + "/t")], check=True)
    """)
    spec = furnished(world, base_image(), code)
    assert world.ended(spec.run_id).exit_code == 0, world.output(spec.run_id)


@pytest.mark.docker
def test_the_second_run_of_an_image_needs_no_look_into_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen(world, base_image())

    def never(*_: object) -> None:
        raise AssertionError("looked into the image once more")

    from sublet_agent.adapters.docker import furnishing

    monkeypatch.setattr(furnishing._Image, "_api", never)
    found, _ = seen(world, base_image())
    assert found["cwd"] == "/work"


@pytest.mark.docker
def test_nothing_is_left_of_the_looks(world: World) -> None:
    spec = furnished(world, base_image())
    world.ended(spec.run_id)
    listed = subprocess.run(
        ["docker", "ps", "-a", "--format", "{{.Names}}"], capture_output=True, text=True, check=True
    )
    mine = [name for name in listed.stdout.split() if world.owner[:12] in name]
    assert mine
    assert not [name for name in mine if name.endswith(".seed")]
    assert layouts.SEED_BYTES == 2_000_000_000


@pytest.mark.docker
def test_a_job_chooses_its_working_folder_and_its_shared_memory(world: World) -> None:
    code = (
        "import os, shutil; print(os.getcwd(), shutil.disk_usage('/dev/shm').total); open('x', 'w')"
    )
    spec = furnished(world, base_image(), code, workdir="/srv/mine", shm_bytes=32 * 2**20)
    assert world.ended(spec.run_id).exit_code == 0, world.output(spec.run_id)
    assert world.output(spec.run_id) == [f"/srv/mine {32 * 2**20}"]
    assert (spec.run_dir / "work" / "x").exists()
    assert spec.layout.notes == ()


@pytest.mark.docker
def test_a_job_runs_as_whom_it_chooses_where_the_owner_allows_it(
    world: World, images: Images
) -> None:
    image = images.make("RUN echo 'ann:x:4242:4243::/home/ann:/bin/sh' >> /etc/passwd")
    with pytest.raises(RunRefused, match="--allow-user"):
        world.runner.furnish(world.spec(LOOK, image=image, image_id=image, user="ann"))
    allowed = dataclasses.replace(world)
    allowed.owner, allowed.runner = world.owner, world.restarted(allow_user=True)
    for user, ids in (("ann", (4242, 4243)), ("4242", (4242, 4243)), ("77:78", (77, 78))):
        code = LOOK + "print(os.getuid(), os.getgid())"
        spec = furnished(allowed, image, code, user=user)
        assert allowed.ended(spec.run_id).exit_code == 0, allowed.output(spec.run_id)
        found, who = allowed.output(spec.run_id)
        assert who == f"{ids[0]} {ids[1]}"
        assert json.loads(found)["writes"][:3] == ["written"] * 3
    for odd in ("root", "nobody-here", "0"):
        with pytest.raises(RunRefused, match="root, or nobody that the image knows"):
            allowed.runner.furnish(world.spec(LOOK, image=image, image_id=image, user=odd))


def test_cores_are_those_that_the_fewest_have() -> None:
    machine = (0, 1, 2, 3)
    assert cores_for(2000, machine, []) == (0, 1)
    assert cores_for(2000, machine, [(0, 1)]) == (2, 3)
    assert cores_for(1500, machine, [(0, 1), (2,)]) == (0, 3)
    assert cores_for(500, machine, [(0,), (1,), (2,), (3,), (0, 2, 3)]) == (1,)
    assert cores_for(4000, machine, []) == cores_for(9000, machine, []) == ()
    assert cores_for(3000, (4, 6, 8, 10), [(6,)]) == (4, 8, 10)
    assert from_text(to_text((1, 3))) == (1, 3)
    assert from_text("") == from_text("0-3") == from_text("x") == ()


@pytest.mark.docker
def test_what_a_run_takes_for_its_cores_is_true_and_runs_have_different_ones(world: World) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("this machine has one core")
    code = (
        "import os, subprocess\n"
        "told = subprocess.run(['nproc'], capture_output=True, text=True).stdout.strip()\n"
        "print(told, *sorted(os.sched_getaffinity(0)), flush=True)\n"
        "__import__('time').sleep(600)"
    )
    runs = [furnished(world, base_image(), code, cpu_millis=900) for _ in range(2)]
    told = []
    for spec in runs:
        world.shown_anything(spec.run_id)
        told.append(world.output(spec.run_id)[0].split())
        world.runner.kill(spec.run_id)
    assert [count for count, *_ in told] == ["1", "1"]
    assert told[0][1] != told[1][1]
    code = "import os; print(len(os.sched_getaffinity(0)) == int(os.environ['ALL']))"
    env = {"ALL": str(docker.from_env().info()["NCPU"])}
    spec = furnished(world, base_image(), code, cpu_millis=64_000, env=env)
    world.ended(spec.run_id)
    assert world.output(spec.run_id) == ["True"]


@pytest.mark.docker
def test_where_lxcfs_is_installed_proc_tells_the_limits(world: World, tmp_path: Path) -> None:
    """By files that stand in for it: what it serves is its own matter, that it is used is ours."""
    assert told_by(tmp_path) == ()
    for name, text in (("proc/meminfo", "MemTotal: 7 kB\n"), ("proc/cpuinfo", "")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert told_by(tmp_path) == (("/proc/meminfo", tmp_path / "proc/meminfo"),)
    told = dataclasses.replace(world)
    told.owner, told.runner = world.owner, world.restarted(lxcfs=tmp_path)
    spec = furnished(told, base_image(), "print(open('/proc/meminfo').read())")
    assert told.ended(spec.run_id).exit_code == 0, told.output(spec.run_id)
    assert told.output(spec.run_id)[0] == "MemTotal: 7 kB"
