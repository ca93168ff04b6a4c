"""What stands in two places is compared: the API's table, its clients, files named in prose."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path
from typing import Any, cast

import pytest

from sublet_broker.adapters.http.app import build_app
from sublet_broker.adapters.http.problems import Guard
from sublet_contracts import api

ROOT = Path(__file__).resolve().parents[2]
PARAMETER = re.compile(r"\{[^}]*\}")


def _operations() -> set[tuple[str, str]]:
    """Return (method, path) of everything that the broker's OpenAPI document describes."""
    app: Any = cast(Guard, build_app(cast(Any, _NoEdge()), cast(Any, None)))._app
    return {
        (method.upper(), path)
        for path, operations in app.openapi()["paths"].items()
        for method in operations
    }


class _NoEdge:
    """Enough to describe the routes: nothing is called."""

    version = "0"
    metrics = None


def test_the_table_of_the_api_is_whole() -> None:
    """contracts/sublet_contracts/api.py opens with it; OpenAPI is made from the routes."""
    row = re.compile(r"^    (GET|POST|PUT|DELETE) +(/[^ ?]*)", re.MULTILINE)
    table = set(row.findall(api.__doc__ or ""))
    served = _operations()
    assert table == served, (
        f"api.py's docstring lacks {sorted(served - table)} and has {sorted(table - served)} more"
    )


def test_each_endpoint_has_a_client() -> None:
    """Its path stands in the SDK or in the agent."""
    paths = {
        path
        for folder in ("sdk/sublet", "provider_agent/sublet_agent")
        for file in (ROOT / folder).rglob("*.py")
        for path in _paths_in(file)
    }
    for method, path in sorted(_operations()):
        if path.startswith("/v1/"):
            plain = PARAMETER.sub("{}", path)
            assert plain in paths or plain.removeprefix("/v1/jobs/{}") in paths, (
                f"nobody calls {method} {path}: add it to sdk/sublet/client.py"
            )


def _paths_in(file: Path) -> set[str]:
    """Return the paths that a file's strings name, with {} for what is put in; those of one job may
    begin after the job."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        text = ""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        elif isinstance(node, ast.JoinedStr):
            text = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
            )
        if text.startswith("/"):
            found.add(text.partition("?")[0])
    return found


def _files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.split()


INSTALLED = ("sublet_ckpt.py", "sublet_frameworks.py")
"""Files that exist only where a job runs."""


def test_files_that_prose_names_exist() -> None:
    """Docstrings and comments name files; who moves one is told where it was named."""
    files = _files()
    named = re.compile(r"(?<![\w/.<>{}-])((?:[a-z_]+/)*[a-z_0-9]+\.py)\b")
    stale = []
    for file in files:
        path = ROOT / file
        if path.suffix != ".py" or not path.is_file():
            continue
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            prose = token.type == tokenize.COMMENT or token.string.startswith('"""')
            for name in named.findall(token.string) if prose else ():
                if name not in INSTALLED and not any(f"/{f}".endswith(f"/{name}") for f in files):
                    stale.append(f"{file}:{token.start[0]}: {name}")
    assert not stale
