"""What the demo shows: a terminal's screen that changes, plain lines where there is none."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sublet_contracts.amounts import format_credits

BLOCKS = "▁▂▃▄▅▆▇█"
STATE_STYLES = {
    "running": "green",
    "succeeded": "bold green",
    "recovering": "bold yellow",
    "starting": "cyan",
    "queued": "cyan",
    "failed": "bold red",
    "killed": "bold red",
    "idle": "dim",
}


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Return the newest `width` values as a line of blocks."""
    shown = list(values)[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    return "".join(BLOCKS[round((value - low) / span * (len(BLOCKS) - 1))] for value in shown)


@dataclass
class ProviderRow:
    """A provider as the demo shows it."""

    name: str
    device: str
    price_ucr_per_device_hour: int
    state: str = "idle"


@dataclass
class ScreenState:
    """All that is on the screen."""

    title: str
    runner: str
    providers: dict[str, ProviderRow] = field(default_factory=dict)
    job_state: str = ""
    step: int = 0
    total_steps: int = 0
    losses: list[float] = field(default_factory=list)
    durable_steps: list[int] = field(default_factory=list)
    charge_ucr: int = 0
    budget_ucr: int = 0
    lost_work: str = "nothing lost"
    events: list[tuple[float, str]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        """Return the seconds since the beginning."""
        return time.monotonic() - self.started


def render(state: ScreenState) -> RenderableType:
    """Return what the screen shows."""
    market = Table(box=None, expand=True, pad_edge=False)
    for heading in ("provider", "device", "price/h", "state"):
        market.add_column(heading, style="bold" if heading == "provider" else "")
    for row in state.providers.values():
        market.add_row(
            row.name,
            row.device,
            format_credits(row.price_ucr_per_device_hour),
            Text(row.state, style=STATE_STYLES.get(row.state, "")),
        )
    job = Table.grid(padding=(0, 2), expand=True)
    job.add_column(style="dim", width=11)
    job.add_column()
    job.add_row("state", Text(state.job_state, style=STATE_STYLES.get(state.job_state, "")))
    bar = ProgressBar(total=max(state.total_steps, 1), completed=state.step, width=40)
    job.add_row("step", Group(bar, f"{state.step} of {state.total_steps or '?'}"))
    if state.losses:
        job.add_row("loss", f"{sparkline(state.losses)}  {state.losses[-1]:.3f}")
    durable = " ".join(str(step) for step in state.durable_steps[-8:]) or "none yet"
    job.add_row("durable at", durable)
    job.add_row(
        "cost", f"{format_credits(state.charge_ucr)} of at most {format_credits(state.budget_ucr)}"
    )
    job.add_row("lost work", state.lost_work)
    events = Text()
    for at, event in state.events[-9:]:
        events.append(f"{at:6.1f} s  ", style="dim")
        events.append(event + "\n")
    events.rstrip()
    return Group(
        Panel(market, title="market", title_align="left", border_style="blue"),
        Panel(job, title=state.title, title_align="left", border_style="blue"),
        Panel(events, title="what happens", title_align="left", border_style="blue"),
    )


class Screen:
    """Shows a state as it changes, between entering and leaving."""

    def __init__(self, state: ScreenState, console: Console) -> None:
        self.state = state
        self.console = console
        self._live = (
            Live(get_renderable=self._rendered, console=console, refresh_per_second=4)
            if console.is_terminal
            else None
        )

    def _rendered(self) -> RenderableType:
        return render(self.state)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, event: str) -> None:
        """Add a line to what has happened (where there is no terminal: print it)."""
        at = self.state.elapsed()
        self.state.events.append((at, event))
        if self._live is None:
            self.console.print(f"{at:6.1f} s  {event}", highlight=False, soft_wrap=True)
