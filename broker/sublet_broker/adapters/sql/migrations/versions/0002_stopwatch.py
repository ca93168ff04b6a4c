"""What the broker's stopwatch showed when leases were proposed and receipts came.

Revision 0002. Old rows get what its clock showed: a stopwatch begins there.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# table -> new column, and the one whose values old rows get
COLUMNS = {
    "lease": ("proposed_stopwatch_ms", "proposed_ms"),
    "receipt": ("received_stopwatch_ms", "received_ms"),
}


def upgrade() -> None:
    """Add the columns."""
    for table, (column, old) in COLUMNS.items():
        op.add_column(table, sa.Column(column, sa.BigInteger(), nullable=False, server_default="0"))
        op.execute(f"UPDATE {table} SET {column} = {old}")


def downgrade() -> None:
    """Drop the columns."""
    for table, (column, _) in COLUMNS.items():
        op.drop_column(table, column)
