"""Offers: which one counts, and what is free of it.

Rules:
- A provider has one offer at a time: the one with the highest sequence. An older or equal sequence
  is an echo of the past and changes nothing; `withdraw` names the sequence up to which it counts.
- An offer lives until it is replaced, withdrawn, or expired. Its leases outlive it.
- A device is free if no lease of that provider that isn't closed names it, and if it isn't held for
  a job whose own machine has fallen silent (see resuming.py).
- Offers stand in pools, "<hardware class>@<region>", so that shards can share the work. An offer
  with devices of several classes stands in "mixed@<region>".
"""

from collections.abc import Iterable
from dataclasses import replace

from sublet_broker.market.facts import AgentFact, LeaseFact, OfferFact
from sublet_contracts.documents import Offer

MIXED = "mixed"


def pool_of(offer: Offer) -> str:
    """Return the pool in which the offer stands."""
    classes = {device.hardware_class for device in offer.devices}
    name = next(iter(classes)) if len(classes) == 1 else MIXED
    return f"{name}@{offer.region}"


def supersedes(offer: Offer, agent: AgentFact) -> bool:
    """Say whether this offer is newer than anything that the agent said before."""
    return offer.sequence > max(agent.offer_sequence, agent.withdrawn_sequence)


def is_withdrawn_by(offer: OfferFact, sequence: int) -> bool:
    """Say whether a withdrawal up to `sequence` ends this offer."""
    return offer.sequence <= sequence


def withdrawn(agent: AgentFact, sequence: int) -> AgentFact:
    """Return the agent after it withdrew everything up to `sequence`."""
    gone = agent.offer_sequence <= sequence
    return replace(
        agent,
        withdrawn_sequence=max(agent.withdrawn_sequence, sequence),
        offer=None if gone else agent.offer,
    )


def free_devices(
    offer: Offer, leases: Iterable[LeaseFact], held: Iterable[int] = ()
) -> tuple[str, ...]:
    """Return the ids of the offer's free devices, in the offer's order.

    `leases`: those of its provider that aren't closed. `held`: for each job that may come over to
    this provider, how many devices it needs; they are kept back from the end of the list.
    """
    taken = {device for lease in leases for device in lease.device_ids}
    free = [device.id for device in offer.devices if device.id not in taken]
    return tuple(free[: max(0, len(free) - sum(held))])
