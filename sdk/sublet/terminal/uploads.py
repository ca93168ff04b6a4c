"""What of a run is on its way to the broker, in a line."""

from sublet_contracts.amounts import format_bytes, format_duration
from sublet_contracts.api import RunUploadView

_OLD_MS = 10_000
"""older figures are told with their age: its agent is silent"""
_DIGITS = 3


def upload_text(upload: RunUploadView, now_ms: int) -> str:
    """Return how far an upload is: 'checkpoint 400: 1.2 of 4 GB on its way, 210 MB/s, 13 s left'.

    In three digits, so that a line that changes each second can be read.
    """
    what = upload.kind.replace("-", " ")
    if upload.kind == "checkpoint":
        what += f" {upload.step}"
    there, total = short_size(upload.there_bytes), short_size(upload.total_bytes)
    figure, unit = there.split(" ")
    parts = [f"{figure if total.endswith(' ' + unit) else there} of {total} on its way"]
    if upload.bytes_per_s:
        parts.append(f"{short_size(upload.bytes_per_s)}/s")
    if upload.left_ms:
        seconds = -(-upload.left_ms // 1000)
        left = f"{seconds} s" if seconds < 60 else format_duration(upload.left_ms)
        parts.append(f"{left} left")
    age_ms = now_ms - upload.measured_ms
    if age_ms >= _OLD_MS:
        parts.append(f"told {format_duration(age_ms)} ago")
    return f"{what}: {', '.join(parts)}"


def short_size(size_bytes: int) -> str:
    """Return a size in three digits, rounded down: '1.23 GB'."""
    scale = 10 ** max(0, len(str(size_bytes)) - _DIGITS)
    return format_bytes(size_bytes // scale * scale)
