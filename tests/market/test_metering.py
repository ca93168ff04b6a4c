"""Metering: which receipts count, to the micro-credit, in whatever order they come."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet_broker.market.facts import ChainFact, CheckpointFact, LeaseFact, ReceiptFact
from sublet_broker.market.metering import Admission, Judgement, judge, most_device_ms
from sublet_contracts.documents import Lease, Receipt, sign_document
from sublet_contracts.envelope import Envelope
from sublet_contracts.reasons import Reason
from sublet_contracts.rules import PULL_FREE_MS, most_pull_device_ms
from sublet_contracts.states import ChainState, CheckpointState, LeaseState
from tests.contracts.samples import (
    BROKER,
    INDEX,
    JOB_ID,
    KEYS,
    LEASE_ID,
    NOW_MS,
    OFFER_ID,
    PROVIDER,
    RENTER,
)
from tests.contracts.samples import CHECKPOINT_ID as SAVED

HOUR_MS = 3_600_000
PRICE_UCR = 400_001  # an hour of it can't be divided into minutes without a rest
HOLD_UCR = 5_000_000
EPOCH = 2


def envelope() -> Envelope:
    document = Lease(
        broker=BROKER,
        provider=PROVIDER,
        renter=RENTER,
        job=JOB_ID,
        offer=OFFER_ID,
        epoch=EPOCH,
        device_ids=("GPU-1",),
        price_ucr_per_device_hour=PRICE_UCR,
        fee_bps=500,
        hold_ucr=HOLD_UCR,
        start_step=0,
        start_checkpoint=None,
        issued_ms=NOW_MS,
        answer_by_ms=NOW_MS + 10_000,
    )
    return sign_document(document, KEYS["broker"], KEYS["provider"]).envelope


SIGNED = envelope()  # what the decision doesn't open


def lease(**changes: Any) -> LeaseFact:
    fact = LeaseFact(
        id=LEASE_ID,
        job=JOB_ID,
        offer=OFFER_ID,
        provider=PROVIDER,
        renter=RENTER,
        epoch=EPOCH,
        state=LeaseState.ACTIVE,
        device_ids=("GPU-1",),
        price_ucr_per_device_hour=PRICE_UCR,
        fee_bps=500,
        hold_ucr=HOLD_UCR,
        start_step=0,
        start_checkpoint=None,
        answer_by_ms=NOW_MS + 10_000,
        proposed_ms=NOW_MS,
        envelope=SIGNED,
    )
    return replace(fact, **changes)


def receipt(**changes: Any) -> Receipt:
    fields: dict[str, Any] = {
        "provider": PROVIDER,
        "job": JOB_ID,
        "lease": LEASE_ID,
        "epoch": EPOCH,
        "sequence": 1,
        "previous": None,
        "cum_device_ms": 0,
        "durable_step": 0,
        "durable_checkpoint": None,
        "durable_device_ms": 0,
        "final": False,
        "reason": None,
        "issued_ms": NOW_MS,
        **changes,
    }
    exact = PRICE_UCR * fields["cum_device_ms"] // HOUR_MS
    fields.setdefault("reached_step", fields["durable_step"])
    return Receipt.model_validate({"charge_ucr": min(exact, HOLD_UCR), **fields})


def checkpoint(**changes: Any) -> CheckpointFact:
    fact = CheckpointFact(
        id=SAVED,
        job=JOB_ID,
        lease=LEASE_ID,
        epoch=EPOCH,
        kind="checkpoint",
        step=50,
        state=CheckpointState.DURABLE,
        index_digest=INDEX,
        total_bytes=1,
        cum_device_ms=600_000,
        created_ms=NOW_MS,
        envelope=SIGNED,
    )
    return replace(fact, **changes)


@dataclass
class Chain:
    """A lease's chain as the service keeps it: takes those that are judged to be new."""

    lease: LeaseFact = field(default_factory=lease)
    checkpoint: CheckpointFact | None = None
    taken: dict[int, tuple[str, Receipt]] = field(default_factory=dict)

    @staticmethod
    def id_of(document: Receipt) -> str:
        return sign_document(document, KEYS["provider"]).id

    def hear(self, document: Receipt) -> Judgement:
        last = max(self.taken, default=0)
        head_id, head = self.taken.get(last, (None, None))
        known = self.taken.get(document.sequence)
        id = self.id_of(document)
        judgement = judge(
            document,
            id,
            self.lease,
            ChainFact(LEASE_ID, JOB_ID, ChainState.OPEN, sequence=last, head=head_id),
            _fact(known[0], document.sequence) if known else None,
            head,
            self.checkpoint if document.durable_checkpoint else None,
        )
        if judgement.admission is Admission.NEW:
            self.taken[document.sequence] = (id, document)
        return judgement

    def next(self, **changes: Any) -> Receipt:
        """The honest next receipt, but for what is changed."""
        last = max(self.taken, default=0)
        previous = self.taken[last][0] if last else None
        return receipt(**{"sequence": last + 1, "previous": previous, **changes})


