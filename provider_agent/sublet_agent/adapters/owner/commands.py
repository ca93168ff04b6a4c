"""`sublet provider ...`: what the owner asks of the agent on this machine, in words or as JSON.

With --json stdout holds one object whose keys are stable: a Status (core/status.py), and for
`earnings` the broker's EarningsView. An error is one object with `error` on stderr, exit code 1.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError
from rich.console import Console

from sublet_agent.adapters.options import OwnerCommand, UsageError
from sublet_agent.adapters.owner.control import NoAgent, ask_agent
from sublet_agent.adapters.owner.dashboard import safe, status_lines
from sublet_agent.adapters.session.clock import SteadyClock
from sublet_agent.adapters.workspace.transfer import Transfer, TransferRefused
from sublet_agent.core.run_phases import RunPhase
from sublet_agent.core.status import Status
from sublet_contracts.amounts import format_credits, format_duration
from sublet_contracts.api import BrokerInfo, EarningsView
from sublet_contracts.keys import KeyRefused, SigningKey, short

POLL_S = 0.2
PLAIN_WIDTH = 160
ROWS_FOR_ALL_RUNS = 10_000


def run_owner_command(command: OwnerCommand) -> int:
    """Run it. Returns the exit code: 0, or 1 after an error."""
    try:
        if command.command == "earnings":
            return _earnings(command)
        return _command(command)
    except (NoAgent, UsageError, KeyRefused, TransferRefused) as error:
        return _error(command, str(error))
    except httpx.HTTPError as error:
        return _error(command, f"the broker does not answer: {error}")


def _error(command: OwnerCommand, text: str) -> int:
    words = json.dumps({"error": text}) if command.json else f"error: {safe(text)}"
    print(words, file=sys.stderr)
    return 1


def _command(command: OwnerCommand) -> int:
    asked: dict[str, Any] = {"command": command.command}
    if command.grace_ms is not None:
        asked["grace_ms"] = command.grace_ms
    status = _ask(command, asked)
    if command.command in ("drain", "reclaim"):
        status = _wait_until_free(command, status)
    if command.json:
        print(status.model_dump_json())
    else:
        _print(status)
    return 0


def _ask(command: OwnerCommand, asked: dict[str, Any]) -> Status:
    answer = ask_agent(command.state, asked)
    if "error" in answer:
        raise UsageError(str(answer["error"]))
    try:
        return Status.model_validate(answer)
    except ValidationError as error:
        raise UsageError(
            "the agent that runs is of another release than this command; restart the agent "
            f"({error.error_count()} of its answer's fields don't fit)"
        ) from error


def _wait_until_free(command: OwnerCommand, status: Status) -> Status:
    """Follow it until the devices are free and what was made is handed over, or the agent has
    ended. Where the broker is away a reclaim doesn't wait for it: that would be for ever."""
    last = ""
    while not _is_free(status):
        words = ", ".join(f"{run.job[:8]} ({safe(run.name)}): {run.phase}" for run in status.runs)
        if status.waits_for:
            words = "waiting for " + "; ".join(safe(line) for line in status.waits_for)
        if words != last and not command.json:
            print(words, flush=True)
        last = words
        time.sleep(POLL_S)
        try:
            status = _ask(command, {"command": "status"})
        except NoAgent:
            gone = {"runs": (), "connected": False, "stopped": True}
            return status.model_copy(update=gone)
    return status


def _is_free(status: Status) -> bool:
    waits = status.connected or status.stopping
    free = {RunPhase.ENDED} if waits else {RunPhase.ENDED, RunPhase.FINISHING}
    return all(run.phase in free for run in status.runs)


def _print(status: Status) -> None:
    console = Console(highlight=False, emoji=False, markup=False)
    width = console.width if console.is_terminal else PLAIN_WIDTH
    for line in status_lines(status, width=width, height=ROWS_FOR_ALL_RUNS, live=False):
        console.print(line, soft_wrap=True)


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
            f"{short(charge.lease)}  {format_duration(charge.payable_device_ms):>10}  "
            f"{format_credits(charge.charged_ucr - charge.fee_ucr):>14}  {charge.reason}"
        )
    print(
        f"earned {format_credits(view.earned_ucr)} credits, "
        f"pending {format_credits(view.pending_ucr)}"
    )
    return 0


def _broker_url(state: Path) -> str:
    try:
        said = json.loads((state / "agent.json").read_text())
        return str(said["broker"])
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"no agent has run with the state folder {state}; name its folder with --state"
        ) from error
