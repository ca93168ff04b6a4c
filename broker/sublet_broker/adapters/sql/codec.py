"""How a fact's fields become a row's columns and come back.

Numbers, booleans and texts are themselves; enums are their text; what has parts is JSON text. A
text may hold characters that a database refuses (NUL, lone surrogates): those are escaped, so that
whatever was accepted can be kept and comes back unchanged.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from sublet_broker.market.facts import Fact
from sublet_contracts.envelope import Envelope

_ESCAPE = "\x1a"
_REFUSED = re.compile("[\x00\x1a\ud800-\udfff]")
_ESCAPED = re.compile(f"{_ESCAPE}([0-9a-f]{{4}})")


def encode_text(value: str) -> str:
    """Return `value` as any database keeps it."""
    if _REFUSED.search(value) is None:
        return value
    return _REFUSED.sub(lambda found: f"{_ESCAPE}{ord(found[0]):04x}", value)


def decode_text(value: str) -> str:
    """Return what encode_text was given."""
    if _ESCAPE not in value:
        return value
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), value)


@lru_cache(maxsize=512)
def decode_envelope(text: str) -> Envelope:
    """Return the envelope; frozen, so that callers may share it."""
    return Envelope.model_validate_json(text)


@dataclass(frozen=True)
class FieldCodec:
    """One field. `encode` and `decode` take values that aren't None."""

    name: str
    encode: Callable[[Any], Any] | None
    decode: Callable[[Any], Any] | None
    nullable: bool

    def to_column(self, value: Any) -> Any:
        """Return the column's value."""
        return value if value is None or self.encode is None else self.encode(value)


@dataclass(frozen=True)
class FactCodec:
    """All fields of one kind, in order."""

    kind: type[Fact]
    fields: tuple[FieldCodec, ...]
    by_name: dict[str, FieldCodec]

    def to_row(self, fact: Fact) -> dict[str, Any]:
        """Return the columns' values by name."""
        return {f.name: f.to_column(getattr(fact, f.name)) for f in self.fields}

    def from_row(self, row: Any) -> Any:
        """Return the fact that a row, whose columns stand in the fields' order, holds."""
        return self.kind(
            *[
                value if value is None or codec.decode is None else codec.decode(value)
                for value, codec in zip(row, self.fields, strict=True)
            ]
        )


def codec_of(kind: type[Fact]) -> FactCodec:
    """Return the kind's codec. Raises TypeError for a field of a type that has none."""
    hints = get_type_hints(kind)
    made = tuple(_field(field.name, hints[field.name]) for field in fields(kind))
    return FactCodec(kind, made, {codec.name: codec for codec in made})


def _field(name: str, hint: Any) -> FieldCodec:
    nullable = False
    if get_origin(hint) is UnionType and NoneType in get_args(hint):
        (hint,) = [part for part in get_args(hint) if part is not NoneType]
        nullable = True
    encode, decode = _pair(name, hint)
    return FieldCodec(name, encode, decode, nullable)


def _pair(name: str, hint: Any) -> tuple[Callable[[Any], Any] | None, Callable[[Any], Any] | None]:
    if hint in (int, bool):
        return None, None
    if hint is str:
        return encode_text, decode_text
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return str, hint
    if hint is Envelope:
        return Envelope.model_dump_json, decode_envelope
    if get_origin(hint) is tuple and get_args(hint) == (str, ...):
        return _encode_json, lambda text: tuple(json.loads(text))
    if get_origin(hint) is dict:
        return _encode_json, json.loads
    raise TypeError(f"{name}: no way to keep a {hint} in a column; teach adapters/sql/codec.py")


def _encode_json(value: Any) -> str:
    # ASCII, so that no character needs escaping; shortest floats come back bit for bit.
    if isinstance(value, tuple):
        return json.dumps(list(value))
    return json.dumps(value, sort_keys=True)
