"""Each parser under its oracle: the seeds, a bounded and (in the short form) repeatable mutation,
and a short run of the real fuzzer, so that neither targets nor runner can rot."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests.histories import fuzz
from tests.histories.profiles import FORM, Form, by_form
from tests.histories.targets import TARGETS
from tests.services import require

MUTANTS = by_form(400, 1_200, 20_000)
INPUTS = by_form(3_000, 30_000, 500_000)
ANEW = FORM is not Form.SHORT


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_what_is_near_them(name: str) -> None:
    target = TARGETS[name]
    seeds = list(target.seeds())
    assert seeds
    draw = random.Random(None if ANEW else f"sublet:{name}")
    for data in [b"", *seeds]:
        tried(name, data)
    for _ in range(MUTANTS):
        tried(name, mutated(draw, seeds))


def tried(name: str, data: bytes) -> None:
    try:
        TARGETS[name].run(data)
    except Exception as error:
        raise AssertionError(fuzz.found(name, data)) from error


def mutated(draw: random.Random, seeds: list[bytes]) -> bytes:
    """Return a seed with a few of its bytes changed, cut, doubled, or another's in their place."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        span = draw.choice((1, 1, 4, 16))
        match draw.randrange(5):
            case 0:
                data[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                del data[at : at + span]
            case 2:
                data[at:at] = data[at : at + span]
            case 3:
                data[at : at + span] = draw.choice(TOKENS)
            case _:
                other = draw.choice(seeds)
                begin = draw.randrange(len(other) + 1)
                data[at : at + span] = other[begin : begin + span]
    return bytes(data)


TOKENS = (
    b"null", b"true", b"-1", b"0", b"1e999", b"9007199254740992", b"1.0", b"\\ud800", b"\\u0000",
    b"[]", b"{}", b'""', b"..", b"/", b"\n", b"\0", b"\xff", b" ", b"\xc3\xa9",
)  # fmt: skip


def test_a_short_run_of_the_fuzzer(capsys: pytest.CaptureFixture[str]) -> None:
    require("atheris")
    passed = fuzz.fuzz(
        "every", seconds=600, inputs=INPUTS, seed=random.randrange(1, 2**31) if ANEW else 1
    )
    assert passed, capsys.readouterr().out


def test_a_crash_says_how_to_run_it_again() -> None:
    said = fuzz.found("json", b"\x00[")
    assert said.endswith("python -m tests.histories.fuzz --replay json 005b")
    again = [sys.executable, "-m", "tests.histories.fuzz", "--replay", "json", "005b"]
    done = subprocess.run(again, cwd=fuzz.ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "it passes\n"
