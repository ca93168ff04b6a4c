"""A part of what is too long to run each time: the K-th of N, so that N runs in a row run all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """The `number`-th of `of` parts, counted from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Return the part that "K/N" names. Raises ValueError."""
        found = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"{text!r} is not K/N with 1 <= K <= N, as in 2/3")
        return cls(int(found[1]), int(found[2]))

    def of_all(self, things: Sequence[T]) -> list[T]:
        """Return this part of them: never none, where there are any."""
        if not things:
            return []
        return list(things[self.number - 1 :: self.of]) or [things[(self.number - 1) % len(things)]]
