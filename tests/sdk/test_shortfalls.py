"""Where no offer fits, every constraint has words that say what the renter could change."""

from typing import cast

import httpx
import pytest

from sublet.cli.jobs import requirements_text
from sublet.errors import refusal
from sublet.shortfalls import relax_text
from sublet_contracts.api import Problem
from sublet_contracts.documents import Resources
from sublet_contracts.requirements import Constraint, Fact, Shortfall
from tests.contracts.varied import Recording

CASES: dict[Constraint, tuple[Fact, Fact, str]] = {
    Constraint.BUSY: (0, 1, "leave out --no-wait, and it waits in line"),
    Constraint.PRICE: (
        450_000,
        400_000,
        "the cheapest offer that fits costs 0.45 per device-hour: raise --max-price by 0.05",
    ),
    Constraint.REGION: ("home", "moon", "allow region home"),
    Constraint.DISK: (50 * 10**9, 10**12, "ask for at most 50 GB of disk"),
    Constraint.MEMORY: (2**34, 10**12, "ask for at most 17.17 GB of memory"),
    Constraint.CPU: (1500, 4000, "ask for at most 1.5 cores of cpu"),
    Constraint.IMAGE: ("digest", "x", "name the image by digest (name@sha256:...)"),
    Constraint.DEVICE_MEMORY: (24 * 10**9, 80 * 10**9, "ask for devices of at most 24 GB"),
    Constraint.DEVICE_NAME: ("RTX 4090", "H100", "allow RTX 4090"),
    Constraint.HARDWARE_CLASS: ("rtx-4090", "h100", "allow hardware class rtx-4090"),
    Constraint.DEVICES: (2, 8, "ask for at most 2 devices"),
    Constraint.DEVICE_KIND: ("cpu", "gpu", "allow a cpu as device (--gpus cpu)"),
    Constraint.EGRESS: (False, True, "do without network access"),
    Constraint.USER: (False, "1000", "leave out --user: no owner there lets jobs choose it"),
    Constraint.ACCEPTS: ("other renters", "ed25519:0", "ask its owner to trust your key"),
}


@pytest.mark.parametrize("constraint", Constraint)
def test_every_constraint_has_its_words(constraint: Constraint) -> None:
    assert constraint in CASES, f"say in sublet/shortfalls.py what to do about {constraint}"
    has, needs, words = CASES[constraint]
    assert relax_text([Shortfall(constraint, has, needs)]) == words


def test_all_of_it_is_said() -> None:
    both = [
        Shortfall(Constraint.DEVICE_KIND, "gpu", "cpu"),
        Shortfall(Constraint.PRICE, 450_000, 400_000),
    ]
    assert relax_text(both).startswith("allow a gpu as device (--gpus 1), and the cheapest offer")
    assert relax_text([]) == ""
    assert "none meets" in relax_text([Shortfall(Constraint.DEVICES, 0, 1)])
    assert "colour: red there, blue asked for" in relax_text([Shortfall("colour", "red", "blue")])


def fix_for(**changes: object) -> str:
    problem = Problem(title="No match", status=422, detail="none fits", code="no_match")
    sent = problem.model_copy(update=changes).model_dump_json()
    return refusal(httpx.Response(422, content=sent)).fix


def test_a_refusal_gets_the_words_from_its_facts() -> None:
    price = Shortfall(Constraint.PRICE, 450_000, 400_000)
    found = {"considered": 2, "failures": {"price": 2}, "shortfalls": [price.as_json()]}
    assert fix_for(facts=found).endswith("raise --max-price by 0.05")
    nobody = fix_for(facts={"considered": 0, "failures": {}, "shortfalls": []})
    assert nobody == "leave out --no-wait, and it waits in line for an offer"
    busy = Shortfall(Constraint.BUSY, 0, 1)
    taken = {"considered": 1, "failures": {"busy": 1}, "shortfalls": [busy.as_json()]}
    assert fix_for(facts=taken) == "leave out --no-wait, and it waits in line"
    # What can't be read gets no words; and they are of this code alone.
    assert fix_for(facts={**found, "shortfalls": [{"constraint": 7}]}) == ""
    assert fix_for(facts={}) == ""
    assert "--max-price" not in fix_for(facts=found, code="over_balance")


def test_what_a_job_needs_is_shown_whole() -> None:
    need = Recording(Resources(devices=1, device_kind="gpu", memory_bytes=10**9, disk_bytes=10**9))
    requirements_text(cast(Resources, need))
    forgotten = set(Resources.model_fields) - need.read
    assert not forgotten, f"requirements_text in sdk/sublet/cli/jobs.py leaves out {forgotten}"
