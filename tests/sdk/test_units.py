"""What people write becomes exact integers, or an error that shows how to write it."""

import shlex
from datetime import datetime, timedelta, timezone

import pytest

from sublet.commands import parse_command
from sublet.terminal.text import clip, safe, table
from sublet.units import (
    Gpus,
    UnitError,
    cores_to_millis,
    credits_to_ucr,
    duration_ms,
    moment_ms,
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
        ("2", Gpus(2, "gpu")),
        ("A100", Gpus(1, "gpu", name="A100")),
        ("A100:2", Gpus(2, "gpu", name="A100")),
        ("2 x A100", Gpus(2, "gpu", name="A100")),
        ("1xH100-80GB", Gpus(1, "gpu", 80 * 10**9, "H100")),
        ("H100_80gb:4", Gpus(4, "gpu", 80 * 10**9, "H100")),
        ("A100-SXM4-80GB", Gpus(1, "gpu", 80 * 10**9, "A100-SXM4")),
        ("RTX 4090", Gpus(1, "gpu", name="RTX 4090")),
        ("4090", Gpus(1, "gpu", name="4090")),
        ("2x4090", Gpus(2, "gpu", name="4090")),
        ("4090:2", Gpus(2, "gpu", name="4090")),
        ("gtx1080", Gpus(1, "gpu", name="gtx1080")),
        ("1xTITAN", Gpus(1, "gpu", name="TITAN")),
        ("MI300X", Gpus(1, "gpu", name="MI300X")),
        ("24GB", Gpus(1, "gpu", 24 * 10**9)),
        ("24GB:2", Gpus(2, "gpu", 24 * 10**9)),
        ("gpu:2", Gpus(2, "gpu")),
    ],
)
def test_gpus(written: str | int, wish: Gpus) -> None:
    assert parse_gpus(written) == wish


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("0", "asks for no device"),
        ("A100:0", "asks for no device"),
        ("", "neither a number nor a GPU's name"),
        ("lots", "neither a number nor a GPU's name"),
        ("0512", "neither a number nor a GPU's name"),
        ("100000", "neither a number nor a GPU's name"),
        ("-1", "neither a number nor a GPU's name"),
        ("A100:", "neither a number nor a GPU's name"),
        ("1x", "neither a number nor a GPU's name"),
        ("A100; rm -r /", "neither a number nor a GPU's name"),
        ("A100\n:2", "neither a number nor a GPU's name"),
        ("x24GB", "the number at the wrong end"),
        ("A100x2", "the number at the wrong end"),
        ("2xA100:2", "says twice how many"),
        ("1x24", "write memory with its unit, like 24GB"),
        ("1xcpu", "write it as cpu"),
        ("cpu:2", "write it as cpu"),
    ],
)
def test_what_is_not_a_wish_for_gpus(written: str, says: str) -> None:
    with pytest.raises(UnitError, match=r"^gpus: .*write ") as refused:
        parse_gpus(written)
    assert says in str(refused.value)


NOW_MS = 1_800_000_000_000


@pytest.mark.parametrize(
    ("written", "ms"),
    [
        ("10m", NOW_MS - 600_000),
        (90, NOW_MS - 90_000),
        ("1.5h", NOW_MS - 5_400_000),
        ("90000d", 0),
        ("2026-11-29T08:00:00+00:00", 1_795_939_200_000),
        ("2026-11-29T08:00:00Z", 1_795_939_200_000),
        (datetime(2026, 11, 29, 9, tzinfo=timezone(timedelta(hours=1))), 1_795_939_200_000),
        ("1960-01-01T00:00Z", 0),
    ],
)
def test_a_moment(written: str | int | datetime, ms: int) -> None:
    assert moment_ms(written, NOW_MS, "since") == ms


def test_a_moment_without_an_offset_is_by_this_machines_clock() -> None:
    here = datetime(2026, 11, 29, 8, 0)
    assert moment_ms("2026-11-29T08:00", NOW_MS, "since") == int(here.timestamp() * 1000)


@pytest.mark.parametrize("written", ["", "yesterday", "-5m", "25:00", "2026-13-01"])
def test_what_is_no_moment(written: str) -> None:
    with pytest.raises(UnitError, match=r"^since: .*write it like 10m or 2026-11-29T08:00"):
        moment_ms(written, NOW_MS, "since")


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("python train.py --x", ("python", "train.py", "--x")),
        (["python train.py --x"], ("python", "train.py", "--x")),
        ("python -c 'print(1)'", ("python", "-c", "print(1)")),
        ("echo '$HOME && a'", ("echo", "$HOME && a")),
        (["sh", "-c", "a && b > c"], ("sh", "-c", "a && b > c")),
        (["python", "my script.py"], ("python", "my script.py")),
        (["true"], ("true",)),
        ("", ()),
        ([], ()),
    ],
)
def test_a_command(written: str | list[str], words: tuple[str, ...]) -> None:
    assert parse_command(written, "command") == words


@pytest.mark.parametrize(
    ("written", "sign"),
    [("a && b", "&&"), ("a | b", "|"), ("a > log", ">"), ("a;b", ";"), ("echo $X", "$")],
)
def test_a_command_that_needs_a_shell(written: str, sign: str) -> None:
    for form in (written, [written]):
        with pytest.raises(UnitError, match=r"^command: .*for a shell") as refused:
            parse_command(form, "command")
        assert repr(sign) in str(refused.value)
        assert str(refused.value).endswith(f"; write it as sh -c {shlex.quote(written)}")


def test_a_command_with_half_a_quote() -> None:
    with pytest.raises(UnitError, match=r"^command: a quote in it is not closed"):
        parse_command("python -c 'print(1)", "command")


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
