"""The encrypted columns of all tables, found by their names, so that a new column can't be forgotten."""

from typing import Any
from uuid import UUID

from sqlalchemy import Column, Table

from models.tables import Base, Confirmation

SEALED: dict[Table, list[Column[Any]]] = {
    table: columns
    for table in Base.metadata.sorted_tables
    if (columns := [column for column in table.columns if column.name.startswith("sealed_")])
}


def id_in(table: Table) -> Column[UUID]:
    """The column of a table that holds the confirmation's id."""
    return table.c.id if table is Confirmation.__table__ else table.c.confirmation_id


def place_of(column: Column[Any], row: Any) -> str:
    """The name that a value is encrypted with, beside the confirmation's id: it binds the value to its place."""
    name = column.name.removeprefix("sealed_")
    return f"{name} {row.number}" if "number" in column.table.primary_key.columns else name
