"""`sublet.run`: a container on somebody's GPU, under a hard price and budget."""

from collections.abc import Sequence
from typing import Unpack

from sublet.client import Client, Job
from sublet.options import JobOptions
from sublet.options_docs import with_options


@with_options()
def run(
    image: str,
    command: str | Sequence[str] = (),
    *,
    broker: str | None = None,
    profile: str | None = None,
    client: Client | None = None,
    **options: Unpack[JobOptions],
) -> Job:
    """Submit a job and return its handle at once; the budget is held from your account.

    Durations are '90s', '2m', '1.5h' (a number is seconds); sizes '24GB', '512MiB' (a number is
    bytes); money is in credits, to the sixth decimal. `max_price` and `budget` must be given.

    `broker` is its URL, by default SUBLET_BROKER's, else this machine's; `profile` whose key signs,
    by default SUBLET_PROFILE's, else `default`. `client`: one that you have already, instead.

    Raises UnitError and InputError, which name the option; ConfigError and KeyRefused about your
    key and broker; SubletError with what the broker refused (`error.problem.code`: no_match,
    over_balance ...) and what to do; BrokerAway if it doesn't answer for a minute.
    """
    return (client or Client(broker=broker, profile=profile)).run(image, command, **options)
