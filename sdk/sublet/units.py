"""What people write, as the integers that documents carry: prices, durations, sizes, GPUs."""

import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
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


Moment = str | int | float | datetime
"""'10m' (ago), '2026-11-29T08:00', a datetime; a number is seconds ago."""


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


AUTO = "auto"


def interval_ms(text: str | int | float, name: str) -> int:
    """Return how often a checkpoint is asked for, in ms; 'auto' is 0. Raises UnitError."""
    if str(text).strip().lower() == AUTO:
        return 0
    try:
        every_ms = duration_ms(text, name)
    except UnitError as error:
        raise UnitError(f"{error}, or {AUTO}") from error
    if every_ms == 0:  # in the document that stands for auto
        raise UnitError(f"{name}: {text!r} is too often; write at least 1s, or {AUTO}")
    return every_ms


def moment_ms(moment: Moment, now_ms: int, name: str) -> int:
    """Return a moment in ms since 1970: '10m' is so long before `now_ms` (a bare number: seconds),
    '2026-11-29T08:00' is by this machine's clock unless it names its offset. Raises UnitError."""
    if isinstance(moment, datetime):
        return _since_1970_ms(moment)
    text = str(moment).strip()
    with suppress(UnitError):
        return max(0, now_ms - duration_ms(text, name))
    try:
        return _since_1970_ms(datetime.fromisoformat(text))
    except (ValueError, OverflowError, OSError) as error:
        raise UnitError(
            f"{name}: {text!r} is neither a duration nor a time; write it like 10m or "
            "2026-11-29T08:00"
        ) from error


def _since_1970_ms(moment: datetime) -> int:
    return min(max(0, int(moment.timestamp() * 1000)), MAX_INTEGER)


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


_GPUS_HINT = "write it like 2, A100, A100:2, 2xA100, 1xH100-80GB, 2x24GB or cpu"
_GPUS = re.compile(r"(?:([0-9]{1,4}) ?[x*] ?)?(.*?)(?: ?: ?([0-9]{1,4}))?")
_MEMORY = re.compile(r"[0-9]+(?:\.[0-9]+)?[KMGT]i?B?", re.IGNORECASE)
_LETTER_OR_MODEL = re.compile(r".*[A-Za-z].*|[1-9][0-9]{3}")
_DEVICE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]*")


def parse_gpus(text: str | int) -> Gpus:
    """Return what is asked for in '2' (any), 'A100' (words of the name), 'A100:2' or '2xA100',
    '1xH100-80GB' (name, and the least memory of each), '2x24GB' or 'cpu'. A number of four digits
    is a GPU's name, as in 4090: so many no machine has. Raises UnitError."""
    written = str(text).strip()
    if written.lower() == "cpu":
        return Gpus(1, "cpu")
    if re.fullmatch(r"[0-9]{1,3}", written):
        return Gpus(_device_count(written, written), "gpu")
    match = _GPUS.fullmatch(written)
    before, what, after = match.groups() if match else (None, "", None)
    if before and after:
        raise UnitError(f"gpus: {written!r} says twice how many; {_GPUS_HINT}")
    devices = _device_count(before or after or "1", written)
    what = what.strip()
    if what.lower() == "cpu":
        raise UnitError("gpus: a machine's CPU is one device; write it as cpu")
    if what.lower() in ("gpu", "any"):
        return Gpus(devices, "gpu")
    if _MEMORY.fullmatch(what):
        return Gpus(devices, "gpu", memory_bytes=size_bytes(what, "gpus"))
    if re.fullmatch(r"[0-9]{1,3}(\.[0-9]+)?", what):
        raise UnitError(f"gpus: {written!r}; write memory with its unit, like {what}GB")
    name, dash, memory = _parted(what)
    # A word alone is a name only if it has a number in it, as GPUs' names have: `lots` is a slip.
    told = before or after or re.search(r"[0-9]", name)
    if not told or not _DEVICE_NAME.fullmatch(name) or not _LETTER_OR_MODEL.fullmatch(name):
        raise UnitError(f"gpus: {written!r} is neither a number nor a GPU's name; {_GPUS_HINT}")
    if re.search(r"^x[0-9]|[A-Za-z0-9]x[0-9]{1,2}$", name):
        raise UnitError(f"gpus: {written!r} has the number at the wrong end; {_GPUS_HINT}")
    return Gpus(devices, "gpu", size_bytes(memory, "gpus") if dash else 0, name)


def _parted(what: str) -> tuple[str, str, str]:
    """Return 'H100-80GB' as its name, the sign between, and its memory."""
    for place in range(len(what) - 1, 0, -1):
        if what[place] in "-_ ":
            found = re.fullmatch(_MEMORY, what[place + 1 :])
            return (what[:place], what[place], what[place + 1 :]) if found else (what, "", "")
    return what, "", ""


def _device_count(number: str, written: str) -> int:
    if int(number) < 1:
        raise UnitError(f"gpus: {written!r} asks for no device; {_GPUS_HINT}")
    return int(number)
