"""`sublet offers` and `sublet whoami`."""

import json
import time
from collections.abc import Sequence

from sublet.cli.parser import Parser, open_client, with_broker, with_json
from sublet.terminal.text import clip, safe, table
from sublet_contracts.amounts import format_credits, format_device_memory
from sublet_contracts.api import OfferView
from sublet_contracts.keys import short


def offers(argv: Sequence[str]) -> int:
    """List what is on the market."""
    parser = with_json(with_broker(Parser("offers", "What is on the market, cheapest first.")))
    parser.add_argument("--kind", choices=("gpu", "cpu"), default="", help="only these devices")
    parser.add_argument("--region", default="", metavar="R", help="only machines there")
    options = parser.parse_args(argv)
    with open_client(options) as client:
        page = client.offers(kind=options.kind, region=options.region)
    if options.json:
        print(page.model_dump_json(indent=2))
    elif not page.offers:
        print("No offer is open. A machine joins with: sublet provide --broker", client.url)
    else:
        print(offers_table(page.offers))
    return 0


def offers_table(found: Sequence[OfferView]) -> str:
    """Return offers as a table; prices in credits per device-hour."""
    rows = []
    for offer in found:
        device = offer.devices[0]
        count = len(offer.devices)
        rows.append(
            [
                format_credits(offer.price_ucr_per_device_hour),
                clip((f"{count}x" if count > 1 else "") + safe(device.name), 24),
                format_device_memory(device.memory_bytes),
                f"{offer.free_devices}/{count}",
                clip(safe(offer.name) or short(offer.provider), 14),
                clip(safe(offer.region) or "-", 10),
                offer.runner,
            ]
        )
    heads = ("price/h", "device", "memory", "free", "provider", "region", "runner")
    return table(heads, rows, right=(0, 2, 3))


def whoami(argv: Sequence[str]) -> int:
    """Say who this user is to which broker. Works while the broker is away."""
    parser = with_json(with_broker(Parser("whoami", "Your party id, its key, and your broker.")))
    options = parser.parse_args(argv)
    from sublet.errors import BrokerAway

    with open_client(options, away_limit_s=1.0) as client:
        broker: str | None
        began = time.monotonic()
        try:
            broker, answers = client.broker, True
        except BrokerAway:
            broker, answers = client.profile.pinned(client.url), False
        took_ms = int((time.monotonic() - began) * 1000)
        said = {
            "party": client.party,
            "profile": client.profile.name,
            "key": str(client.profile.folder / "key"),
            "broker_url": client.url,
            "broker": broker,
            "broker_answers": answers,
        }
    if options.json:
        print(json.dumps(said, indent=2))
        return 0
    print(f"party    {said['party']}")
    print(f"profile  {said['profile']} ({said['key']})")
    print(f"broker   {said['broker_url']}", f"({took_ms} ms)" if answers else "(doesn't answer)")
    print(f"         {broker or 'not seen yet: its id is pinned at the first contact'}")
    return 0
