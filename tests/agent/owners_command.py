"""`sublet provider ...` within the tests' own process: an interpreter less for each look."""

import contextlib
import io
from dataclasses import dataclass

from sublet_agent.main import provider_main


@dataclass(frozen=True)
class Answer:
    """What the command printed, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


def provider(*arguments: str) -> Answer:
    """Run it and return what it said. It reads no more of the environment than `--state` names."""
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        code = provider_main(arguments)
    return Answer(code, said.getvalue(), complained.getvalue())
