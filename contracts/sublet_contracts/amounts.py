"""Amounts in words, for people. Integers in, no arithmetic on what comes out."""

from sublet_contracts.rules import UCR_PER_CREDIT


def credits_of(amount_ucr: int) -> str:
    """Return an amount in credits: 450000 -> 0.45."""
    whole, part = divmod(abs(amount_ucr), UCR_PER_CREDIT)
    digits = f"{part:06d}".rstrip("0")
    sign = "-" if amount_ucr < 0 else ""
    return f"{sign}{whole}.{digits:0<2}"


def size_of(size_bytes: int) -> str:
    """Return a size in GB or MB of 1000: 24000000000 -> 24 GB."""
    if size_bytes >= 10**9:
        return f"{size_bytes / 10**9:.4g} GB"
    return f"{size_bytes / 10**6:.4g} MB"


def span_of(span_ms: int) -> str:
    """Return a span of time: 90000 -> 1.5 min."""
    if span_ms >= 3_600_000:
        return f"{span_ms / 3_600_000:.3g} h"
    if span_ms >= 60_000:
        return f"{span_ms / 60_000:.3g} min"
    return f"{span_ms / 1000:.3g} s"
