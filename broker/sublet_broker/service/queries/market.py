"""The market as it can be looked at: open offers, and what a job would get."""

from sublet_broker.market.accepted import accepted
from sublet_broker.market.matching import BookEntry, Requirements
from sublet_broker.service.leases.open_offers import OpenOffers
from sublet_broker.service.unit_of_work.context import Context
from sublet_contracts.api import MatchRequest, MatchView, OffersPage, OfferView
from sublet_contracts.documents import Offer
from sublet_contracts.rules import minimum_budget_ucr


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


class Market:
    """What is on offer. Answers come from the offers in memory."""

    def __init__(self, context: Context, open_offers: OpenOffers) -> None:
        self._context = context
        self._open_offers = open_offers

    def offers(self, kind: str = "", region: str = "") -> OffersPage:
        """Return the open offers, cheapest first."""
        shown = [
            _offer_view(entry)
            for entry in self._open_offers.all()
            if _shows(accepted(entry.offer.envelope, Offer), kind, region)
        ]
        shown.sort(key=lambda view: (view.price_ucr_per_device_hour, view.id))
        return OffersPage(offers=tuple(shown))

    def match(self, caller: str, request: MatchRequest) -> MatchView:
        """Return what a job like this would get now, and where nothing fits, why."""
        requirements = Requirements(
            renter=caller,
            resources=request.resources,
            max_price_ucr_per_device_hour=request.max_price_ucr_per_device_hour,
            image=request.image,
        )
        explanation = self._open_offers.explain(requirements)
        least_ucr = minimum_budget_ucr(
            request.max_price_ucr_per_device_hour, request.resources.devices
        )
        return MatchView(
            offers=tuple(_offer_view(entry) for entry in explanation.fitting),
            considered=explanation.considered,
            failures=dict(sorted(explanation.failures.items())),
            waiting=self._context.waiting_line.length(request.resources.device_kind),
            relax=explanation.relax,
            least_budget_ucr=least_ucr if 0 < request.budget_ucr < least_ucr else 0,
        )
