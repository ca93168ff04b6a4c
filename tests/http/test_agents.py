"""The agents' websocket, with a small agent that walks a job from submission to settlement."""

from __future__ import annotations

import asyncio
import threading

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from sublet_broker.adapters.http.agent_socket import MAX_QUEUED
from sublet_contracts.digests import digest_of
from sublet_contracts.documents import sign_document
from sublet_contracts.export import verify_export
from sublet_contracts.reasons import Reason
from sublet_contracts.session import SessionError
from sublet_contracts.wire import Announce, Assign, Message, SettlementNotice, Withdraw
from tests.http.fake_agent import FakeAgent, Run, lines_of
from tests.http.world import WAIT_S, Party, World, signed_body, until


async def start(world: World, agent: FakeAgent) -> tuple[Party, dict[str, object], Run]:
    """Bring a job onto the agent."""
    await agent.party.introduce()
    await agent.join()
    await agent.offer()
    renter = await world.renter()
    answer = await renter.post("/v1/jobs", renter.job())
    assert answer.status_code == 201, answer.text
    return renter, answer.json(), await agent.accept()


async def state(renter: Party, job: str, wanted: str) -> dict[str, object]:
    """Wait until the job is in that state; return it."""
    view: dict[str, object] = {}

    async def is_there() -> bool:
        view.update((await renter.get(f"/v1/jobs/{job}")).json())
        return view["state"] == wanted

    await until(is_there)
    return view


async def test_a_job_from_submission_to_settlement(world: World) -> None:
    async with FakeAgent(world, world.party()) as agent:
        renter, job, run = await start(world, agent)
        id = str(job["id"])
        await run.state("running")
        await state(renter, id, "running")
        await run.log("step 1", "step 2")
        run.device_ms = 40
        assert (await run.checkpoint(1, b"weights at 1")).durable
        await run.receipt()
        await run.heartbeat(2)
        run.device_ms = 60
        assert (await run.checkpoint(2, b"result", kind="outputs")).durable
        await run.state("exited", reason=Reason.SUCCEEDED, exit_code=0)
        await run.receipt(final=Reason.SUCCEEDED)
        await agent.wait_for(SettlementNotice)
        view = await state(renter, id, "succeeded")
        assert view["durable_step"] == 1
        statement = (await renter.get(f"/v1/jobs/{id}/statement")).json()
        assert len(statement["charges"]) == 1
        assert statement["held_ucr"] == 0
        assert statement["charged_ucr"] == view["charged_ucr"]
        index = view["outputs_index_digest"]
        content = await renter.get(f"/v1/jobs/{id}/blobs/{index}")
        assert digest_of(content.content) == index
        log = await renter.get(f"/v1/jobs/{id}/logs?follow=true")
        assert [line["text"] for line in lines_of(log.text)] == ["step 1", "step 2"]
        export = await renter.get(f"/v1/jobs/{id}/export")
        verify_export(export.content, broker=world.id)
        assert world.broker.ledger_audit.breaches() == []
        metrics = (await world.http.get(world.url + "/metrics")).text
        assert "sublet_job_queue_wait_seconds_count 1.0" in metrics
        assert 'sublet_jobs{state="succeeded"} 1.0' in metrics


async def test_a_stale_epoch_writes_nothing(world: World) -> None:
    async with FakeAgent(world, world.party()) as agent:
        _, job, run = await start(world, agent)
        target = f"/v1/jobs/{job['id']}/blobs/" + digest_of(b"x")
        epoch = run.lease.epoch
        for header, good in ((epoch, True), (epoch + 1, False)):
            answer = await agent.party.call("PUT", target, b"x", Sublet_Epoch=str(header))
            assert (answer.status_code == 204) == good, answer.text
        assert (await world.party().call("PUT", target, b"x")).status_code in (403, 404)


async def test_the_door_refuses_and_says_why(world: World) -> None:
    agent = FakeAgent(world, world.party())
    async with agent:
        frame = await agent.socket.recv()
        assert isinstance(frame, str)
        _, join = agent.session.receive(frame.encode(), world.clock.now_ms())
        assert join is not None
        # A proof that was made for this connection is of no use on another one.
        async with connect(world.ws_url) as other:
            await other.recv()
            await other.send(join.decode())
            refused = await other.recv()
            assert "bad_proof" in str(refused)
            with pytest.raises(ConnectionClosed):
                await other.recv()


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("not json", "bad_frame"),
        ('{"type":"ack","mid":null,"body":{"mids":[]}}', "out_of_turn"),
    ],
)
async def test_broken_frames(world: World, frame: str, code: str) -> None:
    async with connect(world.ws_url) as socket:
        await socket.recv()
        await socket.send(frame)
        assert code in str(await socket.recv())
        with pytest.raises(ConnectionClosed):
            await socket.recv()


