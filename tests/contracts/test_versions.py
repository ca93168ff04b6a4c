"""Versions of documents, side by side: each read strictly, one shape inside, the newest that the
reader reads outside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field

from sublet_contracts import session, versions
from sublet_contracts.documents import (
    DOCUMENTS,
    Checkpoint,
    DocumentRefused,
    Lease,
    Receipt,
    Settlement,
    read_document,
    sign_document,
    versions_read,
)
from sublet_contracts.encoding import canonical_json
from sublet_contracts.envelope import Envelope, sign_payload
from sublet_contracts.session import AgentSession, BrokerSession, SessionError
from sublet_contracts.versions import (
    OLDER,
    Document,
    NoCommonVersion,
    Older,
    ReceiptV1,
    downgraded,
    model_of,
    newest_that,
    upgraded,
    versions_of,
    without,
)
from tests.contracts.samples import BROKER, KEYS, NOW_MS, older, receipt, receipt_v1

PROVIDER = KEYS["provider"]
VECTORS = json.loads((Path(__file__).parent / "vectors" / "documents.json").read_text())
ONLY_V1 = {**versions_read(), "receipt": (1,)}
"""What a release says that knows no receipt but version 1."""
KINDS = {kind.KIND: kind for kind in DOCUMENTS}


def strictly(model: type[Document], fields: Mapping[str, Any]) -> Envelope:
    return sign_payload(model.payload_type(), canonical_json(dict(fields)), [PROVIDER])


# -- the registry --------------------------------------------------------------------------------


def test_every_kind_counts_its_versions_without_a_gap_up_to_the_newest() -> None:
    assert set(OLDER) <= set(KINDS)
    for kind in DOCUMENTS:
        known = versions_of(kind)
        assert [model.VERSION for model in known.values()] == list(known)
        assert list(known) == list(range(min(known), kind.VERSION + 1))
        assert {model.KIND for model in known.values()} == {kind.KIND}
        assert len({model.payload_type() for model in known.values()}) == len(known)
        assert versions_read()[kind.KIND] == tuple(known)


def test_there_is_a_sample_and_a_vector_for_every_older_version() -> None:
    listed = {(kind, number) for kind, known in OLDER.items() for number in known}
    assert {(document.KIND, document.VERSION) for document, _ in older()} == listed
    named = {(vector["kind"], vector["payload_type"]) for vector in VECTORS["older"]}
    assert named == {(k, OLDER[k][number].model.payload_type()) for k, number in listed}


# -- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS["older"], ids=lambda v: str(v["payload_type"]))
def test_an_older_document_is_the_same_bytes_as_ever_and_is_read(vector: Any) -> None:
    envelope = Envelope.model_validate_json(json.dumps(vector["envelope"]))
    kind = KINDS[vector["kind"]]
    model = model_of(envelope.payloadType, kind)
    assert envelope.id == vector["id"]
    assert envelope.payload_bytes == vector["payload"].encode()
    document = read_document(envelope, kind)
    assert type(document) is kind
    # What the older one said is what the newest says.
    back = downgraded(document, model.VERSION)
    assert canonical_json(back.model_dump(mode="json")) == envelope.payload_bytes


def test_an_upgrade_says_only_what_the_older_version_said() -> None:
    document = read_document(sign_document(receipt_v1(), PROVIDER).envelope, Receipt)
    assert document == receipt().model_copy(update={"reached_step": receipt().durable_step})


def test_each_version_is_strict() -> None:
    first = receipt_v1().model_dump(mode="json")
    second = receipt().model_dump(mode="json")
    assert read_document(strictly(ReceiptV1, first), Receipt).durable_step == 50
    assert read_document(strictly(Receipt, second), Receipt) == receipt()
    for model, fields, field in (
        (ReceiptV1, {**first, "reached_step": 60}, "reached_step"),  # the newer one's field
        (Receipt, first, "reached_step"),  # which the newer one can't do without
        (ReceiptV1, {**first, "note": 1}, "note"),
        (ReceiptV1, {**first, "sequence": "3"}, "sequence"),
        (ReceiptV1, {**first, "durable_device_ms": 10**9}, ""),
        (Receipt, {**second, "reached_step": 49}, ""),
    ):
        with pytest.raises(DocumentRefused) as refused:
            read_document(strictly(model, fields), Receipt)
        assert refused.value.field == field


def test_a_version_is_inside_the_signature() -> None:
    signed = sign_document(receipt_v1(), PROVIDER).envelope
    moved = signed.model_copy(update={"payloadType": Receipt.payload_type()})
    with pytest.raises(DocumentRefused, match="signature"):
        read_document(moved, Receipt)


@pytest.mark.parametrize("number", [0, 3, 10])
def test_an_unknown_version_is_refused_by_its_type(number: int) -> None:
    fields = receipt().model_dump(mode="json")
    envelope = sign_payload(
        f"application/vnd.sublet.receipt.v{number}+json", canonical_json(fields), [PROVIDER]
    )
    with pytest.raises(DocumentRefused, match=r"expected .*receipt\.v2") as refused:
        read_document(envelope, Receipt)
    assert refused.value.field == "payloadType"


def test_another_kinds_older_version_is_refused() -> None:
    with pytest.raises(DocumentRefused, match="expected"):
        read_document(sign_document(receipt_v1(), PROVIDER).envelope, Lease)


# -- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reads", "newest"),
    [
        ({"receipt": (1, 2)}, 2),
        ({"receipt": (2,)}, 2),
        ({"receipt": (1,)}, 1),
        ({"receipt": (1, 2, 3, 9)}, 2),  # a newer peer
        ({}, 1),  # nobody has asked it yet
        ({"offer": (1,)}, 1),
    ],
)
def test_the_newest_that_the_reader_reads_is_written(
    reads: dict[str, tuple[int, ...]], newest: int
) -> None:
    assert newest_that(Receipt, reads) == newest
    signed = sign_document(receipt(), PROVIDER, reads=reads)
    assert signed.envelope.payloadType == versions_of(Receipt)[newest].payload_type()
    # Whoever signed it holds what its reader will read.
    assert signed.document == read_document(signed.envelope, Receipt)


def test_for_a_reader_without_a_common_version_nothing_is_written() -> None:
    for theirs in ((), (3,)):
        with pytest.raises(NoCommonVersion, match="receipt"):
            sign_document(receipt(), PROVIDER, reads={"receipt": theirs})


def test_what_everybody_may_read_is_written_as_the_newest() -> None:
    assert sign_document(receipt(), PROVIDER).envelope.payloadType == Receipt.payload_type()


# -- more than two versions ----------------------------------------------------------------------


class SignV1(Document):
    KIND: ClassVar[str] = "sign"
    SIGNED_BY: ClassVar[str] = "the provider"
    party: str
    height_cm: int


class SignV2(SignV1):
    VERSION: ClassVar[int] = 2
    colour: str


class Sign(Document):
    KIND: ClassVar[str] = "sign"
    VERSION: ClassVar[int] = 3
    SIGNED_BY: ClassVar[str] = "the provider"
    party: str
    height_mm: int = Field(ge=0)
    colour: str


def test_versions_follow_each_other_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        OLDER,
        "sign",
        {
            1: Older(
                SignV1,
                lambda old: {**dict(old), "colour": ""},
                lambda new: without(new, "colour"),
            ),
            2: Older(
                SignV2,
                lambda old: {**without(old, "height_cm"), "height_mm": old.height_cm * 10},
                lambda new: {**without(new, "height_mm"), "height_cm": new.height_mm // 10},
            ),
        },
    )
    newest = Sign(party=PROVIDER.party, height_mm=1234, colour="red")
    first = SignV1(party=PROVIDER.party, height_cm=123)
    assert downgraded(newest, 1) == first
    assert upgraded(first, Sign) == Sign(party=PROVIDER.party, height_mm=1230, colour="")
    for number, read in ((1, (1230, "")), (2, (1230, "red")), (3, (1234, "red"))):
        signed = sign_document(newest, PROVIDER, reads={"sign": (number,)})
        assert signed.envelope.payloadType.endswith(f"sign.v{number}+json")
        document = read_document(signed.envelope, Sign)
        assert (document.height_mm, document.colour) == read
        assert signed.document == document


# -- the handshake -------------------------------------------------------------------------------


def met(
    broker_reads: Mapping[str, tuple[int, ...]] | None,
    agent_reads: Mapping[str, tuple[int, ...]] | None,
) -> AgentSession:
    """Let both shake hands. Raises SessionError."""
    broker = BrokerSession(BROKER, "ab" * 16, reads=broker_reads)
    agent = AgentSession(
        PROVIDER, instance="cd" * 16, agent_version="0", broker=BROKER, reads=agent_reads
    )
    _, join = agent.receive(broker.hello(NOW_MS), NOW_MS)
    assert join is not None
    broker.receive(join, NOW_MS)
    assert broker.proof is not None
    return agent


def test_an_agent_learns_what_its_broker_reads() -> None:
    assert met(None, None).broker_reads == versions_read()
    old = met(ONLY_V1, None)
    assert newest_that(Receipt, old.broker_reads) == 1
    assert newest_that(Receipt, met(None, ONLY_V1).broker_reads) == 2


@pytest.mark.parametrize("kind", session.TO_BROKER)
def test_a_broker_that_could_not_read_what_it_is_sent_is_left(kind: type[Document]) -> None:
    for theirs in ({**versions_read(), kind.KIND: (99,)}, without_kind(kind)):
        with pytest.raises(SessionError, match=kind.KIND) as refused:
            met(theirs, None)
        assert refused.value.code == "version"


@pytest.mark.parametrize("kind", session.TO_AGENT)
def test_an_agent_that_could_not_read_what_it_is_sent_is_refused(kind: type[Document]) -> None:
    for theirs in ({**versions_read(), kind.KIND: (99,)}, without_kind(kind)):
        with pytest.raises(SessionError, match=kind.KIND) as refused:
            met(None, theirs)
        assert refused.value.code == "version"


def without_kind(kind: type[Document]) -> dict[str, tuple[int, ...]]:
    return {name: known for name, known in versions_read().items() if name != kind.KIND}


def test_the_handshake_names_what_travels() -> None:
    assert {Receipt, Checkpoint} <= set(session.TO_BROKER)
    assert {Lease, Checkpoint, Settlement} <= set(session.TO_AGENT)
    assert versions.Document is Document
