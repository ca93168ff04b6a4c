"""What the demo found out: the file that it writes, the table that it ends with, the promises."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from sublet_contracts.amounts import format_credits


@dataclass(frozen=True)
class Outcome:
    """The figures of one demo run; the fields are those of demo.json."""

    accuracy_before: float
    accuracy_after: float
    steps_lost: int
    checkpoint_interval_steps: int
    recovery_seconds: float
    detection_seconds: float
    weights_identical: bool
    charged_ucr: int
    lost_work_charged_ucr: int
    lost_work_device_ms: int
    receipts_verified: bool
    receipt_checks: int
    tampered_receipts_refused: bool
    ledger_balanced: bool
    nothing_left_running: bool
    job_state: str
    runner: str
    runner_reason: str
    elapsed_seconds: float

    def broken_promises(self) -> list[str]:
        """Return the promises that did not hold, in words; none if all is well."""
        held = {
            f"the job must succeed (it is {self.job_state})": self.job_state == "succeeded",
            "training must raise the accuracy": self.accuracy_after > self.accuracy_before,
            f"at most one checkpoint interval is lost ({self.checkpoint_interval_steps} steps)": (
                self.steps_lost <= self.checkpoint_interval_steps
            ),
            "the weights equal an undisturbed run's, byte for byte": self.weights_identical,
            "the lost work costs nothing": self.lost_work_charged_ucr == 0,
            "something was lost, and the statement says so": self.lost_work_device_ms > 0,
            "the machine is called lost before its job goes on elsewhere": (
                self.detection_seconds <= self.recovery_seconds
            ),
            "something was charged": self.charged_ucr > 0,
            "the receipts verify offline": self.receipts_verified,
            "a changed byte in the receipts is noticed": self.tampered_receipts_refused,
            "the ledger balances": self.ledger_balanced,
            "nothing is left running": self.nothing_left_running,
        }
        return [promise for promise, kept in held.items() if not kept]

    def write(self, path: Path) -> None:
        """Write demo.json."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    def table(self) -> Table:
        """Return what the demo ends with."""
        table = Table(title="What happened", title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column()
        rows = {
            "accuracy": f"{self.accuracy_before:.3f} before, {self.accuracy_after:.3f} after",
            "steps lost": f"{self.steps_lost} of at most {self.checkpoint_interval_steps}",
            "from kill -9 to the next new step": (
                f"{self.recovery_seconds:.1f} s, of which {self.detection_seconds:.1f} s "
                "were needed to call the machine lost"
            ),
            "weights as an undisturbed run's": _word(self.weights_identical, "identical bytes"),
            "billed": f"{format_credits(self.charged_ucr)} credits ({self.charged_ucr} ucr)",
            "lost work": (
                f"{self.lost_work_device_ms / 1000:.1f} s of device time, "
                f"billed {format_credits(self.lost_work_charged_ucr)}"
            ),
            "receipts": _word(
                self.receipts_verified, f"verified offline, {self.receipt_checks} checks"
            ),
            "one changed byte": _word(self.tampered_receipts_refused, "noticed"),
            "ledger": _word(self.ledger_balanced, "balanced to the micro-credit"),
            "left running": _word(self.nothing_left_running, "nothing"),
            "runner": self.runner + (f" ({self.runner_reason})" if self.runner_reason else ""),
            "took": f"{self.elapsed_seconds:.0f} s",
        }
        for name, value in rows.items():
            table.add_row(name, value)
        return table


def _word(holds: bool, good: str) -> str:
    return f"[green]{good}[/]" if holds else "[bold red]NO[/]"
