"""Facts to put into stores: each kind filled with values that a careless store would lose."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from sublet_broker.market.facts import Fact, PendingFact
from sublet_contracts.envelope import Envelope, sign_payload
from sublet_contracts.keys import SigningKey

KEY = SigningKey.from_seed(bytes(range(32)))
ENVELOPE = sign_payload("application/vnd.sublet.deposit.v1+json", b'{"memo":"\xc3\xa9"}', [KEY])

ODD_TEXT = "é\x00\x1a0041 \ud800 \U0001f600\n'\"\\"
LARGE = 2**53 - 1


def filled(kind: type[Fact], **changes: Any) -> Any:
    """Return a fact of `kind` with every field set, some of them by `changes`."""
    hints = get_type_hints(kind)
    values = {field.name: _odd(hints[field.name]) for field in dataclasses.fields(kind)}
    if kind is PendingFact:
        values["state"] = "open"  # the database knows three
    return kind(**{**values, **changes})


def sparse(kind: type[Fact], **changes: Any) -> Any:
    """Return a fact of `kind` in which every field that may be None is None."""
    hints = get_type_hints(kind)
    nothing = {
        field.name: None
        for field in dataclasses.fields(kind)
        if NoneType in get_args(hints[field.name])
    }
    return filled(kind, **{**nothing, **changes})


def _odd(hint: Any) -> Any:
    if get_origin(hint) is UnionType:
        return _odd(next(part for part in get_args(hint) if part is not NoneType))
    if hint is str:
        return ODD_TEXT
    if hint is bool:
        return True
    if hint is int:
        return LARGE
    if hint is Envelope:
        return ENVELOPE
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return list(hint)[-1]
    if get_origin(hint) is tuple:
        return ("b", ODD_TEXT, "a")
    if get_origin(hint) is dict:
        return {"loss": 0.1 + 0.2, ODD_TEXT: -1e-300, "acc": 1.0}
    raise TypeError(f"no sample for {hint}")
