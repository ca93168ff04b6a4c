"""The agent's live picture: a Status as a few lines that fit the terminal. Draws nothing itself."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from sublet_agent.core.run_phases import RunPhase
from sublet_agent.core.status import DeviceStatus, HeldRun, Status
from sublet_contracts.amounts import format_credits, format_duration

LABEL_COLUMNS = 10
MAX_DEVICE_LINES = 4
"""beyond so many, devices are counted by kind instead of shown one by one"""
_JOB_COLUMNS = 8
_DEVICE_COLUMNS = 12
_MIN_NAME_COLUMNS = 6
_MAX_NAME_COLUMNS = 24
_STYLES = {
    RunPhase.RUNNING: "green",
    RunPhase.DRAINING: "yellow",
    RunPhase.FINISHING: "yellow",
    RunPhase.ENDED: "dim",
}


def status_lines(status: Status, *, width: int, height: int, live: bool = True) -> list[Text]:
    """Return the lines to show on a terminal of `width` columns and `height` rows.

    `live`: they are drawn again and again below other lines, by the agent itself.
    """
    if status.stopped:
        return [_line("agent", "has ended; the devices are free")]
    found = [_rule(status, width) if live else _who(status), _link(status), *_market(status)]
    # A line stays free for what is written above, and one for the cursor.
    found += _table(status, width, max(1, height - len(found) - 4))
    found.append(_earned(status, live))
    for line in found:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return found


def safe(text: str) -> str:
    """Return a stranger's text without what could move the cursor or change colours."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _rule(status: Status, width: int) -> Text:
    name = Text.assemble((f" {safe(status.name)} ", "bold"))
    name.truncate(max(1, width - 4), overflow="ellipsis")
    return Text.assemble(("──", "dim"), name, ("─" * (width - 2 - name.cell_len), "dim"))


def _who(status: Status) -> Text:
    return _line("provider", (safe(status.name), "bold"), f"  {status.provider}")


def _head(word: str) -> Text:
    return Text(word.ljust(LABEL_COLUMNS), style="dim", end="")


def _line(word: str, *parts: str | tuple[str, str]) -> Text:
    return Text.assemble(_head(word), *parts)


def _link(status: Status) -> Text:
    lasted = format_duration(status.now_ms - status.since_ms)
    if status.connected:
        return _line("broker", status.broker, ("  connected ", "green"), f"for {lasted}")
    return _line("broker", status.broker, (f"  {status.link} ", "yellow"), f"for {lasted}")


def _market(status: Status) -> list[Text]:
    if not status.connected and status.trouble:
        trouble = [_line("", (safe(status.trouble), "yellow"))]
    else:
        trouble = []
    if not status.devices:
        return [*trouble, _line("offers", "nothing (--devices none); what runs goes on")]
    price = f"{format_credits(status.price_ucr_per_device_hour)} credits per device-hour"
    if status.net_ucr_per_device_hour is not None:
        price += f", {format_credits(status.net_ucr_per_device_hour)} after the fee"
    head = _line("offers", price, ("  ", ""), (f"runner {status.runner}", "dim"))
    if status.draining:
        says = (
            "drains: no new jobs; the agent ends when all is handed back"
            if status.stopping
            else "nothing, by `reclaim`; `sublet provider offer` offers again"
        )
        head = _line("offers", (says, "yellow"))
    elif status.set_aside:
        says = f"nothing until a start test passes: {safe(status.set_aside)}"
        head = _line("offers", (says, "yellow"))
    elif status.engine_trouble:
        says = f"nothing while the engine is silent: {safe(status.engine_trouble)}"
        head = _line("offers", (says, "yellow"))
    trouble += [_line("", (f"waits for {safe(line)}", "yellow")) for line in status.waits_for[:4]]
    return [*trouble, head, *_devices(status)]


