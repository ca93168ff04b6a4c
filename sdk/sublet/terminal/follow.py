"""Following a job: what it does, in text and figures, until it ends.

On a terminal its status stays at the bottom while the job's output scrolls above it; elsewhere
plain lines (the job's output on stdout, notes about it on stderr). Receipts are checked and signed
meanwhile. The broker may be away for minutes: the job needs neither it nor this process.
"""

import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from sublet.cosign import Cosigned
from sublet.errors import BrokerAway, SubletError
from sublet.terminal.cadence_text import cadence_of, most_lost_text
from sublet.terminal.detaching import detached_text, not_known
from sublet.terminal.next_steps import status_text
from sublet.terminal.output import Output
from sublet.terminal.text import clip, safe
from sublet.terminal.uploads import upload_text
from sublet.terminal.warning_text import warning_marks, warning_text_of
from sublet_contracts.amounts import format_credits, format_duration
from sublet_contracts.api import JobLogLine, JobView, RunView, WarningView
from sublet_contracts.job_warnings import warning_mark
from sublet_contracts.keys import short
from sublet_contracts.reasons import MEANINGS, Fault, Next
from sublet_contracts.states import JOB, JobState, RunState, is_terminal

if TYPE_CHECKING:
    from rich.console import RenderableType

POLL_S = 0.5
SIGN_EVERY_S = 2.0
LAST_LINES_S = 3.0
AWAY_S = 2.0
_SPARKS = "▁▂▃▄▅▆▇█"


class FollowedJob(Protocol):
    """What following asks of a job; sublet.Job has it. (The client knows this module, so this
    module doesn't know the client.)"""

    id: str

    @property
    def client(self) -> "FollowingClient":
        """The client that it was asked from."""

    def view(self) -> JobView:
        """Ask the broker how it is."""

    def cosign(self) -> Cosigned:
        """Sign the receipts that add up."""

    def logs(self, *, follow: bool = False, unfinished: bool = False) -> Iterator[JobLogLine]:
        """Yield its output, and how its unfinished lines stand."""


