"""Which files of a folder of code go along with a job: judged by git where it is the model."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sublet import code_folder
from sublet.code_folder import CodeError, read_code_folder

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(*empty: str, **content: str) -> Path:
        root = tmp_path / "code"
        write(root, {**dict.fromkeys(empty, ""), **content})
        return root

    return made


def write(root: Path, files: dict[str, str]) -> None:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)


def sent(root: Path) -> list[str]:
    found = read_code_folder(root)
    return sorted([*(file.path for file in found.files), *found.links])


def test_code_goes_along_and_what_stays_home_is_said(make: Make) -> None:
    root = make(
        "train.py", "pkg/__init__.py", "pkg/__pycache__/x.pyc", ".git/config", ".env", ".env.local",
        ".env.example", "env/pyvenv.cfg", "env/bin/python", "deep/er/.venv/bin/python",
        ".pytest_cache/x",
    )  # fmt: skip
    write(root, {"big.txt": "x" * 5_000, "small.txt": "x"})
    assert sent(root) == [".env.example", "big.txt", "pkg/__init__.py", "small.txt", "train.py"]
    first, second = read_code_folder(root).lines()
    assert first.startswith("5 files, 5.001 kB; the largest: big.txt (5 kB), small.txt (1 B), ")
    assert second == "left out: 7 by default"


def test_every_ignore_file_is_honoured_and_the_last_word_is_sublets(make: Make) -> None:
    root = make(
        "a.log", "b.log", "c.log", "data/x", "data/keep", "notes/n", "sub/a.log", "sub/d.bin"
    )
    write(
        root,
        {
            ".gitignore": "*.log\n!b.log\n",
            ".dockerignore": "# not for the image\ndata\n!data/keep\n**/*.bin\n",
            ".subletignore": "notes/\n!c.log\n",
            "sub/.gitignore": "!a.log\n",
        },
    )
    ignores = [".dockerignore", ".gitignore", ".subletignore", "sub/.gitignore"]
    assert sent(root) == sorted([*ignores, "b.log", "c.log", "data/keep", "sub/a.log"])
    assert read_code_folder(root).left_out == {
        ".gitignore": 1,
        ".dockerignore": 2,
        ".subletignore": 1,
    }


def test_a_secret_goes_only_where_sublets_file_says_so(make: Make) -> None:
    root = make("train.py", ".env")
    assert ".env" not in sent(root)
    write(root, {".subletignore": "!.env\n"})
    assert ".env" in sent(root)


_NAMES = st.sampled_from(["a", "b", "c.log", "d.txt", "e f", "ü.log"])
_PATHS = st.lists(_NAMES, min_size=1, max_size=3).map("/".join)
_PATTERNS = st.sampled_from(
    ["a", "a/", "/a", "*.log", "!c.log", "!*.log", "a/b", "**/b", "a/**", "a/**/b", "[a-b]", "?",
     "/*", "!/a", "!a/", "*", "!*/", "e f", "\\!x", "#c", "b/*", "!b/d.txt", " a", "a ", "ü*"]
)  # fmt: skip
_IGNORES = st.lists(_PATTERNS, max_size=4).map("\n".join)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(paths=st.sets(_PATHS, min_size=1, max_size=8), top=_IGNORES, inner=_IGNORES)
def test_gitignore_means_what_git_says(
    tmp_path_factory: pytest.TempPathFactory, paths: set[str], top: str, inner: str
) -> None:
    root = tmp_path_factory.mktemp("code")
    for path in sorted(paths):
        if (
            not any((root / above).is_file() for above in _above(path))
            and not (root / path).is_dir()
        ):
            write(root, {path: "x"})
    write(root, {".gitignore": top, "a.py": ""})
    if (root / "a").is_dir():
        write(root, {"a/.gitignore": inner})
    subprocess.run(["git", "init", "-q", str(root)], check=True, capture_output=True)
    listed = subprocess.run(
        ["git", "-C", str(root), "-c", "core.excludesFile=", "ls-files", "-z", "-co",
         "--exclude-standard"],
        check=True,
        capture_output=True,
    ).stdout.decode()  # fmt: skip
    expected = sorted(path for path in listed.split("\0") if path)
    try:
        found = sent(root)
    except CodeError:
        found = []
    assert found == expected


def _above(path: str) -> Iterable[str]:
    parts = path.split("/")
    return ("/".join(parts[:n]) for n in range(1, len(parts)))


def test_links_inside_go_along_as_links_and_others_are_refused(make: Make) -> None:
    root = make("lib/v2/code.py", "train.py")
    os.symlink("v2", root / "lib" / "current")
    os.symlink("../train.py", root / "lib" / "main.py")
    assert read_code_folder(root).links == {"lib/current": "v2", "lib/main.py": "../train.py"}
    for target, says in (
        ("/etc/passwd", "leads out of the folder"),
        ("../../elsewhere", "leads out of the folder"),
        ("nowhere", "stays home or isn't there"),
    ):
        (root / "lib" / "odd").unlink(missing_ok=True)
        os.symlink(target, root / "lib" / "odd")
        with pytest.raises(CodeError, match=f"lib/odd is a link .*{says}.*subletignore"):
            read_code_folder(root)
    write(root, {".subletignore": "odd\n"})
    assert "lib/odd" not in sent(root)


def test_a_folder_by_mistake_is_told_before_a_byte_is_read(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make("train.py")
    for name in ("data", "runs"):
        (root / name).mkdir()
        with (root / name / "huge.bin").open("wb") as sparse:
            sparse.truncate(20 * 10**9)
    with pytest.raises(CodeError, match=r"over 2 GB .*data \(20 GB\).*subletignore.*--input"):
        read_code_folder(root)
    monkeypatch.setattr(code_folder, "MAX_CODE_FILES", 2)
    root = make("a", "b", "c")
    write(root, {".subletignore": "data\nruns\n"})
    with pytest.raises(CodeError, match="2 files"):
        read_code_folder(root)


@pytest.mark.parametrize("odd", ["fifo", "no UTF-8", "empty", "missing", "ignore file"])
def test_what_cannot_be_sent_is_named(make: Make, tmp_path: Path, odd: str) -> None:
    root = make("train.py")
    says = {
        "fifo": "pipe is neither a file nor a folder",
        "no UTF-8": "is no UTF-8; rename it",
        "empty": "nothing in it would be sent",
        "missing": "there is no such folder",
        "ignore file": "has more than",
    }[odd]
    if odd == "fifo":
        os.mkfifo(root / "pipe")
    elif odd == "no UTF-8":
        (root / os.fsdecode(b"\xff")).write_text("")
    elif odd == "empty":
        write(root, {".subletignore": "*"})
    elif odd == "missing":
        root = tmp_path / "nowhere"
    else:
        write(root, {".gitignore": "x\n" * 600_000})
    with pytest.raises(CodeError, match=says):
        read_code_folder(root)
