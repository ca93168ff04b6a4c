"""A command as a list of words, whether it was written as a list or as one string. Pure.

A container runs a program with its arguments; no shell reads the line. So a string is split as a
shell would split it, and refused where it needs a shell for more than that.
"""

import re
import shlex
from collections.abc import Sequence

from sublet.units import UnitError

_SHELL_ONLY = re.compile(r"[();<>|&]+\Z")
_SINGLE_QUOTED = re.compile(r"'[^']*'")


def parse_command(written: str | Sequence[str], name: str) -> tuple[str, ...]:
    """Return the program and its arguments. A list of one that holds a blank counts as a string:
    no program is called like that. Raises UnitError."""
    if isinstance(written, str):
        return _split(written, name)
    words = tuple(str(word) for word in written)
    if len(words) == 1 and re.search(r"[\s;&|<>]", words[0]):
        return _split(words[0], name)
    return words


def _split(line: str, name: str) -> tuple[str, ...]:
    try:
        reader = shlex.shlex(line, posix=True, punctuation_chars=True)
        reader.whitespace_split = True
        reader.commenters = ""
        tokens = list(reader)
        words = tuple(shlex.split(line))
    except ValueError as error:
        raise UnitError(f"{name}: a quote in it is not closed; close it, or give a list") from error
    operators = [token for token in tokens if _SHELL_ONLY.match(token)]
    if not operators and re.search(r"[$`]", _SINGLE_QUOTED.sub("", line)):
        operators = ["$" if "$" in line else "`"]
    if operators:
        raise UnitError(
            f"{name}: {operators[0]!r} is for a shell, and none reads the command; write it as "
            f"sh -c {shlex.quote(line)}"
        )
    return words
