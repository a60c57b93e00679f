"""Alembic's environment. ``confirm-offer db upgrade`` runs it; see worker/schema.py."""

from alembic import context
from sqlalchemy import Connection

from models.tables import Base


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
        transaction_per_migration=False,
    )
    with context.begin_transaction():
        context.run_migrations()


run(context.config.attributes["connection"])
