"""`sublet init`: writes a sublet.yaml for a folder that it has looked at."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sublet.cli.errors import SUCCEEDED, CommandError
from sublet.cli.parser import Parser
from sublet.job_file import FILE_NAME, schema
from sublet.terminal.text import paint


def init(argv: Sequence[str]) -> int:
    """Write the file."""
    parser = Parser("init", "Write a sublet.yaml for a folder, to be run by `sublet run -f`.")
    parser.add_argument("folder", nargs="?", default=".", metavar="DIR", help="default: here")
    parser.add_argument("--force", action="store_true", help="over one that is there")
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON schema of such files instead"
    )
    options = parser.parse_args(argv)
    if options.schema:
        print(json.dumps(schema(), indent=2))
        return SUCCEEDED
    folder = Path(options.folder).expanduser()
    if not folder.is_dir():
        raise CommandError(
            f"{folder}: there is no such folder", "name the one that holds your code"
        )
    from sublet.job_file_draft import draft

    path = folder / FILE_NAME
    text = draft(folder).text()
    try:
        with path.open("w" if options.force else "x") as file:
            file.write(text)
    except FileExistsError as error:
        raise CommandError(f"{path} is there already", "add --force to write over it") from error
    print(text, end="")
    said = f"Written to {path}. Look at image, command and price, then: sublet run -f {path}"
    print(paint(said, "dim", sys.stderr), file=sys.stderr)
    return SUCCEEDED
