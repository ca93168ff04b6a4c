"""Bad input gets a clear error that names its field; nobody sees what is not theirs."""

from __future__ import annotations

from typing import Any

import pytest

from sublet.shortfalls import relax_text
from sublet_broker.service.errors import Refusal, StaleInstance
from sublet_contracts.api import MatchRequest
from sublet_contracts.auth import Caller
from sublet_contracts.digests import digest_of
from sublet_contracts.documents import Input, Resources, sign_document
from sublet_contracts.envelope import Envelope
from sublet_contracts.reasons import Reason
from sublet_contracts.requirements import Constraint, Shortfall
from sublet_contracts.rules import minimum_budget_ucr
from sublet_contracts.states import CheckpointState, JobState
from sublet_contracts.wire import Heartbeat
from tests.service.world import PRICE, RenterDouble, World, gpu, key_named, tree_of


def refused(renter: RenterDouble, **changes: Any) -> Refusal:
    before = renter.balance_ucr()
    with pytest.raises(Refusal) as caught:
        renter.submit(wait_for_offer=False, **changes)
    assert renter.balance_ucr() == before
    assert renter.world.broker.views.jobs(renter.party).jobs == ()
    renter.world.audit()
    return caught.value


def test_a_gpu_that_nobody_offers_names_the_constraint_and_the_cheapest_way_out() -> None:
    world = World()
    world.agent("alice", price_ucr_per_device_hour=450_000)
    world.agent("bob", price_ucr_per_device_hour=900_000)
    renter = world.renter()
    error = refused(renter, max_price_ucr_per_device_hour=400_000)
    assert error.code == "no_match"
    assert "price (2)" in error.detail
    assert error.facts == {
        "considered": 2,
        "failures": {"price": 2},
        "shortfalls": [{"constraint": "price", "has": 450_000, "needs": 400_000}],
        "waiting": 0,
    }
    error = refused(renter, resources={"device_memory_bytes": 80 * 10**9})
    assert error.field == "device_memory"
    assert "--" not in error.detail  # The command line is the SDK's.


def test_a_busy_machine_is_waited_for() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    renter.run()
    later = renter.submit()
    world.pass_ms(1_000)
    last = renter.submit(name="last")
    world.step()
    assert renter.view(later).state is JobState.QUEUED
    assert renter.view(later).says == "waits for a machine, next in line for a GPU"
    assert renter.view(last).says == "waits for a machine, number 2 in line for a GPU"
    assert (renter.view(later).place_in_line, renter.view(last).place_in_line) == (1, 2)
    request = MatchRequest(
        resources=renter.job().document.resources, image="", max_price_ucr_per_device_hour=10**9
    )
    found = world.broker.market.match(renter.party, request)
    assert (found.failures, found.waiting) == ({"busy": 1}, 2)
    agent.succeed(agent.the_run)
    world.settle_down()
    assert agent.the_run.job_id == later
    assert renter.view(later).place_in_line is None
    assert renter.view(last).says == "waits for a machine, next in line for a GPU"


def test_who_does_not_want_to_wait_is_refused_where_nothing_is_free() -> None:
    world = World()
    world.agent("alice")
    renter = world.renter()
    renter.submit(wait_for_offer=False)
    world.settle_down()
    renter.submit()
    world.step()
    with pytest.raises(Refusal) as caught:
        renter.submit(wait_for_offer=False)
    error = caught.value
    assert (error.code, error.field) == ("no_match", "busy")
    assert error.detail == (
        "the only machine that would do is busy, "
        "and 1 job waits in line for the same kind of device"
    )
    assert error.facts["waiting"] == 1
    assert error.facts["failures"] == {"busy": 1}
    assert len(world.broker.views.jobs(renter.party).jobs) == 2


