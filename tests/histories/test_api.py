"""The whole HTTP API, by its own description, with the parties' signatures.

Schemathesis draws requests from the OpenAPI document, well-formed and not; each is signed as
sdk/sublet/http.py signs. No answer is a 5xx, each is one that the description names, in its type
and schema, and nothing of one party's is in what another one gets: to strangers a job that is
there answers byte for byte as one that never was.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.histories.asgi import Door
from tests.histories.profiles import profile
from tests.histories.town import (
    ABSENT,
    BODIES,
    CALLS,
    OTHERS,
    PARTIES,
    SECRET,
    conforms,
    send,
    town_of,
)


@pytest.mark.parametrize("label", CALLS)
def test_every_call_answers_as_it_is_described(label: str, town_door: Door) -> None:
    town = town_of(town_door)
    parts: dict[str, list[str]] = {
        "job": [town.anna_job, town.anna_job[:8], SECRET, town.ended, town.boris_job, ABSENT],
        "digest": [town.index, f"blake3:{ABSENT}"],
        "receipt": [town.receipt, ABSENT],
    }

    @profile(examples=12)
    @given(data=st.data(), who=PARTIES)
    def holds(data: st.DataObject, who: str | None) -> None:
        case = data.draw(CALLS[label].as_strategy())
        for name, known in parts.items():
            if name in case.path_parameters and data.draw(st.integers(0, 3)):
                case.path_parameters[name] = data.draw(st.sampled_from(known))
        # A stream that is followed ends with the job: this one's doesn't here.
        case.query.pop("follow", None)
        body = None
        if case.method == "POST" and "Signed" in str(case.operation.body) and who is not None:
            kind = data.draw(st.sampled_from((*BODIES, "")))
            if kind:
                envelope = town.document(kind, who).model_dump(mode="json")
                body = json.dumps({"envelope": envelope}).encode()
        answer, made = send(town_door, case, who, body)
        conforms(case, answer, made)
        if who in OTHERS or who is None:
            asked = f"{made.url} {made.body!r}"
            told = [s for s in town.secrets if s.encode() in answer.body and s not in asked]
            assert not told, f"{who} learns {told}: {answer.body[:500]!r}"

    holds()
