"""What the owner sees of his agent: one document for `sublet provider status --json`, for its
words, and for the live picture of `sublet provide`. Its keys are stable; new ones may come.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sublet_agent.core.agent import AgentCore, devices_in_use
from sublet_agent.core.metering import charge_ucr
from sublet_agent.core.run_phases import RunPhase
from sublet_contracts.documents import Device
from sublet_contracts.reasons import Reason
from sublet_contracts.rules import fee_ucr


class _View(BaseModel):
    model_config = ConfigDict(frozen=True)


class Connection(_View):
    """How it stands between agent and broker."""

    connected: bool
    since_ms: int = Field(description="since when it is so")
    trouble: str = Field(default="", description="why there is no connection; '' if there is one")


class Income(_View):
    """What the settlements on this machine's disk add up to."""

    earned_ucr: int = 0
    leases: int = 0


class DeviceStatus(_View):
    """One device on the market."""

    id: str
    kind: str
    name: str
    memory_bytes: int
    lease: str | None = Field(description="the lease that holds it; null: it is free")
    trouble: str = Field(default="", description="why it can't be offered; '' if it can")


class HeldRun(_View):
    """One lease that this machine holds, and the run under it."""

    lease: str
    epoch: int
    job: str
    name: str
    phase: RunPhase
    devices: tuple[str, ...]
    step: int = Field(description="the newest step the job told of")
    total_steps: int = Field(description="0: the job doesn't say")
    durable_step: int
    cum_device_ms: int
    charge_ucr: int = Field(description="what the renter owes for it so far")
    earned_ucr: int = Field(description="what is left of that after the broker's fee")
    reason: Reason | None = Field(description="why it ended; null: it hasn't")


class Status(_View):
    """One running agent. Times in ms since 1970, by the agent's clock."""

    provider: str
    name: str
    broker: str = Field(description="its URL")
    connected: bool
    since_ms: int = Field(description="since when it is connected, or isn't")
    trouble: str = Field(description="why it isn't connected; '' if it is")
    runner: str
    draining: bool = Field(description="nothing is offered, and what runs is asked to stop")
    stopping: bool = Field(description="draining, and the agent ends when all is handed back")
    set_aside: str = Field(
        default="",
        description="what fails, where the agent has taken itself off the market until a start "
        "test passes; '' otherwise",
    )
    engine_trouble: str = Field(default="", description="why its runner can't work; '' if it can")
    waits_for: tuple[str, ...] = Field(
        default=(), description="what a drain waits for, a line each"
    )
    price_ucr_per_device_hour: int
    fee_bps: int | None = Field(
        default=None, description="the broker's share of a charge; null: it has not said so yet"
    )
    net_ucr_per_device_hour: int | None = Field(
        default=None, description="what is left of the price after the fee"
    )
    devices: tuple[DeviceStatus, ...]
    runs: tuple[HeldRun, ...]
    earned_ucr: int = Field(description="by all settlements that this agent has received")
    settled_leases: int
    now_ms: int
    stopped: bool = Field(default=False, description="it has ended since (drain waits for that)")

    @property
    def link(self) -> Literal["connected", "reconnecting", "connecting"]:
        """The connection in a word."""
        if self.connected:
            return "connected"
        return "reconnecting" if self.trouble else "connecting"


def make_status(
    core: AgentCore, *, url: str, connection: Connection, income: Income, now_ms: int
) -> Status:
    """Return how the agent stands."""
    taken = devices_in_use(core.saved.runs)
    price, fee = core.terms.price_ucr_per_device_hour, core.fee_bps
    return Status(
        provider=core.key.party,
        name=core.terms.name,
        broker=url,
        connected=connection.connected,
        since_ms=connection.since_ms,
        trouble=connection.trouble,
        runner=core.terms.runner,
        draining=core.draining is not None,
        stopping=core.draining is not None and core.draining.then_stop,
        set_aside=core.aside.why if core.aside.is_set else "",
        engine_trouble=core.supply.engine,
        waits_for=core.waits_for(),
        price_ucr_per_device_hour=price,
        fee_bps=fee,
        net_ucr_per_device_hour=None if fee is None else price - fee_ucr(price, fee),
        devices=(
            *(_device(device, taken, "") for device in core.terms.devices),
            *(
                _device(core.supply.known.get(id) or _unseen(id), taken, one.says)
                for id, one in core.supply.missing.items()
            ),
        ),
        runs=_runs(core),
        earned_ucr=income.earned_ucr,
        settled_leases=income.leases,
        now_ms=now_ms,
    )


def _device(device: Device, taken: dict[str, str], trouble: str) -> DeviceStatus:
    return DeviceStatus(
        id=device.id,
        kind=device.kind,
        name=device.name,
        memory_bytes=device.memory_bytes,
        lease=taken.get(device.id),
        trouble=trouble,
    )


def _unseen(id: str) -> Device:
    return Device(id=id, kind="gpu", name="GPU", memory_bytes=0, hardware_class="unknown")


def _runs(core: AgentCore) -> tuple[HeldRun, ...]:
    found = []
    for run in core.runs.values():
        record = run.record
        if record.phase is RunPhase.DISCARDED:
            continue
        charge = charge_ucr(record, record.cum_device_ms)
        found.append(
            HeldRun(
                lease=record.lease_id,
                epoch=record.lease.epoch,
                job=record.job_id,
                name=record.job.name,
                phase=record.phase,
                devices=record.lease.device_ids,
                step=max(run.step, record.durable_step),
                total_steps=run.total_steps,
                durable_step=record.durable_step,
                cum_device_ms=record.cum_device_ms,
                charge_ucr=charge,
                earned_ucr=charge - fee_ucr(charge, record.lease.fee_bps),
                reason=record.reason,
            )
        )
    return tuple(found)
