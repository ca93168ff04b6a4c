"""What people write becomes exact integers, or an error that shows how to write it."""

import pytest

from sublet.terminal.text import clip, safe, table
from sublet.units import (
    Gpus,
    UnitError,
    cores_to_millis,
    credits_to_ucr,
    duration_ms,
    parse_gpus,
    size_bytes,
)


@pytest.mark.parametrize(
    ("written", "ucr"),
    [("0.40", 400_000), (5, 5_000_000), (0.1, 100_000), ("0.000001", 1), ("1e-6", 1), (1e-05, 10)],
)
def test_credits_are_exact(written: str | float, ucr: int) -> None:
    assert credits_to_ucr(written, "budget") == ucr


@pytest.mark.parametrize("written", ["", "-1", "0.0000001", "1_0", "nan", "1e999999", "1e30", "x"])
def test_what_is_not_an_amount_names_its_field(written: str) -> None:
    with pytest.raises(UnitError, match=r"^budget: "):
        credits_to_ucr(written, "budget")


@pytest.mark.parametrize(
    ("written", "ms"),
    [("90s", 90_000), ("2m", 120_000), ("1.5h", 5_400_000), (7, 7000), ("5ms", 5)],
)
def test_durations(written: str | int, ms: int) -> None:
    assert duration_ms(written, "patience") == ms


@pytest.mark.parametrize("written", ["", "-1s", "2 minutes", "m", "1e3s"])
def test_what_is_not_a_duration(written: str) -> None:
    with pytest.raises(UnitError, match=r"^patience: .*write it like"):
        duration_ms(written, "patience")


@pytest.mark.parametrize(
    ("written", "count"), [("24GB", 24 * 10**9), ("512MiB", 512 << 20), ("1.5K", 1500), (7, 7)]
)
def test_sizes(written: str | int, count: int) -> None:
    assert size_bytes(written, "memory") == count


@pytest.mark.parametrize(
    ("written", "wish"),
    [
        (1, Gpus(1, "gpu")),
        ("2x24GB", Gpus(2, "gpu", memory_bytes=24 * 10**9)),
        ("1xA100", Gpus(1, "gpu", name="A100")),
        ("CPU", Gpus(1, "cpu")),
    ],
)
def test_gpus(written: str | int, wish: Gpus) -> None:
    assert parse_gpus(written) == wish


@pytest.mark.parametrize("written", ["0", "", "x24GB", "1x24", "1xcpu", "-1"])
def test_what_is_not_a_wish_for_gpus(written: str) -> None:
    with pytest.raises(UnitError, match=r"^gpus: "):
        parse_gpus(written)


def test_no_cores_are_refused() -> None:
    assert cores_to_millis("0.5") == 500
    with pytest.raises(UnitError, match=r"^cpus: "):
        cores_to_millis(0)


def test_a_long_text_is_clipped() -> None:
    assert clip("abcdef", 4) == "abc…"


def test_a_strangers_text_cannot_steer_the_terminal() -> None:
    assert "\x1b" not in safe("\x1b[2Jgone\x07")
    assert safe("tab\tand ü stay") == "tab\tand ü stay"


def test_tables_line_up() -> None:
    text = table(("name", "cost"), [["a", "1.00"], ["long", "10.00"]], right=(1,))
    assert text.splitlines() == ["NAME   COST", "a      1.00", "long  10.00"]
