"""Clock steps: the wall clocks of the broker's and an agent's machine jump while jobs run.

By ten minutes and by a day, forth and back. No run is given up for
it, nothing is charged that was not computed, and nothing that was computed is left unpaid.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from sublet.demo.local import LocalMarket
from tests.chaos.churn import Say
from tests.chaos.stage import Stage, Work

SHIFTED = Path(__file__).parents[1] / "e2e" / "shifted_clock"
MINUTES_10, DAY = 600, 86_400
STEPS = (
    ("box0", MINUTES_10),
    ("broker", -MINUTES_10),
    ("box0", -MINUTES_10),
    ("broker", MINUTES_10),
    ("box0", DAY),
    ("broker", -DAY),
    ("broker", DAY),
    ("box0", -DAY),
    ("box0", 0),
    ("broker", 0),
)
SLACK_MS = 3_000


class JumpyMarket(LocalMarket):
    """Each process has a wall clock of its own, which is that of this machine plus a file's
    seconds."""

    def clock(self, name: str) -> Path:
        """Return the file with the seconds by which its wall clock is off."""
        return self.root / "clocks" / name

    def within(self, name: str) -> Sequence[str]:
        """See LocalMarket."""
        file = self.clock(name)
        if not file.exists():
            self.step(name, 0)
        paths = os.pathsep.join(filter(None, (str(SHIFTED), os.environ.get("PYTHONPATH"))))
        return ("env", f"PYTHONPATH={paths}", f"SHIFTED_CLOCK_FILE={file}")

    def step(self, name: str, seconds: int) -> None:
        """Set its wall clock to so many seconds off."""
        file = self.clock(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".new")
        aside.write_text(str(seconds))
        aside.replace(file)


class ClockSteps(Stage):
    """One run. `steps`: whose clock is set to how many seconds off, one after the other."""

    def __init__(
        self,
        root: Path,
        seed: int,
        say: Say,
        *,
        steps: Sequence[tuple[str, int]] = STEPS,
        patience: str = "20s",
        work: Work = Work(900),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(root, seed, say, agents=2, work=work, patience=patience)
        self.steps = steps
        self.jumpy = JumpyMarket(self.root / "market", self.broker_arguments)
        self.market = self.jumpy

    def storm(self) -> None:
        """See Stage."""
        began_s = time.monotonic()
        for name in self.names:
            self.train(f"at {name}")
        self.until_durable()
        for whose, seconds in self.steps:
            self.jumpy.step(whose, seconds)
            self.hit(f"{whose.rstrip('0')} {seconds:+} s")
            self.say(f"  {whose}: {seconds:+} s")
            self.goes_on()
        self.all_ended()
        real_ms = 1000 * (time.monotonic() - began_s)
        for job in self.jobs:
            view = job.view()
            self.need(view.recoveries == 0, f"{view.name} was given up for a clock's step")
            run = view.runs[-1]
            least_ms = int(1000 * self.work.pace_s * self.work.steps)
            self.say(f"  {run.cum_device_ms} ms of {least_ms} to {real_ms:.0f}")
            self.need(
                least_ms <= run.cum_device_ms <= real_ms + SLACK_MS,
                f"{view.name}: {run.cum_device_ms} ms are charged; it computed {least_ms} and "
                f"was here for {real_ms:.0f}",
            )
            self.need(run.payable_device_ms == run.cum_device_ms, "computed and not paid")
            for began_ms in (view.started_ms or 0, run.started_ms):
                times = (view.submitted_ms, began_ms, view.ended_ms or 0)
                self.need(list(times) == sorted(times), f"{view.name}: times go back: {times}")
