"""What frameworks expect of the world that they run in, asked from within a job.

    python3 probe.py NAME...     one line of JSON: name -> "ok", "absent: ..." or what went wrong

A check that needs a tool which the world has not says `absent`. It needs nothing but Python, and
for the last ones torch.
"""

from __future__ import annotations

import ctypes
import getpass
import glob
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

HOME = Path.home()


class Absent(Exception):
    """What the check needs isn't here."""


def _need(tool: str) -> str:
    found = shutil.which(tool)
    if found is None:
        raise Absent(tool)
    return found


def _run(*command: str, cwd: Path | None = None, **env: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr[-1500:]}")
    return done.stdout


def user() -> None:
    """Whoever asks for the user's name or home gets one."""
    assert getpass.getuser()
    assert os.environ["USER"]
    assert os.environ["LOGNAME"]
    assert os.path.expanduser("~") == os.environ["HOME"]


def host() -> None:
    """The host's own name is known, and is the loopback."""
    assert socket.gethostbyname(socket.gethostname()).startswith("127.") or "." in _address()


def _address() -> str:
    return socket.gethostbyname(socket.gethostname())


def folders() -> None:
    """Working folder, HOME and the temporary folder are there, apart, and can be written."""
    found = {os.path.realpath(p) for p in (".", HOME, tempfile.gettempdir())}
    assert len(found) == 3
    for folder in found:
        Path(folder, "made").write_text("x")


def libraries() -> None:
    """A library that was made in one of them can be loaded, a program run."""
    (library,) = glob.glob("/lib/*-linux-gnu/libm.so.6")[:1]
    for folder in (Path.cwd(), HOME, Path(tempfile.gettempdir())):
        ctypes.CDLL(str(shutil.copy(library, folder / "libx.so")))
        program = shutil.copy(_need("true"), folder / "program")
        _run(str(program))


def compiler() -> None:
    """What is compiled can be loaded."""
    _need("cc")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "x.c")
        source.write_text("int seven(void) { return 7; }")
        _run("cc", "-shared", "-fPIC", "-o", f"{folder}/x.so", str(source))
        assert ctypes.CDLL(f"{folder}/x.so").seven() == 7


def processes() -> None:
    """Semaphores and spawned processes work."""
    code = "import multiprocessing as m; c = m.get_context('spawn'); c.Semaphore(1); c.Queue()"
    _run(sys.executable, "-c", code)


def cores() -> None:
    """What programs take for the number of cores is not more than what they get."""
    threads = int(os.environ["OMP_NUM_THREADS"])
    for name in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        assert int(os.environ[name]) == threads
    assert 1 <= threads <= (os.cpu_count() or 1)


def git() -> None:
    """A repository can be made and committed to."""
    _need("git")
    with tempfile.TemporaryDirectory() as folder:
        _run("git", "init", "-q", folder)
        Path(folder, "a").write_text("x")
        _run("git", "add", "a", cwd=Path(folder))
        identity = ("-c", "user.email=a@b", "-c", "user.name=n")
        _run("git", *identity, "commit", "-qm", "first", cwd=Path(folder))
        _run("git", "config", "--global", "init.defaultBranch", "main")


def pip() -> None:
    """`pip install --user` of a wheel, and what it brings along is found."""
    python = os.environ.get("PROBE_PYTHON", sys.executable)
    try:
        _run(python, "-m", "pip", "--version")
    except RuntimeError as error:
        raise Absent("pip") from error
    inside = "import sys; print(sys.prefix != sys.base_prefix)"
    if _run(python, "-c", inside).strip() == "True":
        raise Absent("a user's site: this is a virtual environment")
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder, "brought-1.0-py3-none-any.whl")
        _make_wheel(wheel)
        options = ("--user", "--no-index", "--no-deps", "--break-system-packages", "-q")
        _run(python, "-m", "pip", "install", *options, str(wheel))
    assert _run(python, "-c", "import brought; print(brought.x)").strip() == "5"
    assert _run("brought").strip() == "5"  # its program is on PATH


def _make_wheel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("brought.py", "x = 5\ndef main(): print(x)\n")
        info = "brought-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/entry_points.txt", "[console_scripts]\nbrought = brought:main\n")
        wheel.writestr(f"{info}/RECORD", "")


def torchrun() -> None:
    """`torchrun --standalone` finds itself and comes up."""
    script = Path(tempfile.gettempdir(), "dist.py")
    script.write_text(
        "import torch.distributed as d\n"
        "d.init_process_group('gloo'); print('gloo', d.get_world_size(), flush=True)\n"
        "d.destroy_process_group()\n"
    )
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", str(script))
    assert "gloo 1" in _run(sys.executable, *run)


def loader() -> None:
    """Workers of a DataLoader hand over tensors (in /dev/shm)."""
    code = textwrap.dedent("""
        import torch
        from torch.utils.data import DataLoader, TensorDataset
        data = TensorDataset(torch.arange(64, dtype=torch.float32))
        for context in ("fork", "spawn"):
            found = DataLoader(data, 8, num_workers=2, multiprocessing_context=context)
            if __name__ == "__main__":
                assert sum(float(batch[0].sum()) for batch in found) == 64 * 63 / 2
    """)
    script = Path(tempfile.gettempdir(), "loads.py")
    script.write_text(code)
    _run(sys.executable, str(script))


def compiled() -> None:
    """torch.compile compiles, keeps it in its cache, and loads it from there."""
    _need("g++")
    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").exists():
        raise Absent("Python.h")
    code = (
        "import torch, torch._inductor.config as c; c.cpp_cache_precompile_headers = False; "
        "f = torch.compile(lambda x: torch.sin(x) + 1); "
        "x = torch.ones(8); assert torch.allclose(f(x), torch.sin(x) + 1)"
    )
    _run(sys.executable, "-c", code)
    name = f"torchinductor_{getpass.getuser()}"
    assert any(Path(tempfile.gettempdir(), name).iterdir())


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        user, host, folders, libraries, compiler, processes, cores, git, pip,
        torchrun, loader, compiled,
    )
}  # fmt: skip
WITH_TORCH = ("torchrun", "loader", "compiled")


def main(names: list[str]) -> None:
    """Make the checks and print what came of them."""
    said = {}
    for name in names:
        try:
            CHECKS[name]()
            said[name] = "ok"
        except Absent as error:
            said[name] = f"absent: {error}"
        except Exception as error:  # noqa: BLE001 - it is what is asked for
            said[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1:])
