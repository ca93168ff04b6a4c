"""The link's times, against those of jobs; and what an owner reads when he is turned away."""

import ssl

from sublet.options import OPTIONS
from sublet.units import duration_ms
from sublet_agent.adapters.session import link as link_module
from sublet_agent.adapters.session.link import BACKOFF_FIRST_S, BACKOFF_MOST_S, PING_S, SILENCE_S
from sublet_agent.core.fixes import with_fix
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


def test_an_owner_reads_what_is_so_and_what_to_do() -> None:
    replaced = with_fix("stale_instance", "another agent with this key has joined since")
    assert replaced.startswith("another agent with this key has joined since; stop one of the two")
    assert "--state" in with_fix("other_broker", "this is another broker")
    assert "timedatectl set-ntp true" in with_fix("clock", "this machine's clock is 600 s behind")
    # Nothing to do, or a code that only a newer broker knows: what is so stands for itself.
    assert with_fix("stale_epoch", "epoch 1 no longer holds the job") == (
        "epoch 1 no longer holds the job"
    )
    assert with_fix("too_hot", "too hot") == "too hot"


def test_a_broker_that_speaks_http_is_told_from_one_that_is_away() -> None:
    error = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number")
    assert link_module._no_connection(error, "wss://there:8470/v1/agent") == (
        "no connection: there:8470 doesn't speak https, as it seems: does its URL begin with "
        "http://?"
    )
