"""The sandbox behaves as its page says. Other tests rely on it."""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from email.utils import parsedate_to_datetime
from typing import Any

import pytest
import requests

from tests.support.jobs import PERSON
from tests.support.system import until
from worker.sandbox.answers import to_json
from worker.sandbox.faults import FAULTS, SWITCHES
from worker.sandbox.sending import HUGE_BYTES
from worker.sandbox.server import Sandbox

JOB: dict[str, Any] = {
    "quotes": [{"id": "quote-1"}, {"id": "quote-2", "insured": [{"first_name": "Ada"}]}],
    "policyholder": PERSON,
}

BOOKING_FIELDS = """id offer_id provider_reference language provider_customer_id status currency price security_token
    created_at updated_at is_instant_booking payment_status policies policyholder quote coi account_url fnol_link
    sign_up_url"""
POLICY_FIELDS = """status policy_start_date policy_end_date price tax commission cover_amount policy_type policy_code
    policy_version policy_content claim_selector_id pds_url extra_fields confirmed_at cancelled_at created_at updated_at
    policy_start_date_tz_offset policy_end_date_tz_offset parent_id id"""
CONTENT_FIELDS = """title header description optout_msg inclusions exclusions disclaimer disclaimer_html
    payment_disclaimer in_path_disclaimer extra_content"""
EXTRA_FIELDS = """seller_entity event_datetime event_cost retail_price uw_fee reinsurer_fee partner_commission
    coverage_group cg_booking_fee"""
POLICYHOLDER_FIELDS = """first_name last_name email phone country birth_date address1 address2 city region postcode
    created_at updated_at id"""


@pytest.fixture
def xone() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        sandbox.slow_seconds = 0.1
        yield sandbox


@pytest.fixture
def client(xone: Sandbox) -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {new_token(xone)}"
        yield session


def request_token(xone: Sandbox, **changes: str) -> requests.Response:
    credentials = {"grant_type": "client_credentials", "client_id": "sandbox", "client_secret": "sandbox-secret"}
    return requests.post(f"{xone.url}/api/oauth/token", json=credentials | changes, timeout=10)


def new_token(xone: Sandbox) -> str:
    return str(request_token(xone).json()["access_token"])


def confirm(
    client: requests.Session, xone: Sandbox, offer_id: str, job: Any = JOB, **headers: str
) -> requests.Response:
    url = f"{xone.url}/api/partners/P-1/offers/{offer_id}"
    return client.post(url, json=job, headers=headers, timeout=10, allow_redirects=False)


def bookings(client: requests.Session, xone: Sandbox, query: str = "") -> requests.Response:
    return client.get(f"{xone.url}/api/partners/P-1/bookings{query}", timeout=10)


def request(token: str, offer_id: str) -> bytes:
    body = json.dumps(JOB).encode()
    head = f"POST /api/partners/P-1/offers/{offer_id} HTTP/1.1\r\nHost: sandbox\r\nAuthorization: Bearer {token}"
    return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def send_confirm(xone: Sandbox, token: str, offer_id: str) -> socket.socket:
    """Sends a confirm request. Returns its connection."""
    connection = socket.create_connection(("127.0.0.1", xone.port), timeout=10)
    connection.sendall(request(token, offer_id))
    return connection


def read_head(connection: socket.socket) -> bytes:
    """Reads one answer with a Content-Length and returns its head."""
    with connection.makefile("rb") as answers:
        head = b"".join(iter(answers.readline, b"\r\n"))
        length = re.search(rb"Content-Length: (\d+)", head)
        assert length
        assert len(answers.read(int(length[1]))) == int(length[1])
    return head


# --- Token ---


def test_the_right_credentials_get_a_token(xone: Sandbox) -> None:
    content = request_token(xone).json()

    assert set(content) == {"access_token", "token_type", "expires_in"}
    assert (content["token_type"], content["expires_in"]) == ("Bearer", 300)
    assert xone.token_requests == 1


@pytest.mark.parametrize(
    ("changes", "status", "error"),
    [
        ({"client_secret": "guessed"}, 401, "invalid_client"),
        ({"client_id": "somebody"}, 401, "invalid_client"),
        ({"grant_type": "password"}, 400, "unsupported_grant_type"),
    ],
)
def test_wrong_credentials_get_no_token(xone: Sandbox, changes: dict[str, str], status: int, error: str) -> None:
    refused = request_token(xone, **changes)

    assert (refused.status_code, refused.json()) == (status, {"error": error})