async def test_a_frame_over_the_limit_closes_the_connection(world: World) -> None:
    async with connect(world.ws_url) as socket:
        await socket.recv()
        await socket.send("x" * (1024 * 1024 + 1))
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009


async def test_a_newer_instance_replaces_the_older(world: World) -> None:
    party = world.party()
    await party.introduce()
    async with FakeAgent(world, party) as older:
        await older.join()
        async with FakeAgent(world, party) as newer:
            await newer.join()
            with pytest.raises(SessionError) as refused:
                await older.until_closed()
            assert refused.value.code == "stale_instance"
            await newer.offer()
            assert len(world.hub.connections) == 1


async def test_the_same_instance_reconnects(world: World) -> None:
    """A line that died unnoticed is replaced without a word about two agents."""
    party = world.party()
    await party.introduce()
    async with FakeAgent(world, party) as older:
        await older.join()
        async with FakeAgent(world, party, older.instance) as newer:
            await newer.join()
            with pytest.raises(ConnectionClosed):
                await older.step()
            await newer.offer()


async def test_what_is_not_acknowledged_comes_again_on_the_next_connection(world: World) -> None:
    party = world.party()
    await party.introduce()
    renter = await world.renter()
    async with FakeAgent(world, party) as first:
        first.answers_acks = False
        await first.join()
        await first.offer()
        await renter.post("/v1/jobs", renter.job())
        assign = await first.wait_for(Assign)
    async with FakeAgent(world, party, first.instance) as second:
        await second.join()
        again = await second.wait_for(Assign)
        assert again.lease == assign.lease
        await until(lambda: not world.broker.outbox.pending(party.id))


async def test_a_match_waits_for_no_tick(world: World) -> None:
    """With all periods out of the way, submitting alone brings the lease."""
    for loop in world.edge.loops.all.values():
        loop.period_s = 3600
    async with FakeAgent(world, world.party()) as agent:
        await start(world, agent)


async def test_agents_are_sent_away_with_service_restart(world: World) -> None:
    async with FakeAgent(world, world.party()) as agent:
        await agent.party.introduce()
        await agent.join()
        world.stop.set()
        with pytest.raises(ConnectionClosed) as closed:
            await agent.until_closed()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012


async def test_a_wrong_offer_is_refused_with_a_reason(world: World) -> None:
    async with FakeAgent(world, world.party()) as agent:
        await agent.join()
        wrong = sign_document(agent.party.offer(broker="ed25519-" + "3" * 64), agent.party.key)
        await agent.send(Announce(offer=wrong.envelope))
        with pytest.raises(SessionError) as refused:
            await agent.until_closed()
        assert "broker" in refused.value.detail


async def test_following_a_log(world: World) -> None:
    async with FakeAgent(world, world.party()) as agent:
        renter, job, run = await start(world, agent)
        id = job["id"]
        await run.state("running")
        target = f"/v1/jobs/{id}/logs?follow=true"
        got: list[str] = []
        headers = renter.sign("GET", target)
        async with world.http.stream("GET", world.url + target, headers=headers) as stream:
            assert stream.status_code == 200
            lines = stream.aiter_lines()

            async def next_texts(count: int) -> list[str]:
                texts: list[str] = []
                async with asyncio.timeout(WAIT_S):
                    while len(texts) < count:
                        texts += [line["text"] for line in lines_of(await anext(lines))]
                return texts

            for number in range(3):
                await run.log(f"line {number}")
                got += await next_texts(1)
            assert world.edge.feeds.followers == 1
        assert got == ["line 0", "line 1", "line 2"]
        await run.log("line 3")
        # A resumed reader starts after the cursor it has.
        rest: list[dict[str, object]] = []

        async def has_come() -> bool:
            rest[:] = lines_of((await renter.get(f"/v1/jobs/{id}/logs?after=3")).text)
            return bool(rest)

        await until(has_come)
        assert [line["text"] for line in rest] == ["line 3"]
        stranger = world.party()
        await stranger.introduce()
        assert (await stranger.get(f"/v1/jobs/{id}/logs")).status_code == 404
        await until(lambda: not world.edge.feeds.followers)


