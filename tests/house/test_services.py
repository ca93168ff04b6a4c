"""A missing service skips, and fails where services are required."""

from __future__ import annotations

import pytest

from tests import services


@pytest.fixture
def nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_missing", lambda service: f"no {service} here")


@pytest.mark.usefixtures("nothing_answers")
def test_absence_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(services.REQUIRE_VARIABLE, raising=False)
    with pytest.raises(pytest.skip.Exception, match="no docker here"):
        services.require("docker")


@pytest.mark.usefixtures("nothing_answers")
def test_absence_fails_where_services_are_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(services.REQUIRE_VARIABLE, "1")
    with pytest.raises(pytest.fail.Exception, match="no docker here"):
        services.require("docker")


def test_an_unset_postgres_is_missing_and_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(services.POSTGRES_VARIABLE, raising=False)
    services._missing.cache_clear()
    reason = services.missing("postgres")
    services._missing.cache_clear()
    assert reason is not None
    assert services.POSTGRES_VARIABLE in reason


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="'dokcer': one of docker, postgres, "):
        services.missing("dokcer")  # type: ignore[arg-type]
