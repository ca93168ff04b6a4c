"""How amounts, sizes and spans of time are written for people. Integers in, text out.

Credits are exact. Sizes are rounded down, so that what is said to be there is there. An amount can
be written back as it was read: no thousands separators.
"""

from sublet_contracts.rules import UCR_PER_CREDIT

_SIZES = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
_SPANS = ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "m"), (60, "m", 1, "s"))
_DIGITS = 4


def format_credits(amount_ucr: int) -> str:
    """Return micro-credits as credits with at least two decimals: 450000 -> '0.45', 379 ->
    '0.000379'."""
    whole, part = divmod(abs(amount_ucr), UCR_PER_CREDIT)
    digits = f"{part:06d}".rstrip("0")
    sign = "-" if amount_ucr < 0 else ""
    return f"{sign}{whole}.{digits:0<2}"


def format_bytes(size_bytes: int) -> str:
    """Return a size in units of 1000, four digits of it, rounded down: '512 B', '24 GB',
    '25.76 GB'."""
    for unit, scale in _SIZES:
        if size_bytes >= scale:
            decimals = max(0, _DIGITS - len(str(size_bytes // scale)))
            shown = size_bytes * 10**decimals // scale
            whole, part = divmod(shown, 10**decimals)
            digits = f"{part:0{decimals}d}".rstrip("0") if decimals else ""
            return f"{whole}{'.' if digits else ''}{digits} {unit}"
    return f"{size_bytes} B"


def format_device_memory(size_bytes: int) -> str:
    """Return a device's memory in the unit of its data sheet: '24 GiB'."""
    return f"{size_bytes / 2**30:.0f} GiB" if size_bytes >= 2**30 else format_bytes(size_bytes)


def format_cores(cpu_millis: int) -> str:
    """Return thousandths of a core: 1500 -> '1.5 cores'."""
    return "1 core" if cpu_millis == 1000 else f"{cpu_millis / 1000:g} cores"


def format_duration(span_ms: int) -> str:
    """Return a span of time in its two largest units: '850 ms', '3.4 s', '12 s', '3 m 20 s',
    '2 h 5 m', '1 d 3 h'. Below zero counts as zero."""
    if span_ms <= 0:
        return "0 s"
    if span_ms < 1000:
        return f"{span_ms} ms"
    seconds = span_ms // 1000
    if seconds < 10:
        return f"{seconds}.{span_ms // 100 % 10} s"
    for scale, unit, small_scale, small in _SPANS:
        if seconds >= scale:
            rest = seconds % scale // small_scale
            return f"{seconds // scale} {unit}" + (f" {rest} {small}" if rest else "")
    return f"{seconds} s"


def format_ago(then_ms: int, now_ms: int) -> str:
    """Return how long ago something was, in one unit: 'now', '40 s ago', '3 m ago', '2 d ago'."""
    seconds = (now_ms - then_ms) // 1000
    if seconds < 2:
        return "now"
    for scale, unit, _, _ in _SPANS:
        if seconds >= scale:
            return f"{seconds // scale} {unit} ago"
    return f"{seconds} s ago"