def _fact(id: str, sequence: int) -> ReceiptFact:
    return ReceiptFact(id, JOB_ID, LEASE_ID, sequence, NOW_MS, False, SIGNED)


def a_chain(*cum_device_ms: int) -> Chain:
    chain = Chain()
    for used in cum_device_ms:
        assert chain.hear(chain.next(cum_device_ms=used)).admission is Admission.NEW
    return chain


# ------------------------------------------------------------------ the chain
@given(
    used=st.lists(st.integers(0, 2 * HOUR_MS), min_size=1, max_size=8),
    seed=st.integers(0, 2**32),
)
def test_whatever_order_they_come_in_all_are_taken_once_and_in_order(
    used: list[int], seed: int
) -> None:
    """An agent sends what isn't acknowledged again; the line loses, doubles and swaps."""
    whole = a_chain(*sorted(used))
    sent = [document for _, document in whole.taken.values()]
    heard, draw = Chain(), random.Random(seed)
    while len(heard.taken) < len(sent):
        last = max(heard.taken, default=0)
        document = draw.choice(sent)
        expected = (
            Admission.KNOWN
            if document.sequence <= last
            else Admission.NEW
            if document.sequence == last + 1
            else Admission.EARLY
        )
        assert heard.hear(document) == Judgement(expected)
    assert heard.taken == whole.taken


def test_the_first_names_none_before_it() -> None:
    assert Chain().hear(receipt()) == Judgement(Admission.NEW)
    late = receipt(sequence=2, previous="9" * 64)
    assert Chain().hear(late) == Judgement(Admission.EARLY)


@pytest.mark.parametrize("sequence", [1, 2, 3])
def test_another_receipt_with_a_known_sequence_is_a_fork_that_agrees_up_to_the_one_before(
    sequence: int,
) -> None:
    chain = a_chain(1000, 2000, 3000)
    mine = chain.taken[sequence][1]
    other = mine.model_copy(update={"issued_ms": NOW_MS + 1})
    judgement = chain.hear(other)
    assert (judgement.admission, judgement.agreed) == (Admission.FORK, sequence - 1)


@pytest.mark.parametrize(("length", "agreed"), [(1, 0), (2, 1), (3, 2)])
def test_a_next_one_with_another_past_is_a_fork_before_our_newest(length: int, agreed: int) -> None:
    chain = a_chain(*range(1000, 1000 * (length + 1), 1000))
    judgement = chain.hear(chain.next(previous="9" * 64, cum_device_ms=9000))
    assert (judgement.admission, judgement.agreed) == (Admission.FORK, agreed)


@pytest.mark.parametrize(
    "changes", [{"epoch": EPOCH - 1}, {"epoch": EPOCH + 1}, {"job": "9" * 64}, {"lease": "9" * 64}]
)
def test_one_of_another_lease_is_wrong_before_anything_else(changes: dict[str, Any]) -> None:
    chain = a_chain(1000)
    assert chain.hear(chain.next(**changes)).admission is Admission.WRONG
    # Not even as a fork: nobody is accused of what was said about another lease.
    again = chain.taken[1][1].model_copy(update=changes)
    assert chain.hear(again).admission is Admission.WRONG


def test_nothing_follows_a_final_one() -> None:
    chain = a_chain(1000)
    final = chain.next(cum_device_ms=2000, final=True, reason=Reason.SUCCEEDED)
    assert chain.hear(final).admission is Admission.NEW
    assert chain.hear(final).admission is Admission.KNOWN
    judgement = chain.hear(chain.next(cum_device_ms=3000))
    assert judgement == Judgement(Admission.WRONG, "the chain was final")


