"""From bytes to lines: carriage returns, characters and long lines, wherever the bytes are cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet_agent.core.log_lines import (
    STANDS_MS,
    Begun,
    LineBuffer,
    UnfinishedLine,
    cut_between_characters,
    shown,
)
from sublet_agent.core.runner_port import MAX_LINE_BYTES


def lines_of(*chunks: bytes) -> list[str]:
    """Return the lines of a stream that came in these chunks and then ended."""
    buffer = LineBuffer()
    found = [line for chunk in chunks for line in buffer.feed(chunk)]
    return [shown(line) for line in found + buffer.end()]


@pytest.mark.parametrize(
    ("written", "lines"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("no end", ["no end"]),
        ("\n\n", ["", ""]),
        ("windows\r\nlines\r\n", ["windows", "lines"]),
        ("\r 0%\r 50%\r100%\n", ["100%"]),
        ("\r 0%\r 50%\r100%", ["100%"]),
        (" 0%\r 50%\r100%\r\n", ["100%"]),
        # A bar that wipes itself leaves what a terminal would show: nothing.
        ("\r 50%\r     \r\nend\n", ["     ", "end"]),
        ("\r 50%\r\r\r\n", [" 50%"]),
        ("épo 0: 40%\répo 0: ✓ 🚀\n", ["épo 0: ✓ 🚀"]),
    ],
)
def test_of_many_states_the_last_is_the_line(written: str, lines: list[str]) -> None:
    data = written.encode()
    assert lines_of(data) == lines
    assert lines_of(*(data[i : i + 1] for i in range(len(data)))) == lines


_PIECES = st.sampled_from(["\r", "\n", "\r\n", "a", "é", "🚀", "训练", " 40%|##  | loss=0.1", ""])


@given(st.lists(_PIECES, max_size=40), st.lists(st.integers(0, 400), max_size=20))
def test_where_bytes_are_cut_makes_no_difference(parts: list[str], cuts: list[int]) -> None:
    data = "".join(parts).encode()
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    chunks = [data[a:b] for a, b in pairwise(places)]
    assert lines_of(*chunks) == lines_of(data)
    assert "�" not in "".join(lines_of(*chunks))
    # Whoever only looks at the line that is being written sees what the lines end with.
    watched, buffer = UnfinishedLine(), LineBuffer()
    for chunk in chunks:
        watched.feed(chunk)
        buffer.feed(chunk)
        assert watched.state == buffer.state


@given(st.integers(0, 3), st.sampled_from(["é", "训", "🚀"]), st.integers(1, 4096))
def test_a_long_line_is_cut_between_characters(shift: int, letter: str, chunk: int) -> None:
    text = "x" * shift + letter * (3 * MAX_LINE_BYTES // len(letter.encode()))
    data = text.encode() + b"\n"
    found = lines_of(*(data[i : i + chunk] for i in range(0, len(data), chunk)))
    assert "".join(found) == text
    assert all(len(line.encode()) <= MAX_LINE_BYTES for line in found)
    assert len(found) in (3, 4)


def test_what_is_no_utf8_is_shown_replaced_and_cut_all_the_same() -> None:
    assert lines_of(b"\xff\xfeok\xc3", b"\n\xc3") == ["��ok�", "�"]
    odd = b"\x80" * (2 * MAX_LINE_BYTES)
    assert [len(line) for line in lines_of(odd)] == [MAX_LINE_BYTES, MAX_LINE_BYTES]
    assert cut_between_characters(b"abc", 3) == 3


def test_what_is_held_back_is_bounded_whatever_is_written() -> None:
    buffer, watched = LineBuffer(), UnfinishedLine()
    for _ in range(50):
        for data in (b"y" * 70_000, b"\r" * 70_000, b"\ry" * 35_000):
            buffer.feed(data)
            watched.feed(data)
            assert len(buffer.held) <= MAX_LINE_BYTES + 1
            assert len(watched.held) <= MAX_LINE_BYTES + 1


def test_who_comes_in_the_middle_of_a_line_shows_nothing_before_its_next_state() -> None:
    watched = UnfinishedLine(known=False)
    watched.feed("\N{ROCKET}".encode()[2:] + b" half")
    assert watched.state == b""
    watched.feed(b"\r 41%")
    assert watched.state == b" 41%"
    late = UnfinishedLine(known=False)
    late.feed(b"rest of a line\nnext")
    assert late.state == b"next"


def test_a_line_that_gets_its_end_at_once_never_counts_as_unfinished() -> None:
    begun = Begun()
    assert not begun.stands(10**6)
    for now_ms in range(0, 10_000, 100):  # print() writes the text, and then its end
        begun.wrote(b"step", now_ms, ended_one=False)
        assert not begun.stands(now_ms + STANDS_MS - 1)
        begun.wrote(b"", now_ms, ended_one=True)
    begun.wrote(b"\r10%", 20_000, ended_one=False)
    begun.wrote(b"\r20%", 20_200, ended_one=False)
    assert not begun.stands(20_200)
    assert begun.stands(20_300)
    begun.wrote(b"next", 20_400, ended_one=True)
    assert not begun.stands(20_400)
    assert begun.stands(20_700)
