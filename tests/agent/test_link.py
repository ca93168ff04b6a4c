"""The link's times, against those of jobs."""

from sublet.options import OPTIONS
from sublet.units import duration_ms
from sublet_agent.adapters.session.link import BACKOFF_FIRST_S, BACKOFF_MOST_S, PING_S, SILENCE_S
from sublet_contracts.documents import Job

JOIN_S = 1.5
"""Time to connect and to prove oneself."""


def test_a_dead_connection_is_replaced_within_the_default_patience() -> None:
    patience_ms = duration_ms(OPTIONS["patience"].default, "patience")
    # A ping goes out, no pong comes, a new connection is made, and the broker hears the agent.
    assert patience_ms > 1000 * (PING_S + SILENCE_S + BACKOFF_FIRST_S + JOIN_S)


def test_an_agent_is_back_within_the_least_patience_after_a_brokers_restart() -> None:
    least_ms = next(m.ge for m in Job.model_fields["patience_ms"].metadata if hasattr(m, "ge"))
    assert least_ms > 1000 * (BACKOFF_MOST_S + JOIN_S)
