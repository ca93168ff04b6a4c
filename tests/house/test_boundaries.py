"""market/ and service/ speak codes with facts: no command, no option, no HTTP status; and each code
is known wherever it must be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sublet.fixes import FIXES as RENTERS_FIXES
from sublet.fixes import fix_of
from sublet.terminal.next_steps import NEXT_STEPS
from sublet_agent.core.fixes import FIXES as OWNERS_FIXES
from sublet_broker.adapters.http.problems import STATUS
from sublet_contracts.api import NextStep, Problem
from sublet_contracts.problems import PROBLEMS, ProblemCode
from sublet_contracts.requirements import Constraint, Shortfall
from sublet_contracts.session import SessionCode

BROKER = Path(__file__).parents[2] / "broker" / "sublet_broker"
INSIDE = sorted(path for room in ("market", "service") for path in (BROKER / room).rglob("*.py"))
EVERYWHERE = sorted(BROKER.rglob("*.py"))

COMMAND = re.compile(r"\bsublet [a-z]")
OPTION = re.compile(r"(?<![\w-])--[a-z]")
STATUS_NAMES = re.compile(r"^http(\.|$)|^starlette|^fastapi|^httpx")


def named(path: Path) -> str:
    return str(path.relative_to(BROKER))


def trees(paths: list[Path]) -> Iterator[tuple[str, ast.Module]]:
    for path in paths:
        yield named(path), ast.parse(path.read_text())


def texts_of(tree: ast.AST) -> Iterator[ast.Constant]:
    """Yield the string literals that are no docstrings; of f-strings, their literal parts."""
    unsaid = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in unsaid:
            yield node


def refusals_in(tree: ast.AST) -> Iterator[ast.Call]:
    """Yield each call that makes a Refusal: by its name, or by a subclass through super()."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (
            ast.unparse(node.func) == "Refusal"
            or (
                ast.unparse(node.func) == "super().__init__"
                and node.args
                and ast.unparse(node.args[0]).startswith("ProblemCode.")
            )
        ):
            yield node


def test_no_command_and_no_option_is_spoken() -> None:
    for name, tree in trees(INSIDE):
        for literal in texts_of(tree):
            where = f"{name}:{literal.lineno}: {literal.value!r}"
            assert not COMMAND.search(literal.value), f"{where}: a command; return a code"
            assert not OPTION.search(literal.value), f"{where}: an option; return a code"


def test_no_http_status_is_known() -> None:
    statuses = set(STATUS.values())
    for name, tree in trees(INSIDE):
        for node in ast.walk(tree):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            for module in modules:
                assert not STATUS_NAMES.search(module), f"{name}: imports {module}"
        for call in refusals_in(tree):
            for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
                is_status = isinstance(argument, ast.Constant) and argument.value in statuses
                assert not is_status, (
                    f"{name}:{call.lineno}: {ast.unparse(argument)} is HTTP's; "
                    "adapters/http/problems.py maps the code"
                )


def test_a_refusal_carries_the_facts_of_its_code() -> None:
    for name, tree in trees(EVERYWHERE):
        for call in refusals_in(tree):
            where = f"{name}:{call.lineno}"
            code = ast.unparse(call.args[0])
            assert re.fullmatch(r"ProblemCode\.[A-Z_]+", code), f"{where}: {code} is no ProblemCode"
            facts = {keyword.arg for keyword in call.keywords} - {"field"}
            listed = set(PROBLEMS[ProblemCode[code.removeprefix("ProblemCode.")]].facts)
            assert facts == listed, f"{where}: it gives {facts}, problems.py lists {listed}"


def test_every_code_is_answered_with_and_nothing_else() -> None:
    used = {
        ast.unparse(call.args[0]).removeprefix("ProblemCode.")
        for _, tree in trees(EVERYWHERE)
        for call in refusals_in(tree)
    }
    assert used == {code.name for code in ProblemCode}


def test_every_code_has_its_kind_its_status_and_its_fix() -> None:
    assert set(PROBLEMS) == set(ProblemCode), "contracts/sublet_contracts/problems.py: PROBLEMS"
    assert set(STATUS) == set(ProblemCode), "broker: adapters/http/problems.py: STATUS"
    assert set(RENTERS_FIXES) == set(ProblemCode), "sdk/sublet/fixes.py: FIXES"
    assert set(SessionCode) <= set(OWNERS_FIXES), "provider_agent: core/fixes.py: FIXES"
    assert set(NEXT_STEPS) == set(NextStep), "sdk/sublet/terminal/next_steps.py: NEXT_STEPS"


def test_a_facts_name_has_its_unit() -> None:
    units = ("_bytes", "_ms", "_ucr")
    numbers = {"jobs", "limit", "considered", "open_streams", "waiting", "epoch", "current_epoch"}
    for kind in PROBLEMS.values():
        for name, of in kind.facts.items():
            assert of in (int, str, list, dict)
            assert of is not int or name.endswith(units) or name in numbers, name
            assert name not in ("code", "detail", "field"), "those are a Refusal's own arguments"


PRICE = Shortfall(Constraint.PRICE, 450_000, 400_000)
SAMPLES: dict[type, object] = {int: 86_400_000, str: "job", list: [PRICE.as_json()], dict: {}}


def problem_of(code: ProblemCode) -> Problem:
    facts = {name: SAMPLES[kind] for name, kind in PROBLEMS[code].facts.items()}
    return Problem.model_validate(
        {"title": "t", "status": STATUS[code], "detail": "d", "code": code, "facts": facts}
    )


@pytest.mark.parametrize("code", PROBLEMS)
def test_a_fix_is_made_from_the_facts_that_its_code_carries(code: ProblemCode) -> None:
    problem = problem_of(code)
    fix = RENTERS_FIXES[code](problem)
    assert fix == fix_of(problem)
    assert fix
    assert "_ucr" not in fix


@pytest.mark.parametrize("code", [code for code, kind in PROBLEMS.items() if kind.facts])
def test_a_fix_needs_no_fact_to_be_there(code: ProblemCode) -> None:
    """A broker of another version may send fewer facts, or others; its detail stands for itself."""
    bare = problem_of(code).model_copy(update={"facts": {}})
    assert isinstance(fix_of(bare), str)
    odd = {name: [{"a": None}] for name in PROBLEMS[code].facts}
    assert isinstance(fix_of(bare.model_copy(update={"facts": odd})), str)


def test_a_code_that_only_a_newer_broker_knows_gets_no_fix() -> None:
    newer = problem_of(ProblemCode.BUSY).model_copy(update={"code": "too_hot"})
    assert fix_of(newer) == ""


@pytest.mark.parametrize(
    ("room", "most"),
    [
        ("broker/sublet_broker/service", 12),
        ("broker/sublet_broker/adapters", 10),
        ("provider_agent/sublet_agent/adapters", 10),
    ],
)
def test_a_room_holds_what_can_be_seen_at_a_glance(room: str, most: int) -> None:
    entries = {
        path.stem
        for path in (BROKER.parents[1] / room).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    } - {"__init__"}
    assert len(entries) <= most, sorted(entries)
