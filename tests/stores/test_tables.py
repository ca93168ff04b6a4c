"""facts.py and tables.py say the same."""

from __future__ import annotations

from dataclasses import fields
from types import NoneType
from typing import get_args, get_type_hints

import pytest
from sqlalchemy import BigInteger, Boolean, Text

from sublet_broker.adapters.sql.tables import ROWS, AboutRow, Row
from sublet_broker.market.facts import FACTS, Fact


def test_each_kind_has_a_table_of_its_own() -> None:
    assert set(ROWS) == set(FACTS)
    named = {str(row.__tablename__) for row in ROWS.values()} | {str(AboutRow.__tablename__)}
    assert named == set(Row.metadata.tables)
    assert len(named) == len(FACTS) + 1


@pytest.mark.parametrize("kind", FACTS, ids=lambda kind: kind.__name__)
def test_a_table_has_the_columns_of_its_fact(kind: type[Fact]) -> None:
    table = Row.metadata.tables[str(ROWS[kind].__tablename__)]
    hints = get_type_hints(kind)
    assert [column.name for column in table.columns] == [field.name for field in fields(kind)]
    assert tuple(column.name for column in table.primary_key) == kind.KEY
    for field in fields(kind):
        column, parts = table.c[field.name], get_args(hints[field.name])
        assert column.nullable == (NoneType in parts), field.name
        (hint,) = (
            {part for part in parts if part is not NoneType}
            if column.nullable
            else {hints[field.name]}
        )
        expected = {int: BigInteger, bool: Boolean}.get(hint, Text)
        assert isinstance(column.type, expected), field.name
