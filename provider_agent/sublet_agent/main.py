"""`sublet provide` and `sublet provider`: the agent's one composition root."""

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from sublet_agent.adapters.clock import SteadyClock
from sublet_agent.adapters.control import Control, NoAgent, ask_agent
from sublet_agent.adapters.journal import Journal, NewerState, StateFolderInUse
from sublet_agent.adapters.link import Link
from sublet_agent.adapters.machine import choose_runner, make_terms, trusted
from sublet_agent.adapters.options import (
    Options,
    OwnerCommand,
    UsageError,
    read_options,
    read_owner_command,
)
from sublet_agent.adapters.shell import Shell
from sublet_agent.adapters.spool import Spool
from sublet_agent.adapters.transfer import Transfer, TransferRefused
from sublet_agent.core import events
from sublet_agent.core.agent import AgentCore
from sublet_agent.core.metering import charge_ucr
from sublet_agent.core.records import Phase
from sublet_contracts.api import BrokerInfo, EarningsView, SignedRequest
from sublet_contracts.ckpt_helper_install import write_helper
from sublet_contracts.documents import KeyDocument, sign_document
from sublet_contracts.keys import KeyRefused, SigningKey, short
from sublet_contracts.reasons import Reason
from sublet_contracts.rules import UCR_PER_CREDIT

