"""Puts the checkpoint helper where a job finds it, in whatever image.

The agent calls `write_helper` and puts the folder on the job's PYTHONPATH. It holds:
- `sublet_ckpt.py`: the helper itself, for `import sublet_ckpt as ckpt`.
- `sublet_frameworks.py`: a line for each framework, for `import sublet_frameworks as frameworks`.
- `sublet/`: for `from sublet import ckpt, frameworks`. PYTHONPATH comes before the image's own
  packages, so this folder would hide an installed sublet; where there is one, it loads that in its
  own place.
"""

import hashlib
import os
from pathlib import Path

from sublet_contracts import ckpt_helper

_STAND_IN = '''\
"""Stands in for sublet inside a job whose image has none; where the image has one, loads that."""

import importlib.machinery
import importlib.util
import os
import sys


def _installed():
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    elsewhere = [p for p in sys.path if os.path.abspath(p or os.curdir) != here]
    spec = importlib.machinery.PathFinder.find_spec("sublet", elsewhere)
    if spec is not None and spec.loader is not None:
        return spec
    # An editable install is known to a finder of its own, not to a folder of sys.path.
    for finder in sys.meta_path:
        if finder is importlib.machinery.PathFinder or not hasattr(finder, "find_spec"):
            continue
        spec = finder.find_spec("sublet", None)
        if spec is not None and spec.loader is not None:
            return spec
    return None


_spec = _installed()
if _spec is None:
    import sublet_ckpt as ckpt
    import sublet_frameworks as frameworks

    sys.modules["sublet.ckpt"] = ckpt
    sys.modules["sublet.frameworks"] = frameworks
else:
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["sublet"] = _module
    _spec.loader.exec_module(_module)
'''


def helper_source() -> bytes:
    """Return the helper's source."""
    return Path(ckpt_helper.__file__).read_bytes()


def frameworks_source() -> bytes:
    """Return the source of the lines for each framework: it isn't imported."""
    return (Path(ckpt_helper.__file__).parent / "ckpt_frameworks.py").read_bytes()


def helper_sha256() -> str:
    """Return the hash of the helper's source."""
    return hashlib.sha256(helper_source()).hexdigest()


def write_helper(directory: Path) -> Path:
    """Write the helper into `directory` (made if absent) and return it, for PYTHONPATH.

    Safe to call again, also while jobs read from it. Files are readable by everybody.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sublet").mkdir(exist_ok=True)
    for folder in (directory, directory / "sublet"):
        folder.chmod(0o755)
    _write(directory / "sublet_ckpt.py", helper_source())
    _write(directory / "sublet_frameworks.py", frameworks_source())
    _write(directory / "sublet" / "__init__.py", _STAND_IN.encode())
    return directory


def _write(path: Path, content: bytes) -> None:
    if path.is_file() and path.read_bytes() == content:
        return
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp.write_bytes(content)
    tmp.chmod(0o644)
    os.replace(tmp, path)
