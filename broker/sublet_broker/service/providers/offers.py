"""Offers come, are replaced, withdrawn, and expire."""

from dataclasses import replace

from sublet_broker.market.facts import AgentFact, OfferFact
from sublet_broker.market.offers import is_withdrawn_by, pool_of, supersedes, withdrawn
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.signed_input import (
    as_refusal,
    check_fresh,
    receive_document,
)
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.documents import DocumentRefused, Offer
from sublet_contracts.envelope import Envelope


class Offers:
    """Offers."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def announce(self, provider: str, envelope: Envelope) -> None:
        """Take up an offer in place of the provider's older one; an older one changes nothing."""
        try:
            signed = receive_document(self._context, envelope, Offer, signed_by=(provider,))
            offer = signed.document
            if offer.provider != provider:
                raise DocumentRefused("the provider is not who sent it", "provider")
            with self._context.work() as work:
                check_fresh(
                    self._context,
                    work.now_ms,
                    issued_ms=offer.issued_ms,
                    expires_ms=offer.expires_ms,
                )
                agent = work.must(AgentFact, provider)
                if not supersedes(offer, agent):
                    return
                most = self._context.settings.max_offers_an_hour
                self._context.rate_limits.demand("offers", provider, most, work.now_ms)
                self._close(work, agent.offer)
                latest = work.now_ms + self._context.settings.max_offer_ms
                work.add(
                    OfferFact(
                        signed.id,
                        provider,
                        offer.sequence,
                        pool_of(offer),
                        True,
                        min(offer.expires_ms, latest),
                        signed.envelope,
                    )
                )
                work.put(replace(agent, offer=signed.id, offer_sequence=offer.sequence))
                work.record(signed.id)
                work.touch_offer(provider)
        except DocumentRefused as error:
            raise as_refusal(error) from error

    def withdraw(self, provider: str, offer_sequence: int) -> None:
        """Take back every offer up to a sequence: no further leases on it."""
        with self._context.work() as work:
            agent = work.must(AgentFact, provider)
            offer = work.get(OfferFact, agent.offer) if agent.offer else None
            if offer is not None and is_withdrawn_by(offer, offer_sequence):
                self._close(work, offer.id)
            work.put(withdrawn(agent, offer_sequence))
            work.touch_offer(provider)

    def _close(self, work: UnitOfWork, id: str | None) -> None:
        offer = work.get(OfferFact, id) if id else None
        if offer is not None and offer.open:
            work.put(replace(offer, open=False), before=offer)

    def expired(self, snapshot: UnitOfWork) -> list[OfferFact]:
        """Return the open offers whose time is over."""
        return [
            o for o in snapshot.find(OfferFact, {"open": True}) if o.expires_ms <= snapshot.now_ms
        ]

    def expire(self, over: list[OfferFact]) -> None:
        """Close these offers."""
        for offer in over:
            with self._context.work() as work:
                agent = work.get(AgentFact, offer.provider)
                self._close(work, offer.id)
                if agent is not None and agent.offer == offer.id:
                    work.put(replace(agent, offer=None))
                work.touch_offer(offer.provider)
