"""The link's times, against those of jobs."""

from sublet.spec import JobSpec
from sublet.units import duration_ms
from sublet_agent.adapters.link import BACKOFF_FIRST_S, PING_S, SILENCE_S

JOIN_S = 5.0
"""Time to connect and to prove oneself, generously."""


def test_a_dead_connection_is_replaced_within_the_default_patience() -> None:
    patience_ms = duration_ms(JobSpec.__dataclass_fields__["patience"].default, "patience")
    # A ping goes out, no pong comes, a new connection is made, and the broker hears the agent.
    assert patience_ms > 1000 * (PING_S + SILENCE_S + BACKOFF_FIRST_S + JOIN_S)
