"""Builds tests' stand-in for the NVIDIA driver's library, for whole processes to load."""

import os
import subprocess
from pathlib import Path

from tests.agent.test_nvml import STUB
from tests.services import require


def build(folder: Path) -> dict[str, str]:
    """Build it into `folder`; return the environment in which a process finds three GPUs."""
    require("cc")
    source = folder / "stub.c"
    source.write_text(STUB)
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, source], check=True)
    before = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": f"{folder}:{before}" if before else str(folder)}