def test_a_place_in_line_is_known_after_a_restart_and_counts_whom_it_competes_with() -> None:
    world = World()
    renter = world.renter()
    cpu = {"device_kind": "cpu", "device_memory_bytes": 0, "device_name": ""}

    def submit(name: str, **resources: object) -> str:
        world.pass_ms(1_000)
        return renter.submit(name=name, resources=resources)

    gpu = [submit("gpu-0"), submit("gpu-1")]
    for_cpu = submit("cpu", **cpu)
    any_kind = submit("any", **{**cpu, "device_kind": "any"})
    for _ in range(2):
        world.step()
        places = [renter.view(job).place_in_line for job in (*gpu, for_cpu, any_kind)]
        assert places == [1, 2, 1, 4]
        assert renter.view(any_kind).says == "waits for a machine, number 4 in line"
        world.restart_broker()
    renter.world.broker.jobs.cancel(renter.party, gpu[0])
    world.step()
    assert [renter.view(job).place_in_line for job in (*gpu, any_kind)] == [None, 1, 3]


def test_a_job_may_wait_for_a_machine_that_nobody_has_yet() -> None:
    world = World()
    renter = world.renter()
    signed = renter.job()
    assert refused(renter).code == "no_match"
    world.broker.jobs.submit(renter.party, signed.envelope, wait_for_offer=True)
    agent = world.agent("alice")
    world.settle_down()
    assert agent.the_run.job_id == signed.id


def test_a_job_that_nobody_takes_expires_and_gets_its_money_back() -> None:
    world = World()
    renter = world.renter()
    signed = renter.job(expires_ms=world.now_ms + 60_000)
    world.broker.jobs.submit(renter.party, signed.envelope, wait_for_offer=True)
    world.pass_ms(61_000)
    view = renter.view(signed.id)
    assert view.state is JobState.CANCELLED
    assert view.reason is Reason.JOB_EXPIRED
    assert renter.balance_ucr() == 100_000_000
    world.audit()


def test_a_budget_under_a_minutes_price() -> None:
    world = World()
    world.agent("alice")
    error = refused(world.renter(), budget_ucr=59_999)
    assert (error.code, error.field) == ("budget_too_small", "budget_ucr")


@pytest.mark.parametrize(
    ("shift_ms", "field"), [(600_000, "issued_ms"), (-172_800_000, "expires_ms")]
)
def test_documents_of_another_time(shift_ms: int, field: str) -> None:
    world = World()
    world.agent("alice")
    renter = world.renter()
    at = world.now_ms + shift_ms
    error = refused(renter, issued_ms=at, expires_ms=at + 86_400_000)
    assert error.field == field


def test_documents_of_another_broker_or_signer() -> None:
    world = World()
    world.agent("alice")
    renter = world.renter()
    assert refused(renter, broker=key_named("other broker").party).field == "broker"
    mine = renter.job()
    forged = sign_document(mine.document, key_named("thief")).envelope
    with pytest.raises(Refusal) as caught:
        world.broker.jobs.submit(renter.party, forged)
    assert caught.value.field == "signatures"
    broken = mine.envelope.model_copy(update={"payload": mine.envelope.payload[:-8] + "AAAAAAA="})
    with pytest.raises(Refusal):
        world.broker.jobs.submit(renter.party, Envelope.model_validate(broken.model_dump()))


def test_an_image_by_tag_where_policy_wants_a_digest() -> None:
    world = World()
    world.agent("alice", image_policy="digest")
    error = refused(world.renter(), image="train:latest")
    assert error.field == "image"


def test_inputs_must_be_here_before_the_job() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    index, chunks = tree_of({"data.csv": b"a,b\n1,2\n"})
    raw = index.to_bytes()
    digest = digest_of(raw)
    entry = Input(
        destination="/data/data.csv",
        kind="file",
        index_digest=digest,
        total_bytes=index.total_bytes,
    )
    assert refused(renter, inputs=(entry,)).code == "input_missing"
    blobs = world.broker.blobs
    blobs.put(renter.party, renter.party, None, digest, raw)
    assert refused(renter, inputs=(entry,)).code == "input_missing"
    (chunk,) = blobs.missing(renter.party, renter.party, None, list(chunks)).missing
    with pytest.raises(Refusal) as caught:
        blobs.put(renter.party, renter.party, None, chunk, b"changed meanwhile")
    assert caught.value.code == "hash_mismatch"
    blobs.put(renter.party, renter.party, None, chunk, chunks[chunk])
    job = renter.run(inputs=(entry,))
    assert blobs.get(agent.party, job, 1, chunk) == chunks[chunk]
    with pytest.raises(Refusal) as caught:
        blobs.get(agent.party, job, 2, chunk)
    assert caught.value.code == "not_found"


