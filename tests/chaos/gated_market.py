"""A local market whose processes stop at the gate before each durable write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from sublet.demo.local import LocalMarket
from sublet_agent.adapters.process.runner import WITNESS

GATE = Path(__file__).with_name("gate")
WAL_PAGES = "60"
"""SQLite moves its log into the database after so many pages instead of 1000: it's to be met."""


class GatedMarket(LocalMarket):
    """Its processes stop at the gate before each durable write, and are started again."""

    gate = ""
    before_stop: Callable[[], None] | None = None

    def stop(self) -> None:
        """See LocalMarket."""
        if self.before_stop is not None:
            self.before_stop()
        super().stop()

    @property
    def environment(self) -> dict[str, str]:
        """See LocalMarket; with the gate."""
        paths = [str(GATE), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **super().environment,
            "PYTHONPATH": os.pathsep.join(paths),
            "SUBLET_GATE": self.gate,
            WITNESS: "off",  # strace traces the job's own process, and two can't
            "SUBLET_GATE_WAL_PAGES": WAL_PAGES,
        }
