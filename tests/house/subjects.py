"""Commit subjects: at most 72 characters, so that `git log --oneline` and a patch's mail show them.

python -m tests.house.subjects              of the commits since BASE, where there is a history
python -m tests.house.subjects --message FILE      of one that is about to be made
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_CHARACTERS = 72
BASE = "56cda2c663264e769f1e5008f34af773fb23b615"
"""The last commit before this was a rule: older subjects stay as they are."""


def subject_of(message: str) -> str:
    """Return the first line that git keeps of a message: comments and what is below scissors go."""
    for line in message.splitlines():
        if line.startswith("# ---") and ">8" in line:
            break
        if line.strip() and not line.startswith("#"):
            return line.strip()
    return ""


def too_long(subject: str) -> str:
    """Say what is wrong with a subject, or nothing. What git itself writes is let through."""
    if subject.startswith(("fixup! ", "squash! ", "amend! ", "Merge ", 'Revert "')):
        return ""
    if not subject:
        return "a commit needs a subject: one line that says why"
    if len(subject) > MOST_CHARACTERS:
        return f"{len(subject)} characters, at most {MOST_CHARACTERS}: {subject}"
    return ""


def subjects_since(base: str, folder: Path) -> list[str] | None:
    """Return the subjects after `base`, the newest first; None where that history isn't there (a
    shallow clone, an unpacked archive)."""
    done = subprocess.run(
        ["git", "log", "--no-merges", "--format=%s", f"{base}..HEAD"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.splitlines() if done.returncode == 0 else None


def main(arguments: list[str], *, base: str = BASE, folder: Path = ROOT) -> int:
    """0: all subjects are short enough, or there is no history to look at; 1: some are not."""
    if arguments[:1] == ["--message"]:
        subjects = [subject_of(Path(arguments[1]).read_text(encoding="utf-8"))]
    else:
        found = subjects_since(base, folder)
        if found is None:
            print(f"no history since {base[:10]} here: subjects were not looked at")
            return 0
        subjects = found
    wrong = [says for subject in subjects if (says := too_long(subject))]
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