def test_others_see_nothing_of_a_job() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    other = world.renter("other")
    job = renter.run()
    agent.durable(agent.the_run, 5)
    views = world.broker.views
    for look in (
        views.job,
        views.events,
        views.logs,
        views.checkpoints,
        world.broker.money.statement,
        views.export,
        views.receipts,
    ):
        with pytest.raises(Refusal) as caught:
            look(other.party, job)
        assert caught.value.code == "not_found"
    for act in (world.broker.jobs.cancel, world.broker.jobs.pause):
        with pytest.raises(Refusal) as caught:
            act(other.party, job)
        assert caught.value.code == "not_found"
    index = views.checkpoints(renter.party, job).checkpoints[0].index_digest
    with pytest.raises(Refusal) as caught:
        world.broker.blobs.get(other.party, job, None, index)
    assert caught.value.code == "not_found"
    assert world.broker.blobs.missing(other.party, other.party, None, [index]).missing == (index,)


def test_a_job_is_found_by_id_prefix_and_name() -> None:
    world = World()
    world.agent("alice")
    renter = world.renter()
    job = renter.submit(name="fine tune")
    newer = renter.submit(name="other")
    for ref in (job, job[:10], "fine tune"):
        assert renter.view(ref).id == job
    assert renter.view("other").id == newer
    with pytest.raises(Refusal):
        renter.view(job[:4])


def test_a_request_counts_once() -> None:
    world = World()
    idempotency = world.broker.idempotency
    caller = Caller(world.renter().party, "b" * 32, world.now_ms)
    assert idempotency.begin(caller, "POST", "/v1/jobs", "c" * 64, "") is None
    with pytest.raises(Refusal) as caught:
        idempotency.begin(caller, "POST", "/v1/jobs", "c" * 64, "")
    assert caught.value.code == "replayed"
    world.restart_broker()
    with pytest.raises(Refusal):
        world.broker.idempotency.begin(caller, "POST", "/v1/jobs", "c" * 64, "")
    read = Caller(caller.party, "d" * 32, world.now_ms)
    assert idempotency.begin(read, "GET", "/v1/jobs", "c" * 64, "") is None
    with pytest.raises(Refusal):
        idempotency.begin(read, "GET", "/v1/jobs", "c" * 64, "")
    world.clock.ms += 3_600_000
    world.broker.idempotency.forget_old()
    assert world.broker.idempotency.begin(caller, "POST", "/v1/jobs", "c" * 64, "") is None


def test_an_idempotency_key_gets_the_same_answer_and_no_other_request() -> None:
    idempotency = World().broker.idempotency
    party = "ed25519-" + "a" * 64

    def begin(nonce: str, body: str) -> Any:
        caller = Caller(party, nonce * 32, 0)
        return idempotency.begin(caller, "POST", "/v1/jobs", body * 64, "key")

    assert begin("1", "a") is None
    idempotency.finish(
        Caller(party, "1" * 32, 0), "POST", "/v1/jobs", "a" * 64, "key", 201, '{"id": 1}'
    )
    answer = begin("2", "a")
    assert (answer.status, answer.body) == (201, '{"id": 1}')
    with pytest.raises(Refusal) as caught:
        begin("3", "b")
    assert caught.value.code == "idempotency_mismatch"


def test_a_second_agent_with_the_same_key_replaces_the_first() -> None:
    world = World()
    agent = world.agent("alice")
    first = agent.instance
    agent.instance = "9" * 32
    agent.join()
    with pytest.raises(StaleInstance):
        world.broker.sessions.receive(agent.party, first, Heartbeat(runs=()))
    world.broker.sessions.left(agent.party, first)  # the old connection's end means nothing
    assert world.broker.market.offers().offers[0].free_devices == 1