FLUSH_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sublet provide`. Returns the exit code: 0 drained, 1 failed, 2 wrong usage."""
    options = read_options(sys.argv[1:] if argv is None else argv)
    say = _speaker(options.json)
    try:
        return asyncio.run(_provide(options, say))
    except UsageError as error:
        say(f"error: {error}")
        return 2
    except (StateFolderInUse, NewerState, KeyRefused) as error:
        say(f"error: --state: {error}")
        return 1
    except (OSError, sqlite3.Error) as error:
        say(f"error: {error}; runs go on, start again to take them up")
        return 1


def _speaker(as_json: bool) -> Callable[[str], None]:
    def say(text: str) -> None:
        if as_json:
            line = json.dumps({"time_ms": time.time_ns() // 1_000_000, "says": text})
        else:
            line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)

    return say


async def _provide(options: Options, say: Callable[[str], None]) -> int:
    clock = SteadyClock()
    journal = Journal(options.state)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(journal.close)
        key = SigningKey.load_or_create(options.state / "key")
        runner = choose_runner(options, journal.state_id, say)
        terms = make_terms(options, runner, trusted(options, runner, say), say)
        (options.state / "agent.json").write_text(json.dumps({"broker": options.broker}))
        core = AgentCore(terms, key, journal.load())
        spool = Spool(options.state / "spool.db")
        stack.callback(spool.close)
        transfer = Transfer(options.broker, key, lambda: core.saved.broker, clock.now_ms)
        stack.callback(transfer.close)
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
        )
        stack.callback(shell.close)
        link = Link(
            options.broker, key, os.urandom(8).hex(), journal, shell, clock,
            lambda: core.saved.broker,
        )  # fmt: skip
        shell.link = link
        control = Control(options.state, lambda asked: _answer(shell, options, asked))
        await control.open()
        stack.push_async_callback(control.close)
        price = options.price_ucr / UCR_PER_CREDIT
        for device in terms.devices:
            say(f"offering {device.id} ({device.name}) at {price:g} credits per hour")
        say(f"provider {key.party}, state in {options.state}")
        await shell.start()
        return await _until_done(shell, link, options, say)


async def _until_done(
    shell: Shell, link: Link, options: Options, say: Callable[[str], None]
) -> int:
    asked = 0

    def on_signal() -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            say("draining: runs checkpoint and stop, then this agent ends (again: faster)")
            shell.post(events.DrainAsked(Reason.PROVIDER_DRAINED, options.grace_ms))
        elif asked == 2:
            say("hurrying: runs are killed now, finished checkpoints are still uploaded")
            shell.post(events.DrainAsked(Reason.PROVIDER_DRAINED, 0))
        else:
            shell.done.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    tasks = [asyncio.create_task(work) for work in (link.run(), shell.ticking(), _introduce(shell))]
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
        say("handed back" if not shell.core.machines else "stopped; runs go on without this agent")
        return 0
    finally:
        done.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, done, return_exceptions=True)


async def _introduce(shell: Shell) -> None:
    """Tell the broker this machine's name, so that people see more than a key."""
    await shell.knows_broker.wait()
    document = KeyDocument(
        party=shell.core.key.party, broker=shell.core.saved.broker, name=shell.core.terms.name,
        issued_ms=shell.now_ms(),
    )  # fmt: skip
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
            return _status(shell, options)
        case "drain":
            shell.post(events.DrainAsked(Reason.PROVIDER_DRAINED, grace_ms))
        case "reclaim":
            shell.post(events.DrainAsked(Reason.RECLAIMED, grace_ms, then_stop=False))
        case "offer":
            shell.post(events.OfferAgain())
        case other:
            return {"error": f"unknown command {other!r}; this agent may be older than the command"}
    return _status(shell, options)


def _status(shell: Shell, options: Options) -> dict[str, Any]:
    core = shell.core
    return {
        "provider": core.key.party,
        "broker": options.broker,
        "connected": core.live,
        "trouble": shell.link.refused if shell.link else "",
        "runner": shell.runner.name,
        "draining": core.draining is not None,
        "price_ucr_per_device_hour": core.terms.price_ucr_per_device_hour,
        "devices": [device.id for device in core.terms.devices],
        "runs": [
            {
                "lease": record.lease_id,
                "job": record.job_id,
                "name": record.job.name,
                "phase": record.phase,
                "devices": list(record.lease.device_ids),
                "cum_device_ms": record.cum_device_ms,
                "durable_step": record.durable_step,
                "charge_ucr": charge_ucr(record, record.cum_device_ms),
                "reason": record.reason,
            }
            for record in core.saved.runs.values()
            if record.phase is not Phase.DISCARDED
        ],
    }


def provider_main(argv: Sequence[str] | None = None) -> int:
    """Run `sublet provider ...`. Returns the exit code."""
    command = read_owner_command(sys.argv[1:] if argv is None else argv)
    try:
        if command.command == "earnings":
            return _earnings(command)
        return _command(command)
    except (NoAgent, UsageError, KeyRefused, TransferRefused) as error:
        print(f"error: {error}", file=sys.stderr)
    except httpx.HTTPError as error:
        print(f"error: the broker does not answer: {error}", file=sys.stderr)
    return 1


def _command(command: OwnerCommand) -> int:
    asked: dict[str, Any] = {"command": command.command}
    if command.grace_ms is not None:
        asked["grace_ms"] = command.grace_ms
    status = ask_agent(command.state, asked)
    if "error" in status:
        print(f"error: {status['error']}", file=sys.stderr)
        return 1
    if command.command in ("drain", "reclaim"):
        status = _wait_until_free(command, status)
    if command.json:
        print(json.dumps(status))
        return 0
    print(_status_words(status))
    return 0


def _wait_until_free(command: OwnerCommand, status: dict[str, Any]) -> dict[str, Any]:
    """Follow a drain to its end: the devices are free once no run is left (or the agent is)."""
    last = ""
    while any(run["phase"] != Phase.ENDED for run in status.get("runs", [])):
        words = ", ".join(f"{run['name']}: {run['phase']}" for run in status["runs"])
        if words != last and not command.json:
            print(words, flush=True)
        last = words
        time.sleep(0.2)
        try:
            status = ask_agent(command.state, {"command": "status"})
        except NoAgent:
            return {**status, "runs": [], "connected": False, "stopped": True}
    return status


def _status_words(status: dict[str, Any]) -> str:
    price = status["price_ucr_per_device_hour"] / UCR_PER_CREDIT
    state = "connected" if status["connected"] else status["trouble"] or "not connected"
    lines = [
        f"{short(status['provider'])} at {status['broker']}: {state}",
        f"runner {status['runner']}, {', '.join(status['devices']) or 'nothing offered'}, "
        f"{price:g} credits per device-hour" + (", draining" if status["draining"] else ""),
    ]
    for run in status["runs"]:
        lines.append(
            f"  {run['name']} ({short(run['job'])}): {run['phase']}, "
            f"{run['cum_device_ms'] / 1000:.0f} device-seconds, durable step "
            f"{run['durable_step']}, {run['charge_ucr'] / UCR_PER_CREDIT:.6f} credits"
        )
    return (
        "\n".join(lines) if status["runs"] else "\n".join([*lines, "no runs: the devices are free"])
    )


def _earnings(command: OwnerCommand) -> int:
    url = _broker_url(command.state)
    answer = httpx.get(f"{url}/v1/broker", timeout=10)
    answer.raise_for_status()
    info = BrokerInfo.model_validate_json(answer.content)
    key = SigningKey.load_or_create(command.state / "key")
    transfer = Transfer(url, key, lambda: info.broker, SteadyClock().now_ms)
    try:
        data = transfer.request("GET", "/v1/earnings", attempts=3)
    finally:
        transfer.close()
    view = EarningsView.model_validate_json(data)
    if command.json:
        print(view.model_dump_json())
        return 0
    for charge in view.charges:
        print(
            f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(charge.time_ms / 1000))}  "
            f"{short(charge.lease)}  {charge.payable_device_ms / 1000:9.0f} device-s  "
            f"{(charge.charged_ucr - charge.fee_ucr) / UCR_PER_CREDIT:12.6f}  {charge.reason}"
        )
    print(f"earned {view.earned_ucr / UCR_PER_CREDIT:.6f} credits, "
          f"pending {view.pending_ucr / UCR_PER_CREDIT:.6f}")  # fmt: skip
    return 0


def _broker_url(state: Path) -> str:
    try:
        said = json.loads((state / "agent.json").read_text())
        return str(said["broker"])
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"no agent has run with the state folder {state}; name its folder with --state"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