def test_a_rotated_secret_refuses_the_old_one(xone: Sandbox) -> None:
    xone.rotate_secret("new")

    assert request_token(xone).json() == {"error": "invalid_client"}
    assert request_token(xone, client_secret="new").status_code == 200


def test_revoked_expired_and_missing_tokens_are_refused(xone: Sandbox, client: requests.Session) -> None:
    xone.token_lifetime = 0
    with requests.Session() as stranger:
        for authorization in ("", "Bearer made-up", f"Bearer {new_token(xone)}"):
            stranger.headers["Authorization"] = authorization
            assert confirm(stranger, xone, "o-1").status_code == 401
            assert bookings(stranger, xone).status_code == 401
    assert confirm(client, xone, "o-1").status_code == 201
    xone.revoke_tokens()
    assert confirm(client, xone, "o-2").status_code == 401
    assert list(xone.bookings) == [("P-1", "o-1")]


# --- Confirm ---


def test_a_booking_has_every_field_of_xones_page(xone: Sandbox, client: requests.Session) -> None:
    confirmed = confirm(client, xone, "o-1")
    data = confirmed.json(parse_float=Decimal)["data"]
    policy = data["policies"][0]

    assert confirmed.status_code == 201
    assert set(data) == {*BOOKING_FIELDS.split(), "sandbox"}
    assert set(policy) == set(POLICY_FIELDS.split())
    assert set(policy["policy_content"]) == set(CONTENT_FIELDS.split())
    assert set(policy["extra_fields"]) == set(EXTRA_FIELDS.split())
    assert set(data["policyholder"]) == set(POLICYHOLDER_FIELDS.split())
    assert set(data["coi"]) == {"url", "pdf"}
    assert data == xone.bookings["P-1", "o-1"]


