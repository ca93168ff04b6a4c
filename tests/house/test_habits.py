"""What a developer's machine and CI run is one thing, and no hook fetches anything."""

from __future__ import annotations

from typing import Any

import yaml

from tests.house.floors import ROOT

CONFIG = ROOT / ".pre-commit-config.yaml"


def hooks() -> list[dict[str, Any]]:
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    assert set(config["default_install_hook_types"]) == {"pre-commit", "commit-msg"}
    return [hook for repository in config["repos"] for hook in repository["hooks"]]


def test_hooks_are_local_and_run_what_make_check_runs() -> None:
    assert "://" not in CONFIG.read_text(encoding="utf-8")
    entries = {hook["entry"]: hook for hook in hooks()}
    assert all(hook["language"] == "system" for hook in entries.values())
    assert entries["make check"]["stages"] == ["pre-commit"]
    assert entries[".venv/bin/python -m tests.house.subjects --message"]["stages"] == ["commit-msg"]


def test_make_check_looks_at_code_and_at_commit_subjects() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    check = makefile.split("\ncheck:", 1)[1].split("\n\n", 1)[0]
    for step in ("ruff check", "ruff format", "-m mypy", "lint-imports", "tests.house.subjects"):
        assert step in check


def test_ci_runs_the_check_the_tests_and_a_sample_of_the_long_ones_with_all_services() -> None:
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    wanted = [
        "SUBLET_REQUIRE_SERVICES=1",
        " make check\n",
        " make test\n",
        " make test-slow PART=",
        " make mutants PART=",
    ]
    places = [steps.find(text) for text in wanted]
    assert -1 not in places
    assert places == sorted(places)
