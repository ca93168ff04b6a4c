"""Every kind of document that comes from outside: for this broker, signed by its parties, in time.

One table of kinds, one table of what may be wrong with each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from sublet_broker.service.errors import Refusal
from sublet_contracts.documents import Amendment, Deposit, Document, KeyDocument, sign_document
from sublet_contracts.envelope import Envelope
from sublet_contracts.keys import SigningKey
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import Announce, Assign, LeaseAnswer, ReceiptIssued
from tests.service.world import AgentDouble, RenterDouble, World, key_named


@dataclass
class Scene:
    """A world with a job that runs, and what it takes to send each kind of document."""

    world: World
    agent: AgentDouble
    renter: RenterDouble
    job: str

    @classmethod
    def begin(cls) -> Scene:
        world = World()
        agent = world.agent("alice")
        renter = world.renter()
        return cls(world, agent, renter, renter.run())

    def key(self, **changes: Any) -> tuple[Document, SigningKey]:
        fields = {
            "party": self.renter.party, "broker": self.world.key.party, "name": "me",
            "issued_ms": self.world.now_ms,
        }  # fmt: skip
        return KeyDocument(**{**fields, **changes}), self.renter.key

    def deposit(self, **changes: Any) -> tuple[Document, SigningKey]:
        fields = {
            "broker": self.world.key.party,
            "party": self.renter.party,
            "amount_ucr": 1,
            "memo": "",
            "nonce": self.world.nonce(),
            "issued_ms": self.world.now_ms,
        }
        return Deposit(**{**fields, **changes}), self.world.key

    def amendment(self, **changes: Any) -> tuple[Document, SigningKey]:
        fields = {
            "renter": self.renter.party, "broker": self.world.key.party, "job": self.job,
            "budget_ucr": 20_000_000, "accept_receipts_up_to_ucr": 20_000_000,
            "issued_ms": self.world.now_ms,
        }  # fmt: skip
        return Amendment(**{**fields, **changes}), self.renter.key

    def submission(self, **changes: Any) -> tuple[Document, SigningKey]:
        return self.renter.job(**changes).document, self.renter.key

    def offer(self, **changes: Any) -> tuple[Document, SigningKey]:
        newest = self.agent.announce().document
        fields = {**dict(newest), "sequence": newest.sequence + 1, **changes}
        return type(newest)(**fields), self.agent.key

    def send(self, kind: str, envelope: Envelope) -> object:
        jobs = self.world.broker.jobs
        match kind:
            case "key":
                return self.world.broker.accounts.register_key(envelope)
            case "deposit":
                return self.world.broker.accounts.deposit(self.world.key.party, envelope)
            case "amendment":
                return jobs.resume(self.renter.party, self.job, envelope)
            case "submission":
                return jobs.submit(self.renter.party, envelope)
            case _:
                return self.agent.tell(Announce(offer=envelope))


KINDS = ("key", "deposit", "amendment", "submission", "offer")
HOUR_MS = 3_600_000


def another_broker(scene: Scene, kind: str) -> Envelope:
    document, key = getattr(scene, kind)(broker=key_named("another broker").party)
    return sign_document(document, key).envelope


def from_the_future(scene: Scene, kind: str) -> Envelope:
    at_ms = scene.world.now_ms + HOUR_MS
    times = {"issued_ms": at_ms}
    if kind in ("submission", "offer"):
        times["expires_ms"] = at_ms + HOUR_MS
    document, key = getattr(scene, kind)(**times)
    return sign_document(document, key).envelope


def another_signer(scene: Scene, kind: str) -> Envelope:
    document, _ = getattr(scene, kind)()
    return sign_document(document, key_named("thief")).envelope


def a_stranger_too(scene: Scene, kind: str) -> Envelope:
    document, key = getattr(scene, kind)()
    return sign_document(document, key, key_named("stranger")).envelope


def one_signer_twice(scene: Scene, kind: str) -> Envelope:
    document, key = getattr(scene, kind)()
    return sign_document(document, key, key).envelope


def another_kind(scene: Scene, kind: str) -> Envelope:
    if kind == "deposit":
        document, _ = scene.key(party=scene.world.key.party)
        return sign_document(document, scene.world.key).envelope
    document, _ = scene.deposit()
    return sign_document(document, key_named("renter")).envelope


def a_changed_byte(scene: Scene, kind: str) -> Envelope:
    document, key = getattr(scene, kind)()
    good = sign_document(document, key).envelope
    other = sign_document(document, key_named("thief")).envelope
    wrong = good.signatures[0].model_copy(update={"sig": other.signatures[0].sig})
    return good.model_copy(update={"signatures": (wrong,)})


WRONGS: tuple[tuple[Callable[[Scene, str], Envelope], str], ...] = (
    (another_broker, "broker"),
    (from_the_future, "issued_ms"),
    (another_signer, "signatures"),
    (a_stranger_too, "signatures"),
    (one_signer_twice, "signatures"),
    (another_kind, "payloadType"),
    (a_changed_byte, "signatures"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_one_is_taken(kind: str) -> None:
    scene = Scene.begin()
    document, key = getattr(scene, kind)()
    scene.send(kind, sign_document(document, key).envelope)
    scene.world.audit()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("wrong", "field"), WRONGS, ids=[w.__name__ for w, _ in WRONGS])
def test_a_wrong_one_is_refused_by_its_field(
    kind: str, wrong: Callable[[Scene, str], Envelope], field: str
) -> None:
    scene = Scene.begin()
    envelope = wrong(scene, kind)
    before = scene.renter.balance_ucr()
    with pytest.raises(Refusal) as caught:
        scene.send(kind, envelope)
    assert (caught.value.code, caught.value.field) == ("document_refused", field)
    assert scene.renter.balance_ucr() == before
    scene.world.audit()


@pytest.mark.parametrize("kind", ["submission", "offer"])
def test_an_expired_one_is_refused(kind: str) -> None:
    scene = Scene.begin()
    now_ms = scene.world.now_ms
    document, key = getattr(scene, kind)(issued_ms=now_ms - HOUR_MS, expires_ms=now_ms)
    with pytest.raises(Refusal) as caught:
        scene.send(kind, sign_document(document, key).envelope)
    assert caught.value.field == "expires_ms"


def test_a_deposit_is_the_operators_alone() -> None:
    scene = Scene.begin()
    document, _ = scene.deposit()
    with pytest.raises(Refusal) as caught:
        scene.world.broker.accounts.deposit(
            scene.renter.party, sign_document(document, scene.renter.key).envelope
        )
    assert caught.value.code == "not_operator"


def strangers(count: int) -> list[SigningKey]:
    return [key_named(f"stranger {number}") for number in range(count)]


def test_a_lease_that_comes_back_with_strangers_signatures_is_not_taken() -> None:
    world = World()
    agent = world.agent("alice")
    agent.awake = False
    renter = world.renter()
    job = renter.run()
    ((_, assign),) = world.broker.outbox.pending(agent.party)
    assert isinstance(assign, Assign)
    lease = assign.lease
    signed = lease.countersigned(agent.key)
    for key in strangers(2):
        signed = signed.countersigned(key)
    agent.tell(
        LeaseAnswer(lease=lease.id, signed=signed)
    )  # dropped, and said in the history: not an error of ours
    assert world.broker.views.export(renter.party, job).leases == ()
    agent.tell(LeaseAnswer(lease=lease.id, signed=lease.countersigned(agent.key)))
    assert len(world.broker.views.export(renter.party, job).leases) == 1
    world.audit()


def test_a_receipt_takes_the_renters_signature_and_no_strangers() -> None:
    scene = Scene.begin()
    scene.world.pass_ms(30_000)
    run = scene.agent.the_run
    scene.agent.durable(run, 1)
    views = scene.world.broker.views
    (receipt,) = views.receipts(scene.renter.party, scene.job, unsigned=True).receipts
    crowded = receipt.countersigned(scene.renter.key)
    for key in strangers(2):
        crowded = crowded.countersigned(key)
    with pytest.raises(Refusal) as caught:
        scene.world.broker.countersigning.countersign(scene.renter.party, receipt.id, crowded)
    assert caught.value.field == "signatures"
    assert scene.renter.cosign(scene.job) == 1
    scene.agent.exit(run, Reason.SUCCEEDED, 0)
    scene.world.settle_down()
    scene.world.audit()


def test_a_receipt_with_strangers_signatures_is_dropped() -> None:
    scene = Scene.begin()
    scene.world.pass_ms(30_000)
    run = scene.agent.the_run
    signed = scene.agent.make_receipt(run).envelope
    crowded = signed
    for key in strangers(3):
        crowded = crowded.countersigned(key)
    scene.agent.tell(ReceiptIssued(receipt=crowded))
    views = scene.world.broker.views
    assert views.receipts(scene.renter.party, scene.job).receipts == ()
    scene.agent.tell(ReceiptIssued(receipt=signed))
    assert len(views.receipts(scene.renter.party, scene.job).receipts) == 1
