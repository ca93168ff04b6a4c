"""`sublet provide` and `sublet provider`: the agent's one composition root."""

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from sublet_agent.adapters.machine.facts import Machine
from sublet_agent.adapters.machine.terms import cache_cap_bytes, choose_runner, make_terms, trusted
from sublet_agent.adapters.machine.watch import Watch
from sublet_agent.adapters.options import Options, UsageError, read_options, read_owner_command
from sublet_agent.adapters.owner.commands import run_owner_command
from sublet_agent.adapters.owner.control import Control
from sublet_agent.adapters.owner.screen import OwnerOutput, make_output
from sublet_agent.adapters.session import replaced
from sublet_agent.adapters.session.clock import SteadyClock
from sublet_agent.adapters.session.journal import Journal, NewerState, StateFolderInUse
from sublet_agent.adapters.session.link import Link, Replaced
from sublet_agent.adapters.session.log_spool import Spool
from sublet_agent.adapters.shell import THREAD_NAME, Shell, put_the_loop_first
from sublet_agent.adapters.watchdog.deadline_files import boot_id
from sublet_agent.adapters.watchdog.watchdog import WatchdogKeeper
from sublet_agent.adapters.workspace.input_cache import InputCache
from sublet_agent.adapters.workspace.renter_caches import RenterCaches
from sublet_agent.adapters.workspace.transfer import Transfer, TransferRefused
from sublet_agent.core import events
from sublet_agent.core.agent import AgentCore
from sublet_agent.core.run_phases import LIVE, RunPhase
from sublet_agent.core.status import Connection, Status, make_status
from sublet_contracts.amounts import format_credits
from sublet_contracts.api import SignedRequest
from sublet_contracts.ckpt_helper_install import write_helper
from sublet_contracts.documents import KeyDocument, sign_document
from sublet_contracts.keys import KeyRefused, SigningKey, short
from sublet_contracts.reasons import Reason

