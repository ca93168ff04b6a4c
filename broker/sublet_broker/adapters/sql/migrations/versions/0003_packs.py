"""Where content lies: a row for each, and for each pack.

Revision 0003. What is there already lies in files of its own. Going back loses what lies in packs:
whoever wants to keep it lets the jobs end and downloads first.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# Byte order on every database: the same data gives the same list everywhere.
TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def _text(name: str) -> sa.Column[str]:
    return sa.Column(name, TEXT, nullable=False)


def _whole(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=False, autoincrement=False)


def upgrade() -> None:
    """Make the tables, and a row for what scopes have."""
    op.create_table(
        "content",
        _text("sha256"),
        _whole("size_bytes"),
        _text("pack"),
        _whole("offset_bytes"),
        sa.CheckConstraint("size_bytes >= 0 AND offset_bytes >= 0", name=op.f("ck_content_size")),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_content")),
    )
    op.create_index(op.f("ix_content_pack"), "content", ["pack"])
    op.create_table(
        "pack",
        _text("id"),
        _whole("size_bytes"),
        _whole("scrub_ms"),
        sa.CheckConstraint("size_bytes > 0", name=op.f("ck_pack_size")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pack")),
    )
    op.create_index(op.f("ix_pack_scrub_ms"), "pack", ["scrub_ms"])
    op.execute(
        "INSERT INTO content (sha256, size_bytes, pack, offset_bytes) "
        "SELECT sha256, MAX(size_bytes), '', 0 FROM blob GROUP BY sha256"
    )


def downgrade() -> None:
    """Drop the tables."""
    op.drop_table("pack")
    op.drop_table("content")
