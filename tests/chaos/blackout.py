"""A broker blackout: the broker is gone for minutes, and the agents compute on.

It is killed with -9, or stands still (SIGSTOP, as a machine that is suspended), for much longer
than the jobs' patience. When it's back no run is given up; what was computed, printed and used in
the dark arrives, and no disk has filled up with it.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.chaos.churn import Say
from tests.chaos.stage import Stage, Work

FOLDER_LIMIT_BYTES = 64 * 1024 * 1024
"""An agent's folder at most: journal, log, and the last checkpoints of one run."""
CHECKPOINTS_LIMIT = 5
"""More of a run's checkpoints on its machine than when it went dark: the last three, and those that
are being made or let go of."""
LONG_MINUTES = 3.0
PULSE_S = 1.0


class Blackout(Stage):
    """One run. `still`: the broker is stopped, not killed."""

    def __init__(
        self,
        root: Path,
        seed: int,
        say: Say,
        *,
        minutes: float = 15.0,
        patience: str = "20s",
        still: bool = False,
        after_s: float = 20.0,
    ) -> None:
        self.dark_s = 60.0 * minutes
        pace_s = 0.5 if minutes >= LONG_MINUTES else 0.1
        # It has still to compute when the broker is back.
        work = Work(int((self.dark_s + after_s) / pace_s), pace_s)
        super().__init__(root, seed, say, agents=2, work=work, patience=patience)
        self.still = still

    def storm(self) -> None:
        """See Stage."""
        self.train("through")
        # This one ends in the dark; its end, outputs and last receipt have to wait.
        within = Work(max(20, int(0.5 * self.dark_s / self.work.pace_s)), self.work.pace_s)
        self.train("within", within)
        self.until_durable()
        broker = self.market.broker
        assert broker is not None
        if self.still:
            broker.signal(signal.SIGSTOP)
            self.hit("stood still")
        else:
            broker.kill()
            self.hit("blackout by kill -9")
        before = self._steps()
        self._dark()
        computed = self._steps() - before
        if self.still:
            broker.signal(signal.SIGCONT)
        else:
            self.restart_broker()
        self.say(f"  {computed} steps in the dark; the broker is back")
        self.facts.notes |= {"dark_s": self.dark_s, "steps in the dark": computed}
        self.need(computed > 0, "nothing was computed in the dark")
        self.connected(len(self.names))

    def _dark(self) -> None:
        """Wait it out; watch what the agents keep meanwhile."""
        end = time.monotonic() + self.dark_s
        most_bytes = most_checkpoints = 0
        under_way = max(len(self._checkpoints(name)) for name in self.names)
        told = time.monotonic()
        while (now := time.monotonic()) < end:
            time.sleep(min(PULSE_S, end - now))  # the fault itself
            for name in self.names:
                root = self.market.root / name
                sizes = []
                for path in root.rglob("*"):
                    try:
                        sizes.append(path.stat().st_size)
                    except FileNotFoundError:
                        continue  # Deleted while we looked.
                most_bytes = max(most_bytes, sum(sizes))
                most_checkpoints = max(most_checkpoints, len(self._checkpoints(name)))
            if now - told > 60:
                told = now
                self.say(f"  {end - now:.0f} s to go; {most_bytes} bytes at an agent at most")
        self.facts.notes |= {
            "agent's folder, most bytes": most_bytes,
            "checkpoints kept, most": most_checkpoints,
        }
        self.need(most_bytes < FOLDER_LIMIT_BYTES, f"an agent's folder grew to {most_bytes} bytes")
        self.need(
            most_checkpoints <= under_way + CHECKPOINTS_LIMIT,
            f"{most_checkpoints} checkpoints piled up, from {under_way}",
        )

    def _checkpoints(self, name: str) -> list[Path]:
        root = self.market.root / name
        return [path for path in root.glob("runs/*/checkpoint/out/step-*") if path.is_dir()]

    def _steps(self) -> int:
        return sum(self.market.last_step(name) for name in self.names)

    def all_ended(self, limit_s: float = 300.0) -> None:
        """See Stage; and nobody was given up, and every second is on the bill."""
        super().all_ended(limit_s)
        for job in self.jobs:
            view = job.view()
            self.need(len(view.runs) == 1, f"{view.name} has {len(view.runs)} runs")
            least_ms = int(1000 * self.work.pace_s * view.total_steps)
            run = view.runs[0]
            self.need(
                run.cum_device_ms >= least_ms and run.payable_device_ms == run.cum_device_ms,
                f"{view.name}: {run.payable_device_ms} ms are paid, it computed {least_ms}",
            )
