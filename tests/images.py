"""Images for tests with containers. The engine here need not reach any registry."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

_SCRIPT = Path(__file__).parents[1] / "deploy" / "images" / "base.py"


@functools.cache
def base_image() -> str:
    """Return the id (`sha256:...`) of a tiny image with python3; made at first, in a minute."""
    made = _script().build()
    assert isinstance(made, str)
    return made


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sublet_deploy_base", _SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