# ------------------------------------------------------------------ money
@given(price=st.integers(0, 10**9), used=st.integers(0, 10**9), hold=st.integers(0, 10**12))
def test_only_the_exact_charge_is_taken(price: int, used: int, hold: int) -> None:
    """Price times time, rounded down, and never above what is held for the lease."""
    exact = min(price * used // HOUR_MS, hold)
    for charge in {max(0, exact - 1), exact, exact + 1}:
        chain = Chain(lease(price_ucr_per_device_hour=price, hold_ucr=hold))
        judgement = chain.hear(chain.next(cum_device_ms=used, charge_ucr=charge))
        if charge == exact:
            assert judgement == Judgement(Admission.NEW)
        else:
            assert judgement == Judgement(Admission.WRONG, "its charge is not price x time")


@pytest.mark.parametrize(
    ("used", "charge"),
    [
        (0, 0),
        (8, 0),  # 0.89 ucr
        (9, 1),  # 1.00 ucr: 9 x 400,001 / 3,600,000 = 1.0000025
        (HOUR_MS - 1, PRICE_UCR - 1),
        (HOUR_MS, PRICE_UCR),
        (12 * HOUR_MS, 4_800_012),
        (13 * HOUR_MS, HOLD_UCR),  # 5,200,013 at the price: the hold is the end
    ],
)
def test_charges_at_the_edges(used: int, charge: int) -> None:
    chain = Chain()
    wanted = chain.next(cum_device_ms=used, charge_ucr=charge)
    assert chain.hear(wanted).admission is Admission.NEW


def test_usage_is_cumulative_and_may_stand_still() -> None:
    chain = a_chain(1000, 1000)
    judgement = chain.hear(chain.next(cum_device_ms=999))
    assert judgement == Judgement(Admission.WRONG, "it goes back behind the receipt before it")
    assert chain.hear(chain.next(cum_device_ms=1001)).admission is Admission.NEW


# ------------------------------------------------------------------ durable progress
DURABLE = {
    "cum_device_ms": 700_000,
    "durable_checkpoint": SAVED,
    "durable_step": 50,
    "durable_device_ms": 600_000,
}


def judged(found: CheckpointFact | None, **changes: Any) -> Judgement:
    chain = Chain(checkpoint=found)
    return chain.hear(chain.next(**{**DURABLE, **changes}))


def test_durable_progress_is_that_of_a_verified_checkpoint() -> None:
    assert judged(checkpoint()) == Judgement(Admission.NEW)
    # It was verified once; that its content was found damaged later takes nothing back.
    assert judged(checkpoint(state=CheckpointState.QUARANTINED)) == Judgement(Admission.NEW)


def test_one_whose_checkpoint_is_not_verified_yet_comes_again() -> None:
    assert judged(checkpoint(state=CheckpointState.UPLOADED)) == Judgement(Admission.EARLY)


@pytest.mark.parametrize(
    ("found", "changes", "says"),
    [
        (None, {}, "did not make"),
        (checkpoint(lease="9" * 64), {}, "did not make"),
        (checkpoint(state=CheckpointState.REJECTED), {}, "rejected"),
        (checkpoint(), {"durable_device_ms": 600_001}, "durable time is not"),
        (checkpoint(), {"durable_device_ms": 599_999}, "durable time is not"),
        (checkpoint(), {"durable_step": 51}, "durable step is not"),
        (checkpoint(), {"durable_checkpoint": None}, "without a checkpoint"),
    ],
)
def test_durable_progress_that_is_not_so_is_wrong(
    found: CheckpointFact | None, changes: dict[str, Any], says: str
) -> None:
    judgement = judged(found, **changes)
    assert judgement.admission is Admission.WRONG
    assert says in judgement.detail


@pytest.mark.parametrize("kind", ["outputs", "partial-outputs"])
def test_what_a_run_hands_over_is_no_durable_time(kind: str) -> None:
    for found in (checkpoint(kind=kind), checkpoint(kind=kind, step=0)):
        said = f"it names {kind.replace('-', ' ')} as its progress"
        assert judged(found) == Judgement(Admission.WRONG, said)


def test_durable_progress_does_not_go_back() -> None:
    chain = Chain(checkpoint=checkpoint())
    assert chain.hear(chain.next(**DURABLE)).admission is Admission.NEW
    chain.checkpoint = checkpoint(cum_device_ms=599_999)
    judgement = chain.hear(chain.next(**{**DURABLE, "durable_device_ms": 599_999}))
    assert judgement == Judgement(Admission.WRONG, "it goes back behind the receipt before it")


# ------------------------------------------------------------------ what can have been used
@pytest.mark.parametrize(
    ("devices", "stopwatch_ms", "most_ms"),
    [
        (1, 0, 5_000),  # the tolerance alone
        (1, 1_000_000, 1_000_000 + 5_000 + 100),  # 100 ppm of the time besides
        (1, 9_999, 9_999 + 5_000),  # less than a ms of them is none
        (4, 1_000_000, 4 * (1_000_000 + 5_000 + 100)),
    ],
)
def test_no_more_was_used_than_the_stopwatch_shows(
    devices: int, stopwatch_ms: int, most_ms: int
) -> None:
    leased = lease(
        proposed_stopwatch_ms=70_000, device_ids=tuple(f"GPU-{n}" for n in range(devices))
    )
    most = most_device_ms(
        leased, stopwatch_ms=70_000 + stopwatch_ms, tolerance_ms=5_000, tolerance_ppm=100
    )
    assert most == most_ms


def test_a_stopwatch_that_began_again_allows_the_tolerance_and_nothing_negative() -> None:
    leased = lease(proposed_stopwatch_ms=10**9)
    assert most_device_ms(leased, stopwatch_ms=0, tolerance_ms=5_000, tolerance_ppm=100) == 5_000
    assert most_device_ms(leased, stopwatch_ms=0, tolerance_ms=0, tolerance_ppm=0) == 0


@given(earlier=st.integers(0, 10**12), passed=st.integers(0, 10**9), devices=st.integers(1, 16))
def test_each_ms_allows_a_ms_of_each_device_and_the_tolerance_at_most(
    earlier: int, passed: int, devices: int
) -> None:
    leased = lease(device_ids=tuple(f"GPU-{n}" for n in range(devices)))

    def most(stopwatch_ms: int) -> int:
        return most_device_ms(
            leased, stopwatch_ms=stopwatch_ms, tolerance_ms=1_000, tolerance_ppm=200
        )

    more = most(earlier + passed) - most(earlier)
    assert passed * devices <= more <= (passed + passed // 5_000 + 1) * devices


def test_time_before_the_start_is_believed_beyond_what_a_pull_has_for_nothing() -> None:
    leased = lease(proposed_stopwatch_ms=70_000, device_ids=("GPU-1", "GPU-2"))

    def most(passed_ms: int, pull_device_ms: int) -> int:
        return most_device_ms(
            leased,
            stopwatch_ms=70_000 + passed_ms,
            tolerance_ms=5_000,
            tolerance_ppm=0,
            pull_device_ms=pull_device_ms,
        )

    quarter_ms = 15 * 60_000
    assert most(quarter_ms, 0) == 2 * (quarter_ms + 5_000)
    assert most(quarter_ms, 1) == 2 * (quarter_ms - PULL_FREE_MS + 5_000)
    assert most(PULL_FREE_MS - 1, 1) == 2 * 5_000, "so early no pull has lasted that long"


def test_a_pull_that_takes_more_of_the_hold_than_it_may_is_wrong() -> None:
    most = most_pull_device_ms(PRICE_UCR, HOLD_UCR)
    assert most is not None
    for pull_device_ms, admission in ((most, Admission.NEW), (most + 1, Admission.WRONG)):
        document = receipt(cum_device_ms=most + 1, pull_device_ms=pull_device_ms)
        found = judge(
            document,
            "r" * 64,
            lease(),
            ChainFact(LEASE_ID, JOB_ID, ChainState.OPEN),
            None,
            None,
            None,
        )
        assert found.admission is admission
    with pytest.raises(ValueError, match="pull_device_ms"):
        receipt(cum_device_ms=5, pull_device_ms=6)
