"""Alembic's entry: run the migrations on the connection that `migrate` hands over."""

from alembic import context
from sqlalchemy import Connection

from sublet_broker.adapters.sql.engine import connect_engine
from sublet_broker.adapters.sql.tables import Row


def run(connection: Connection) -> None:
    """Run them inside the caller's transaction."""
    context.configure(
        connection=connection,
        target_metadata=Row.metadata,
        transactional_ddl=True,
        transaction_per_migration=False,
        compare_type=True,
    )
    context.run_migrations()


handed_over = context.config.attributes.get("connection")
if handed_over is not None:
    run(handed_over)
else:
    # A contributor's `alembic revision --autogenerate -x url=...`: see CONTRIBUTING.md.
    url = context.get_x_argument(as_dictionary=True).get("url")
    if not url:
        raise SystemExit("say which database: alembic -x url=sqlite:////tmp/sublet.sqlite ...")
    engine = connect_engine(url)
    with engine.begin() as own:
        run(own)
    engine.dispose()