def _devices(status: Status) -> list[Text]:
    if len(status.devices) <= MAX_DEVICE_LINES:
        names = {run.lease: run for run in status.runs}
        return [_device(device, names.get(device.lease or ""), status) for device in status.devices]
    kinds: dict[tuple[str, int], list[DeviceStatus]] = {}
    for device in status.devices:
        kinds.setdefault((device.name, device.memory_bytes), []).append(device)
    gone = [device for device in status.devices if device.trouble]
    found = []
    for (name, memory_bytes), devices in kinds.items():
        free = sum(device.lease is None and not device.trouble for device in devices)
        found.append(
            _line("", f"{len(devices)} x {safe(name)}, {_memory(memory_bytes)}, {free} free")
        )
    for device in gone[:MAX_DEVICE_LINES]:
        found.append(_line("", f"{device.id[:_DEVICE_COLUMNS]}  ", (safe(device.trouble), "red")))
    return found


def _device(device: DeviceStatus, run: HeldRun | None, status: Status) -> Text:
    state = ("not offered", "dim") if status.draining else ("free", "cyan")
    if device.lease is not None:
        state = (f"leased to {run.job[:_JOB_COLUMNS]}" if run else "leased", "green")
    if device.trouble:
        state = (f"not offered: {safe(device.trouble)}", "red")
    words = " ".join(safe(device.name).split())
    if len(words) > 36:
        words = words[:35] + "…"
    return _line(
        "", f"{device.id[:_DEVICE_COLUMNS]}  ", f"{words}, {_memory(device.memory_bytes)}  ", state
    )


def _memory(count_bytes: int) -> str:
    return f"{count_bytes / 2**30:.0f} GiB" if count_bytes else "memory unknown"


def _earned(status: Status, live: bool) -> Text:
    many = "lease" if status.settled_leases == 1 else "leases"
    return _line(
        "earned",
        (format_credits(status.earned_ucr), "bold"),
        f" credits in all, {status.settled_leases} {many} settled",
        (_hint(status) if live else "", "dim"),
    )


def _hint(status: Status) -> str:
    return "   Ctrl-C: leave now" if status.stopping else "   Ctrl-C: drain and stop"


# -- the runs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    head: str
    cells: Sequence[str]
    right: bool = False

    @property
    def width(self) -> int:
        return max(len(text) for text in (self.head, *self.cells))

    def cell(self, text: str) -> str:
        return text.rjust(self.width) if self.right else text.ljust(self.width)


def _table(status: Status, width: int, most: int) -> list[Text]:
    if not status.runs:
        return [_line("runs", "none")]
    # What still runs is above what only waits for its settlement.
    runs = sorted(status.runs, key=lambda run: run.phase is RunPhase.ENDED)[:most]
    left = [_Column("job", [run.job[:_JOB_COLUMNS] for run in runs])]
    right = [
        _Column("phase", [run.phase.value for run in runs]),
        _Column("step", [_step(run) for run in runs], right=True),
        _Column("durable", [str(run.durable_step) for run in runs], right=True),
        _Column("time", [format_duration(run.cum_device_ms) for run in runs], right=True),
        _Column("earned", [format_credits(run.earned_ucr) for run in runs], right=True),
    ]
    room = _room(width, [*left, *right])
    for unneeded in ("durable", "time"):
        if room < _MIN_NAME_COLUMNS:
            right = [column for column in right if column.head != unneeded]
            room = _room(width, [*left, *right])
    if room >= _MIN_NAME_COLUMNS:
        most_name = min(room, _MAX_NAME_COLUMNS)
        left.append(_Column("name", [_clip(safe(run.name), most_name) for run in runs]))
    columns = [*left, *right]
    heads = "  ".join(column.cell(column.head) for column in columns)
    found = [_line("runs", (heads, "dim"))]
    for row, run in enumerate(runs):
        line = _line("")
        for column in columns:
            style = _STYLES.get(run.phase, "cyan") if column.head == "phase" else ""
            line.append(column.cell(column.cells[row]), style=style)
            line.append("  ")
        line.rstrip()
        found.append(line)
    if len(runs) < len(status.runs):
        found.append(_line("", (f"and {len(status.runs) - len(runs)} more", "dim")))
    return found


def _room(width: int, columns: Sequence[_Column]) -> int:
    """Columns that are left for the name of the job."""
    return width - LABEL_COLUMNS - sum(column.width + 2 for column in columns) - 2


def _step(run: HeldRun) -> str:
    return f"{run.step}/{run.total_steps}" if run.total_steps else str(run.step)


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
