"""Whether a job has opened what it was restored from: by access times, and by its own word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sublet_agent.adapters.workspace import placed_files
from sublet_agent.adapters.workspace.placed_files import PlacedFile, PlacedFiles, keeps_access_times
from sublet_agent.adapters.workspace.reader import Look, look


@pytest.fixture
def run(tmp_path: Path) -> Path:
    if not keeps_access_times(tmp_path):
        pytest.skip("this filesystem keeps no access times (noatime)")
    (tmp_path / "out").mkdir()
    return tmp_path


def placed(run: Path, *names: str) -> PlacedFiles:
    for size, name in enumerate(names, 1):
        (run / "out" / name).write_bytes(b"x" * size)
    files = PlacedFiles(run)
    files.watch(PlacedFile(run / "out", (name,)) for name in names)
    return files


def test_the_first_read_is_noticed_and_stays(run: Path) -> None:
    files = placed(run, "settings.json", "model.pt")
    assert files.opened() is False
    assert files.opened() is False, "looking is no reading"
    (run / "out" / "model.pt").read_bytes()
    assert files.opened() is True
    (run / "out" / "model.pt").unlink()
    assert files.opened() is True


def test_an_agent_that_was_started_anew_knows_it_too(run: Path) -> None:
    placed(run, "model.pt")
    assert PlacedFiles(run).opened() is False
    (run / "out" / "model.pt").read_bytes()
    assert PlacedFiles(run).opened() is True


def test_what_was_written_over_before_anybody_read_it_was_not_opened(run: Path) -> None:
    files = placed(run, "ckpt.pt", "other.pt")
    (run / "out" / "ckpt.pt").write_bytes(b"from the start")
    new = run / "out" / "other.pt.tmp"
    new.write_bytes(b"replaced")
    os.replace(new, run / "out" / "other.pt")
    (run / "out" / "other.pt").read_bytes()
    assert files.opened() is False


@pytest.mark.parametrize("anew", [False, True])
def test_what_was_read_and_replaced_before_anybody_looked_was_opened(run: Path, anew: bool) -> None:
    files = placed(run, "ckpt.pt")
    (run / "out" / "ckpt.pt").read_bytes()
    new = run / "out" / "ckpt.pt.tmp"
    new.write_bytes(b"the next one")
    os.replace(new, run / "out" / "ckpt.pt")
    assert (PlacedFiles(run) if anew else files).opened() is True
    assert not list((run / "placed").iterdir()), "no more room than needed"


def test_what_was_replaced_unread_takes_up_room_until_it_was_seen(run: Path) -> None:
    files = placed(run, "ckpt.pt", "other.pt")
    (run / "out" / "other.pt").unlink()
    assert files.opened() is False
    assert [link.name for link in (run / "placed").iterdir()] == ["1"], "ckpt.pt is still there"
    assert files.opened() is False
    (run / "out" / "ckpt.pt").read_bytes()
    assert files.opened() is True
    assert not list((run / "placed").iterdir())


def test_the_largest_files_count_not_the_many_small_ones(run: Path) -> None:
    names = [f"{number:02}" for number in range(placed_files.WATCHED + 4)]
    files = placed(run, *names)
    (run / "out" / "00").read_bytes()
    assert files.opened() is False
    (run / "out" / names[-1]).read_bytes()
    assert files.opened() is True


def test_links_and_folders_that_the_job_makes_of_them_are_not_followed(run: Path) -> None:
    files = placed(run, "model.pt")
    (run / "out" / "model.pt").unlink()
    (run / "elsewhere").write_bytes(b"read by others")
    (run / "out" / "model.pt").symlink_to(run / "elsewhere")
    (run / "out" / "model.pt").read_bytes()
    assert files.opened() is False
    (run / "out" / "model.pt").unlink()
    (run / "out" / "model.pt").mkdir()
    assert files.opened() is False


def test_where_no_access_times_are_kept_nothing_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placed_files, "keeps_access_times", lambda folder: False)
    files = placed(run, "model.pt")
    assert files.opened() is None
    assert PlacedFiles(run).opened() is None


def test_of_nothing_placed_nothing_is_said(run: Path) -> None:
    assert PlacedFiles(run).opened() is None
    assert placed(run).opened() is None


@pytest.mark.parametrize("record", ["", "[]", "[[1]]", '[["/x", "a", 1, 2, 3]]', "[" * 9000, "{}"])
def test_a_record_that_is_damaged_says_nothing(run: Path, record: str) -> None:
    (run / "placed.json").write_text(record)
    assert PlacedFiles(run).opened() is None


@pytest.mark.parametrize(
    ("told", "marked", "right"),
    [
        (None, False, None),
        ('{"step": 1, "restored": false}', False, False),
        ('{"step": 1, "restored": true}', False, True),
        ('{"step": 1, "restored": false}', True, True),
        ('{"step": 1, "restored": "yes"}', False, None),
        ("[]", False, None),
        ("{", True, True),
    ],
)
def test_the_helpers_own_word(
    tmp_path: Path, told: str | None, marked: bool, right: bool | None
) -> None:
    if told is not None:
        (tmp_path / "progress.json").write_text(told)
    if marked:
        (tmp_path / "restored").touch()
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        found: Look = look(folder)
    finally:
        os.close(folder)
    assert found.restored is right
