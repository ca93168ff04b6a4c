"""The live picture of `sublet provide`: a Status in, lines out."""

from typing import Any

import pytest

from sublet_agent.adapters.owner.dashboard import status_lines
from sublet_agent.core.run_phases import RunPhase
from sublet_agent.core.status import DeviceStatus, HeldRun, Status

NOW_MS = 1_800_000_000_000


def status(**changes: Any) -> Status:
    found = Status(
        provider="ed25519-" + "ab" * 32,
        name="tower",
        broker="https://broker.example",
        connected=True,
        since_ms=NOW_MS - 200_000,
        trouble="",
        runner="docker",
        draining=False,
        stopping=False,
        price_ucr_per_device_hour=400_000,
        devices=(device("GPU-1f2e3d4c-5b6a", lease="77" * 32), device("GPU-99999999-0000")),
        runs=(run(),),
        earned_ucr=1_234_567,
        settled_leases=12,
        now_ms=NOW_MS,
    )
    return found.model_copy(update=changes)


def device(device_id: str, lease: str | None = None) -> DeviceStatus:
    return DeviceStatus(
        id=device_id, kind="gpu", name="NVIDIA A100-SXM4-80GB", memory_bytes=80 * 2**30, lease=lease
    )


def run(**changes: Any) -> HeldRun:
    found = HeldRun(
        lease="77" * 32,
        epoch=2,
        job="0123456789abcdef" * 4,
        name="fine-tune",
        phase=RunPhase.RUNNING,
        devices=("GPU-1f2e3d4c-5b6a",),
        step=120,
        total_steps=400,
        durable_step=100,
        cum_device_ms=3_725_000,
        charge_ucr=413_888,
        earned_ucr=393_194,
        reason=None,
    )
    return found.model_copy(update=changes)


def drawn(found: Status, width: int = 80, height: int = 24, *, live: bool = True) -> list[str]:
    return [
        line.plain.rstrip() for line in status_lines(found, width=width, height=height, live=live)
    ]


def test_all_that_an_owner_asks_at_80_columns() -> None:
    assert drawn(status())[1:] == [
        "broker    https://broker.example  connected for 3 m 20 s",
        "offers    0.40 credits per device-hour  runner docker",
        "          GPU-1f2e3d4c  NVIDIA A100-SXM4-80GB, 80 GiB  leased to 01234567",
        "          GPU-99999999  NVIDIA A100-SXM4-80GB, 80 GiB  free",
        "runs      job       name       phase       step  durable     time    earned",
        "          01234567  fine-tune  running  120/400      100  1 h 2 m  0.393194",
        "earned    1.234567 credits in all, 12 leases settled   Ctrl-C: drain and stop",
    ]


@pytest.mark.parametrize("width", [20, 33, 44, 60, 79, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    long = run(name="x" * 64, step=10**12, total_steps=10**12, cum_device_ms=10**13)
    found = status(runs=(run(), long), name="n" * 256, broker="https://" + "b" * 300)
    assert all(line.cell_len <= width for line in status_lines(found, width=width, height=24))


def test_the_less_room_the_less_is_said_of_a_run_but_never_half_a_figure() -> None:
    for width, columns in (
        (80, ["job", "name", "phase", "step", "durable", "time", "earned"]),
        (70, ["job", "name", "phase", "step", "time", "earned"]),
        (60, ["job", "name", "phase", "step", "earned"]),
        (50, ["job", "phase", "step", "earned"]),
    ):
        heads, row = (line[10:] for line in drawn(status(), width)[5:7])
        assert heads.split() == columns
        assert row.endswith("0.393194")


def test_the_broker_is_away() -> None:
    lost = status(connected=False, trouble="no connection: nothing answers at broker.example")
    assert drawn(lost)[1:3] == [
        "broker    https://broker.example  reconnecting for 3 m 20 s",
        "          no connection: nothing answers at broker.example",
    ]
    assert "connecting for" in drawn(status(connected=False))[1]


def test_drained_reclaimed_and_offering_nothing_are_told_apart() -> None:
    drains = "\n".join(drawn(status(draining=True, stopping=True)))
    assert "the agent ends when all is handed back" in drains
    assert "Ctrl-C: leave now" in drains
    reclaimed = "\n".join(drawn(status(draining=True)))
    assert "`sublet provider offer` offers again" in reclaimed
    assert "free" not in reclaimed
    assert "--devices none" in "\n".join(drawn(status(devices=())))


def test_many_devices_are_counted_by_kind() -> None:
    eight = tuple(device(f"GPU-{n}", lease="77" * 32 if n < 3 else None) for n in range(8))
    assert "          8 x NVIDIA A100-SXM4-80GB, 80 GiB, 5 free" in drawn(status(devices=eight))


def test_many_runs_leave_room_for_the_rest() -> None:
    runs = tuple(run(phase=RunPhase.ENDED if n < 40 else RunPhase.RUNNING) for n in range(50))
    lines = drawn(status(runs=runs), height=24)
    assert len(lines) < 24
    assert lines[-1].startswith("earned")
    assert "more" in lines[-2]
    # Those that still run are the ones to be seen.
    assert sum("running" in line for line in lines) == 10
    assert len(drawn(status(runs=runs), height=10_000)) > 50


def test_a_strangers_words_move_no_cursor() -> None:
    evil = "a\x1b[2J\r\n\x9b31m\u202eb"
    found = status(
        runs=(run(name=evil),),
        name=evil,
        trouble=evil,
        connected=False,
        devices=(device("GPU-1").model_copy(update={"name": evil}),),
    )
    assert all(line.isprintable() for line in drawn(found))


def test_printed_once_it_names_the_provider_in_full() -> None:
    lines = drawn(status(), width=160, live=False)
    assert lines[0] == "provider  tower  ed25519-" + "ab" * 32
    assert not any("Ctrl-C" in line for line in lines)
    ended = status(stopped=True, runs=(), connected=False)
    assert drawn(ended, live=False) == ["agent     has ended; the devices are free"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"set_aside": "no runtime"}, "nothing until a start test passes: no runtime"),
        ({"engine_trouble": "no answer"}, "nothing while the engine is silent: no answer"),
        ({"net_ucr_per_device_hour": 380_000}, "0.40 credits per device-hour, 0.38 after the fee"),
        ({"waits_for": ("job 0123456789: its settlement",)}, "waits for job 0123456789"),
    ],
)
def test_why_nothing_is_offered_what_is_earned_and_what_is_awaited(
    changes: dict[str, Any], words: str
) -> None:
    assert any(words in line for line in drawn(status(**changes), width=120))


def test_a_device_that_is_gone_is_named_with_its_trouble_among_however_many() -> None:
    gone = device("GPU-deadbeef").model_copy(update={"trouble": "GPU is lost"})
    few = drawn(status(devices=(device("GPU-1"), gone)), width=120)
    assert any("GPU-deadbeef" in line and "not offered: GPU is lost" in line for line in few)
    many = drawn(status(devices=(*(device(f"GPU-{n}") for n in range(7)), gone)), width=120)
    assert any("8 x NVIDIA A100" in line and "7 free" in line for line in many)
    assert any("GPU-deadbeef" in line and "GPU is lost" in line for line in many)
