"""The market decides from its arguments alone: it can neither read, write, wait, nor draw lots."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MARKET = ROOT / "broker" / "sublet_broker" / "market"

# What a decision may lean on. A new name here is a decision to be defended in review.
ALLOWED_MODULES = {
    "__future__",
    "bisect",
    "collections",
    "dataclasses",
    "enum",
    "fractions",
    "functools",
    "hashlib",
    "heapq",
    "itertools",
    "math",
    "operator",
    "random",
    "re",
    "string",
    "sublet_broker",
    "sublet_contracts",
    "typing",
}
FORBIDDEN_CALLS = {"__import__", "breakpoint", "eval", "exec", "input", "open", "print"}


def impurities(source: str) -> list[str]:
    """Name each import, call and definition in `source` that reaches outside its arguments."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        match node:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), level=0):
                modules = [module]
            case _:
                modules = []
        for module in modules:
            if module.split(".")[0] not in ALLOWED_MODULES:
                found.append(f"line {line}: imports {module}")
            if module.startswith("sublet_broker.") and not module.startswith(
                "sublet_broker.market"
            ):
                found.append(f"line {line}: imports {module}")
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_CALLS:
                found.append(f"line {line}: calls {name}()")
            # `random.Random` is a type for a seeded argument; other names draw from shared state.
            case ast.Attribute(value=ast.Name(id="random"), attr=attribute) if (
                attribute != "Random"
            ):
                found.append(f"line {line}: uses random.{attribute}")
            case ast.ImportFrom(module="random", names=names) if any(
                alias.name != "Random" for alias in names
            ):
                found.append(f"line {line}: imports from random other than Random")
            case ast.Call(func=ast.Attribute(attr="Random") | ast.Name(id="Random"), args=[]):
                found.append(f"line {line}: makes a Random without a seed")
            case ast.AsyncFunctionDef() | ast.Await():
                found.append(f"line {line}: is async")
            case _:
                pass
    return found


def test_no_file_of_the_market_reaches_outside_its_arguments() -> None:
    files = sorted(MARKET.rglob("*.py"))
    assert files, f"{MARKET} is empty"
    found = {
        str(path.relative_to(ROOT)): found
        for path in files
        if (found := impurities(path.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "import os.path",
        "from datetime import datetime",
        "from sublet_broker.adapters import blobs",
        "import random\nrandom.random()",
        "from random import choice",
        "import random\nrng = random.Random()",
        "open('x')",
        "async def f(): ...",
        "def f():\n    import socket",
    ],
)
def test_a_planted_impurity_is_found(source: str) -> None:
    assert impurities(source)


def test_what_the_market_needs_is_allowed() -> None:
    source = "from random import Random\nimport math\nfrom sublet_contracts import rules\nRandom(1)"
    assert impurities(source) == []
