"""Shifts the wall clock of this Python by the seconds that SHIFTED_CLOCK_FILE holds.

Python imports it at its start when this folder is on PYTHONPATH. The monotonic clock stays.
"""

import os
import time
from pathlib import Path

_file = Path(os.environ["SHIFTED_CLOCK_FILE"])
_time, _time_ns = time.time, time.time_ns


def _shift_s() -> int:
    return int(_file.read_text() or "0")


time.time = lambda: _time() + _shift_s()
time.time_ns = lambda: _time_ns() + _shift_s() * 1_000_000_000
