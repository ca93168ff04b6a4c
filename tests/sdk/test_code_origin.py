"""Where code comes from: the commit, and what was changed since in what goes along."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sublet.code_origin import DIFF, CodeOrigin, find_origin, read_origin


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    (root / "job").mkdir(parents=True)
    for name in ("job/train.py", "job/odd :(name).py", "job/secret.txt", "readme"):
        (root / name).write_text("first\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "first")
    return root


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


GOING = ["train.py", "odd :(name).py", "new.py"]


def test_a_clean_folder_is_its_commit(repository: Path) -> None:
    (repository / "readme").write_text("changed, and not in this folder\n")
    origin, diff = find_origin(repository / "job", GOING)
    assert origin == CodeOrigin(git(repository, "rev-parse", "HEAD"))
    assert diff == b""
    assert origin.line() == f"commit {git(repository, 'rev-parse', 'HEAD')[:12]}, as committed"


def test_changes_are_recorded_and_what_stays_home_is_not(repository: Path) -> None:
    job = repository / "job"
    for name in ("train.py", "odd :(name).py", "secret.txt", "new.py"):
        (job / name).write_text("second\n")
    origin, diff = find_origin(job, GOING)
    assert origin.changed == ("new.py", "odd :(name).py", "train.py")
    assert origin.diff == DIFF
    assert origin.line().endswith(", 3 files changed since")
    assert b"+++ b/train.py" in diff
    assert b"secret" not in diff
    git(repository, "checkout", "-q", "--", "job")
    (repository / "diff").write_bytes(diff)
    git(repository, "apply", "--directory=job", "diff")
    assert (job / "train.py").read_text() == "second\n"


def test_what_was_deleted_since_is_told(repository: Path) -> None:
    (repository / "job" / "train.py").unlink()
    origin, diff = find_origin(repository / "job", ["odd :(name).py"])
    assert origin.changed == ("train.py",)
    assert b"-first" in diff


def test_outside_of_a_repository_nothing_is_said(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_origin(tmp_path, ["a"]) == (CodeOrigin(None), b"")
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_origin(repository, ["a"]) == (CodeOrigin(None), b"")


def test_the_record_reads_back(repository: Path) -> None:
    (repository / "job" / "train.py").write_text("second\n")
    for origin, _ in (find_origin(repository / "job", GOING), find_origin(Path("/"), [])):
        assert read_origin(origin.to_bytes()) == origin


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"[]", b"[" * 9_000, b"\xff", b"x" * 300_000,
        b'{"commit": "--output=x", "changed": [], "changed_total": 0, "diff": ""}',
        b'{"commit": null, "changed": [1], "changed_total": 0, "diff": ""}',
        b'{"commit": null, "changed": [], "changed_total": -1, "diff": ""}',
        b'{"commit": null, "changed": [], "changed_total": 0, "diff": "/etc/passwd"}',
    ],
)  # fmt: skip
def test_what_a_stranger_wrote_there_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"code\.json"):
        read_origin(data)