def test_old_offers_and_withdrawals_change_nothing() -> None:
    world = World()
    agent = world.agent("alice")
    newest = agent.announce(price_ucr_per_device_hour=7)
    agent.sequence -= 2
    agent.announce(price_ucr_per_device_hour=5)
    assert [offer.id for offer in world.broker.market.offers().offers] == [newest.id]
    agent.sequence = 2
    agent.withdraw()
    agent.sequence = 1
    agent.announce()
    assert world.broker.market.offers().offers == ()


def test_match_says_what_a_job_would_get() -> None:
    world = World()
    world.agent("alice", price_ucr_per_device_hour=450_000)
    renter = world.renter()
    need = Resources(devices=1, device_kind="gpu", memory_bytes=10**9, disk_bytes=10**9)
    request = MatchRequest(resources=need, max_price_ucr_per_device_hour=400_000)
    answer = world.broker.market.match(renter.party, request)
    assert (answer.offers, answer.considered, answer.failures) == ((), 1, {"price": 1})
    assert answer.relax == (Shortfall(Constraint.PRICE, 450_000, 400_000),)
    assert relax_text(answer.relax).endswith("raise --max-price by 0.05")
    fits = world.broker.market.match(
        renter.party, request.model_copy(update={"max_price_ucr_per_device_hour": PRICE})
    )
    assert len(fits.offers) == 1
    assert fits.least_budget_ucr == 0
    poor = world.broker.market.match(
        renter.party,
        request.model_copy(update={"max_price_ucr_per_device_hour": PRICE, "budget_ucr": 1}),
    )
    assert poor.least_budget_ucr == minimum_budget_ucr(PRICE, 1)


def test_logs_are_neither_repeated_nor_skipped() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    run = agent.the_run
    assert agent.log(run, 0, "one", "two") == 2
    assert agent.log(run, 0, "one", "two", "three") == 3
    assert agent.log(run, 7, "eight") == 3
    assert agent.log(run, 3, "four") == 4
    lines = world.broker.views.logs(renter.party, job)
    assert [line.text for line in lines] == ["one", "two", "three", "four"]
    assert [line.cursor for line in lines] == [1, 2, 3, 4]
    rest = world.broker.views.logs(renter.party, job, after=lines[1].cursor)
    assert [line.text for line in rest] == ["three", "four"]


def test_three_checkpoints_are_kept_and_a_damaged_one_is_passed_over() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    job = renter.run()
    run = agent.the_run
    for step in range(1, 6):
        world.pass_ms(3_000)
        agent.durable(run, step, content={"base": b"shared", "model": str(step).encode()})
    shared = digest_of(b"shared")
    kept = {digest_of(str(step).encode()) for step in (3, 4, 5)}
    pruned = {digest_of(str(step).encode()) for step in (1, 2)}
    names = set(world.blobs.names())
    assert shared in names
    assert kept <= names
    assert not pruned & names

    world.blobs.damage(digest_of(b"5"))
    agent.exit(run, Reason.RECLAIMED, 75)
    world.settle_down()
    again = agent.the_run
    assert again.lease.start_step == 5
    with pytest.raises(Refusal, match="no longer readable"):
        world.broker.blobs.get(agent.party, job, again.lease.epoch, digest_of(b"5"))
    agent.exit(again, Reason.RESTORE_FAILED)
    world.settle_down()
    world.pass_ms(5_000)
    states = {
        c.step: c.state for c in world.broker.views.checkpoints(renter.party, job).checkpoints
    }
    assert states[5] is CheckpointState.QUARANTINED
    assert agent.the_run.lease.start_step == 4 or renter.view(job).runs[-1].start_step == 4
    world.audit()


def test_a_job_stays_within_its_hardware_class_after_its_first_checkpoint() -> None:
    world = World()
    agent = world.agent("alice")
    renter = world.renter()
    renter.run()
    world.agent("bob", devices=(gpu("GPU-b", hardware="rtx3090"),), price_ucr_per_device_hour=1)
    alike = world.agent("carol")
    agent.durable(agent.the_run, 10)
    agent.withdraw()
    agent.exit(agent.the_run, Reason.RECLAIMED)
    world.settle_down()
    assert alike.the_run.lease.start_step == 10
