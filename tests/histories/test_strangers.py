"""To strangers, a job that is there answers byte for byte as one that never was."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.histories.asgi import Door
from tests.histories.profiles import profile
from tests.histories.town import (
    ABSENT,
    CALLS,
    OF_JOBS,
    OTHERS,
    SECRET,
    conforms,
    send,
    town_of,
)


@pytest.mark.parametrize("label", OF_JOBS)
def test_anothers_job_is_as_absent_as_one_that_never_was(label: str, town_door: Door) -> None:
    town = town_of(town_door)
    # Of each way to name a job: one that is there, and one of the same length that never was.
    twins = [
        (town.anna_job, ABSENT),
        (town.anna_job[:8], ABSENT[:8]),
        (SECRET, SECRET.replace("a", "b")),
        (town.ended, ABSENT),
    ]

    @profile(examples=6)
    @given(data=st.data(), who=st.sampled_from(OTHERS), twin=st.sampled_from(twins))
    def holds(data: st.DataObject, who: str, twin: tuple[str, str]) -> None:
        case = data.draw(CALLS[label].as_strategy())
        case.query.pop("follow", None)
        for named in {"digest", "hashes"} & case.path_parameters.keys():
            case.path_parameters[named] = town.index
        said = []
        for job in twin:
            case.path_parameters["job"] = job
            answer, made = send(town_door, case, who)
            conforms(case, answer, made)
            assert answer.status >= 400
            assert answer.status != 403, "a 403 would say that it is there"
            headers = {n: v for n, v in answer.headers.items() if n != "content-length"}
            said.append((answer.status, headers, answer.body.replace(job.encode(), b"JOB")))
        assert said[0] == said[1]

    holds()


@pytest.mark.parametrize("who", OTHERS)
def test_a_plain_look_at_anothers_job_is_404(who: str, town_door: Door) -> None:
    town = town_of(town_door)
    looks = [label.removeprefix("GET ") for label in OF_JOBS if label.startswith("GET")]
    assert len(looks) > 5
    for look in looks:
        path = look.replace("{digest}", town.index).replace("{hashes}", town.index)
        for job in (town.anna_job, town.anna_job[:8], SECRET, town.ended):
            answer = town_door.ask(who, "GET", path.replace("{job}", job))
            assert answer.status == 404, (path, answer)
        mine = town_door.ask("anna", "GET", path.replace("{job}", town.anna_job))
        # This broker carries content itself, and has no addresses to give.
        by_address = "/addresses/" in path and b"no_such_address" in mine.body
        assert mine.status == 200 or by_address, (path, mine)


@pytest.mark.parametrize("who", OTHERS)
def test_nobody_asks_about_anothers_content_even_with_nothing_to_ask(
    who: str, town_door: Door
) -> None:
    target = f"/v1/jobs/{town_of(town_door).anna_job}/blobs/missing"
    assert town_door.ask(who, "POST", target, b'{"digests": []}').status == 404
    assert town_door.ask("anna", "POST", target, b'{"digests": []}').status == 200


@pytest.mark.parametrize("who", OTHERS)
def test_lists_and_hashes_tell_nothing_of_others(who: str, town_door: Door) -> None:
    town = town_of(town_door)
    for target in (
        "/v1/jobs",
        f"/v1/jobs?name={SECRET}",
        "/v1/jobs?state=running",
        "/v1/balance",
        "/v1/earnings",
        "/v1/log?since=0",
        "/v1/offers",
    ):
        answer = town_door.ask(who, "GET", target)
        assert answer.status == 200
        assert not [s for s in town.secrets if s.encode() in answer.body]
    absent = f"blake3:{ABSENT}"
    asked = json.dumps({"digests": [town.index, absent]}).encode()
    missing = town_door.ask(who, "POST", "/v1/blobs/missing", asked)
    assert missing.status >= 400 or json.loads(missing.body)["missing"] == [town.index, absent]
