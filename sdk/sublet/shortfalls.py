"""What a renter could change where no offer fits, in words: the options of the command line.

The broker returns codes with facts (sublet_contracts/requirements.py); the words are made here.
"""

from collections.abc import Callable, Iterable

from pydantic import TypeAdapter

from sublet_contracts.amounts import format_bytes, format_cores, format_credits
from sublet_contracts.problems import FactValue
from sublet_contracts.requirements import Constraint, Shortfall


def _price(price: Shortfall) -> str:
    has = int(price.has)
    return (
        f"the cheapest offer that fits costs {format_credits(has)} per device-hour: "
        f"raise --max-price by {format_credits(has - int(price.needs))}"
    )


def _devices(devices: Shortfall) -> str:
    if not devices.has:
        return "ask for less of each device: none meets every wish"
    return f"ask for at most {devices.has} device{'' if devices.has == 1 else 's'}"


_WORDS: dict[str, Callable[[Shortfall], str]] = {
    Constraint.BUSY: lambda _: "leave out --no-wait, and it waits in line",
    Constraint.PRICE: _price,
    Constraint.REGION: lambda s: f"allow region {s.has}",
    Constraint.DISK: lambda s: f"ask for at most {format_bytes(int(s.has))} of disk",
    Constraint.MEMORY: lambda s: f"ask for at most {format_bytes(int(s.has))} of memory",
    Constraint.CPU: lambda s: f"ask for at most {format_cores(int(s.has))} of cpu",
    Constraint.IMAGE: lambda _: "name the image by digest (name@sha256:...)",
    Constraint.DEVICE_MEMORY: (lambda s: f"ask for devices of at most {format_bytes(int(s.has))}"),
    Constraint.DEVICE_NAME: lambda s: f"allow {s.has}",
    Constraint.HARDWARE_CLASS: lambda s: f"allow hardware class {s.has}",
    Constraint.DEVICES: _devices,
    Constraint.DEVICE_KIND: (
        lambda s: f"allow a {s.has} as device (--gpus {'cpu' if s.has == 'cpu' else 1})"
    ),
    Constraint.EGRESS: lambda _: "do without network access",
    Constraint.USER: lambda _: "leave out --user: no owner there lets jobs choose it",
    Constraint.ACCEPTS: lambda _: "ask its owner to trust your key",
}


def relax_text(shortfalls: Iterable[Shortfall]) -> str:
    """Return how to get the offer that falls short: all of it, for a part would get nothing.

    '' where nothing falls short. A constraint that only a newer broker knows is told as it is.
    """
    return ", and ".join(
        _WORDS[s.constraint](s) if s.constraint in _WORDS else f"change what it says of {s}"
        for s in shortfalls
    )


def advice(shortfalls: Iterable[Shortfall]) -> str:
    """Return how to get an offer that is there, for who would wait for it: '' where it is just
    taken."""
    return relax_text(s for s in shortfalls if s.constraint != Constraint.BUSY)


_SHORTFALLS = TypeAdapter(tuple[Shortfall, ...])


def advice_from(shortfalls: FactValue) -> str:
    """Return the same from a refusal's fact. Raises ValidationError: it isn't one."""
    return relax_text(_SHORTFALLS.validate_python(shortfalls))
