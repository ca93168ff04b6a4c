"""Setting machines aside that can't start what they are given.

A broken machine is often the cheapest one, so every queued job would try it first. Rules:

- When a provider could not start a run it isn't leased again for a while: a short one first. Where
  another job fails there as well, before any run has started, each time twice as long. One job's
  failures alone don't add up: it may be the job that nobody can start.
- The first run that starts there ends it.
- What is leased there already goes on. It counts as busy, not as gone: a job that only this machine
  fits waits for it.
"""

from dataclasses import replace

from sublet_broker.market.facts import AgentFact
from sublet_contracts.reasons import Reason

ASIDE_MS = 15_000
ASIDE_MOST_MS = 1_800_000
CANT_START = frozenset({Reason.START_FAILED, Reason.RUN_QUARANTINED})


def could_not_start(agent: AgentFact, job: str, now_ms: int) -> AgentFact:
    """Return the agent after it could not start a run of the job."""
    again = agent.start_failed_job == job
    failures = max(1, agent.start_failures) if again else agent.start_failures + 1
    aside_ms = min(ASIDE_MS << min(failures - 1, 32), ASIDE_MOST_MS)
    return replace(
        agent,
        start_failures=failures,
        start_failed_job=job,
        set_aside_until_ms=max(agent.set_aside_until_ms, now_ms + aside_ms),
    )


def has_started(agent: AgentFact) -> AgentFact:
    """Return the agent after a run has started there."""
    return replace(agent, start_failures=0, start_failed_job="", set_aside_until_ms=0)


def is_set_aside(agent: AgentFact, now_ms: int) -> bool:
    """Say whether nothing is leased on the agent's machine now."""
    return now_ms < agent.set_aside_until_ms
