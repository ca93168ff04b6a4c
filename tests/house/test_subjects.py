"""Commit subjects are short: where a commit is made, and where a history is looked at."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.house.subjects import main, subject_of, too_long

AT_MOST = "x" * 72


@pytest.mark.parametrize(
    ("message", "subject"),
    [
        ("Subject\n\nbody of a length that nobody counts\n", "Subject"),
        ("\n\n  Subject  \nbody", "Subject"),
        ("# what git writes\nSubject", "Subject"),
        ("# only comments\n", ""),
        ("# ------------------------ >8 ------------------------\ndiff", ""),
        ("", ""),
    ],
)
def test_the_subject_is_the_first_line_that_git_keeps(message: str, subject: str) -> None:
    assert subject_of(message) == subject


def test_72_characters_are_enough_and_73_too_many() -> None:
    assert too_long(AT_MOST) == ""
    assert too_long("ü" * 72) == ""
    assert too_long(AT_MOST + "x").startswith("73 characters, at most 72: xxx")
    assert "needs a subject" in too_long("")
    assert too_long('Revert "' + AT_MOST + '"') == ""


def test_a_message_that_is_about_to_be_committed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "COMMIT_EDITMSG"
    file.write_text(f"{AT_MOST}\n\n{AT_MOST * 2}\n")
    assert main(["--message", str(file)]) == 0
    file.write_text(f"{AT_MOST}!\n")
    assert main(["--message", str(file)]) == 1
    assert "73 characters" in capsys.readouterr().out


def test_only_the_commits_since_the_base_are_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    def commit(subject: str) -> str:
        git("commit", "-q", "--allow-empty", "--no-verify", "-m", subject)
        return git("rev-parse", "HEAD")

    git("init", "-q")
    base = commit("older than the rule " + AT_MOST)
    commit("short")
    assert main([], base=base, folder=tmp_path) == 0
    commit("this one is long " + AT_MOST)
    commit("short again")
    assert main([], base=base, folder=tmp_path) == 1
    out = capsys.readouterr().out
    assert "this one is long" in out
    assert "older" not in out
    # A shallow clone doesn't have it: there is nothing to say then.
    assert main([], base="0" * 40, folder=tmp_path) == 0
    assert "not looked at" in capsys.readouterr().out
