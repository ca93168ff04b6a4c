"""What one look at the machine says, and that it always ends: on a stand-in for the driver's
library that loses its GPUs, hangs, and records faults."""

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from sublet_agent.adapters.machine.facts import Look, Machine
from sublet_agent.adapters.machine.gpu_helper import GpuHelper
from sublet_agent.adapters.machine.nvml import Fault, GpuProbe
from sublet_agent.adapters.machine.watch import Watch
from sublet_agent.adapters.options import UsageError, read_options
from sublet_agent.adapters.process.runner import ProcessRunner
from sublet_agent.core import events
from sublet_agent.core.device_faults import JOBS_OWN, NOTES, says_of_xid
from sublet_agent.core.supply import Facts
from tests.agent.nvml_stub import CARDS, Driver

LIMIT_S = 20.0
LOST, UNKNOWN, MISMATCH = 15, 999, 18


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    return Driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def driver(built: Driver, monkeypatch: pytest.MonkeyPatch) -> Driver:
    built.says()
    for name, value in built.environment.items():
        monkeypatch.setenv(name, value)
    return built


@pytest.fixture
def helper(driver: Driver) -> Iterator[GpuHelper]:
    helper = GpuHelper()
    yield helper
    helper.close()


def uuids(found: GpuProbe) -> list[str]:
    return [gpu.uuid for gpu in found.gpus]


def test_a_lost_gpu_is_the_only_one_that_is_missing_and_comes_back(
    driver: Driver, helper: GpuHelper
) -> None:
    assert uuids(helper.look(LIMIT_S)) == [*CARDS]
    driver.says(err1=LOST)
    found = helper.look(LIMIT_S)
    assert uuids(found) == [CARDS[0]]
    assert [(u.index, u.says, u.certain_after_ms) for u in found.unreadable] == [
        (1, "GPU is lost", 0)
    ]
    driver.says()
    assert uuids(helper.look(LIMIT_S)) == [*CARDS]


@pytest.mark.parametrize(
    ("told", "word", "certain_after_ms"),
    [
        ({"all": UNKNOWN}, "Unknown Error", 60_000),
        ({"init": MISMATCH, "all": MISMATCH}, "RM has detected an NVML/RM version mismatch.", None),
    ],
)
def test_a_driver_that_says_nothing_of_any(
    driver: Driver,
    helper: GpuHelper,
    told: dict[str, int],
    word: str,
    certain_after_ms: int | None,
) -> None:
    helper.look(LIMIT_S)
    driver.says(**told)
    found = helper.look(LIMIT_S)
    assert (found.gpus, found.trouble) == ((), word)
    assert found.certain_after_ms == certain_after_ms
    driver.says()
    assert uuids(helper.look(LIMIT_S)) == [*CARDS]


def test_a_call_that_hangs_costs_its_limit_and_the_helper(
    driver: Driver, helper: GpuHelper
) -> None:
    helper.look(LIMIT_S)
    driver.says(hang1=1)
    began = time.monotonic()
    found = helper.look(0.3)
    assert time.monotonic() - began < 2.0
    assert (found.gpus, found.trouble) == ((), "the driver gives no answer within 0.3 s")
    # The next one is asked in a new process; while that one waits too, looks end all the same.
    began = time.monotonic()
    assert helper.look(0.3).trouble
    assert time.monotonic() - began < 2.0
    driver.says()
    assert uuids(helper.look(LIMIT_S)) == [*CARDS]


def test_a_helper_that_is_killed_is_replaced(driver: Driver, helper: GpuHelper) -> None:
    helper.look(LIMIT_S)
    process = helper._process
    assert process is not None
    process.kill()
    process.wait()
    assert "has ended" in helper.look(LIMIT_S).trouble
    assert uuids(helper.look(LIMIT_S)) == [*CARDS]


def test_records_of_faults_are_told_once_and_a_jobs_own_are_not(
    driver: Driver, helper: GpuHelper
) -> None:
    helper.look(LIMIT_S)
    driver.says(xids=3, xid0=31, xid1=1079, xid2=43)
    [fault] = helper.look(LIMIT_S).faults
    assert (fault.uuid, fault.says) == (
        CARDS[1],
        "the driver recorded Xid 79: it has fallen off the bus",
    )
    assert helper.look(LIMIT_S).faults == ()
    # The GPU is lost by the time that its record is read: it can't say any more who it is.
    driver.says(xids=4, xid3=79, err0=LOST)
    assert [fault.uuid for fault in helper.look(LIMIT_S).faults] == [CARDS[0]]


def test_memory_errors_that_can_not_be_corrected_count_from_the_first_look_on(
    driver: Driver, helper: GpuHelper
) -> None:
    driver.says(ecc0=2)
    assert helper.look(LIMIT_S).faults == ()
    driver.says(ecc0=5)
    [fault] = helper.look(LIMIT_S).faults
    assert fault.uuid == CARDS[0]
    assert fault.says == "its memory has 3 more errors that can't be corrected"