class FollowingClient(Protocol):
    """What following asks of a client; sublet.Client has it."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def copy(self, away_limit_s: float | None = None) -> "FollowingClient":
        """Return a client with connections of its own."""

    def handle(self, view: JobView) -> FollowedJob:
        """Return a handle for a job."""


class Screen(Protocol):
    """Where a job is shown."""

    def output(self, line: JobLogLine) -> None:
        """Show a line of its output, finished or not."""

    def note(self, text: str) -> None:
        """Show something that happened to it."""

    def status(self, view: JobView, away_s: float) -> None:
        """Show how it stands, and for how long the broker has been away (0: it's there)."""


def follow(job: FollowedJob, stop: threading.Event | None = None) -> JobView:
    """Show a job until it has ended or is paused; Ctrl-C, or `stop`, leaves it running.

    Returns how it stands then. Raises SubletError where the broker refuses.
    """
    stop = stop or threading.Event()
    view = job.view()
    lines: SimpleQueue[JobLogLine] = SimpleQueue()
    all_read = threading.Event()
    # A client of its own, which gives up early: the status goes on while the broker is away.
    with job.client.copy(away_limit_s=AWAY_S) as impatient:
        reader = threading.Thread(
            target=_read_lines, args=(job.client.copy(), view, lines, all_read, stop), daemon=True
        )
        reader.start()
        with _screen() as screen, _interrupts_set(stop) as interrupted:
            try:
                view = _watch(impatient.handle(view), view, screen, lines, stop)
                if interrupted.is_set():
                    return _left(impatient.handle(view), view, screen)
                if is_terminal(JOB, view.state):
                    _show_last_output(screen, lines, all_read)
                screen.status(view, 0.0)
            except KeyboardInterrupt:
                stop.set()
                return _left(impatient.handle(view), view, screen)
            finally:
                stop.set()
            for text in _closing_notes(view):
                screen.note(text)
    return view


@contextmanager
def _interrupts_set(stop: threading.Event) -> Iterator[threading.Event]:
    """Let a first Ctrl-C set `stop` and the event that is given; a second one raises, as ever.

    An exception may be raised anywhere: between a lock's being taken and noted, where the thread
    that draws waits for it for ever, or while an object is finalised, where it is lost.
    """
    interrupted = threading.Event()
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield interrupted  # somebody else decides what it means
        return

    def on_interrupt(number: int, frame: object) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        stop.set()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _left(job: FollowedJob, seen: JobView, screen: Screen) -> JobView:
    """Show whoever leaves how the job stands now, not how it stood when it was last drawn."""
    try:
        view = job.view()
    except SubletError as error:
        screen.status(seen, AWAY_S)
        screen.note(not_known(job.id, error))
        return seen
    screen.status(view, 0.0)
    screen.note(detached_text(view))
    return view


def _read_lines(
    client: FollowingClient,
    view: JobView,
    lines: "SimpleQueue[JobLogLine]",
    all_read: threading.Event,
    stop: threading.Event,
) -> None:
    try:
        with client:
            for line in client.handle(view).logs(follow=True, unfinished=True):
                lines.put(line)
                if stop.is_set():
                    return
    except SubletError:
        # Refused, or away at the very end: the watching thread, which asks as well, says which.
        return
    finally:
        all_read.set()


def _watch(
    job: FollowedJob,
    view: JobView,
    screen: Screen,
    lines: "SimpleQueue[JobLogLine]",
    stop: threading.Event,
) -> JobView:
    changes = Changes()
    warned: set[str] = set()
    signed_at = 0.0
    away_since: float | None = None
    while True:
        for text in changes.since_last(view):
            screen.note(text)
        over = is_terminal(JOB, view.state) or view.state is JobState.PAUSED
        try:
            if over or time.monotonic() - signed_at >= SIGN_EVERY_S:
                signed_at = time.monotonic()
                for refusal in job.cosign().refused:
                    if refusal not in warned:
                        warned.add(refusal)
                        screen.note(f"warning: {refusal}")
            if over or stop.is_set():
                return view
            _show_output(screen, lines, POLL_S)
            view = job.view()
            if away_since is not None:
                screen.note(f"the broker is back after {format_duration(_ms_since(away_since))}")
            away_since = None
        except BrokerAway as away:
            if over:
                return view
            if away_since is None:
                away_since = time.monotonic()
                screen.note(f"{away.problem.title}; the job goes on without it, asking again")
            _show_output(screen, lines, POLL_S)
        screen.status(view, time.monotonic() - away_since if away_since is not None else 0.0)


def _show_output(screen: Screen, lines: "SimpleQueue[JobLogLine]", for_s: float) -> None:
    """Show the lines that come within the next `for_s` seconds."""
    deadline = time.monotonic() + for_s
    while (left := deadline - time.monotonic()) > 0:
        try:
            screen.output(lines.get(timeout=left))
        except Empty:
            return


def _show_last_output(
    screen: Screen, lines: "SimpleQueue[JobLogLine]", all_read: threading.Event
) -> None:
    deadline = time.monotonic() + LAST_LINES_S
    while time.monotonic() < deadline:
        over = all_read.is_set()
        _show_output(screen, lines, 0.1)
        if over and lines.empty():
            return


def _ms_since(then_s: float) -> int:
    return int((time.monotonic() - then_s) * 1000)


@dataclass
class Changes:
    """Says what has changed from one view of a job to the next, each change once. Pure."""

    _state: str = ""
    _durable_step: int = 0
    _said_of_runs: set[tuple[int, str]] = field(default_factory=set)
    _warned: dict[tuple[int, str], WarningView] = field(default_factory=dict)

    def since_last(self, view: JobView) -> Iterator[str]:
        """Yield what is new, as text."""
        for index, run in enumerate(view.runs):
            before = view.runs[index - 1] if index else None
            yield from self._run(run, before)
        if view.state != self._state and view.state in (
            JobState.QUEUED,
            JobState.PAUSED,
            JobState.RECOVERING,
        ):
            yield f"{view.state}: {status_text(view)}"
        self._state = view.state
        if view.durable_step > self._durable_step:
            yield f"step {view.durable_step} is durable"
        self._durable_step = max(self._durable_step, view.durable_step)
        yield from self._warnings(view)

    def _warnings(self, view: JobView) -> Iterator[str]:
        standing = {(warning.epoch, warning.code): warning for warning in view.warnings}
        for key, warning in standing.items():
            if key not in self._warned:
                yield f"warning: {warning_text_of(warning, view)}"
        for (epoch, code), _ in self._warned.items():
            run = view.runs[-1] if view.runs else None
            if (epoch, code) not in standing and run is not None and run.epoch == epoch:
                yield f"no longer: {warning_mark(code)}"
        self._warned = standing

    def _run(self, run: RunView, before: RunView | None) -> Iterator[str]:
        name = _name(run)
        if self._new(run, "leased"):
            price = format_credits(run.price_ucr_per_device_hour)
            if before is None:
                yield f"{name} takes the job at {price} per device-hour"
            else:
                start = f"from step {run.start_step}" if run.start_step else "from the start"
                yield f"{name} goes on {start} at {price} per device-hour{_cost_of(before)}"
        if run.run_state is RunState.UNKNOWN and self._new(run, f"unknown {run.last_seen_ms}"):
            yield f"{name} has gone silent at step {run.step}; a successor is made ready"
        if run.reason is not None and self._new(run, "ended"):
            meaning = MEANINGS[run.reason]
            if meaning.next is Next.RETRY:
                lost = "is lost" if run.run_state is RunState.LOST else "ends"
                yield f"{name} {lost} at step {run.step}: {meaning.says}"

    def _new(self, run: RunView, what: str) -> bool:
        new = (run.epoch, what) not in self._said_of_runs
        self._said_of_runs.add((run.epoch, what))
        return new


def _cost_of(lost: RunView) -> str:
    """Return what the work that a run lost costs; nothing if it lost none."""
    lost_ms = lost.cum_device_ms - lost.payable_device_ms
    if lost.fault not in (Fault.PROVIDER, Fault.BROKER) or lost_ms <= 0:
        return ""
    return f"; the lost work ({format_duration(lost_ms)}) costs nothing"


def _name(run: RunView) -> str:
    return safe(run.provider_name) or short(run.provider)


def _closing_notes(view: JobView) -> Iterator[str]:
    ref = short(view.id)
    yield (
        f"{safe(view.name)} {view.state}: {status_text(view)}; "
        f"charged {format_credits(view.charged_ucr)} of {format_credits(view.budget_ucr)}"
    )
    if view.state is JobState.PAUSED:
        yield f"go on: sublet resume {ref} [--budget CREDITS]"
    if view.outputs_index_digest:
        yield f"outputs: sublet download {ref}   bill: sublet statement {ref}"
    elif view.partial_outputs_index_digest:
        yield f"what it had written: sublet download {ref}   bill: sublet statement {ref}"


@contextmanager
def _screen() -> Iterator[Screen]:
    if not sys.stdout.isatty():
        plain = PlainScreen()
        try:
            yield plain
        finally:
            plain.close()
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        yield LiveScreen(live.update, lambda text, style: console.print(_styled(text, style)))


def _styled(text: str, style: str) -> "RenderableType":
    from rich.text import Text

    return Text(text, style=style)


class PlainScreen:
    """Lines, for files and pipes."""

    def __init__(self) -> None:
        self._output = Output()

    def output(self, line: JobLogLine) -> None:
        """Write it where the job wrote it."""
        self._output.show(line)

    def note(self, text: str) -> None:
        """Write it to stderr."""
        self._output.note(f"sublet: {text}")

    def close(self) -> None:
        """Nothing more comes."""
        self._output.close()

    def status(self, view: JobView, away_s: float) -> None:
        """Nothing: plain lines have no place that changes."""


class LiveScreen:
    """A terminal, with a status at its bottom that changes."""

    def __init__(
        self, update: Callable[["RenderableType"], None], print_: Callable[[str, str], None]
    ) -> None:
        self._update = update
        self._print = print_
        self._losses: deque[tuple[int, float]] = deque(maxlen=240)
        self._unfinished: dict[str, str] = {}
        """stream -> the line that the job is writing"""
        self._status: tuple[JobView, float] | None = None

    def output(self, line: JobLogLine) -> None:
        """Let it scroll by above the status; one that is not finished stays there."""
        before = self._unfinished.pop(line.stream, None)
        if line.unfinished and line.text:
            self._unfinished[line.stream] = line.text
        if not line.unfinished:
            self._print(safe(line.text), _colour(line.stream))
        if self._status is not None and (line.unfinished or before is not None):
            self.status(*self._status)

    def note(self, text: str) -> None:
        """Let it scroll by, set off from the job's own lines."""
        style = "yellow" if text.startswith("warning") else "cyan"
        self._print(f"● {text}", style)

    def status(self, view: JobView, away_s: float) -> None:
        """Draw how the job stands."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        self._status = (view, away_s)
        run = view.runs[-1] if view.runs else None
        head = Text.assemble(
            (safe(view.name), "bold"),
            "  ",
            (view.state, _STYLES.get(view.state, "cyan")),
            f"  {clip(status_text(view), 60)}",
        )
        if away_s:
            head.append(f"  broker away for {format_duration(int(away_s * 1000))}", "yellow")
        rows: list[RenderableType] = [
            Text(safe(text), _colour(stream), no_wrap=True, overflow="ellipsis")
            for stream, text in self._unfinished.items()
        ]
        rows += [Text("─" * 40, "dim"), head]
        if view.total_steps:
            bar = Table.grid(padding=(0, 1))
            bar.add_row(
                ProgressBar(total=view.total_steps, completed=view.step, width=40),
                f"step {view.step}/{view.total_steps}",
                Text(f"durable {view.durable_step}", "dim"),
            )
            rows.append(bar)
        elif view.step:
            rows.append(Text(f"step {view.step}, durable {view.durable_step}"))
        cadence = cadence_of(view)
        if cadence is not None:
            rows.append(Text(most_lost_text(cadence), "dim"))
        if view.warnings:
            rows.append(Text(f"! {warning_marks(view, most=3)}", "yellow"))
        if view.metrics:
            rows.append(self._metrics(view))
        if run is not None and run.upload is not None and not is_terminal(JOB, view.state):
            rows.append(Text(upload_text(run.upload, time.time_ns() // 1_000_000), "dim"))
        money = Text.assemble(
            (format_credits(view.charged_ucr), "bold"),
            f" of {format_credits(view.budget_ucr)} credits",
        )
        if run is not None and not is_terminal(JOB, view.state):
            price = format_credits(run.price_ucr_per_device_hour)
            money.append(f"  on {_name(run)} at {price} per device-hour", "dim")
        if view.recoveries:
            money.append(f"  recovered {view.recoveries}x", "yellow")
        rows.append(money)
        self._update(Group(*rows))

    def _metrics(self, view: JobView) -> "RenderableType":
        from rich.text import Text

        loss = view.metrics.get("loss")
        if loss is not None and (not self._losses or self._losses[-1][0] != view.step):
            self._losses.append((view.step, loss))
        figures = "  ".join(f"{safe(k)} {v:.4g}" for k, v in sorted(view.metrics.items()))
        return Text.assemble(
            clip(figures, 60), "  ", (sparkline([value for _, value in self._losses]), "green")
        )


def _colour(stream: str) -> str:
    return "red" if stream == "stderr" else ""


_STYLES = {
    "running": "green",
    "succeeded": "green",
    "failed": "red",
    "recovering": "yellow",
    "paused": "yellow",
}


def sparkline(values: list[float], width: int = 30) -> str:
    """Return values as a line of blocks, the newest at the right; '' for fewer than two."""
    shown = [value for value in values if value == value and abs(value) != float("inf")]
    if len(shown) < 2:
        return ""
    if len(shown) > width:
        step = len(shown) / width
        shown = [shown[int(i * step)] for i in range(width - 1)] + [shown[-1]]
    low, high = min(shown), max(shown)
    if high == low:
        return _SPARKS[0] * len(shown)
    return "".join(_SPARKS[int((value - low) / (high - low) * 7)] for value in shown)
