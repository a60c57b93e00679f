"""What both afternoon versions do with a job: token, call, rows."""

import os
import time
from datetime import datetime
from decimal import Decimal
from typing import Any

import requests
from sqlalchemy import JSON, ForeignKey, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

XONE = os.environ["XONE_BASE_URL"]
CLIENT = {"client_id": os.environ["XONE_CLIENT_ID"], "client_secret": os.environ["XONE_CLIENT_SECRET"]}

engine = create_engine(os.environ["DATABASE_URL"], pool_size=16, max_overflow=0)
http = requests.Session()
http.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=int(os.environ["WORKER_CONCURRENCY"])))
_token: dict[str, Any] = {"expires_at": 0.0}


class Base(DeclarativeBase):
    pass


class Booking(Base):
    __tablename__ = "bookings"

    id: Mapped[str] = mapped_column(primary_key=True)
    partner_id: Mapped[str]
    offer_id: Mapped[str]
    status: Mapped[str | None]
    currency: Mapped[str | None]
    price: Mapped[Decimal | None]
    provider_reference: Mapped[str | None]
    security_token: Mapped[str | None]
    created_at: Mapped[datetime | None]
    account_url: Mapped[str | None]
    policyholder: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    policies: Mapped[list["Policy"]] = relationship(cascade="all, delete-orphan")


class Policy(Base):
    __tablename__ = "policies"

    id: Mapped[str] = mapped_column(primary_key=True)
    booking_id: Mapped[str] = mapped_column(ForeignKey("bookings.id"))
    status: Mapped[str | None]
    policy_type: Mapped[str | None]
    policy_code: Mapped[str | None]
    price: Mapped[Decimal | None]
    tax: Mapped[Decimal | None]
    policy_start_date: Mapped[datetime | None]
    policy_end_date: Mapped[datetime | None]


def token() -> str:
    if time.time() > _token["expires_at"]:
        answer = http.post(f"{XONE}/api/oauth/token", json={"grant_type": "client_credentials", **CLIENT}, timeout=30)
        answer.raise_for_status()
        _token.update(answer.json(), expires_at=time.time() + answer.json()["expires_in"] - 60)
    return str(_token["access_token"])


def confirm(job: dict[str, Any]) -> dict[str, Any]:
    """Calls XONE and stores its answer. Returns the event."""
    partner, offer = job["partner_id"], job["offer_id"]
    answer = http.post(
        f"{XONE}/api/partners/{partner}/offers/{offer}",
        json={"quotes": job["quotes"], "policyholder": job["policyholder"]},
        headers={"Authorization": f"Bearer {token()}"},
        timeout=30,
    )
    answer.raise_for_status()
    data = answer.json()["data"]
    with Session(engine) as session:
        booking = session.merge(
            Booking(
                **{name: data[name] for name in ("id", "status", "currency", "price", "provider_reference")},
                **{name: data[name] for name in ("security_token", "account_url", "policyholder")},
                partner_id=partner,
                offer_id=offer,
                created_at=datetime.fromisoformat(data["created_at"]),
                policies=[
                    Policy(
                        **{name: policy[name] for name in ("status", "policy_type", "policy_code", "price", "tax")},
                        id=f"{data['id']}-{policy['id']}",
                        policy_start_date=datetime.fromisoformat(policy["policy_start_date"]),
                        policy_end_date=datetime.fromisoformat(policy["policy_end_date"]),
                    )
                    for policy in data["policies"]
                ],
            )
        )
        session.commit()
        return {
            "type": "booking.confirmed",
            "data": {"offer_id": offer, "booking": booking.id, "price": str(booking.price)},
        }
