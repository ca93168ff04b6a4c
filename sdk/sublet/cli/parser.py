"""How every command reads its arguments: one parser class, one look of help and errors."""

import argparse
import shutil
from typing import TYPE_CHECKING, Any, NoReturn

from sublet.cli.errors import USAGE, CommandError

if TYPE_CHECKING:
    from sublet.client import Client

AWAY_LIMIT_S = 10.0
"""How long a command asks a broker that doesn't answer, before it says so."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors end in a fix and whose help fits the terminal."""

    def __init__(self, command: str, summary: str, **options: Any) -> None:
        epilog = options.pop("epilog", None)
        super().__init__(
            prog=f"sublet {command}",
            description=summary,
            epilog=epilog,
            formatter_class=_formatter,
            allow_abbrev=False,
            add_help=False,
            **options,
        )
        self.add_argument("-h", "--help", action="help", help="show this")

    def error(self, message: str) -> NoReturn:
        """Raises CommandError with exit code 2."""
        what = message.removeprefix("argument ")
        if what.startswith("the following arguments are required: "):
            what = what.rsplit(": ", 1)[1] + ": missing"
        raise CommandError(what, f"see: {self.prog} --help", USAGE)


def _formatter(prog: str) -> argparse.HelpFormatter:
    columns = min(shutil.get_terminal_size().columns, 100)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=columns - 2)


def with_broker(parser: Parser) -> Parser:
    """Add the options that say who asks whom."""
    group = parser.add_argument_group("connection")
    group.add_argument("--broker", metavar="URL", help="default: $SUBLET_BROKER, or this machine's")
    group.add_argument("--profile", metavar="NAME", help="default: $SUBLET_PROFILE, or `default`")
    return parser


def with_json(parser: Parser, what: str = "one JSON document, for scripts") -> Parser:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help=what)
    return parser


def with_job(parser: Parser) -> Parser:
    """Add the job that a command is about."""
    parser.add_argument("job", metavar="JOB", help="its id, the id's first 8 digits, or its name")
    return parser


def open_client(options: argparse.Namespace, away_limit_s: float | None = None) -> "Client":
    """Return a Client by the options. Raises ConfigError, KeyRefused."""
    from sublet.client import Client

    limit_s = AWAY_LIMIT_S if away_limit_s is None else away_limit_s
    return Client(broker=options.broker, profile=options.profile, away_limit_s=limit_s)
