"""`sublet demo`: a job loses its machine, goes on elsewhere, and the bill adds up. Real parts only.

A broker and two agents run as processes of their own on this machine. The job's machine is killed
with kill -9, agent and run, after its second durable checkpoint. An undisturbed run of the same
command goes on beside it, outside of the market, to compare the results with.
"""

import argparse
import contextlib
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.markup import escape

from sublet.demo.local import LocalMarket
from sublet.demo.outcome import Outcome
from sublet.demo.plans import BUDGET, Plan, find_image, finetune_plan, quick_plan
from sublet.demo.reference import Reference, same_content
from sublet.demo.screen import ProviderRow, Screen, ScreenState
from sublet.errors import SubletError
from sublet_contracts.amounts import format_credits
from sublet_contracts.rules import UCR_PER_CREDIT

if TYPE_CHECKING:
    from sublet.client import Client, Job
    from sublet_contracts.api import JobView, StatementView

POLL_S = 0.2
CHECKPOINTS_BEFORE_KILL = 2
JOB_LIMIT_S = 900
PRICES = {"alice": "0.40", "bob": "0.45"}
FUNDS = 5
LAST_LINES = 12
TERMINAL = ("succeeded", "failed", "cancelled", "paused")


class DemoFailed(RuntimeError):
    """The demo could not go on; the message says where and why."""


@dataclass
class Loss:
    """The loss of the machine, as it was seen; times in seconds of the monotonic clock."""

    killed_at_s: float
    step: int
    """Of the run, as its machine was killed."""
    provider: str
    epoch: int
    """Of the run that was killed."""
    noticed_at_s: float | None = None
    resumed_at_s: float | None = None
    start_step: int = 0
    """At which the run after it began."""

    def look(self, view: "JobView", now_s: float) -> list[str]:
        """See how far the job is over its loss; return what there is to be said of it.

        The machine was called lost once its run has a reason to have ended: the job's own state
        may be back at running by the next look.
        """
        said = []
        newest = view.runs[-1]
        killed = next((run for run in view.runs if run.epoch == self.epoch), newest)
        if self.noticed_at_s is None and (killed.reason is not None or newest.epoch > self.epoch):
            self.noticed_at_s = now_s
            said.append(f"{self.provider} is called lost; {view.says}")
        goes_on = newest.epoch > self.epoch and newest.step > newest.start_step
        if self.resumed_at_s is None and goes_on:
            self.resumed_at_s = now_s
            self.start_step = newest.start_step
            said.append(
                f"{newest.provider_name} goes on from step {newest.start_step}, "
                f"{now_s - self.killed_at_s:.1f} s after the kill"
            )
        return said


