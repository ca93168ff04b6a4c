"""contracts/README.md is generated: it must be what the models say today."""

from pathlib import Path

import pytest

from sublet_contracts import describe
from sublet_contracts.documents import DOCUMENTS
from sublet_contracts.reasons import Reason
from sublet_contracts.wire import MESSAGES

README = Path(describe.__file__).parents[1] / "README.md"


def test_the_page_is_up_to_date() -> None:
    assert README.read_text(encoding="utf-8") == describe.page(), (
        "stale: run  python -m sublet_contracts.describe > contracts/README.md"
    )


def test_the_page_names_every_document_message_and_reason() -> None:
    page = describe.page()
    for kind in DOCUMENTS:
        assert f"### {kind.KIND}\n" in page
        for field in kind.model_fields:
            assert f"| `{field}` |" in page
    for message in MESSAGES:
        assert f"### {message}\n" in page
    for reason in Reason:
        assert f"| `{reason}` |" in page


def test_no_two_headings_share_an_anchor() -> None:
    headings = [line for line in describe.page().splitlines() if line.startswith("#")]
    assert len(set(headings)) == len(headings)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("price_ucr_per_device_hour", "µcr per device-hour"),
        ("cum_device_ms", "device-ms"),
        ("issued_ms", "ms"),
        ("fee_bps", "1/10 000"),
        ("name", ""),
    ],
)
def test_units_stand_in_the_names(field: str, words: str) -> None:
    assert describe.unit(field) == words


def test_a_field_without_a_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="speed has no description"):
        describe.meaning("speed", {"type": "integer"})
