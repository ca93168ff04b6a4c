"""How figures are written for the owner."""

from sublet_contracts.rules import UCR_PER_CREDIT


def credits(ucr: int) -> str:
    """Return micro-credits as credits, exactly: '0.40', '0.022222'."""
    whole, part = divmod(ucr, UCR_PER_CREDIT)
    return f"{whole}.{f'{part:06d}'.rstrip('0').ljust(2, '0')}"


def duration(ms: int) -> str:
    """Return a time in its two largest units: '12 s', '3 m 20 s', '2 h 5 m', '1 d 3 h'."""
    seconds = max(0, ms) // 1000
    for size, unit, below, small in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // below} {small}"
    return f"{seconds} s"