FLUSH_S = 5.0
CANCEL_S = 1.0
LEAVE_S = 2.0
SHOW_S = 0.5
PREPARING = frozenset({RunPhase.PULLING, RunPhase.RESTORING})


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sublet provide`. Returns the exit code: 0 drained, 1 failed, 2 wrong usage."""
    options = read_options(sys.argv[1:] if argv is None else argv)
    with make_output(options.json) as output:
        code = _run(options, output)
    leave_threads(code)
    return code


def _run(options: Options, output: OwnerOutput) -> int:
    try:
        return asyncio.run(_provide(options, output))
    except UsageError as error:
        output.say(f"error: {error}")
        return 2
    except (StateFolderInUse, NewerState, KeyRefused) as error:
        output.say(f"error: --state: {error}")
        return 1
    except Replaced as error:
        replaced.mark(options.state)
        output.say(f"error: {error}; this one ends, and what it runs goes on without it")
        return 1
    except replaced.StaysAway as error:
        output.say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        output.say("stopped before anything was offered")
        return 1
    except (OSError, sqlite3.Error) as error:
        output.say(f"error: {error}; runs go on, start again to take them up")
        return 1


def leave_threads(code: int) -> None:
    """End the process here if threads of the agent still wait, for a broker that doesn't answer or
    a slow engine: Python would wait for them. What counts is on disk, as it is for a kill -9."""
    deadline = time.monotonic() + LEAVE_S
    for thread in threading.enumerate():
        if thread.name.startswith(THREAD_NAME):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                sys.stdout.flush()
                os._exit(code)


async def _provide(options: Options, output: OwnerOutput) -> int:
    say = output.say
    clock = SteadyClock()
    journal = Journal(options.state)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(journal.close)
        replaced.check(options.state, by_hand=sys.stdin.isatty())
        key = SigningKey.load_or_create(options.state / "key")
        runner = choose_runner(options, journal.state_id, say)
        accepts = trusted(options, runner, say)
        inputs = InputCache(options.state, cache_cap_bytes(options), links=runner.name == "docker")
        machine = Machine(options, runner, inputs.held_bytes)
        stack.callback(machine.close)
        facts = machine.first(say)
        terms = make_terms(options, runner, accepts, facts, clock.now_ms())
        (options.state / "agent.json").write_text(json.dumps({"broker": options.broker}))
        core = AgentCore(terms, key, journal.load(), boot=boot_id())
        spool = Spool(options.state / "spool.db", journal.reserve)
        stack.callback(spool.close)
        transfer = Transfer(options.broker, key, lambda: core.saved.broker, clock.now_ms)
        stack.callback(transfer.close)
        watchdog = WatchdogKeeper(options.state, runner.name, journal.state_id)
        stack.callback(watchdog.close)
        shell = Shell(
            state=options.state,
            core=core,
            journal=journal,
            spool=spool,
            runner=runner,
            transfer=transfer,
            helper=write_helper(options.state / "helper"),
            now_ms=clock.now_ms,
            say=say,
            watchdog=watchdog,
            caches=RenterCaches(options.state, options.renter_caches_bytes),
            inputs=inputs,
        )
        stack.callback(shell.close)
        link = Link(
            options.broker,
            key,
            os.urandom(8).hex(),
            journal,
            shell.writer,
            shell,
            clock,
            lambda: core.saved.broker,
        )
        shell.link = link
        watch = Watch(machine, shell, facts, lambda: core.heartbeat_ms)
        stack.callback(watch.close)
        shell.look_now = watch.look_now
        signals = Signals()
        control = Control(options.state, lambda asked: _answer(shell, options, asked))
        await control.open()
        stack.push_async_callback(control.close)
        price = format_credits(options.price_ucr)
        for device in terms.devices:
            say(f"offering {device.id} ({device.name}) at {price} credits per device-hour")
        say(f"provider {key.party}, state in {options.state}")
        await shell.start()
        put_the_loop_first()
        watch.begin()
        _handle_signals(shell, options, say, signals)
        return await _until_done(shell, link, watch, options, output)


async def _until_done(
    shell: Shell, link: Link, watch: Watch, options: Options, output: OwnerOutput
) -> int:
    say = output.say
    tasks = [
        asyncio.create_task(work)
        for work in (
            link.run(),
            shell.ticking(),
            watch.run(),
            shell.keep_watchdog(),
            _register_name(shell),
            _show_status(shell, options, output),
        )
    ]
    done = asyncio.create_task(shell.done.wait())
    try:
        await asyncio.wait([done, *tasks[:2]], return_when=asyncio.FIRST_COMPLETED)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(link.flushed(), FLUSH_S)
        for task in tasks[:2]:
            if task.done():
                task.result()
        if shell.failed is not None:
            raise shell.failed
        say(_closing_line(shell))
        return 0
    finally:
        everything: set[asyncio.Task[Any]] = {done, *tasks}
        left = everything
        while left:
            # More than once: wait_for of Python 3.11 may lose a cancellation that comes just as
            # what it waits for does, and an agent that can't write must not stay, deaf.
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=CANCEL_S)
        await asyncio.gather(*everything, return_exceptions=True)


class Signals:
    """What the owner asks for by signal. While the agent starts nothing can be drained yet: what
    comes then is kept.

    One handler serves from first to last. asyncio calls it some turns after the signal came, so one
    that had been replaced meanwhile would be told what nobody reads any more.
    """

    def __init__(self) -> None:
        self._came_early: list[signal.Signals] = []
        self._handle: Callable[[signal.Signals], None] = self._came_early.append
        handled = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            # The terminal was closed; with nohup that doesn't matter.
            handled.append(signal.SIGHUP)
        loop = asyncio.get_running_loop()
        for number in handled:
            loop.add_signal_handler(number, self._came, number)

    def _came(self, number: signal.Signals) -> None:
        self._handle(number)

    def handle_with(self, act: Callable[[signal.Signals], None]) -> None:
        """Let `act` have those that came, and all that come."""
        self._handle = act
        for number in self._came_early:
            act(number)


def _handle_signals(
    shell: Shell, options: Options, say: Callable[[str], None], signals: Signals
) -> None:
    """The first ask drains. After it Ctrl-C leaves at once; another SIGTERM hurries the drain."""
    asked: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        asked.append(number)
        if len(asked) == 1:
            say(
                "draining: runs checkpoint and stop, then this agent ends (Ctrl-C again: it ends "
                "now, and they go on without it)"
            )
            shell.post(events.DrainAsked(Reason.PROVIDER_DRAINED, options.grace_ms))
        elif number is not signal.SIGINT and len(asked) == 2:
            say("hurrying: runs are killed now, finished checkpoints are still uploaded")
            shell.post(events.DrainAsked(Reason.PROVIDER_DRAINED, 0))
        else:
            shell.done.set()

    signals.handle_with(on_signal)


def _closing_line(shell: Shell) -> str:
    records = [run.record for run in shell.core.runs.values()]
    left = [record for record in records if record.phase in PREPARING | LIVE]
    finished = [record for record in records if record.phase is RunPhase.FINISHING]
    if not left and (finished or shell.journal.pending(limit=1)):
        jobs = ", ".join(short(record.job_id) for record in finished)
        return (
            "handed back; what is finished waits on this disk for the broker"
            + (f" (of job {jobs})" if jobs else "")
            + ": start the agent again, with --devices none if it is to offer nothing, to hand it "
            "over; else this machine is paid up to the last checkpoint that is there"
        )
    if left:
        return (
            f"left: {len(left)} run(s) go on without this agent; start it again to take them up, "
            "else their jobs go on elsewhere and this machine is paid up to the last checkpoint"
        )
    earned = format_credits(shell.journal.income().earned_ucr)
    if shell.core.runs:
        return f"handed back; what is not settled yet is settled without us; earned {earned} so far"
    return f"handed back; earned {earned} credits in all"


async def _show_status(shell: Shell, options: Options, output: OwnerOutput) -> None:
    """Keep the picture fresh, where one is shown."""
    while True:
        output.show(_status(shell, options))
        await asyncio.sleep(SHOW_S)


async def _register_name(shell: Shell) -> None:
    """Tell the broker this machine's name, so that people see more than a key."""
    await shell.knows_broker.wait()
    document = KeyDocument(
        party=shell.core.key.party,
        broker=shell.core.saved.broker,
        name=shell.core.terms.name,
        issued_ms=shell.now_ms(),
    )
    signed = sign_document(document, shell.core.key)
    body = SignedRequest(envelope=signed.envelope).model_dump_json().encode()

    def call() -> bytes:
        return shell.transfer.request("POST", "/v1/keys", body, attempts=5)

    try:
        await shell.blocking(call)
    except (TransferRefused, httpx.HTTPError) as error:
        shell.say(f"the broker did not take this machine's name: {error}")


# -- the owner's commands ------------------------------------------------------------


def _answer(shell: Shell, options: Options, asked: dict[str, Any]) -> dict[str, Any]:
    grace = asked.get("grace_ms")
    grace_ms = grace if isinstance(grace, int) and grace >= 0 else options.grace_ms
    match asked.get("command"):
        case "status":
            pass
        case "drain":
            shell.post(events.DrainAsked(Reason.PROVIDER_DRAINED, grace_ms))
        case "reclaim":
            shell.post(events.DrainAsked(Reason.RECLAIMED, grace_ms, then_stop=False))
        case "offer":
            shell.post(events.OfferAgain())
        case "forget-caches":
            shell.forget_caches()
        case other:
            return {"error": f"unknown command {other!r}; this agent may be older than the command"}
    return _status(shell, options).model_dump(mode="json")


def _status(shell: Shell, options: Options) -> Status:
    now_ms = shell.now_ms()
    link = shell.link
    return make_status(
        shell.core,
        url=options.broker,
        connection=link.connection if link else Connection(connected=False, since_ms=now_ms),
        income=shell.journal.income(),
        now_ms=now_ms,
    )


def provider_main(argv: Sequence[str] | None = None) -> int:
    """Run `sublet provider ...`. Returns the exit code."""
    return run_owner_command(read_owner_command(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
