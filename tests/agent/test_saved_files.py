"""Which file a script seems to save its state to: a guess that its renter is told."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sublet_agent.adapters.workspace import saved_files
from sublet_agent.adapters.workspace.saved_files import newest_saved


@contextmanager
def opened(*folders: Path) -> Iterator[list[int]]:
    with ExitStack() as stack:
        tops = []
        for folder in folders:
            tops.append(os.open(folder, os.O_RDONLY))
            stack.callback(os.close, tops[-1])
        yield tops


def write(path: Path, size: int, *, age_s: float = 0.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    when = time.time() - age_s
    os.utime(path, (when, when))


def found(*folders: Path, since_s: float = 60.0) -> list[int | str] | None:
    with opened(*folders) as tops:
        return newest_saved(tops, int((time.time() - since_s) * 1e9))


def test_a_state_goes_before_what_is_larger_and_what_was_there_before_is_none(
    tmp_path: Path,
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    write(work / "data.csv", 9000, age_s=600)
    write(work / "base.pt", 9000, age_s=600)
    write(work / "events.log", 9000)
    write(out / "samples.dat", 5000)
    assert found(work, out) == [1, "samples.dat"]
    write(out / "runs" / "a" / "state.pkl", 10)
    assert found(work, out) == [1, "runs/a/state.pkl"]
    write(work / "ckpt.PT", 11)
    assert found(work, out) == [0, "ckpt.PT"]


def test_nothing_written_is_nothing_found(tmp_path: Path) -> None:
    write(tmp_path / "train.py", 100, age_s=600)
    write(tmp_path / "empty.pt", 0)
    assert found(tmp_path) is None
    assert newest_saved([-1], 0) is None


def test_links_odd_names_and_endless_folders_are_left_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere / "secret.pt", 10)
    top = tmp_path / "top"
    top.mkdir()
    (top / "link.pt").symlink_to(elsewhere / "secret.pt")
    (top / "folder").symlink_to(elsewhere)
    write(top / "a\x1b[2J.pt", 10)
    os.mkfifo(top / "pipe.pt")
    deep = top
    for _ in range(30):
        deep = deep / "d"
    write(deep / "state.pt", 10)
    assert found(top) is None


def test_listing_ends_at_a_bound(tmp_path: Path) -> None:
    before, saved_files.MAX_LISTED = saved_files.MAX_LISTED, 50
    try:
        for number in range(200):
            write(tmp_path / f"{number}.txt", 1)
        assert found(tmp_path) is not None
    finally:
        saved_files.MAX_LISTED = before
