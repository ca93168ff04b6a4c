"""The board: offers come, are replaced, withdrawn, and shown."""

from dataclasses import replace

from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import AgentFact, OfferFact
from sublet_broker.market.matching import BookEntry, Wish, explain
from sublet_broker.market.offers import is_withdrawn_by, pool_of, supersedes, withdrawn
from sublet_broker.service.leases.candidates import load_offers
from sublet_broker.service.unit_of_work.context import Core
from sublet_broker.service.unit_of_work.signed_input import (
    as_refusal,
    check_fresh,
    receive_document,
)
from sublet_broker.service.unit_of_work.unit_of_work import Work
from sublet_contracts.amounts import credits_of
from sublet_contracts.api import MatchRequest, MatchView, OffersPage, OfferView
from sublet_contracts.documents import DocumentRefused, Offer
from sublet_contracts.envelope import Envelope
from sublet_contracts.rules import minimum_budget_ucr


class Board:
    """Offers."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def announce(self, provider: str, envelope: Envelope) -> None:
        """Take up an offer in place of the provider's older one; an older one changes nothing."""
        try:
            signed = receive_document(self._core, envelope, Offer, signed_by=(provider,))
            offer = signed.document
            if offer.provider != provider:
                raise DocumentRefused("the provider is not who sent it", "provider")
            with self._core.work() as work:
                check_fresh(
                    self._core, work.now_ms, issued_ms=offer.issued_ms, expires_ms=offer.expires_ms
                )
                agent = work.must(AgentFact, provider)
                if not supersedes(offer, agent):
                    return
                most = self._core.settings.max_offers_an_hour
                self._core.quotas.demand("offers", provider, most, work.now_ms)
                self._close(work, agent.offer)
                latest = work.now_ms + self._core.settings.max_offer_ms
                work.tx.add(
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
        with self._core.work() as work:
            agent = work.must(AgentFact, provider)
            offer = work.get(OfferFact, agent.offer) if agent.offer else None
            if offer is not None and is_withdrawn_by(offer, offer_sequence):
                self._close(work, offer.id)
            work.put(withdrawn(agent, offer_sequence))
            work.touch_offer(provider)

    def _close(self, work: Work, id: str | None) -> None:
        offer = work.get(OfferFact, id) if id else None
        if offer is not None and offer.open:
            work.put(replace(offer, open=False))

    def expired(self, look: Work) -> list[OfferFact]:
        """Return the open offers whose time is over."""
        return [o for o in look.find(OfferFact, {"open": True}) if o.expires_ms <= look.now_ms]

    def expire(self, over: list[OfferFact]) -> None:
        """Close these offers."""
        for offer in over:
            with self._core.work() as work:
                agent = work.get(AgentFact, offer.provider)
                self._close(work, offer.id)
                if agent is not None and agent.offer == offer.id:
                    work.put(replace(agent, offer=None))
                work.touch_offer(offer.provider)

    def offers(self, kind: str = "", region: str = "") -> OffersPage:
        """Return the open offers, cheapest first."""
        with self._core.read() as look:
            entries = load_offers(look.tx, look.now_ms)
        shown = [
            _offer_view(entry)
            for entry in entries
            if _shows(accepted(entry.offer.envelope, Offer), kind, region)
        ]
        shown.sort(key=lambda view: (view.price_ucr_per_device_hour, view.id))
        return OffersPage(offers=tuple(shown))

    def match(self, caller: str, request: MatchRequest) -> MatchView:
        """Return what a job like this would get now, and where nothing fits, why."""
        wish = Wish(
            renter=caller,
            resources=request.resources,
            max_price_ucr_per_device_hour=request.max_price_ucr_per_device_hour,
            image=request.image,
            hardware_class=request.resources.hardware_class,
        )
        with self._core.read() as look:
            told = explain(wish, load_offers(look.tx, look.now_ms))
        relax = told.relax
        least = minimum_budget_ucr(request.max_price_ucr_per_device_hour, request.resources.devices)
        if told.fitting and 0 < request.budget_ucr < least:
            relax = f"a minute costs up to {credits_of(least)}: raise --budget to at least that"
        if not told.considered:
            relax = "no offer is open at the moment"
        return MatchView(
            offers=tuple(_offer_view(entry) for entry in told.fitting),
            considered=told.considered,
            failures=dict(sorted(told.failures.items())),
            relax=relax,
        )


def _shows(offer: Offer, kind: str, region: str) -> bool:
    kinds = {device.kind for device in offer.devices}
    return (not kind or kind in kinds) and (not region or region == offer.region)


def _offer_view(entry: BookEntry) -> OfferView:
    offer = accepted(entry.offer.envelope, Offer)
    return OfferView(
        id=entry.offer.id,
        provider=offer.provider,
        name=offer.name,
        devices=offer.devices,
        free_devices=len(entry.free_device_ids),
        price_ucr_per_device_hour=offer.price_ucr_per_device_hour,
        cpu_millis=offer.cpu_millis,
        memory_bytes=offer.memory_bytes,
        disk_bytes=offer.disk_bytes,
        region=offer.region,
        runner=offer.runner,
        egress=offer.egress,
        expires_ms=entry.offer.expires_ms,
    )
