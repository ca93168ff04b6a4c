"""Errors as people and scripts see them: what is wrong, what to do, and an exit code."""

import json
import sys
from collections.abc import Callable

SUCCEEDED, ERROR, USAGE = 0, 1, 2
FAILED, UNFINISHED, NOT_FOUND, CANCELLED = 100, 101, 102, 103


class CommandError(Exception):
    """A command can't go on: `what` is wrong, its field first; `fix` says what to do."""

    def __init__(self, what: str, fix: str = "", code: int = ERROR) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix
        self.code = code


def exit_code(state: str) -> int:
    """Return the exit code that stands for a job's state."""
    known = {"succeeded": SUCCEEDED, "failed": FAILED, "cancelled": CANCELLED}
    return known.get(state, UNFINISHED)


def guarded(command: Callable[[], int], *, as_json: bool) -> int:
    """Run a command; say its expected errors on stderr and return the code they stand for."""
    try:
        return command()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return UNFINISHED
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Nothing more may be written, not even at exit.
        sys.stdout = None
        return SUCCEEDED
    except CommandError as error:
        say(error, as_json=as_json)
        return error.code
    except Exception as error:
        known = expected(error)
        if known is None:
            raise
        say(known, as_json=as_json)
        return known.code


def say(error: CommandError, *, as_json: bool = False) -> None:
    """Print an error to stderr."""
    if as_json:
        print(
            json.dumps({"error": error.what, "fix": error.fix, "code": error.code}),
            file=sys.stderr,
        )
        return
    from sublet.terminal.text import paint, safe

    print(paint("error:", "red", sys.stderr), safe(error.what), file=sys.stderr)
    if error.fix:
        print(paint("  fix:", "green", sys.stderr), safe(error.fix), file=sys.stderr)


def expected(error: Exception) -> CommandError | None:
    """Return an expected error in this shape; None for a fault of this program."""
    # Imported here: by now whatever raised it has been imported anyway.
    from sublet.config import ConfigError
    from sublet.errors import JobFileError, SubletError
    from sublet.options import OPTIONS
    from sublet.transfers import InputError, TargetError
    from sublet.units import UnitError
    from sublet_contracts.documents import DocumentRefused
    from sublet_contracts.keys import KeyRefused
    from sublet_contracts.problems import ProblemCode
    from sublet_contracts.tree import TreeRefused

    if isinstance(error, SubletError):
        problem = error.problem
        option = _option(problem.field)
        detail = problem.detail
        if option not in ("", problem.field, *_OF_COMMANDS.values()):
            # The field's name is no word of people's.
            detail = detail.replace(problem.field, option)
        field = f"{option}: " if option and not detail.startswith(option) else ""
        missing = problem.code == ProblemCode.NOT_FOUND
        return CommandError(field + detail, error.fix, NOT_FOUND if missing else ERROR)
    if isinstance(error, UnitError):
        what, _, fix = str(error).partition("; ")
        field, colon, rest = what.partition(":")
        code = USAGE if field in OPTIONS and OPTIONS[field].flag else ERROR
        return CommandError(_option(field) + colon + rest, fix, code)
    if isinstance(
        error,
        InputError
        | TargetError
        | JobFileError
        | ConfigError
        | KeyRefused
        | TreeRefused
        | DocumentRefused,
    ):
        what, _, fix = str(error).rpartition("; ")
        return CommandError(what or fix, fix if what else "")
    if isinstance(error, OSError) and error.filename is not None:
        return CommandError(f"{error.filename}: {error.strerror}", "check the path and its rights")
    return None


def _option(field: str) -> str:
    """Return the option that a document's field comes from; the field itself where none is."""
    from sublet.options import OPTIONS, option_of_field

    option = OPTIONS.get(field) or option_of_field(field)
    if option is not None and option.flag:
        return option.flag
    return _OF_COMMANDS.get(field, field)


_OF_COMMANDS = {"state": "--state", "limit": "--limit", "run": "--run", "tail": "--tail"}
"""What a broker refuses of what a command asks for, and the option that it comes from."""
