"""Fills the tables as a year of work leaves them: confirmations that ended long ago, and their dependent rows.

    python -m benchmarks.seed --url postgresql+psycopg://localhost/confirm_offer --rows 2000000

Of 1,000 confirmations, 980 are confirmed, 5 pending, 14 failed for three causes, and 1 needs review. The database
generates the rows, which is faster than COPY.
"""

import time

import click
from sqlalchemy import Engine, text

from worker.storage import database, migrator

STEP = 100_000  # confirmations in one transaction
PARTNERS = 50
ID = "('01900000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid"
SEALED = "convert_to(repeat(md5(n::text), {}), 'UTF8')"
AGE = "clock_timestamp() - interval '1 day' - n * interval '15 seconds'"
STATE = "case when n % 1000 < 980 then 'confirmed' when n % 1000 < 985 then 'pending' when n % 1000 < 999 then 'failed' else 'needs_review' end"  # noqa: E501
BAD = "n % 1000 >= 985"
CODE = "case when n % 1000 < 985 then null when n % 1000 < 992 then 'http-503' when n % 1000 < 997 then 'connect' else 'http-422' end"  # noqa: E501

ROWS = f"""
insert into confirmations (id, partner_id, offer_id, order_reference, echo, idempotency_key, sealed_body, email_hash, state,
  attempts, attempts_used, crashes, read_backs, answer_unknown, error_code, error_detail, sequence, queued_at, created_at, updated_at)
select {ID}, 'P-' || n % {PARTNERS}, 'seeded-' || n, 'SO-' || n, '{{}}', gen_random_uuid(), {SEALED.format(20)},
  sha256(n::text::bytea), {STATE}, 1, 1, 0, 0, false, {CODE}, {CODE}, 1, {AGE}, {AGE}, {AGE}
from generate_series(cast(:first as int), cast(:last as int)) n;
insert into further_emails (confirmation_id, email_hash)
select {ID}, sha256((n || ' ')::bytea) from generate_series(cast(:first as int), cast(:last as int)) n where n % 4 = 0;
insert into attempts (confirmation_id, number, lease_token, started_at, duration_ms, outcome, code)
select {ID}, 1, gen_random_uuid(), {AGE}, 200, case when {BAD} then 'not_booked' else 'booked' end, {CODE}
from generate_series(cast(:first as int), cast(:last as int)) n;
insert into bookings (confirmation_id, id, offer_id, status, currency, price, sealed_security_token, sealed_coi_url, recorded_at)
select {ID}, 'INS-' || n, 'seeded-' || n, 'CONFIRMED', 'EUR', 19.99, {SEALED.format(6)}, {SEALED.format(8)}, {AGE}
from generate_series(cast(:first as int), cast(:last as int)) n where not {BAD};
insert into policyholders (confirmation_id, id, sealed_person)
select {ID}, n::text, {SEALED.format(12)} from generate_series(cast(:first as int), cast(:last as int)) n where not {BAD};
insert into policies (confirmation_id, position, id, status, policy_type, price)
select {ID}, 0, n::text, 'CONFIRMED', 'event_ticket_protection', 19.99 from generate_series(cast(:first as int), cast(:last as int)) n where not {BAD};
insert into outbox (id, aggregatetype, aggregateid, type, payload, confirmation_id, sequence, created_at, published_at)
select {ID}, 'confirmation', 'P-' || n % {PARTNERS} || '/seeded-' || n,
  case when {BAD} then 'confirmation.failed' else 'booking.confirmed' end, '{{"data": {{"booking": {{"id": "' || repeat(md5(n::text), 20) || '"}}}}}}', {ID}, 1, {AGE}, {AGE}
from generate_series(cast(:first as int), cast(:last as int)) n;
"""  # noqa: E501 - all of it is written here


def seed(engine: Engine, rows: int) -> None:
    """Adds so many confirmations to tables without seeded ones, then analyzes the tables."""
    for first in range(1, rows + 1, STEP):
        with engine.begin() as connection:
            for statement in ROWS.split(";")[:-1]:
                connection.execute(text(statement), {"first": first, "last": min(first + STEP - 1, rows)})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("vacuum analyze"))


@click.command(help=__doc__)
@click.option("--url", required=True, help="Of a PostgreSQL database, preferably an empty one.")
@click.option("--rows", default=2_000_000, show_default=True, type=click.IntRange(1))
def main(url: str, rows: int) -> None:
    engine = database.connect(url)
    migrator.upgrade(engine)
    began = time.monotonic()
    seed(engine, rows)
    click.echo(f"{rows} confirmations in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