def test_a_fault_of_a_gpu_is_one_of_all_its_instances(driver: Driver, helper: GpuHelper) -> None:
    driver.says(mig0=2)
    assert uuids(helper.look(LIMIT_S)) == ["MIG-0-0", "MIG-0-1", CARDS[1]]
    driver.says(mig0=2, ecc0=1)
    assert [fault.uuid for fault in helper.look(LIMIT_S).faults] == ["MIG-0-0", "MIG-0-1"]


@pytest.mark.parametrize("number", sorted(JOBS_OWN | NOTES))
def test_records_that_accuse_no_machine(number: int) -> None:
    assert says_of_xid(number) == ""


@pytest.mark.parametrize("number", [48, 62, 74, 79, 94, 95, 119, 140, 999])
def test_records_that_do(number: int) -> None:
    assert f"Xid {number}" in says_of_xid(number)


# -- which of them belong to the offer -------------------------------------------------------------


class Offered:
    """A machine with this driver, as `sublet provide` looks at it."""

    def __init__(self, driver: Driver, folder: Path, *arguments: str) -> None:
        self.driver = driver
        self.said: list[str] = []
        options = read_options(
            ["--broker", "http://broker.example", "--state", str(folder), *arguments]
        )
        self.machine = Machine(options, ProcessRunner("owner", folder))

    def first(self) -> list[str]:
        self.facts = self.machine.first(self.said.append)
        return ids(self.facts)

    def then(self, **told: int) -> list[str]:
        self.driver.says(**told)
        self.facts = self.machine.look().facts
        return ids(self.facts)


def ids(facts: Facts) -> list[str]:
    return [seen.device.id for seen in facts.devices]


@pytest.fixture
def offered(driver: Driver, tmp_path: Path) -> Iterator[Callable[..., Offered]]:
    made: list[Offered] = []

    def provide(*arguments: str) -> Offered:
        made.append(Offered(driver, tmp_path, *arguments))
        return made[-1]

    yield provide
    for one in made:
        one.machine.close()


def test_a_number_stays_with_its_card_when_one_is_lost(
    driver: Driver, offered: Callable[..., Offered]
) -> None:
    driver.says(count=3)
    two = offered("--devices", "0,1")
    assert two.first() == ["GPU-0-0", "GPU-1-0"]
    assert two.then(count=3, err0=LOST) == ["GPU-1-0"]
    # Another card bears the number now: it is the owner's all the same.
    assert two.then(count=3, card0=7) == ["GPU-1-0"]
    assert [one.says for one in two.facts.missing] == ["the driver no longer lists it"]
    assert two.then(count=3) == ["GPU-0-0", "GPU-1-0"]


def test_a_number_that_can_not_be_read_at_the_start_is_no_other_cards(
    driver: Driver, offered: Callable[..., Offered]
) -> None:
    driver.says(count=3, err0=LOST)
    two = offered("--devices", "0,1")
    assert two.first() == ["GPU-1-0"]
    assert "GPU 0 can't be read: GPU is lost" in two.said
    assert two.then(count=3) == ["GPU-0-0", "GPU-1-0"]


def test_instances_do_not_move_the_numbers_of_cards(
    driver: Driver, offered: Callable[..., Offered]
) -> None:
    driver.says(count=3, mig0=2)
    assert offered("--devices", "1").first() == ["GPU-1-0"]
    assert offered("--devices", "0").first() == ["MIG-0-0", "MIG-0-1"]
    assert offered("--devices", "0:1,2").first() == ["MIG-0-1", "GPU-2-0"]
    with pytest.raises(UsageError) as caught:
        offered("--devices", "0:2").first()
    assert str(caught.value) == (
        "--devices: no GPU 0:2 here; there are: 0:0 (MIG-0-0), 0:1 (MIG-0-1), 1 (GPU-1-0), "
        "2 (GPU-2-0)"
    )


def test_all_are_offered_as_they_come_and_go(
    driver: Driver, offered: Callable[..., Offered]
) -> None:
    every = offered()
    assert every.first() == [*CARDS]
    assert every.then(all=UNKNOWN) == []
    assert {one.id: one.says for one in every.facts.missing} == dict.fromkeys(
        CARDS, "Unknown Error"
    )
    assert every.then(count=1) == [CARDS[0]]
    assert every.then(card0=7) == ["GPU-0-7", CARDS[1]]
    assert [one.id for one in every.facts.missing] == [CARDS[0]]


def test_a_gpu_without_memory_of_its_own_has_the_machines_and_its_owner_is_told(
    driver: Driver, offered: Callable[..., Offered]
) -> None:
    driver.says(count=1, nomem0=1)
    one = offered("--memory", "2GB")
    one.first()
    assert one.facts.devices[0].shares_main_memory
    assert one.said == [
        "GPU-0-0 has no memory of its own and uses the machine's: 2 GB are offered as both"
    ]


