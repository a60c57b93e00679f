"""Query plans of a database with as many rows as in production."""

from typing import Any

from sqlalchemy import Engine, Select, text

FAILED = 500
INSERT = """
    INSERT INTO confirmations (id, partner_id, offer_id, echo, idempotency_key, state, attempts, attempts_used, crashes,
        read_backs, answer_unknown, error_code, error_http_status, error_detail, sequence, queued_at, created_at,
        updated_at)
    SELECT gen_random_uuid(), 'P-' || n % 7, 'offer-' || n, '{}', gen_random_uuid(),
        CASE WHEN n > :fine THEN 'failed' ELSE 'confirmed' END, 1, 1, 0, 0, false,
        CASE WHEN n > :fine THEN CASE WHEN n % 3 = 0 THEN 'http-404' ELSE 'http-422' END END,
        CASE WHEN n > :fine THEN 422 END, CASE WHEN n > :fine THEN 'XONE answered 422' END, 1,
        now(), now(), now() - n * interval '1 second'
    FROM generate_series(1, :number) AS n
"""


def fill(engine: Engine, number: int = 20_500) -> None:
    """Adds so many confirmations that PostgreSQL plans as in production. The last FAILED of them have failed."""
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.execute(text(INSERT), {"number": number, "fine": number - FAILED})
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE confirmations"))


def plan_of(engine: Engine, query: Select[Any], explain: str = "EXPLAIN") -> str:
    """The plan of a query. On PostgreSQL the generic plan, without values, which frequent statements may get."""
    with engine.connect() as connection:
        statement = query.compile(connection, compile_kwargs={"render_postcompile": True})
        if engine.dialect.name == "postgresql":
            names = list(statement.params)
            numbered = {name: f"${number}" for number, name in enumerate(names, start=1)}
            connection.exec_driver_sql("SET plan_cache_mode = force_generic_plan")
            connection.exec_driver_sql("DEALLOCATE ALL")
            connection.exec_driver_sql(f"PREPARE asked AS {str(statement) % numbered}")
            values = ", ".join(f"'{statement.params[name]}'" for name in names)
            rows = connection.exec_driver_sql(f"{explain} EXECUTE asked{f'({values})' if names else ''}")
        else:
            values = tuple(statement.params[name] for name in statement.positiontup or ())
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", tuple(map(str, values)))
        return "".join(f"{row[-1]}\n" for row in rows)
