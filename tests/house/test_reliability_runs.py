"""`make reliability` can be interrupted at any point, and goes on from there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.reliability import __main__ as records
from tests.reliability.__main__ import KINDS
from tests.reliability.run import Piece, Runs, pieces

PLAY = """
import pathlib, sys
name, folder, file = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
with (folder / "played").open("a") as played:
    played.write(name + "\\n")
how = folder / f"{name}-ends"
file.write_text('{"of": "' + name + '"}')
sys.exit(int(how.read_text()) if how.exists() else 0)
"""


class Played:
    """Three pieces, of which the second may end otherwise, and finds it told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken: list[str] = []
        self.said: list[str] = []
        self.pieces = [
            Piece(
                name,
                "storm",
                (sys.executable, "-c", PLAY, name, str(folder), "{json}"),
                failures_are_told=name == "told",
            )
            for name in ("one", "two", "told", "last")
        ]

    def ends(self, name: str, status: int) -> None:
        (self.folder / f"{name}-ends").write_text(str(status))

    def play(self) -> list[str]:
        """Start anew, as another process would."""
        return Runs(
            self.folder / "state", lambda piece, json: self._take(piece, json), self.said.append
        ).play(self.pieces)

    def _take(self, piece: Piece, json: Path) -> None:
        assert json.read_text() == f'{{"of": "{piece.name}"}}'
        self.taken.append(piece.name)

    @property
    def played(self) -> list[str]:
        """All that was played, however often."""
        return (self.folder / "played").read_text().split()


def test_what_is_done_is_not_played_again(tmp_path: Path) -> None:
    all_of = Played(tmp_path)
    assert all_of.play() == []
    assert all_of.play() == []
    assert all_of.played == all_of.taken == ["one", "two", "told", "last"]
    assert "== 1 of 4, one: done already" in all_of.said


def test_interrupted_it_goes_on_with_the_one_that_was_under_way(tmp_path: Path) -> None:
    some = Played(tmp_path)
    some.ends("two", 130)
    with pytest.raises(KeyboardInterrupt):
        some.play()
    assert some.taken == ["one"]
    some.ends("two", 0)
    assert some.play() == []
    assert some.played == ["one", "two", "two", "told", "last"]
    assert some.taken == ["one", "two", "told", "last"]


def test_a_kill_between_taking_and_noting_takes_the_same_again(tmp_path: Path) -> None:
    some = Played(tmp_path)
    really = some._take

    def die(piece: Piece, json: Path) -> None:
        really(piece, json)
        raise SystemExit(137)

    some._take = die  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        some.play()
    some._take = really  # type: ignore[method-assign]
    assert some.play() == []
    assert some.taken == ["one", "one", "two", "told", "last"]


def test_what_fails_stops_nothing_is_told_and_is_tried_again(tmp_path: Path) -> None:
    some = Played(tmp_path)
    some.ends("two", 1)
    assert some.play() == ["two"]
    assert some.taken == ["one", "told", "last"]
    some.ends("two", 0)
    assert some.play() == []
    assert some.taken[-1] == "two"


def test_a_failure_that_the_page_lists_is_taken_and_told(tmp_path: Path) -> None:
    some = Played(tmp_path)
    some.ends("told", 1)
    assert some.play() == ["told"]
    assert some.taken == ["one", "two", "told", "last"]
    # It has been played, and so it isn't again; nor does it look as if all had held.
    assert some.play() == ["told"]
    assert some.played == ["one", "two", "told", "last"]


def test_the_same_simulation_taken_twice_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "HERE", tmp_path)
    run = tmp_path / "simulation.json"
    run.write_text(
        '{"first_seed": 7, "markets": 3, "simulated_hours": 1.5, "violations": [],'
        ' "seconds": 2.0, "faults": {"break": 2}}'
    )
    for commit in ("aaa", "bbb", "bbb"):
        records.take("simulation", run, commit)
    text = (tmp_path / "records" / "simulation.json").read_text()
    assert text.count('"first_seed"') == 3  # this run, and the two that differ


def test_every_kind_of_record_has_its_piece() -> None:
    kinds = {piece.kind for piece in pieces(60)}
    assert kinds == {*KINDS, "storm"} - {"storms"}
    assert len({piece.name for piece in pieces(60)}) == len(pieces(60))
