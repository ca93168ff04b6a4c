"""What people write, as the integers that documents carry: prices, durations, sizes, GPUs."""

import re
from dataclasses import dataclass
from decimal import Decimal

from sublet_contracts.encoding import MAX_INTEGER
from sublet_contracts.rules import UCR_PER_CREDIT

_DURATION = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_SIZE = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


class UnitError(ValueError):
    """Something written isn't what was expected; the message shows how to write it."""


def credits_to_ucr(amount: str | int | float | Decimal, name: str) -> int:
    """Return an amount of credits as micro-credits, exactly. Raises UnitError."""
    return _scaled(amount, UCR_PER_CREDIT, name, "finer than 0.000001")


def cores_to_millis(cores: str | int | float | Decimal, name: str = "cpus") -> int:
    """Return a number of cores as thousandths. Raises UnitError."""
    millis = _scaled(cores, 1000, name, "finer than 0.001")
    if millis == 0:
        raise UnitError(f"{name}: at least 0.001 of a core is needed")
    return millis


def _scaled(amount: str | int | float | Decimal, scale: int, name: str, grain: str) -> int:
    text = str(amount).strip()
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,24})?|[0-9]+(\.[0-9]+)?e-?[0-9]{1,2}", text):
        raise UnitError(f"{name}: {amount!r} is not an amount; write it like 0.40")
    exact = Decimal(text) * scale
    if exact != exact.to_integral_value():
        raise UnitError(f"{name}: {amount!r} must not be {grain}")
    if exact > MAX_INTEGER:
        raise UnitError(f"{name}: {amount!r} is more than can be written")
    return int(exact)


def duration_ms(text: str | int | float, name: str) -> int:
    """Return a duration ('90s', '2m', '1.5h'; a bare number is seconds) in ms. Raises UnitError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d)?\s*", str(text))
    if not match:
        raise UnitError(f"{name}: {text!r} is not a duration; write it like 90s, 2m or 1h")
    return int(Decimal(match[1]) * _DURATION[match[2] or "s"])


def size_bytes(text: str | int, name: str) -> int:
    """Return a size ('24GB', '512MiB'; a bare number is bytes). Raises UnitError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGTkmgt]?i?[Bb]?)\s*", str(text))
    unit = match[2].upper() if match else None
    if unit in ("K", "M", "G", "T"):
        unit += "B"
    if match is None or unit not in _SIZE:
        raise UnitError(f"{name}: {text!r} is not a size; write it like 24GB or 512MiB")
    return int(Decimal(match[1]) * _SIZE[unit])


@dataclass(frozen=True)
class Gpus:
    """The devices that a job asks for, all on one machine."""

    devices: int
    kind: str
    memory_bytes: int = 0
    name: str = ""


def parse_gpus(text: str | int) -> Gpus:
    """Return what is asked for in '1', '2x24GB', '1xA100' or 'cpu'. Raises UnitError."""
    written = str(text).strip()
    if written.lower() == "cpu":
        return Gpus(1, "cpu")
    match = re.fullmatch(r"([0-9]{1,2})(?:x(.+))?", written)
    if not match or int(match[1]) < 1:
        raise UnitError(f"gpus: {written!r}; write it like 1, 1x24GB, 2xA100 or cpu")
    rest = (match[2] or "").strip()
    if rest.lower() == "cpu":
        raise UnitError("gpus: a machine's CPU is one device; write it as cpu")
    if re.match(r"[0-9.]+\s*[KMGTkmgt]i?[Bb]?$", rest):
        return Gpus(int(match[1]), "gpu", memory_bytes=size_bytes(rest, "gpus"))
    if re.fullmatch(r"[0-9]{1,2}(\.[0-9]+)?", rest):
        raise UnitError(f"gpus: {written!r}; write memory with its unit, like {written}GB")
    return Gpus(int(match[1]), "gpu", name=rest)
