"""Documents opened again: the same document, parsed once, and nothing without a bound."""

from __future__ import annotations

import pytest

from sublet_broker.market import accepted as module
from sublet_broker.market.accepted import SMALL_BYTES, accepted
from sublet_contracts.documents import Document, Job, Receipt, sign_document
from sublet_contracts.envelope import Envelope
from sublet_contracts.versions import UnknownVersion
from tests.contracts.samples import KEYS, job, receipt, receipt_v1, samples

MIB = 2**20
LARGEST_DOCUMENT_BYTES = 64 * 2**10


def signed(document: Document, *names: str) -> Envelope:
    return sign_document(document, *(KEYS[name] for name in names)).envelope


@pytest.mark.parametrize(
    ("document", "signers"), samples(), ids=lambda part: getattr(part, "KIND", "")
)
def test_every_kind_comes_back_as_it_was_signed(
    document: Document, signers: tuple[str, ...]
) -> None:
    assert accepted(signed(document, *signers), type(document)) == document


def test_a_document_is_parsed_once_however_many_have_signed_it() -> None:
    by_provider = signed(receipt(), "provider")
    by_both = signed(receipt(), "provider", "renter")
    assert by_provider != by_both
    assert accepted(by_provider, Receipt) is accepted(by_both, Receipt)


def test_documents_that_differ_are_not_taken_for_each_other() -> None:
    other = receipt().model_copy(update={"charge_ucr": receipt().charge_ucr - 1})
    assert accepted(signed(receipt(), "provider"), Receipt) == receipt()
    assert accepted(signed(other, "provider"), Receipt) == other


@pytest.mark.parametrize("length", [0, SMALL_BYTES, 20_000])
def test_large_documents_are_opened_like_small_ones(length: int) -> None:
    document = job().model_copy(update={"command": ("x" * min(length, 16_000),)})
    envelope = signed(document, "renter")
    assert accepted(envelope, Job) == document
    assert accepted(envelope, Job) is accepted(envelope, Job)


def test_a_document_is_not_read_as_another_kind() -> None:
    envelope = signed(receipt(), "provider")
    assert accepted(envelope, Receipt) == receipt()
    with pytest.raises(UnknownVersion):
        accepted(envelope, Job)


def test_an_older_version_is_opened_in_the_newest_shape() -> None:
    envelope = signed(receipt_v1(), "provider")
    document = accepted(envelope, Receipt)
    assert document == receipt().model_copy(update={"reached_step": receipt().durable_step})
    assert accepted(envelope, Receipt) == document


def test_what_strangers_can_make_it_keep_is_bounded_in_bytes() -> None:
    # The payloads are the keys; what is parsed from them is of the same order.
    small, large = module._small.cache_info().maxsize, module._large.cache_info().maxsize
    assert small is not None
    assert large is not None
    assert small * SMALL_BYTES + large * LARGEST_DOCUMENT_BYTES < 256 * MIB
