"""Make a tiny Linux + python3 image where no registry answers: debootstrap, then `docker import`.

    python deploy/images/base.py [--tag sublet-test-base:1] [--include python3,...]

The packages come from the mirror that this machine's own apt uses. Takes about a minute, once: an
image that has the tag already is left as it is. Needs root, debootstrap and a Docker Engine.
"""

from __future__ import annotations

import argparse
import fcntl
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

TAG = "sublet-test-base:1"
PACKAGES = ("python3-minimal", "libpython3-stdlib")
_APT = Path("/etc/apt")
# Nothing in a container reads these, and they are two fifths of the image.
_LEFT_OUT = re.compile(r"\./(usr/share/(doc|man|locale|info)|var/cache/apt|var/lib/apt/lists)/.")


class BaseImageError(RuntimeError):
    """The image can't be made here; the message says why and what to do."""


def build(tag: str = TAG, packages: Sequence[str] = PACKAGES) -> str:
    """Return the id (`sha256:...`) of the image `tag`, made first if it is absent.

    Two callers at once build it once. Raises BaseImageError.
    """
    lock = Path(tempfile.gettempdir()) / f"sublet-image-{re.sub(r'[^a-z0-9]', '-', tag)}.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        found = image_id(tag)
        return found if found else _build(tag, packages)


def image_id(tag: str) -> str | None:
    """Return the id of `tag` in the local engine, or None where it has no such image."""
    command = ["docker", "image", "inspect", "--format", "{{.Id}}", tag]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return asked.stdout.strip() if asked.returncode == 0 else None


def apt_source() -> tuple[str, str]:
    """Return (mirror URL, suite) of this machine's own apt. Raises BaseImageError."""
    release = dict(
        line.split("=", 1)
        for line in Path("/etc/os-release").read_text().splitlines()
        if "=" in line
    )
    suite = release.get("VERSION_CODENAME", "").strip('"')
    for mirror, suites in _sources():
        if suite and suite in suites:
            return mirror, suite
    raise BaseImageError(
        f"apt has no http source of the suite {suite or '(unknown)'!r}: "
        "pull a base image from a registry and tag it " + TAG
    )


def _sources() -> Iterator[tuple[str, list[str]]]:
    files = [_APT / "sources.list", *sorted((_APT / "sources.list.d").glob("*"))]
    for file in (f for f in files if f.is_file()):
        if file.suffix == ".sources":
            for block in file.read_text().split("\n\n"):
                fields = dict(re.findall(r"^(URIs|Suites):\s*(.+)$", block, re.MULTILINE))
                if "URIs" in fields and "Suites" in fields:
                    yield fields["URIs"].split()[0], fields["Suites"].split()
        else:
            line = re.compile(r"^deb\s+(?:\[[^\]]*\]\s+)?(https?://\S+)\s+(\S+)", re.MULTILINE)
            for mirror, suite in line.findall(file.read_text()):
                yield mirror, [suite]


def _build(tag: str, packages: Sequence[str]) -> str:
    for tool in ("debootstrap", "docker"):
        if shutil.which(tool) is None:
            raise BaseImageError(f"{tool} is not installed: apt-get install debootstrap docker.io")
    mirror, suite = apt_source()
    with tempfile.TemporaryDirectory(prefix="sublet-base-") as scratch:
        root = Path(scratch) / "root"
        _run(
            [
                "debootstrap",
                "--variant=minbase",
                f"--include={','.join(packages)}",
                suite,
                str(root),
                mirror,
            ],
            hint="it needs root, and the mirror that apt uses",
        )
        # A container gets its own of these from the engine; the host's must not be inside.
        for name in ("etc/resolv.conf", "etc/hostname", "etc/apt/sources.list"):
            (root / name).unlink(missing_ok=True)
        archive = Path(scratch) / "root.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(root, ".", filter=_kept)
        _run(
            [
                "docker",
                "import",
                "--change",
                "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                str(archive),
                tag,
            ],
            hint="is the Docker Engine running? try: docker info",
        )
    made = image_id(tag)
    if made is None:
        raise BaseImageError(
            f"docker import ended well, yet the engine has no {tag}: docker images"
        )
    return made


def _kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if _LEFT_OUT.match(entry.name) or entry.ischr() or entry.isblk():
        return None
    return entry


def _run(command: list[str], hint: str) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise BaseImageError(f"{command[0]} failed ({hint}):\n{done.stdout[-2000:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the image and print its id; 1 and the reason on stderr where that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tag", default=TAG)
    parser.add_argument("--include", default=",".join(PACKAGES), help="Debian packages, commas")
    options = parser.parse_args(arguments)
    try:
        print(build(options.tag, options.include.split(",")))
    except BaseImageError as error:
        print(f"base image: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