async def test_following_a_line_that_is_being_written(world: World) -> None:
    async with FakeAgent(world, world.party()) as agent:
        renter, job, run = await start(world, agent)
        id = job["id"]
        await run.state("running")
        await run.heartbeat(1)
        target = f"/v1/jobs/{id}/logs?follow=true&unfinished=true"
        headers = renter.sign("GET", target)
        async with world.http.stream("GET", world.url + target, headers=headers) as stream:
            lines = stream.aiter_lines()

            async def next_line() -> tuple[object, object]:
                async with asyncio.timeout(WAIT_S):
                    while not (found := lines_of(await anext(lines))):
                        continue
                [line] = found
                return line["text"], line["unfinished"]

            await run.log("begins")
            assert await next_line() == ("begins", False)
            for text in ("10%", "20%"):
                await run.stands(text)
                assert await next_line() == (text, True)
            # Who doesn't follow sees it as well, at the end; who doesn't ask for it, does not.
            for more, texts in (("&unfinished=true", ["begins", "20%"]), ("", ["begins"])):
                answer = await renter.get(f"/v1/jobs/{id}/logs?after=0{more}")
                assert [line["text"] for line in lines_of(answer.text)] == texts
            await run.log("100%")
            assert await next_line() == ("100%", False)
            # A state that is wiped away leaves an empty place.
            await run.stands("Continue?")
            assert await next_line() == ("Continue?", True)
            await run.stands()
            assert await next_line() == ("", True)


async def test_a_log_is_read_from_where_it_is_asked(world: World) -> None:
    async with FakeAgent(world, world.party()) as agent:
        renter, job, run = await start(world, agent)
        await run.log(*(str(i) for i in range(30)))
        await run.state("running")
        path = f"/v1/jobs/{job['id']}/logs"

        async def texts(query: str) -> list[object]:
            answer = await renter.get(f"{path}?{query}")
            assert answer.status_code == 200, answer.text
            return [line["text"] for line in lines_of(answer.text)]

        await until(lambda: len(world.broker.views.logs(renter.key.party, job["id"])) == 30)
        assert await texts("tail=3") == ["27", "28", "29"]
        assert await texts("tail=3&run=1") == ["27", "28", "29"]
        assert await texts("tail=3&after=28") == ["28", "29"]
        assert await texts("since_ms=0&tail=1") == ["29"]
        assert await texts(f"since_ms={world.clock.now_ms() + 60_000}") == []
        missing = await renter.get(f"{path}?run=2")
        assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
        assert missing.json()["facts"] == {"what": "run", "ref": "2"}
        for bad in ("tail=-1", "run=0", "since_ms=x", f"tail={2**60}"):
            assert (await renter.get(f"{path}?{bad}")).status_code == 422


async def test_a_long_log_comes_whole_and_in_order(world: World) -> None:
    async with FakeAgent(world, world.party()) as agent:
        renter, job, run = await start(world, agent)
        for batch in range(6):
            await run.log(*(f"{batch * 300 + i}" for i in range(300)))
        await run.state("running")
        answer = await renter.get(f"/v1/jobs/{job['id']}/logs")
        assert [line["text"] for line in lines_of(answer.text)] == [str(i) for i in range(1800)]


async def test_cancel_ends_the_log_of_a_job_that_never_ran(world: World) -> None:
    renter = await world.renter()
    body = signed_body(renter.job(), renter.key)
    job = (await renter.call("POST", "/v1/jobs?wait=true", body)).json()["id"]
    answer = await renter.call("POST", f"/v1/jobs/{job}/cancel")
    assert answer.json()["state"] == "cancelled", answer.text
    log = await renter.get(f"/v1/jobs/{job}/logs?follow=true")
    assert lines_of(log.text) == []


async def test_pings_are_answered_while_the_use_cases_are_slow(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent hangs up when no pong comes: what it sent before must not hold up the answer."""
    release = threading.Event()
    slow = world.broker.sessions.receive

    def receive(party: str, instance: str, message: Message) -> list[Message]:
        release.wait(WAIT_S)
        return slow(party, instance, message)

    async with FakeAgent(world, world.party()) as agent:
        await agent.join()
        monkeypatch.setattr(world.broker.sessions, "receive", receive)
        mids = [await agent.send(Withdraw(offer_sequence=number)) for number in range(20)]
        pong = await agent.socket.ping()
        await asyncio.wait_for(pong, WAIT_S)
        assert not release.is_set()
        assert not agent.acknowledged
        release.set()
        while not agent.acknowledged.issuperset(mids):
            await agent.step()


async def test_who_sends_more_than_is_read_ahead_is_held_back_and_loses_nothing(
    world: World,
) -> None:
    async with FakeAgent(world, world.party()) as agent:
        await agent.join()
        mids = [
            await agent.send(Withdraw(offer_sequence=number)) for number in range(3 * MAX_QUEUED)
        ]
        while not agent.acknowledged.issuperset(mids):
            await agent.step()