@dataclass
class Demo:
    """One run of the demo."""

    plan: Plan
    runner: str
    image: str
    market: LocalMarket
    screen: Screen
    seen_runs: set[str] = field(default_factory=set)
    job: "Job | None" = None

    def last_lines(self) -> str:
        """Return the end of what the job said, as far as the broker has it."""
        if self.job is None:
            return ""
        with contextlib.suppress(SubletError):
            said = deque((line.text for line in self.job.logs()), maxlen=LAST_LINES)
            if said:
                return "\n".join(["", "its last lines:", *(f"  {line}" for line in said)])
        return ""

    def run(self) -> tuple["Client", "Job", Loss, Reference]:
        """Run the market, and the job to its end. Raises DemoFailed, LocalMarketError and
        SubletError."""
        import sublet

        say = self.screen.say
        client = sublet.Client(
            broker=self.market.url, config_dir=self.market.root / "config" / "sublet"
        )
        # The image was made here, and no registry has it.
        allowed = ("--allow-image", self.image) if self.runner == "docker" else ()
        for name, price in PRICES.items():
            self.market.start_agent(
                name,
                *allowed,
                "--runner",
                self.runner,
                "--trust",
                client.party,
                "--region",
                "here",
                price=price,
            )
        self.market.wait_for(
            lambda: self._offers(client),
            "both agents to be on the market",
            self.market.agents["alice"],
        )
        say(f"alice and bob rent out a CPU each, with the {self.runner} runner")
        client.fund(client.party, FUNDS, operator_key=self.market.operator_key)
        say(f"the renter's account is credited with {FUNDS} credits")
        job = self.job = self.plan.submit(client, self.image)
        view = job.view()
        self.screen.state.budget_ucr = view.budget_ucr
        say(f"job {view.id[:10]} submitted; its budget of {BUDGET} credits is held")
        reference = Reference(
            self.market.root / "undisturbed",
            view.command,
            self.plan.inputs,
            self.image if self.runner == "docker" else None,
        )
        try:
            reference.start()
            loss = self._lose_the_machine(job)
            self._until_finished(job, loss)
            say("waiting for the undisturbed run, to compare with")
            reference.wait()
        except BaseException:
            reference.stop()
            raise
        return client, job, loss, reference

    def _offers(self, client: "Client") -> bool:
        offers = client.offers().offers
        for offer in offers:
            self.screen.state.providers[offer.name] = ProviderRow(
                offer.name, offer.devices[0].name, offer.price_ucr_per_device_hour
            )
        return len(offers) == len(PRICES)

    def _lose_the_machine(self, job: "Job") -> Loss:
        deadline = time.monotonic() + JOB_LIMIT_S
        while time.monotonic() < deadline:
            view = self._look(job)
            if view.state in TERMINAL:
                raise DemoFailed(
                    f"the job {view.state} before its machine could be lost: {view.says}"
                )
            durable = self.screen.state.durable_steps
            provider = view.runs[-1].provider_name if view.runs else ""
            # Half-way to the next checkpoint, so that there is work to lose.
            enough = view.durable_step + self.plan.interval_steps // 2
            if (
                len(durable) >= CHECKPOINTS_BEFORE_KILL
                and self.market.last_step(provider) >= enough
            ):
                break
            time.sleep(POLL_S)
        else:
            raise DemoFailed("no second durable checkpoint in time")
        agent = self.market.agents[provider]
        killed_at_s = time.monotonic()
        agent.kill()
        ended = self.market.kill_run(view.id, provider, self.runner)
        if not ended:
            raise DemoFailed(
                f"no process of the run was found on {provider}; nothing could be killed"
            )
        step = max(self.market.last_step(provider), view.step)
        self.screen.state.providers[provider].state = "killed"
        self.screen.say(f"kill -9: {provider}'s agent and the run itself, at step {step}")
        return Loss(killed_at_s, step, provider, view.runs[-1].epoch)

    def _until_finished(self, job: "Job", loss: Loss) -> None:
        deadline = time.monotonic() + JOB_LIMIT_S
        while time.monotonic() < deadline:
            view = self._look(job)
            for line in loss.look(view, time.monotonic()):
                self.screen.say(line)
            if loss.resumed_at_s is not None:
                self.screen.state.lost_work = "billed nothing"
            if view.state in TERMINAL:
                self.screen.say(f"the job {view.state}: {view.says}")
                return
            time.sleep(POLL_S)
        raise DemoFailed(f"the job did not finish within {JOB_LIMIT_S} s")

    def _look(self, job: "Job") -> "JobView":
        view = job.view()
        state = self.screen.state
        state.job_state = str(view.state)
        state.charge_ucr = view.charged_ucr
        if view.step != state.step or not state.losses:
            state.step, state.total_steps = view.step, view.total_steps
            if "loss" in view.metrics:
                state.losses.append(view.metrics["loss"])
        for run in view.runs:
            if run.lease not in self.seen_runs:
                self.seen_runs.add(run.lease)
                self.screen.say(
                    f"lease {run.epoch}: {run.provider_name} at "
                    f"{format_credits(run.price_ucr_per_device_hour)} per device-hour"
                )
            row = state.providers.get(run.provider_name)
            if row and row.state != "killed":
                row.state = str(run.run_state)
        if view.durable_step and view.durable_step not in state.durable_steps:
            state.durable_steps.append(view.durable_step)
            self.screen.say(f"checkpoint at step {view.durable_step} is durable at the broker")
        job.cosign()
        return view


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return 0 if every promise held."""
    options = _parser().parse_args(argv)
    console = Console()
    build = Path(options.build_dir).resolve()
    began = time.monotonic()
    previous = signal.signal(signal.SIGTERM, _as_interrupt)
    root = Path(tempfile.mkdtemp(prefix="demo-", dir=_made(build)))
    market = LocalMarket(root)
    try:
        outcome = _run(options, console, build, market, began)
    except (RuntimeError, SubletError, OSError) as error:
        console.print("[bold red]the demo failed:[/]", escape(str(error)), highlight=False)
        console.print(f"logs: {root / 'logs'}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("\nstopped; nothing is left running")
        return 130
    finally:
        market.stop()
        signal.signal(signal.SIGTERM, previous)
    outcome.write(Path(options.json_file))
    console.print()
    console.print(outcome.table())
    broken = outcome.broken_promises()
    for promise in broken:
        console.print(f"[bold red]broken:[/] {escape(promise)}", highlight=False)
    console.print(f"written to {options.json_file}", highlight=False)
    if broken:
        console.print(f"logs: {root / 'logs'}", highlight=False)
        return 1
    shutil.rmtree(root, ignore_errors=True)
    return 0


def _run(
    options: argparse.Namespace, console: Console, build: Path, market: LocalMarket, began: float
) -> Outcome:
    def say(line: str) -> None:
        at = time.monotonic() - began
        console.print(f"{at:6.1f} s  {line}", highlight=False, soft_wrap=True)

    plan = quick_plan() if options.quick else finetune_plan(build / "data")
    market.broker_arguments = plan.broker_arguments
    say("starting a broker: one process, one port, Ray inside")
    market.start_broker()
    runner, image, why = find_image(options.quick, options.runner, say)
    say(f"runner: {runner}" + (f" ({why})" if why else f", image {image[:19]}"))
    if runner == "process":
        say("the process runner isolates nothing: it serves this renter alone")
    state = ScreenState(title=plan.title, runner=runner, started=began)
    with Screen(state, console) as screen:
        demo = Demo(plan, runner, image, market, screen)
        try:
            client, job, loss, reference = demo.run()
            try:
                return _judge(demo, client, job, loss, reference, why, began)
            finally:
                reference.stop()
        except DemoFailed as error:
            raise DemoFailed(f"{error}{demo.last_lines()}") from error


def _judge(
    demo: Demo,
    client: "Client",
    job: "Job",
    loss: Loss,
    reference: Reference,
    why: str,
    began: float,
) -> Outcome:
    """Check every promise from the outside, with what a renter has in hand."""
    import json

    from sublet_contracts.export import verify_export

    view = job.view()
    if view.state != "succeeded":
        raise DemoFailed(f"the job {view.state}: {view.says}")
    results = demo.market.root / "results"
    job.download(results)
    job.cosign()
    same = same_content(results, reference.outputs, demo.plan.same_files)
    metrics = json.loads((results / "metrics.json").read_text())
    statement = job.statement()
    export = job.export()
    verdict = verify_export(export, broker=demo.market.broker_id)
    middle = len(export) // 2
    tampered = export[:middle] + bytes([export[middle] ^ 1]) + export[middle + 1 :]
    balanced = _ledger_balances(client, demo.market, statement)
    demo.market.stop()
    return Outcome(
        accuracy_before=metrics["accuracy_before"],
        accuracy_after=metrics["accuracy_after"],
        steps_lost=max(loss.step - loss.start_step, 0),
        checkpoint_interval_steps=demo.plan.interval_steps,
        recovery_seconds=round((loss.resumed_at_s or float("inf")) - loss.killed_at_s, 2),
        detection_seconds=round((loss.noticed_at_s or float("inf")) - loss.killed_at_s, 2),
        weights_identical=all(same.values()),
        charged_ucr=statement.charged_ucr,
        lost_work_charged_ucr=statement.lost_work_charged_ucr,
        lost_work_device_ms=sum(charge.lost_device_ms for charge in statement.charges),
        receipts_verified=verdict.holds,
        receipt_checks=verdict.checks,
        tampered_receipts_refused=not verify_export(tampered, broker=demo.market.broker_id).holds,
        ledger_balanced=balanced,
        nothing_left_running=not demo.market.run_processes() and not demo.market.containers(),
        job_state=str(view.state),
        runner=demo.runner,
        runner_reason=why,
        elapsed_seconds=round(time.monotonic() - began, 1),
    )


def _ledger_balances(client: "Client", market: LocalMarket, statement: "StatementView") -> bool:
    """Say whether all that was deposited is accounted for: what the renter has left, what the
    providers have earned, and the broker's fees."""
    from sublet.client import Client
    from sublet_contracts.keys import SigningKey

    earned_ucr = 0
    for name in market.agents:
        key = SigningKey.load_or_create(market.root / name / "key")
        with Client(broker=market.url, config_dir=market.root / "config" / name, key=key) as owner:
            earned_ucr += owner.earnings().earned_ucr
    fees_ucr = sum(charge.fee_ucr for charge in statement.charges)
    balance = client.balance()
    return (
        balance.held_ucr == 0
        and balance.available_ucr + earned_ucr + fees_ucr == FUNDS * UCR_PER_CREDIT
        and earned_ucr + fees_ucr == statement.charged_ucr
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sublet demo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a numpy model, in half a minute")
    parser.add_argument("--runner", choices=("auto", "docker", "process"), default="auto")
    parser.add_argument("--build-dir", default="build", help="for data and logs (default: build)")
    parser.add_argument("--json-file", default="build/demo.json", help="where the figures go")
    return parser


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _as_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
