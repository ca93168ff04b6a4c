"""Machines that can't start what they are given are set aside; a start puts them back."""

from __future__ import annotations

from sublet_broker.market.facts import AgentFact
from sublet_broker.market.setting_aside import could_not_start, has_started, is_set_aside

AGENT = AgentFact("provider", "instance", True, 0)
NOW_MS = 1_000_000


def aside_ms(agent: AgentFact) -> int:
    return agent.set_aside_until_ms - NOW_MS


def test_each_other_job_that_fails_doubles_the_time() -> None:
    agent, spans_s = AGENT, []
    for number in range(10):
        agent = could_not_start(agent, f"job {number}", NOW_MS)
        spans_s.append(aside_ms(agent) // 1000)
    assert spans_s == [15, 30, 60, 120, 240, 480, 960, 1800, 1800, 1800]


def test_one_jobs_failures_do_not_add_up() -> None:
    agent = AGENT
    for _ in range(10):
        agent = could_not_start(agent, "job", NOW_MS)
    assert aside_ms(agent) == 15_000


def test_two_jobs_that_take_turns_do_not_get_around_it() -> None:
    agent = AGENT
    for number in range(6):
        agent = could_not_start(agent, f"job {number % 2}", NOW_MS)
    assert aside_ms(agent) == 480_000


def test_a_start_ends_it() -> None:
    agent = has_started(could_not_start(AGENT, "job", NOW_MS))
    assert not is_set_aside(agent, NOW_MS)
    assert aside_ms(could_not_start(agent, "other", NOW_MS)) == 15_000


def test_it_ends_by_itself() -> None:
    agent = could_not_start(AGENT, "job", NOW_MS)
    assert is_set_aside(agent, NOW_MS + 14_999)
    assert not is_set_aside(agent, NOW_MS + 15_000)
