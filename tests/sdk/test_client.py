"""The client against a real broker and a real agent."""

import asyncio
import threading
from pathlib import Path

import pytest

from sublet import aio
from sublet.client import Client, Job
from sublet.config import ConfigError
from sublet.errors import BrokerAway, SubletError
from sublet.running import run
from sublet.terminal.follow import follow
from sublet.transfers import InputError, OnBytes
from sublet.units import UnitError
from sublet_contracts.export import verify_export
from tests.sdk.market import SCRIPT, SmallMarket

WISHES = {"gpus": "cpu", "memory": "256MB", "disk": "256MB", "cpus": 0.5}


def submit(market: SmallMarket, *command: str, name: str) -> Job:
    """Submit a command that needs nothing."""
    return market.client.run(
        image="local/python",
        command=command,
        max_price=1,
        budget=1,
        name=name,
        stop_grace="1s",
        **WISHES,
    )


def test_run_by_the_function_follow_and_download(
    at_market: SmallMarket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = run(
        "local/python",
        [
            *("python3", "/job/training_job.py", "--steps", "10", "--every", "5"),
            *("--pace-s", "0.05", "--out", "/out"),
        ],
        max_price="0.40",
        budget=1,
        gpus="cpu",
        memory="256MB",
        disk="256MB",
        cpus=0.5,
        inputs={str(SCRIPT): "/job/training_job.py"},
        outputs="/out",
        name="by-function",
    )
    view = job.follow()
    assert view.state == "succeeded"
    shown = capsys.readouterr()
    lines = [line for line in shown.out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == [str(i) for i in range(1, 11)]
    assert "alice takes the job at 0.40" in shown.err
    files = job.download(tmp_path / "out")
    assert [file.name for file in files] == ["weights.json"]
    assert verify_export(job.export(), broker=at_market.client.broker).problems == []
    assert at_market.client.job("by-function").id == job.id
    assert job.statement().charged_ucr == job.view().charged_ucr > 0


def test_a_failed_command_is_a_failed_job(market: SmallMarket) -> None:
    view = submit(market, "python3", "-c", "raise SystemExit(3)", name="fails").wait()
    assert view.state == "failed"


def test_leaving_a_job_does_not_end_it(market: SmallMarket) -> None:
    job = submit(market, "python3", "-c", "import time; time.sleep(60)", name="left")
    stop = threading.Event()
    stop.set()
    try:
        assert follow(job, stop).state not in ("succeeded", "failed", "cancelled")
    finally:
        job.cancel()
    assert job.wait().state == "cancelled"


def test_the_async_twin_does_the_same(at_market: SmallMarket) -> None:
    async def story() -> None:
        async with aio.AsyncClient() as client:
            assert client.party == at_market.client.party
            job = await client.run(
                image="local/python",
                command=["python3", "-c", "print('one'); print('two')"],
                max_price=1,
                budget=1,
                name="async",
                **WISHES,
            )
            lines = [line.text async for line in job.logs(follow=True)]
            view = await job.wait()
            assert view.state == "succeeded"
            assert lines == ["one", "two"]
            assert (await client.job("async")).id == job.id
            with pytest.raises(SubletError):
                await client.job("no-such-job")

    asyncio.run(story())


def test_no_match_and_too_little_money_hold_nothing(market: SmallMarket) -> None:
    before = market.client.balance()
    command = {"image": "local/python", "command": ["true"]}
    for wishes, code in (
        ({**WISHES, "gpus": "8x80GB", "max_price": 1, "budget": 1}, "no_match"),
        ({**WISHES, "max_price": 1, "budget": 500}, "over_balance"),
    ):
        with pytest.raises(SubletError) as refused:
            market.client.run(**command, **wishes, wait_for_offer=False)
        assert refused.value.problem.code == code
        assert refused.value.fix
    with pytest.raises(SubletError, match="a minute"):
        market.client.run(**command, **WISHES, max_price=1, budget="0.001")
    after = market.client.balance()
    assert (after.available_ucr, after.held_ucr) == (before.available_ucr, before.held_ucr)


def test_a_job_is_queued_where_nobody_could_take_it(market: SmallMarket) -> None:
    wanted = {**WISHES, "gpus": "8x80GB", "max_price": 1, "budget": 1, "name": "waits"}
    job = market.client.run(image="local/python", command=["true"], **wanted)
    try:
        assert job.view().state == "queued"
    finally:
        job.cancel()


def test_inputs_that_cannot_be_sent(market: SmallMarket, tmp_path: Path) -> None:
    jobs = len(market.client.jobs().jobs)
    common = {"image": "local/python", "command": ["true"], "max_price": 1, "budget": 1, **WISHES}
    with pytest.raises(InputError, match="no such file"):
        market.client.run(**common, inputs={str(tmp_path / "nope"): "/in"})
    changing = tmp_path / "changing.bin"
    changing.write_bytes(b"a" * 1000)

    def announce(what: str, total_bytes: int) -> OnBytes:
        # It has been hashed by now, and is read once more to be sent.
        changing.write_bytes(b"b" * 1000)
        return lambda count_bytes: None

    with pytest.raises(InputError, match="changed while it was sent"):
        market.client.run(**common, inputs={str(changing): "/in"}, announce=announce)
    with pytest.raises(UnitError, match="gpus"):
        market.client.run(**{**common, "gpus": "lots"})
    assert len(market.client.jobs().jobs) == jobs


def test_a_broker_that_is_away_or_another_than_before(market: SmallMarket, tmp_path: Path) -> None:
    lost = Client("http://127.0.0.1:9", config_dir=tmp_path, away_limit_s=0.3)
    with lost, pytest.raises(BrokerAway, match="no answer"):
        lost.balance()
    with Client(market.local.url, config_dir=tmp_path) as client:
        client.profile.pin(client.url, "ed25519-" + "0" * 64)
        with pytest.raises(ConfigError, match="used to be"):
            client.balance()


def test_fund_needs_a_key_that_is_there(market: SmallMarket, tmp_path: Path) -> None:
    mistyped = tmp_path / "brokre.key"
    with pytest.raises(ConfigError, match="no such file"):
        market.client.fund(market.client.party, 1, operator_key=mistyped)
    assert not mistyped.exists()