def test_what_others_use_of_a_gpu_is_seen(driver: Driver, offered: Callable[..., Offered]) -> None:
    driver.says(used1=19_000_000_000)
    one = offered()
    one.first()
    assert [seen.used_bytes for seen in one.facts.devices] == [0, 19_000_000_000]


@pytest.mark.parametrize(("option", "what"), [("--memory", "this machine has"), ("--disk", "free")])
def test_more_than_there_is_is_refused_in_words(
    offered: Callable[..., Offered], option: str, what: str
) -> None:
    with pytest.raises(UsageError) as caught:
        offered("--cpu", option, "900TB").first()
    assert str(caught.value).startswith(f"{option}: ")
    assert what in str(caught.value)
    assert "900 TB are asked for: offer less" in str(caught.value)


def test_what_own_runs_hold_of_the_disk_counts_as_there(
    offered: Callable[..., Offered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an agent that runs something could not be started again with the same options."""
    held = tmp_path / "runs" / "one"
    held.mkdir(parents=True)
    (held / "checkpoint").write_bytes(bytes(1_000_000))
    free_bytes = shutil.disk_usage(tmp_path).free
    few = shutil.disk_usage(tmp_path)._replace(free=500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: few)
    assert free_bytes > 0
    offered("--cpu", "--disk", "1MB").first()
    with pytest.raises(UsageError):
        offered("--cpu", "--disk", "2MB").first()


def test_what_renters_images_hold_counts_as_there(
    offered: Callable[..., Offered], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are let go when a job needs the room, and must not keep an agent from starting again."""
    few = shutil.disk_usage(tmp_path)._replace(free=500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: few)
    monkeypatch.setattr(ProcessRunner, "images_hold_bytes", lambda *_: 600_000)
    one = offered("--cpu", "--disk", "1MB")
    one.first()
    one.then()
    assert one.facts.disk_free_bytes == 1_100_000


def test_an_engine_that_is_silent_costs_its_limit_and_is_asked_once(
    offered: Callable[..., Offered], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    answers = threading.Event()

    def check(_runner: ProcessRunner) -> None:
        asked.append(time.monotonic())
        answers.wait(LIMIT_S)

    monkeypatch.setattr(ProcessRunner, "check", check)
    monkeypatch.setattr("sublet_agent.adapters.machine.facts.LIMIT_S", 0.2)
    one = offered("--cpu")
    one.first()
    one.then()
    one.then()
    assert (one.facts.engine, len(asked)) == ("no answer within 0.2 s", 1)
    answers.set()
    one.then()
    assert one.facts.engine == ""


# -- again and again -------------------------------------------------------------------------------


class Heard:
    """Who takes what a watch sees."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.events: asyncio.Queue[events.Event] = asyncio.Queue()
        self.now_ms = lambda: int(time.monotonic() * 1000)

    def say(self, text: str) -> None:
        self.lines.append(text)

    def post(self, event: events.Event) -> None:
        self.events.put_nowait(event)


async def test_a_watch_tells_faults_before_facts_and_outlives_a_look_that_fails() -> None:
    facts = Facts((), 1, 1, 1, 1)
    looks: list[Look | OSError] = [
        OSError("no such folder"),
        OSError("no such folder"),
        Look(facts, (Fault("GPU-1", "Xid 79"),)),
    ]

    class Scripted:
        def look(self) -> Look:
            seen = looks.pop(0) if looks else Look(facts)
            if isinstance(seen, OSError):
                raise seen
            return seen

    heard = Heard()
    watch = Watch(cast(Machine, Scripted()), heard, facts, lambda: 10)
    watch.begin()
    running = asyncio.create_task(watch.run())
    try:
        said = [await asyncio.wait_for(heard.events.get(), 20) for _ in range(4)]
    finally:
        running.cancel()
        watch.close()
    assert [type(event) for event in said] == [
        events.FactsRead,
        events.DeviceFailed,
        events.FactsRead,
        events.FactsRead,
    ]
    assert len(heard.lines) == 1
    assert "no such folder" in heard.lines[0]


async def test_who_waits_for_a_look_gets_one_that_began_after_he_asked() -> None:
    began = threading.Event()
    goes_on = threading.Event()
    facts = Facts((), 1, 1, 1, 1)

    class Slow:
        def look(self) -> Look:
            began.set()
            goes_on.wait(20)
            return Look(facts)

    heard = Heard()
    watch = Watch(cast(Machine, Slow()), heard, facts, lambda: 10)
    running = asyncio.create_task(watch.run())
    try:
        await asyncio.to_thread(began.wait, 20)
        await asyncio.sleep(0.01)
        asked_ms = heard.now_ms()
        watch.look_now()
        goes_on.set()
        first, second = [await asyncio.wait_for(heard.events.get(), 20) for _ in range(2)]
    finally:
        running.cancel()
        watch.close()
    assert isinstance(first, events.FactsRead)
    assert isinstance(second, events.FactsRead)
    assert first.looked_ms < asked_ms <= second.looked_ms
