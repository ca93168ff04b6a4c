"""Strict JSON: the one way in which hostile bytes become Python values.

Rules: a stated size limit, UTF-8, no duplicate keys, no NaN or Infinity, integers within 2**53 - 1,
no floats unless the caller says so (signed documents never carry one), whole characters, and
bounded nesting. What passes can always be written again by `canonical_json`.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

MAX_DOCUMENT_BYTES = 64 * 1024
MAX_INTEGER = 2**53 - 1
MAX_DEPTH = 32

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class EncodingError(ValueError):
    """The bytes aren't acceptable JSON; the message says what is wrong with them."""


def canonical_json(value: Any) -> bytes:
    """Return the form we write ourselves: sorted keys, no white space, UTF-8.

    Nobody relies on it to verify: what is signed is checked as the bytes that came (DSSE).
    """
    return _CANONICAL.encode(value).encode()


def parse_json(
    data: bytes, *, max_bytes: int = MAX_DOCUMENT_BYTES, allow_floats: bool = False
) -> Any:
    """Parse `data` under the rules at the top of this file.

    Raises EncodingError, whose message names the rule that was broken.
    """
    if len(data) > max_bytes:
        raise EncodingError(f"{len(data)} bytes; at most {max_bytes} are accepted")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EncodingError(f"not UTF-8 at byte {error.start}") from error
    try:
        value = (_WITH_FLOATS if allow_floats else _STRICT).decode(text)
    except RecursionError as error:
        raise EncodingError(f"nested deeper than {MAX_DEPTH} levels") from error
    except json.JSONDecodeError as error:
        raise EncodingError(f"not JSON: {error.msg} at character {error.pos}") from error
    _check_depth(value)
    if _SURROGATE.search(text):
        _check_characters(value)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise EncodingError(f"the key {key[:80]!r} stands twice in one object")
            seen.add(key)
    return result


def _bounded_integer(text: str) -> int:
    if len(text) > 17:
        raise EncodingError(f"an integer of {len(text)} digits; at most 2**53 - 1 is accepted")
    value = int(text)
    if abs(value) > MAX_INTEGER:
        raise EncodingError(f"the integer {text} is beyond 2**53 - 1")
    return value


def _no_float(text: str) -> NoReturn:
    raise EncodingError(f"the number {text[:40]} is not an integer")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise EncodingError(f"the number {text[:40]} is too large")
    return value


def _no_constant(text: str) -> NoReturn:
    raise EncodingError(f"{text} is not a number")


def _check_characters(value: Any) -> None:
    """Refuse an escaped half of a character: Python would carry it on, but can't encode it."""
    try:
        canonical_json(value)
    except UnicodeEncodeError as error:
        raise EncodingError("a text holds half of a surrogate pair") from error


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        if not below:
            return
        level = below
    raise EncodingError(f"nested deeper than {MAX_DEPTH} levels")


# Made once: the functions of `json` would make a new one at each call, and frames come in masses.
_CANONICAL = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)


def _decoder(parse_float: Callable[[str], float]) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=_unique_keys,
        parse_int=_bounded_integer,
        parse_float=parse_float,
        parse_constant=_no_constant,
    )


_STRICT = _decoder(_no_float)
_WITH_FLOATS = _decoder(_finite_float)