def test_a_booking_repeats_the_job(xone: Sandbox, client: requests.Session) -> None:
    data = confirm(client, xone, "o-1").json()["data"]

    assert (data["offer_id"], data["status"], data["quote"]) == ("o-1", "CONFIRMED", {"uuid": "quote-1"})
    assert re.fullmatch(r"INS-[A-Z2-7]{8}", data["id"])
    assert len(data["policies"]) == 2
    assert data["policyholder"] | PERSON == data["policyholder"]
    assert all(data["security_token"] in data[link] for link in ("account_url", "fnol_link", "sign_up_url"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", data["created_at"])


def test_money_is_exact_and_the_same_for_the_same_offer(xone: Sandbox, client: requests.Session) -> None:
    texts = [confirm(client, xone, f"o-{number}").text for number in range(20)]
    xone.bookings.clear()
    again = confirm(client, xone, "o-0").text

    amounts = re.compile(r'"(?:price|tax|commission|\w+_fee|retail_price|partner_commission)": ([^,}]+)')
    assert all(re.fullmatch(r"\d+\.\d\d", amount) for text in texts for amount in amounts.findall(text))
    assert amounts.findall(again) == amounts.findall(texts[0])
    data = json.loads(texts[0], parse_float=Decimal)["data"]
    assert data["price"] == sum(policy["price"] for policy in data["policies"])
    assert to_json({"price": Decimal("20.00")}) == b'{"price": 20.00}'


def test_an_offer_is_booked_once(xone: Sandbox, client: requests.Session) -> None:
    booking = confirm(client, xone, "o-1", **{"x-idempotency-key": "same"}).json()["data"]
    again = confirm(client, xone, "o-1", **{"x-idempotency-key": "same"})

    message = f"Booking already exists for this offer. INS number: {booking['id']}"
    assert (again.status_code, again.json()) == (422, {"errors": [{"message": message}]})
    assert len(xone.bookings) == 1
    assert xone.double_bookings == 0


def test_only_the_configured_path_confirms(xone: Sandbox, client: requests.Session) -> None:
    with Sandbox(confirm_path="/api/partners/{partner_id}/offers/{offer_id}/confirm") as newer:
        assert [confirm(client, newer, offer).status_code for offer in ("o-1", "o-1/confirm")] == [404, 401]
    assert [confirm(client, xone, offer).status_code for offer in ("o-1/confirm", "o-1")] == [404, 201]


def test_calls_are_recorded(xone: Sandbox, client: requests.Session) -> None:
    confirm(client, xone, "o%2D1", **{"x-idempotency-key": "k-1"})
    confirm(client, xone, "o-2~http-500")
    first, second = xone.calls

    assert (first.partner_id, first.offer_id, first.idempotency_key, first.status) == ("P-1", "o-1", "k-1", 201)
    assert (second.offer_id, second.idempotency_key, second.status) == ("o-2~http-500", None, 500)
    assert json.loads(first.body) == JOB
    assert first.started <= first.ended <= second.started <= second.ended


@pytest.mark.parametrize(
    ("job", "status", "field"),
    [
        ("text", 400, None),
        ({"quotes": [], "policyholder": JOB["policyholder"]}, 400, None),
        ({"quotes": [{"id": "q"}], "policyholder": {"first_name": "A", "last_name": "B", "country": "GB"}}, 422,
         "policyholder.email"),
        ({"quotes": [{"id": "q"}]}, 422, "policyholder.first_name"),
        ({"quotes": [{}], "policyholder": JOB["policyholder"]}, 422, "quotes.0.id"),
    ],
)  # fmt: skip
def test_a_bad_job_is_refused(xone: Sandbox, client: requests.Session, job: Any, status: int, field: str) -> None:
    refused = confirm(client, xone, "o-1", job)

    assert refused.status_code == status
    assert refused.json()["errors"][0].get("field") == field
    assert not xone.bookings


def test_a_body_that_is_no_json_is_refused(xone: Sandbox, client: requests.Session) -> None:
    refused = client.post(f"{xone.url}/api/partners/P-1/offers/o-1", data=b"{", timeout=10)

    assert refused.status_code == 400


def test_one_connection_serves_many_requests(xone: Sandbox) -> None:
    token = new_token(xone)
    with send_confirm(xone, token, "o-1") as connection:
        assert b" 201 " in read_head(connection)
        for offer_id, status in (("o-1", b" 422 "), ("o-2~http-204", b" 204 "), ("o-3", b" 201 ")):
            connection.sendall(request(token, offer_id))
            assert status in read_head(connection)


# --- Faults ---

ANSWERED = {  # status, booked
    "pending": (201, True),
    "pending-cancelled": (201, True),
    "pending-failed": (201, True),
    "failed-payment": (201, True),
    "http-400": (400, False),
    "http-500": (500, False),
    "http-599": (599, False),
    "http-204": (204, False),
    "busy": (429, False),
    "unavailable": (503, False),
    "maintenance": (503, False),
    "redirect": (307, False),
    "html": (200, True),
    "html-not-booked": (200, False),
    "no-id": (200, True),
    "other-offer": (200, False),
    "errors-beside": (200, True),
    "slow": (201, True),
    "slow-headers": (201, True),
    "drip": (201, True),
    "huge": (201, True),
    "blocked": (403, False),
    "booked": (409, True),
    "booked-with-body": (409, True),
    "booked-text": (422, True),
    "booked-words": (400, True),
    "booked-code": (422, True),
    "booked-nowhere": (422, False),
    "odd-types": (201, True),
    "minimal": (201, True),
    "capitals": (201, True),
    "many-policies": (201, True),
    "unicode": (201, True),
}
UNANSWERED = {"truncated": True, "drop-before": False, "drop-after": True, "reset-mid": True}  # booked


def test_each_fault_is_tested() -> None:
    tested = {re.sub(r"http-\d+", "http-NNN", name) for name in (*ANSWERED, *UNANSWERED)}

    assert tested == set(FAULTS)


@pytest.mark.parametrize("name", ANSWERED)
def test_a_fault_has_its_answer(xone: Sandbox, client: requests.Session, name: str) -> None:
    status, booked = ANSWERED[name]
    answer = confirm(client, xone, f"o-1~{name}")

    assert answer.status_code == status
    assert (("P-1", f"o-1~{name}") in xone.bookings) is booked
    assert len(bookings(client, xone).json()["data"]) == booked
    assert xone.calls[0].status == status


@pytest.mark.parametrize("name", UNANSWERED)
def test_a_fault_breaks_the_connection(xone: Sandbox, client: requests.Session, name: str) -> None:
    with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
        confirm(client, xone, f"o-1~{name}")

    assert (("P-1", f"o-1~{name}") in xone.bookings) is UNANSWERED[name]
    assert len(bookings(client, xone).json()["data"]) == UNANSWERED[name]


def test_a_pending_booking_changes_once_it_was_listed_so_often(xone: Sandbox, client: requests.Session) -> None:
    for offer in "a~pending~2", "b~pending-cancelled~1", "c~pending-failed~1", "d~pending":
        confirm(client, xone, offer)

    def listed() -> list[str]:
        return [booking["status"] for booking in bookings(client, xone).json()["data"]]

    assert listed() == ["PENDING"] * 4
    assert listed() == ["PENDING", "CANCELLED", "FAILED", "PENDING"]
    assert listed() == ["CONFIRMED", "CANCELLED", "FAILED", "PENDING"] == listed()


def test_the_body_of_each_fault_is_that_of_its_cause(xone: Sandbox, client: requests.Session) -> None:
    def answer(name: str) -> requests.Response:
        return confirm(client, xone, f"o-1~{name}")

    def booking(name: str) -> Any:
        return xone.bookings["P-1", f"o-1~{name}"]

    assert answer("pending").json()["data"]["status"] == booking("pending")["status"] == "PENDING"
    assert answer("failed-payment").json()["data"]["status"] == booking("failed-payment")["status"] == "FAILED"
    assert answer("http-500").json()["errors"]
    assert answer("busy").headers["Retry-After"] == answer("unavailable").headers["Retry-After"] == "1"
    retry_after = parsedate_to_datetime(answer("maintenance").headers["Retry-After"]) - datetime.now(UTC)
    assert 0 < retry_after.total_seconds() <= 2
    assert answer("html").headers["Content-Type"] == "text/html"
    assert answer("blocked").headers["Content-Type"].startswith("text/html")
    assert "id" not in answer("no-id").json()["data"]
    assert booking("no-id")["id"]
    assert answer("other-offer").json()["data"]["offer_id"] != "o-1~other-offer"
    with_errors = answer("errors-beside").json()
    assert with_errors["data"]["id"]
    assert with_errors["errors"]
    assert "data" not in answer("booked").json()
    assert answer("booked-with-body").json()["data"]["id"] == booking("booked-with-body")["id"]
    assert "already been confirmed" in answer("booked-words").text
    assert "OFFER_ALREADY_CONFIRMED" in answer("booked-code").text
    text = answer("booked-text").text
    assert booking("booked-text")["id"] in text
    assert re.search(r"already exists.*INS-\w{8}", answer("booked-nowhere").text)
    odd_types = answer("odd-types").json()["data"]
    assert (odd_types["price"], odd_types["created_at"], odd_types["policies"][0]["tax"]) == (
        "about twenty",
        "yesterday",
        [1, "two"],
    )
    assert set(answer("minimal").json()["data"]) == {"id", "offer_id", "status"}
    assert answer("capitals").json()["data"]["offer_id"] == "O-1~CAPITALS"
    content = answer("unicode").json()["data"]["policies"][0]["policy_content"]
    assert "日本語" in content["description"]
    assert len(content["description"]) > 5000


def test_a_followed_redirect_is_recorded(xone: Sandbox, client: requests.Session) -> None:
    location = confirm(client, xone, "o-1~redirect").headers["Location"]
    client.post(f"{xone.url}{location}", json=JOB, timeout=10)

    assert ("moved", "moved") in xone.bookings


def test_a_huge_body_is_chunked(xone: Sandbox, client: requests.Session) -> None:
    answer = confirm(client, xone, "o-1~huge")

    assert answer.headers["Transfer-Encoding"] == "chunked"
    assert len(answer.content) > HUGE_BYTES


def test_a_client_may_hang_up_on_a_huge_body(xone: Sandbox) -> None:
    send_confirm(xone, new_token(xone), "o-1~huge").close()

    until(lambda: len(xone.calls) == 1)
    assert xone.calls[0].status is None


@pytest.mark.parametrize("name", ["slow-headers", "drip"])
def test_a_dripped_answer_takes_slow_seconds(xone: Sandbox, name: str) -> None:
    with send_confirm(xone, new_token(xone), f"o-1~{name}") as connection:
        assert b" 201 Created\r\n" in read_head(connection)

    assert xone.calls[0].ended - xone.calls[0].started >= xone.slow_seconds


def test_the_reset_fault_resets_the_connection(xone: Sandbox) -> None:
    with send_confirm(xone, new_token(xone), "o-1~reset-mid") as connection, pytest.raises(ConnectionResetError):
        list(iter(lambda: connection.recv(65536), b""))


def test_a_dropped_connection_ends_without_a_byte(xone: Sandbox) -> None:
    with send_confirm(xone, new_token(xone), "o-1~drop-after") as connection:
        assert connection.recv(65536) == b""


@pytest.mark.parametrize(
    ("offer_id", "statuses"),
    [
        ("o~http-500", [500, 500, 500]),
        ("o~http-500~1", [500, 201, 422]),
        ("o~http-503~2", [503, 503, 201]),
        ("o~html~1", [200, 422, 422]),
        ("o~booked-nowhere~1", [422, 201, 422]),
        ("o~pending", [201, 422, 422]),
        ("o~no-such-fault", [201, 422, 422]),
        ("o~1~http-500~1", [500, 201, 422]),
    ],
)
def test_a_fault_occurs_as_often_as_its_count_says(
    xone: Sandbox, client: requests.Session, offer_id: str, statuses: list[int]
) -> None:
    assert [confirm(client, xone, offer_id).status_code for _ in statuses] == statuses


def test_each_offer_has_its_own_count(xone: Sandbox, client: requests.Session) -> None:
    assert [confirm(client, xone, f"{offer}~busy~1").status_code for offer in "abab"] == [429, 429, 201, 201]


# --- In flight ---


def test_simultaneous_calls_for_one_offer_are_recorded(xone: Sandbox) -> None:
    xone.slow_seconds = 60
    token, start = new_token(xone), threading.Barrier(2)
    connections: list[socket.socket] = []

    def call() -> None:
        start.wait(10)
        connections.append(send_confirm(xone, token, "o-1~slow"))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: xone.overlapping == {("P-1", "o-1~slow")})

    xone.stop()  # ends the wait: one call is answered with the booking, the other with a refusal
    heads = [read_head(connection)[9:12] for connection in connections]
    for connection in connections:
        connection.close()
    assert sorted(heads) == [b"201", b"422"]
    assert len(xone.bookings) == 1


def test_successive_calls_do_not_overlap(xone: Sandbox) -> None:
    token = new_token(xone)
    for _ in range(100):
        with send_confirm(xone, token, "o-1") as connection:
            read_head(connection)

    assert len(xone.calls) == 100
    assert xone.overlapping == set()


def test_an_aborted_call_does_not_overlap_the_next(xone: Sandbox) -> None:
    xone.slow_seconds = 60
    token = new_token(xone)
    given_up = send_confirm(xone, token, "o-1~slow~1")
    until(lambda: bool(xone.bookings))
    given_up.close()
    with send_confirm(xone, token, "o-1~slow~1") as connection:
        assert b" 422 " in read_head(connection)

    until(lambda: len(xone.calls) == 2)
    assert xone.overlapping == set()
    assert {call.status for call in xone.calls} == {422, None}


# --- Switches ---


@pytest.mark.parametrize(
    "send",
    [lambda client, xone: confirm(client, xone, "o-1"), bookings, lambda _client, xone: request_token(xone)],
    ids=["confirm", "bookings", "token"],
)
def test_down_closes_every_connection(
    xone: Sandbox, client: requests.Session, send: Callable[[requests.Session, Sandbox], object]
) -> None:
    xone.down = True
    with pytest.raises(requests.ConnectionError):
        send(client, xone)
    xone.down = False

    assert not xone.calls
    assert confirm(client, xone, "o-1").status_code == 201


def test_a_status_can_be_set_for_all_calls(xone: Sandbox, client: requests.Session) -> None:
    xone.status_for_all = 502

    assert confirm(client, xone, "o-1").status_code == 502
    assert not xone.bookings
    assert [call.status for call in xone.calls] == [502]


def test_the_token_endpoint_can_be_down(xone: Sandbox) -> None:
    xone.token_down = True

    assert request_token(xone).status_code == 503
    assert xone.token_requests == 1


def test_answers_can_be_delayed(xone: Sandbox, client: requests.Session) -> None:
    xone.latency, xone.latency_jitter = 0.05, 0.01
    confirm(client, xone, "o-1")

    assert xone.calls[0].ended - xone.calls[0].started >= 0.05


def test_calls_can_be_limited_by_rate(xone: Sandbox, client: requests.Session) -> None:
    xone.rate = 2
    answers = [confirm(client, xone, f"o-{number}") for number in range(3)]

    assert [answer.status_code for answer in answers] == [201, 201, 429]
    assert answers[2].headers["Retry-After"] == "1"


def test_the_list_can_be_forbidden_failing_or_lagging(xone: Sandbox, client: requests.Session) -> None:
    confirm(client, xone, "o-1")
    xone.bookings_mode = "forbidden"
    assert bookings(client, xone).status_code == 403
    xone.bookings_mode = "failing"
    assert bookings(client, xone).status_code == 503
    xone.bookings_mode = "lagging"
    assert bookings(client, xone).json()["data"] == []
    xone.bookings_lag = 0
    assert len(bookings(client, xone).json()["data"]) == 1
    xone.bookings_mode = "nameless"
    (nameless,) = bookings(client, xone).json()["data"]
    assert "offer_id" not in nameless
    assert nameless["quote"]["uuid"]


def test_an_offer_is_known_by_its_uuid_in_any_form(xone: Sandbox, client: requests.Session) -> None:
    offer = "5c7e1f00-0000-4000-8000-00000000abcd"

    assert confirm(client, xone, offer.upper()).json()["data"]["offer_id"] == offer
    assert confirm(client, xone, offer.replace("-", "")).status_code == 422
    assert list(xone.bookings) == [("P-1", offer)]


def test_the_list_has_pages_and_the_newest_booking_last(xone: Sandbox, client: requests.Session) -> None:
    xone.page_size = 2
    for number in range(5):
        confirm(client, xone, f"o-{number}")
    client.post(f"{xone.url}/api/partners/P-2/offers/other", json=JOB, timeout=10)

    pages = [bookings(client, xone).json()]
    while pages[-1]["links"]["next"]:
        pages.append(client.get(pages[-1]["links"]["next"], timeout=10).json())

    assert [[booking["offer_id"] for booking in page["data"]] for page in pages] == [
        ["o-0", "o-1"],
        ["o-2", "o-3"],
        ["o-4"],
    ]
    assert [page["meta"] for page in pages] == [{"page": page, "pages": 3, "total": 5} for page in (1, 2, 3)]
    assert bookings(client, xone, "?page=9").json()["data"] == []
    assert bookings(client, xone, "?page=none").status_code == 400


def test_an_empty_list_has_one_page(xone: Sandbox, client: requests.Session) -> None:
    empty = {"data": [], "links": {"next": None}, "meta": {"page": 1, "pages": 1, "total": 0}}

    assert bookings(client, xone).json() == empty


def test_switches_can_be_set_over_http_while_down(xone: Sandbox) -> None:
    xone.down = True
    state = requests.post(f"{xone.url}/sandbox/switches", json={"down": False, "rate": 3}, timeout=10).json()

    assert (xone.down, xone.rate) == (False, 3)
    assert state == requests.get(f"{xone.url}/sandbox/state", timeout=10).json()
    assert set(state) == {"bookings", "calls", "overlapping", "double_bookings", "token_requests", "switches"}
    assert set(state["switches"]) == set(SWITCHES)


@pytest.mark.parametrize(
    "values",
    [{}, {"lock": 1}, {"latency": 1, "port": 2}, {"down": 1}, {"latency": -1}, {"rate": 0}, {"status_for_all": 42},
     {"bookings_mode": "off"}, {"page_size": 0}],
)  # fmt: skip
def test_an_unknown_switch_is_refused(xone: Sandbox, values: dict[str, Any]) -> None:
    before = xone.state()

    assert requests.post(f"{xone.url}/sandbox/switches", json=values, timeout=10).status_code == 400
    assert xone.state() == before


# --- Start and stop, the page ---


def test_stop_frees_the_port_and_ends_kept_connections(xone: Sandbox, client: requests.Session) -> None:
    confirm(client, xone, "o-1")
    port = xone.port
    xone.stop()
    with pytest.raises(requests.ConnectionError):
        confirm(client, xone, "o-2")

    xone.start()
    assert xone.port == port
    assert confirm(client, xone, "o-2").status_code == 201


def test_the_page_shows_faults_switches_and_bookings_without_personal_data(
    xone: Sandbox, client: requests.Session
) -> None:
    confirm(client, xone, "%3Cscript%3E")
    page = requests.get(xone.url, timeout=10)

    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert all(f"demo-1~{name.replace('NNN', '500')}" in page.text for name in FAULTS)
    assert all(f"<code>{name}</code>" in page.text for name in SWITCHES)
    assert f"XONE_BASE_URL={xone.url}" in page.text
    assert xone.bookings["P-1", "<script>"]["id"] in page.text
    assert "&lt;script&gt;" in page.text
    assert "<script>" not in page.text
    assert "Somerset" not in page.text


def test_other_paths_are_not_found(xone: Sandbox) -> None:
    assert requests.get(f"{xone.url}/favicon.ico", timeout=10).status_code == 404
