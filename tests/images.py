"""Images for tests with containers. The engine here need not reach any registry."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

_IMAGES = Path(__file__).parents[1] / "deploy" / "images"


@functools.cache
def base_image() -> str:
    """Return the id (`sha256:...`) of a tiny image with python3; made at first, in a minute."""
    made = _script("base.py").build()
    assert isinstance(made, str)
    return made


@functools.cache
def torch_image() -> str:
    """Return the id of the image of `sublet.finetune`: torch, transformers, peft, as they are
    installed here; made at first, in a minute."""
    made = _script("finetune/build.py").ensure_image()
    assert isinstance(made, str)
    return made


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"sublet_deploy_{Path(name).stem}", _IMAGES / name
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
